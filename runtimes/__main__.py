"""``python -m runtimes VERB``: each verb is one module, which is imported only for that verb."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

VERBS = {
    "check": ("preflight.check", "does this box fit the bundle? one sentence if it does not"),
    "serve": ("server.serve", "answer over HTTP: OpenAI API, /predict, /docs, /health, /metrics; /answer or /classify"),
    "bench": ("bench.llm", "measure latency, memory and throughput on this box"),
    "engine": (
        "engines.tensorrt.command",
        "build, show or clear the engine that this box builds from a TensorRT bundle",
    ),
    "score": ("evaluate.score", "log-probabilities of given token sequences, for the fidelity gate"),
    "encode": ("evaluate.encode", "vectors or logits of given texts, for the fidelity gate of encoders"),
    "answer": ("evaluate.answer", "greedy answers to given prompts, for the fidelity report"),
    "render": ("evaluate.render", "conversations to the token ids that the server feeds the model"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code. Everything after the verb belongs to the verb's own parser."""
    listing = "\n".join(f"  {verb:8}{text}" for verb, (_, text) in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="python -m runtimes",
        description="Runs a packaged model on this box.",
        epilog=f"verbs:\n{listing}\n\n'python -m runtimes VERB --help' shows a verb's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=list(VERBS), metavar="VERB", help=", ".join(VERBS))
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    module = importlib.import_module(f"runtimes.{VERBS[arguments.verb][0]}")
    return int(module.main(arguments.rest))


if __name__ == "__main__":
    sys.exit(main())
