"""``answer``: greedy answers to given prompts, for the build machine, through two JSON files.

Input: {"run", "prompts": [{"ids": [...], "max_tokens": n}, …]}. Output: {"answers": [{"ids", "finish"}, …], "engine"};
ids hold every token, the end token included where the model wrote one, and finish is "stop" or "length".
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtimes.engine import Engine, EngineError, Sampling
from runtimes.engines import module
from runtimes.manifest import ManifestError, Run, parse_run
from runtimes.score import FAILED, UNUSABLE, write


def main(argv: Sequence[str]) -> int:
    """Exit codes: 0 done, 1 the engine failed, 3 the input is unusable."""
    parser = argparse.ArgumentParser(prog="python -m runtimes answer", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--input", type=Path, required=True, help="JSON file with the prompts")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--verbose", action="store_true", help="show the engine's own log")
    options = parser.parse_args(argv)
    try:
        question = json.loads(options.input.read_text(encoding="utf-8"))
        write(options.output, answer(parse_run(question.get("run")), question, options.verbose))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ManifestError) as error:
        sys.stderr.write(f"answer: {type(error).__name__}: {error}\n")
        return UNUSABLE
    except EngineError as error:
        sys.stderr.write(f"{error}\n")
        return FAILED
    return 0


def answer(run: Run, question: dict[str, Any], verbose: bool = False) -> dict[str, Any]:
    """One answer after the other, at temperature 0 and without a penalty, as long as max_tokens allows."""
    prompts = question["prompts"]
    engine: Engine = module(run.engine).load(run, verbose=verbose)
    found = []
    try:
        for done, prompt in enumerate(prompts, 1):
            sampling = Sampling(temperature=0.0, max_tokens=int(prompt["max_tokens"]), exact_ids=True)
            pieces = list(engine.generate(prompt["ids"], sampling))
            ids = [token for piece in pieces for token in piece.ids]
            found.append({"ids": ids, "finish": pieces[-1].finish if pieces else None})
            sys.stderr.write(json.dumps({"done": done, "total": len(prompts)}) + "\n")
            sys.stderr.flush()
    finally:
        engine.close()
    return {"answers": found, "engine": engine.version}
