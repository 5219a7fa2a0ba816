"""``encode``: what the build machine asks an encoder's runtime, through two JSON files.

Input: {"run": the manifest's run object with absolute paths, "texts": [str, …]}. Output: {"ids": [ids, …], "outputs":
[[float, …], …], "engine": version}: token ids, and the vector or the logits of each text. Texts are truncated as the
model's own library does and computed in batches, padding and all, as the server computes them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtimes.encoding import Encoder
from runtimes.engine import EngineError
from runtimes.engines import module
from runtimes.manifest import ManifestError, parse_run

UNUSABLE, FAILED = 3, 1


def main(argv: Sequence[str]) -> int:
    """Exit codes: 0 done, 1 the engine failed, 3 the input is unusable."""
    parser = argparse.ArgumentParser(prog="python -m runtimes encode", description=__doc__.partition("\n\n")[2])
    parser.add_argument("--input", type=Path, required=True, help="JSON file with the texts")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args(argv)
    try:
        question = json.loads(options.input.read_text(encoding="utf-8"))
        run = parse_run(question.get("run"))
        answer = encode(module(run.engine).load(run, verbose=False), question["texts"])
        temporary = options.output.with_name(options.output.name + ".part")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(answer, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(options.output)
    except EngineError as error:
        sys.stderr.write(f"encode: {error}\n")
        return FAILED
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ManifestError) as error:
        sys.stderr.write(f"encode: {type(error).__name__}: {error}\n")
        return UNUSABLE
    return 0


def encode(engine: Encoder, texts: Sequence[str]) -> dict[str, Any]:
    """All texts in batches of ``engine.slots``, in their order."""
    read = [engine.reader.read(text, truncate=True) for text in texts]
    outputs: list[list[float]] = []
    for start in range(0, len(read), engine.slots):
        outputs += [[float(value) for value in row] for row in engine.compute(read[start : start + engine.slots])]
        sys.stderr.write(json.dumps({"done": len(outputs), "total": len(read)}) + "\n")
        sys.stderr.flush()
    return {"ids": [list(text.ids) for text in read], "outputs": outputs, "engine": engine.version}
