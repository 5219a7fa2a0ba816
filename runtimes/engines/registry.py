"""The engine that a manifest names: one module of this folder, of which a bundle carries only its own.

A module that serves in this process offers ``load(run, verbose=...)`` (an Engine) and ``open_scorer(run, ...)`` (a
Scorer). ``APP`` names the module of runtimes/server/ that serves it, where that is not ``chat_app``: it has
``open_service`` and ``make_app``. One that starts an outside server instead offers ``serve(run, options)``, which gives
the exit code.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Protocol

from runtimes.manifest import ManifestError, Run

MODULES = {
    "llamacpp": "llamacpp.engine",
    "ort": "onnxruntime.cpu",
    "ort_cuda": "onnxruntime.cuda",
    "transformers": "transformers.engine",
    "vllm": "vllm",
    "edgellm": "edge_llm",
    "ort_encoder": "onnxruntime.encoder",
    "tensorrt": "tensorrt.encoder",
    "tensorrt_decoder": "tensorrt.decoder",
}


class Scorer(Protocol):
    """A model opened for scoring alone."""

    version: str

    def top(self, ids: Sequence[int], positions: Sequence[int], top: int) -> Iterator[tuple[int, Mapping[int, float]]]:
        """For each position p, ascending: p and the ``top`` likeliest tokens after ids[:p], with log-probabilities
        (natural, softmax over the whole vocabulary), likeliest first.
        """
        ...

    def tokenize(self, text: str) -> list[int]:
        """The artifact's own tokenizer: special tokens recognised, none added."""
        ...


class OpenScorer(Protocol):
    """What an engine's module calls ``open_scorer``."""

    def __call__(
        self, run: Run, *, longest: int, max_rss_bytes: int | None, verbose: bool
    ) -> AbstractContextManager[Scorer]:
        """longest: tokens of the longest sequence. max_rss_bytes: resident memory to stay near, where the engine can.
        Raises EngineError when the model does not load.
        """
        ...


def module(name: str) -> ModuleType:
    """The module of an engine. Raises ManifestError with one sentence for one that this bundle does not carry."""
    if name in MODULES:
        path = f"runtimes.engines.{MODULES[name]}"
        try:
            return importlib.import_module(path)
        except ModuleNotFoundError as error:
            # the engine's module or its folder is not in this bundle; anything else that is missing is another fault
            if error.name is None or not f"{path}.".startswith(f"{error.name}."):
                raise
    raise ManifestError(f"This runtime has no engine {name!r}; it knows {', '.join(MODULES)}.")


def scorer(name: str) -> OpenScorer:
    """How an engine is opened for scoring. Raises ManifestError."""
    found = getattr(module(name), "open_scorer", None)
    if found is None:
        raise ManifestError(f"The engine {name!r} cannot be scored here.")
    opened: OpenScorer = found
    return opened


COMPILED = ("tensorrt", "tensorrt_decoder")  # engines that bin/engine tells of and makes again
