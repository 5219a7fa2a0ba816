"""``encode``: an encoder's outputs in the shipped runtime, for the build machine, through two JSON files.

Input: {"run": the manifest's run object with absolute paths, "texts": [str, …]}. Output: {"ids": [ids, …], "outputs":
[[float, …], …], "engine": version}: token ids, and the vector or the logits of each text. Texts are truncated as the
model's own library does, and computed in padded batches, as the server does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from runtimes.engines.encoder import Encoder
from runtimes.engines.registry import module
from runtimes.evaluate.json_files import progress, run_json_verb
from runtimes.manifest import Run


def main(argv: Sequence[str]) -> int:
    """Exit codes: see run_json_verb."""
    return run_json_verb("encode", __doc__.partition("\n\n")[2], argv, answer)


def answer(run: Run, question: dict[str, Any], verbose: bool = False) -> dict[str, Any]:
    """The outputs of the run's engine for the question's texts."""
    return encode(module(run.engine).load(run, verbose=verbose), question["texts"])


def encode(engine: Encoder, texts: Sequence[str]) -> dict[str, Any]:
    """All texts in batches of ``engine.slots``, in their order."""
    tokenized = [engine.reader.read(text, truncate=True) for text in texts]
    outputs: list[list[float]] = []
    for start in range(0, len(tokenized), engine.slots):
        outputs += [[float(value) for value in row] for row in engine.compute(tokenized[start : start + engine.slots])]
        progress(len(outputs), len(tokenized))
    return {"ids": [list(text.ids) for text in tokenized], "outputs": outputs, "engine": engine.version}
