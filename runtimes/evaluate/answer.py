"""``answer``: greedy answers to given prompts, for the build machine, through two JSON files.

Input: {"run", "prompts": [{"ids": [...], "max_tokens": n}, …]}. Output: {"answers": [{"ids", "finish"}, …], "engine"};
ids hold every token, the end token included where the model wrote one, and finish is "stop" or "length".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from runtimes.engine import Engine, Sampling
from runtimes.engines.registry import module
from runtimes.evaluate.json_files import exchange, progress
from runtimes.manifest import Run


def main(argv: Sequence[str]) -> int:
    """Exit codes: see exchange."""
    return exchange("answer", __doc__.partition("\n\n")[0], argv, answer)


def answer(run: Run, question: dict[str, Any], verbose: bool = False) -> dict[str, Any]:
    """One answer after the other, at temperature 0 and without a penalty, as long as max_tokens allows. Resident memory
    stays near ``max_rss_bytes`` when that is given and the engine maps its weights.
    """
    opened = module(run.engine)
    within = getattr(opened, "load_within", None)
    if within is None:
        return _ask(opened.load(run, verbose=verbose), question["prompts"])
    with within(run, question.get("max_rss_bytes"), verbose=verbose) as engine:
        return _ask(engine, question["prompts"])


def _ask(engine: Engine, prompts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found = []
    try:
        for done, prompt in enumerate(prompts, 1):
            sampling = Sampling(temperature=0.0, max_tokens=int(prompt["max_tokens"]), exact_ids=True)
            pieces = list(engine.generate(prompt["ids"], sampling))
            ids = [token for piece in pieces for token in piece.ids]
            found.append({"ids": ids, "finish": pieces[-1].finish if pieces else None})
            progress(done, len(prompts))
    finally:
        engine.close()
    return {"answers": found, "engine": engine.version}
