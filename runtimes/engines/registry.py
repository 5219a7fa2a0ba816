"""The engine that a manifest names: one module of this folder, of which a bundle carries only its own.

A module that serves in this process offers ``load(run, verbose=...)`` (an Engine) and ``open_scorer(run, ...)`` (a
Scorer). ``FACE`` names the module of its HTTP face where that is not ``app`` (chat): it has ``open_service`` and
``make_app``. One that starts an outside server instead offers ``serve(run, options)``, which gives the exit code.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Protocol

from runtimes.manifest import ManifestError, Run

MODULES = {
    "llamacpp": "llamacpp",
    "ort": "ort",
    "ort_cuda": "ort_cuda",
    "transformers": "transformers_",
    "vllm": "vllm_",
    "edgellm": "edgellm_",
    "ort_encoder": "ort_encoder",
    "tensorrt": "tensorrt_",
    "tensorrt_decoder": "tensorrt_decoder",
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
        try:
            return importlib.import_module(f"runtimes.{MODULES[name]}")
        except ModuleNotFoundError as error:
            if error.name != f"runtimes.{MODULES[name]}":
                raise
    raise ManifestError(f"This runtime has no engine {name!r}; it knows {', '.join(MODULES)}.")


def scorer(name: str) -> OpenScorer:
    """How an engine is opened for scoring. Raises ManifestError."""
    found = getattr(module(name), "open_scorer", None)
    if found is None:
        raise ManifestError(f"The engine {name!r} cannot be scored here.")
    opened: OpenScorer = found
    return opened
