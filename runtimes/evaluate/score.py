"""``score``: next-token distributions of the shipped runtime, for the build machine, through two JSON files.

The likeliest next tokens after given positions of given token sequences, with their log-probabilities in the model's
own distribution, before any sampling filter. Each sequence is computed once, in chunks of one size, so the same input
gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from runtimes.engines.registry import scorer
from runtimes.evaluate.json_files import progress, run_json_verb
from runtimes.manifest import Run


def main(argv: Sequence[str]) -> int:
    """Exit codes: see run_json_verb."""
    return run_json_verb("score", __doc__.partition("\n\n")[2], argv, score)


def score(run: Run, question: dict[str, Any], verbose: bool = False) -> dict[str, Any]:
    """Score every position of every sequence; resident memory stays near ``max_rss_bytes`` when that is given."""
    top, sequences = int(question.get("top", 64)), question.get("sequences") or []
    ceiling = question.get("max_rss_bytes")
    longest = max([len(sequence["ids"]) for sequence in sequences], default=0)
    total = sum(len(set(sequence["positions"])) for sequence in sequences)
    scored, done = [], 0
    with scorer(run.engine)(run, longest=longest, max_rss_bytes=ceiling, verbose=verbose) as engine:
        tokenized = [engine.tokenize(text) for text in question.get("tokenize") or []]
        # an engine with a tokenizer in the artifact reports which of the ids end an answer
        vocabulary = engine.vocabulary(run.stop_ids) if hasattr(engine, "vocabulary") else None
        for sequence in sequences:
            rows: dict[int, Mapping[int, float]] = {}
            for position, row in engine.top(sequence["ids"], sequence["positions"], top):
                rows[position] = row
                done += 1
                if done == total or done % 16 == 0:
                    progress(done, total)
            likeliest = [rows[position] for position in sequence["positions"]]
            scored.append(
                {
                    "positions": list(sequence["positions"]),
                    "ids": [list(row) for row in likeliest],
                    "logprobs": [list(row.values()) for row in likeliest],
                }
            )
    return {"sequences": scored, "tokenized": tokenized, "vocabulary": vocabulary, "engine": engine.version}
