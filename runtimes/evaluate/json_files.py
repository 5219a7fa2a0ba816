"""What the build machine asks of a runtime goes through two JSON files: one question in, one answer out."""

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


def exchange(
    verb: str, about: str, argv: Sequence[str], answer: Callable[[Run, dict[str, Any], bool], dict[str, Any]]
) -> int:
    """Read the question and its ``run``, answer, and write the answer whole or not at all.

    answer: called with the run, the question and whether the engine's own log is wanted. Exit codes: 0 done, 1 the
    engine failed, 3 the input is unusable.
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
    """One line of JSON on standard error, which the build machine turns into its progress."""
    sys.stderr.write(json.dumps({"done": done, "total": total}) + "\n")
    sys.stderr.flush()
