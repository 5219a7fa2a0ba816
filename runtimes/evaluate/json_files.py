"""The verbs for the build machine read a question from one JSON file and write the answer to another."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from runtimes.engine import EngineError
from runtimes.files import write_atomically
from runtimes.manifest import ManifestError, Run, parse_run

FAILED, UNUSABLE = 1, 3


def run_json_verb(
    verb: str, about: str, argv: Sequence[str], answer: Callable[[Run, dict[str, Any], bool], dict[str, Any]]
) -> int:
    """Read the question, compute the answer, and write it atomically. Returns the exit code: 0 done, 1 the engine
    failed, 3 the input is unusable.

    answer: called with the run, the question, and whether to show the engine's log.
    """
    parser = argparse.ArgumentParser(prog=f"python -m runtimes {verb}", description=about)
    parser.add_argument("--input", type=Path, required=True, help="JSON file with the question")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--verbose", action="store_true", help="show the engine's own log")
    options = parser.parse_args(argv)
    try:
        question = json.loads(options.input.read_text(encoding="utf-8"))
        answered = answer(parse_run(question.get("run")), question, options.verbose)
        write_atomically(options.output, json.dumps(answered).encode())
    except EngineError as error:
        sys.stderr.write(f"{verb}: {error}\n")
        return FAILED
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ManifestError) as error:
        sys.stderr.write(f"{verb}: {type(error).__name__}: {error}\n")
        return UNUSABLE
    return 0


def progress(done: int, total: int) -> None:
    """Write one line of JSON to standard error, which the build machine shows as progress."""
    sys.stderr.write(json.dumps({"done": done, "total": total}) + "\n")
    sys.stderr.flush()
