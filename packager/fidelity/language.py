"""Checks that the source knows the language of the calibration text.

Tuning and importance matrices fit the quantized model to the calibration text. Text that the model was not trained on
(another language, noise, a tokenizer that falls back to bytes) costs fidelity.

The measure needs no table of languages: the source's loss per character, divided by the order-0 entropy of the text's
characters (Shannon 1948). Above 1 the model predicts the text worse than character frequencies do.
SmolLM2-135M-Instruct (benchmarks/known_text.py): code 0.08, English 0.36, German and Russian 0.66 to 0.69; Thai 1.01,
Chinese 1.26, Korean 1.31, Japanese 1.34, random letters 1.36.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from packager.core.errors import GateFailed

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from packager.fidelity.samples import Samples
    from packager.recipe import Job

WORST = 1.0
FEW = 100  # characters; a shorter text is not judged
KINDS = {"text": "its text", "tuning": "the answers of its pairs"}


@dataclass(frozen=True)
class Known:
    """loss: the source's nats per character. counted: the order-0 entropy of the characters, nats per character."""

    characters: int
    loss: float
    counted: float

    @property
    def ratio(self) -> float:
        """loss / counted; 0 for a text of one repeated character, whose entropy is 0."""
        return self.loss / self.counted if self.counted > 0 else 0.0


def surprise(row: Mapping[int, float], token: int, vocabulary: int) -> float:
    """Nats of a token under a distribution of which only the best tokens are known. A token outside them has an equal
    share of the remaining probability, and at most that of the least likely one.
    """
    if token in row:
        return -row[token]
    left = max(1.0 - math.fsum(math.exp(value) for value in row.values()), 1e-12)
    return -min(min(row.values()), math.log(left / max(vocabulary - len(row), 1)))


def measure(text: str, losses: Sequence[float]) -> Known:
    """Loss and entropy of a text per character. losses: nats of every token of the text."""
    counts = Counter(text)
    counted = -math.fsum(n / len(text) * math.log(n / len(text)) for n in counts.values()) if text else 0.0
    return Known(len(text), math.fsum(losses) / max(len(text), 1), counted)


def require_known(
    job: Job,
    samples: Samples,
    rows: Sequence[Mapping[int, float]],
    judged: Sequence[Mapping[int, float]],
) -> dict[str, Known]:
    """Raise GateFailed when the source does not know the language of the user's calibration; returns the measurements,
    for "text" and "tuning" (the pairs' answers).

    rows: the source's distributions at the positions of samples.sequences. judged: at every position but the first of
    samples.judged.
    """
    if job.calibration is None:
        return {}
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(job.checkpoint.path / "tokenizer.json"))
    stops = set(job.checkpoint.tokenizer.stop_ids)
    tuning: list[tuple[int, Mapping[int, float]]] = []
    place = 0
    texts: dict[str, list[str]] = {"text": [], "tuning": []}
    for sequence in samples.sequences:
        positions = sequence["positions"]
        if sequence["set"] == "tuning":
            ids = [sequence["ids"][p] for p in positions]
            tuning += [pair for pair in zip(ids, rows[place : place + len(ids)], strict=True) if pair[0] not in stops]
            texts["tuning"].append(_decoded(tokenizer, [token for token in ids if token not in stops]))
        place += len(positions)
    plain: list[tuple[int, Mapping[int, float]]] = []
    place = 0
    for ids in samples.judged:
        plain += zip(ids[1:], judged[place : place + len(ids) - 1], strict=True)
        texts["text"].append(_decoded(tokenizer, ids))
        place += len(ids) - 1
    vocabulary = job.checkpoint.shape.vocab
    measured: dict[str, Known] = {}
    for kind, pairs in (("text", plain), ("tuning", tuning)):
        known = measure("".join(texts[kind]), [surprise(row, token, vocabulary) for token, row in pairs])
        if known.characters < FEW:
            continue
        measured[kind] = known
        if known.ratio > WORST and not job.trust_calibration:
            raise GateFailed(
                f"the model does not know the language of the calibration file {job.calibration.name}: it predicts "
                f"{KINDS[kind]} worse than counting its characters would ({known.loss:.2f} against {known.counted:.2f} "
                f"nats a character, {known.characters} characters).",
                why="Tuning on text that the model was not trained on costs fidelity.",
                fix="Give the fine-tuning pairs, or text in the model's own languages; --trust-calibration uses it "
                "anyway.",
            )
    return measured


def _decoded(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False))
