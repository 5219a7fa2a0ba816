"""Embedders and classifiers on onnxruntime alone: no torch, no transformers on the box."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from runtimes.engine import EngineError
from runtimes.engines.encoder import Reader, Settings, Text, padded, require_encoder, require_inputs, rows
from runtimes.engines.onnxruntime.session import open_session, quiet_onnxruntime
from runtimes.manifest import Run
from runtimes.process import resident_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

APP = "encoder_app"


class OrtEncoder:
    """A loaded model. Raises EngineError when it does not load or does not fit the manifest."""

    details: Mapping[str, str] = {}

    def __init__(self, run: Run, *, verbose: bool) -> None:
        require_encoder(run)
        self.task, self.context, self.slots = run.task, run.context, run.slots
        self.version = f"onnxruntime {quiet_onnxruntime().__version__}"
        self.settings = Settings.of(run)
        self.reader = Reader(run, self.settings)
        self._session: Any = open_session(run.model, threads=run.threads, verbose=verbose)
        require_inputs([value.name for value in self._session.get_inputs()], self.settings, run.model.name)
        self.compute([self.reader.read("a")])  # a model that cannot compute fails at start-up, not on the first request

    def compute(self, texts: Sequence[Text]) -> list[NDArray[np.float32]]:
        """A vector of float32 for each text: the embedding, or the logits. Raises EngineError."""
        inputs = padded(texts, self.settings)
        try:
            (output,) = self._session.run(None, inputs)
        except Exception as error:  # onnxruntime's errors share no class of their own
            raise EngineError(f"onnxruntime failed: {error}") from None
        return rows(output, inputs["attention_mask"], self.task, self.settings)

    def memory(self) -> int:
        """Resident bytes of this process; the model runs in it."""
        return resident_bytes()

    def close(self) -> None:
        """Free the model. No computation may run any more."""
        self._session = None


def load(run: Run, *, verbose: bool) -> OrtEncoder:
    """The engine of a manifest. Raises EngineError."""
    return OrtEncoder(run, verbose=verbose)
