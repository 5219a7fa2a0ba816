"""ONNX decoders on the CPU with onnxruntime, without torch; runtimes/decoding/scheduler.py batches the slots."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from runtimes.decoding.scheduler import Scheduler, Scorer
from runtimes.manifest import Run

if TYPE_CHECKING:
    from runtimes.engines.onnxruntime.decoder import Model


@contextlib.contextmanager
def open_scorer(run: Run, *, longest: int, max_rss_bytes: int | None, verbose: bool) -> Iterator[Scorer]:
    """A Scorer for sequences of up to ``longest`` tokens. onnxruntime repacks weights into its own memory, so
    max_rss_bytes has no effect. Raises EngineError.
    """
    yield Scorer(run, _open(run, context=max(longest, 1), slots=1, verbose=verbose))


def _open(run: Run, *, context: int, slots: int, verbose: bool) -> Model:
    from runtimes.engines.onnxruntime.decoder import Model

    optimized = bool(run.settings.get("optimized", True))
    return Model(run.model, context=context, slots=slots, threads=run.threads, optimized=optimized, verbose=verbose)


def load(run: Run, *, verbose: bool) -> Scheduler:
    """The engine of a manifest. Raises EngineError."""
    return Scheduler(run, _open(run, context=run.context, slots=run.slots, verbose=verbose))
