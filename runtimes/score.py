"""``score`` and ``render``: what the build machine asks the runtime that ships, through two JSON files.

score: the likeliest next tokens after given positions of given token sequences, with their log-probabilities in the
model's own distribution (no sampling filter touches them). render: conversations to the ids that the server feeds.
Each sequence is computed once, in pieces of one size, so the same input gives the same numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from runtimes.engine import EngineError
from runtimes.engines import scorer
from runtimes.manifest import ManifestError, Run, parse_run

UNUSABLE, FAILED = 3, 1


def main(argv: Sequence[str], verb: str = "score") -> int:
    """Run score or render. Exit codes: 0 done, 1 the engine failed, 3 the input is unusable."""
    parser = argparse.ArgumentParser(prog=f"python -m runtimes {verb}", description=__doc__.partition("\n\n")[2])
    parser.add_argument("--input", type=Path, required=True, help="JSON file with the questions")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--verbose", action="store_true", help="show the engine's own log")
    options = parser.parse_args(argv)
    try:
        question = json.loads(options.input.read_text(encoding="utf-8"))
        run = parse_run(question.get("run"))
        answer = score(run, question, options.verbose) if verb == "score" else render(run, question)
        write(options.output, answer)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ManifestError) as error:
        sys.stderr.write(f"{verb}: {type(error).__name__}: {error}\n")
        return UNUSABLE
    except EngineError as error:
        sys.stderr.write(f"{error}\n")
        return FAILED
    return 0


def render(run: Run, question: dict[str, Any]) -> dict[str, Any]:
    """Each conversation's text and ids, exactly as the server would feed them on the first day of 2026: a template that
    writes the date must not make two builds differ.
    """
    from runtimes.chat import Prompts, TemplateRefused

    prompts = Prompts(run, now=lambda: datetime(2026, 1, 1))
    try:
        texts = [prompts.render(conversation) for conversation in question["conversations"]]
    except TemplateRefused as error:
        raise ValueError(f"the chat template refuses a conversation: {error}") from None
    return {"ids": [prompts.encode(text) for text in texts], "texts": texts}


def score(run: Run, question: dict[str, Any], verbose: bool = False) -> dict[str, Any]:
    """Score every position of every sequence; resident memory stays near ``max_rss_bytes`` when that is given."""
    top, sequences = int(question.get("top", 64)), question.get("sequences") or []
    ceiling = question.get("max_rss_bytes")
    longest = max([len(sequence["ids"]) for sequence in sequences], default=0)
    total = sum(len(set(sequence["positions"])) for sequence in sequences)
    scored, done = [], 0
    with scorer(run.engine)(run, longest=longest, max_rss_bytes=ceiling, verbose=verbose) as engine:
        tokenized = [engine.tokenize(text) for text in question.get("tokenize") or []]
        # an engine that reads tokens out of the artifact itself says what it makes of their ends
        vocabulary = engine.vocabulary(run.stop_ids) if hasattr(engine, "vocabulary") else None
        for sequence in sequences:
            rows: dict[int, Mapping[int, float]] = {}
            for position, row in engine.top(sequence["ids"], sequence["positions"], top):
                rows[position] = row
                done += 1
                _progress(done, total)
            found = [rows[position] for position in sequence["positions"]]
            scored.append(
                {
                    "positions": list(sequence["positions"]),
                    "ids": [list(row) for row in found],
                    "logprobs": [list(row.values()) for row in found],
                }
            )
    return {"sequences": scored, "tokenized": tokenized, "vocabulary": vocabulary, "engine": engine.version}


def _progress(done: int, total: int) -> None:
    if done == total or done % 16 == 0:
        sys.stderr.write(json.dumps({"done": done, "total": total}) + "\n")
        sys.stderr.flush()


def write(path: Path, value: Any) -> None:
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
