"""Embedders and classifiers on onnxruntime alone: no torch, no transformers on the box."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from runtimes.encoding import Reader, Settings, Text, padded, pooled
from runtimes.engine import EngineError
from runtimes.manifest import Run
from runtimes.memory import resident_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

FACE = "encoder_app"
# onnxruntime 1.29 and newer look up a host on import unless both are set before
QUIET = {"ORT_DISABLE_TELEMETRY": "1", "ORT_TELEMETRY_DISABLED": "1"}


class OrtEncoder:
    """A loaded model. Raises EngineError when it does not load or does not fit the manifest."""

    def __init__(self, run: Run, *, verbose: bool) -> None:
        os.environ.update(QUIET)
        import onnxruntime

        if run.task not in ("embed", "classify"):
            raise EngineError(f"The manifest's run.task is {run.task!r}; this engine embeds or classifies.")
        self.task, self.context, self.slots = run.task, run.context, run.slots
        self.version = f"onnxruntime {onnxruntime.__version__}"
        self.settings = Settings.of(run)
        self.reader = Reader(run, self.settings)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = run.threads  # 0: one a physical core
        options.inter_op_num_threads = 1
        options.log_severity_level = 1 if verbose else 3
        # a waiting thread that spins takes the core from whoever else works on the box
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session: Any = onnxruntime.InferenceSession(
                str(run.model), options, providers=["CPUExecutionProvider"]
            )
            wanted = {value.name for value in self._session.get_inputs()}
            self.compute([self.reader.read("a")])  # a model that cannot answer is told now, not to the first client
        except EngineError:
            raise
        except Exception as error:  # onnxruntime's errors share no class of their own
            raise EngineError(f"{run.model.name} does not load: {error}") from None
        given = {"input_ids", "attention_mask"} | ({"token_type_ids"} if self.settings.token_types else set())
        if wanted != given:
            raise EngineError(f"{run.model.name} takes {', '.join(sorted(wanted))}; the manifest says otherwise.")

    def compute(self, texts: Sequence[Text]) -> list[NDArray[Any]]:
        """A vector of float32 for each text: the embedding, or the logits. Raises EngineError."""
        inputs = padded(texts, self.settings)
        try:
            (found,) = self._session.run(None, inputs)
        except Exception as error:
            raise EngineError(f"onnxruntime failed: {error}") from None
        rows = found if self.task == "classify" else pooled(found, inputs["attention_mask"], self.settings)
        return list(rows)

    def memory(self) -> int:
        """Resident bytes of this process; the model runs in it."""
        return resident_bytes()

    def close(self) -> None:
        """Free the model. No computation may run any more."""
        self._session = None


def load(run: Run, *, verbose: bool) -> OrtEncoder:
    """The engine of a manifest. Raises EngineError."""
    return OrtEncoder(run, verbose=verbose)
