"""The engines by their names in the manifest: one module each; a bundle carries only its own.

A module that serves in this process has ``load(run, verbose=...)`` (an Engine) and ``open_scorer(run, ...)`` (a
Scorer). ``APP`` names the module of runtimes/server/ that serves it, where that is not ``chat_app``; such a module has
``open_service`` and ``make_app``. A module that starts another server has ``serve(run, options)`` instead, which
returns the exit code.
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
    """The type of ``open_scorer`` in an engine's module."""

    def __call__(
        self, run: Run, *, longest: int, max_rss_bytes: int | None, verbose: bool
    ) -> AbstractContextManager[Scorer]:
        """longest: tokens of the longest sequence. max_rss_bytes: resident memory not to exceed by much, where the
        engine can. Raises EngineError when the model does not load.
        """
        ...


def module(name: str) -> ModuleType:
    """The module of an engine. Raises ManifestError with one sentence when this bundle does not carry it."""
    if name in MODULES:
        path = f"runtimes.engines.{MODULES[name]}"
        try:
            return importlib.import_module(path)
        except ModuleNotFoundError as error:
            # only the engine's own module or folder may be missing from a bundle; another missing module is a defect
            if error.name is None or not f"{path}.".startswith(f"{error.name}."):
                raise
    raise ManifestError(f"This runtime has no engine {name!r}; it has {', '.join(MODULES)}.")


def scorer(name: str) -> OpenScorer:
    """The ``open_scorer`` of an engine. Raises ManifestError for an engine without one."""
    open_scorer: OpenScorer | None = getattr(module(name), "open_scorer", None)
    if open_scorer is None:
        raise ManifestError(f"The engine {name!r} cannot be scored here.")
    return open_scorer


COMPILED = ("tensorrt", "tensorrt_decoder")  # engines that the box builds, with bin/engine
