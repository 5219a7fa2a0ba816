"""``answer``: greedy answers to given prompts, for the build machine, through two JSON files.

Input: {"run", "prompts": [{"ids": [...], "max_tokens": n}, …]}. Output: {"answers": [{"ids", "finish"}, …], "engine"};
ids hold every token, with the end token where the model generated one; finish is "stop" or "length".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from runtimes.engine import Engine, Sampling
from runtimes.engines.registry import module
from runtimes.evaluate.json_files import progress, run_json_verb
from runtimes.manifest import Run


def main(argv: Sequence[str]) -> int:
    """Exit codes: see run_json_verb."""
    return run_json_verb("answer", __doc__.partition("\n\n")[0], argv, answer)


def answer(run: Run, question: dict[str, Any], verbose: bool = False) -> dict[str, Any]:
    """Answers one after the other, at temperature 0 and without penalties, up to max_tokens each. Resident memory stays
    near ``max_rss_bytes`` when the question has it and the engine maps its weights. Raises EngineError.
    """
    engine_module = module(run.engine)
    within = getattr(engine_module, "load_within", None)
    if within is None:
        return _answers(engine_module.load(run, verbose=verbose), question["prompts"])
    with within(run, question.get("max_rss_bytes"), verbose=verbose) as engine:
        return _answers(engine, question["prompts"])


def _answers(engine: Engine, prompts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    answers = []
    try:
        for done, prompt in enumerate(prompts, 1):
            sampling = Sampling(temperature=0.0, max_tokens=int(prompt["max_tokens"]), exact_ids=True)
            pieces = list(engine.generate(prompt["ids"], sampling))
            ids = [token for piece in pieces for token in piece.ids]
            answers.append({"ids": ids, "finish": pieces[-1].finish if pieces else None})
            progress(done, len(prompts))
    finally:
        engine.close()
    return {"answers": answers, "engine": engine.version}
