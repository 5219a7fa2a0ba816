"""The texts of an encoder's comparison, and the outputs of transformers and of the bundle's runtime for them.

The texts are the package's own (packager/prompts/data/sentences.json: short and long, several languages, code, pairs
with the same meaning) and the user's from --calibration.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from packager.core.errors import GateFailed, InputError
from packager.core.processes import WORKERS, follow, version_of
from packager.core.store import digest_of
from packager.fidelity.artifact import runtime_copy
from packager.metrics.encoders import Score, compare_labels, compare_vectors
from packager.prompts.calibration import DATA, Calibration

if TYPE_CHECKING:
    from packager.checkpoint.encoder import EncoderFacts
    from packager.core.store import Cost, Step
    from packager.recipe import Job, Run

CHILD = WORKERS / "encode.py"
OWN_TEXTS = 256  # of the user's file, evenly spaced


@dataclass(frozen=True)
class Texts:
    """sets: "general" and "tuning" (the user's own) -> indices in ``all``. truth: label ids, None when not known."""

    all: tuple[str, ...]
    sets: Mapping[str, range]
    truth: tuple[int | None, ...]

    @property
    def digest(self) -> str:
        return digest_of([list(self.all), list(self.truth)])[:40]


@dataclass(frozen=True)
class Encoded:
    """ids: token ids of each text. outputs: its vector, or a classifier's logits."""

    ids: list[list[int]]
    outputs: list[list[float]]


def make_texts(own: Calibration | None, labels: Sequence[str]) -> Texts:
    """The texts to compare on. labels: a classifier's, else none. Raises InputError for an unknown label."""
    general = json.loads((DATA / "sentences.json").read_text(encoding="utf-8"))
    mine = _own(own, labels) if own else []
    chosen = [mine[place * len(mine) // OWN_TEXTS] for place in range(OWN_TEXTS)] if len(mine) > OWN_TEXTS else mine
    return Texts(
        all=(*general, *(text for text, _ in chosen)),
        sets={"general": range(len(general)), "tuning": range(len(general), len(general) + len(chosen))},
        truth=(*([None] * len(general)), *(label for _, label in chosen)),
    )


def _own(own: Calibration, labels: Sequence[str]) -> list[tuple[str, int | None]]:
    """(text, label id) for each text of the user's file. A plain text file has one text on each line."""
    pairs: list[tuple[str, int | None]] = []
    marks = own.labels or (None,) * len(own.texts)
    for text, mark in zip(own.texts, marks, strict=True):
        label = None if mark is None or not labels else _label_id(mark, labels, own.name)
        parts = [text] if mark is not None else text.splitlines()
        pairs += [(part.strip(), label) for part in parts if part.strip()]
    pairs += [(turn["content"], None) for talk in own.conversations for turn in talk if turn["content"].strip()]
    return pairs


def _label_id(mark: str, labels: Sequence[str], name: str) -> int:
    if mark in labels:
        return list(labels).index(mark)
    if mark.isascii() and mark.isdigit() and int(mark) < len(labels):
        return int(mark)
    raise InputError(
        f"{name} has the label {mark!r}, which this classifier does not know.",
        why=f"Its labels are {', '.join(labels)} (or their numbers from 0).",
        fix="Correct the label, or id2label in config.json.",
    )


def source_outputs(job: Job, facts: EncoderFacts, texts: Texts) -> tuple[Encoded, Step]:
    """The outputs of transformers in float32, once."""

    def make(folder: Path, cost: Cost) -> None:
        settings = {
            "checkpoint": str(job.checkpoint.path),
            "texts": list(texts.all),
            "classify": facts.task == "classify",
            "max_length": facts.max_length,
            "pooling": facts.pooling,
            "normalize": facts.normalize,
            "lower_case": facts.lower_case,
            "prompt": facts.prompt,
            "threads": os.cpu_count() or 1,
            "output": str(folder / "encoded.json"),
        }
        count = float(len(texts.all))
        name = "encoding with the source (float32)"
        follow(
            CHILD,
            settings,
            name,
            job.progress,
            cost,
            work=folder,
            total=count,
            unit="texts",
            path=[WORKERS.parent.parent],
        )

    inputs = {
        "checkpoint": job.checkpoint.digest,
        "texts": texts.digest,
        "settings": {**facts.settings(), "max_length": facts.max_length},
    }
    step = job.store.step("encoded-source", inputs, make, progress=job.progress)
    return Encoded(**step.read_json("encoded.json")), step


def shipped_outputs(job: Job, run: Run, texts: Texts, *, what: str, model: str) -> tuple[Encoded, Step]:
    """The outputs of the bundle's runtime. run: with absolute paths. what: the form in a sentence. model: its key."""
    runtime = runtime_copy(job, run.engine)
    plain = run.as_dict()

    def make(folder: Path, cost: Cost) -> None:
        follow(
            "runtimes",
            {"run": plain, "texts": list(texts.all)},
            f"encoding with {what}",
            job.progress,
            cost,
            work=folder,
            total=float(len(texts.all)),
            unit="texts",
            path=[runtime.path],
            arguments=["encode", "--input", "{job}", "--output", folder / "encoded.json"],
        )

    settings = {key: value for key, value in plain.items() if key not in ("model", "tokenizer")}
    inputs = {
        "model": model,
        "run": settings,
        "texts": texts.digest,
        "runtime": runtime.key,
        "engine": version_of("onnxruntime"),
    }
    step = job.store.step("encoded", inputs, make, progress=job.progress)
    encoded = step.read_json("encoded.json")
    return Encoded(encoded["ids"], encoded["outputs"]), step


def require_same_ids(texts: Texts, source: Encoded, artifact: Encoded) -> None:
    """Raise GateFailed at the first text that the box tokenizes differently from transformers."""
    for text, expected, got in zip(texts.all, source.ids, artifact.ids, strict=True):
        if expected != got:
            place = next(
                (number for number, (one, other) in enumerate(zip(expected, got, strict=False)) if one != other),
                min(len(expected), len(got)),
            )
            raise GateFailed(
                f"The box tokenizes {text[:60]!r} differently from transformers, first at token {place}: "
                f"{expected[place : place + 3]} in transformers, {got[place : place + 3]} on the box.",
                why="tokenizer.json and tokenizer_config.json disagree (casing, special tokens or the longest text).",
                fix="Save the tokenizer again with save_pretrained from the library it was trained with.",
            )


def compare(facts: EncoderFacts, texts: Texts, source: Encoded, artifact: Encoded) -> dict[str, Score | None]:
    """A score for each set of texts; None for an empty one."""

    def score(places: range) -> Score | None:
        if not places:
            return None
        one, other = ([side.outputs[place] for place in places] for side in (source, artifact))
        if facts.task == "embed":
            return compare_vectors(one, other)
        truth = [texts.truth[place] for place in places]
        return compare_labels(one, other, truth, several=facts.scores == "sigmoid")

    return {name: score(places) for name, places in texts.sets.items()}
