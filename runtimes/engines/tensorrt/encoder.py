"""Embedders and classifiers with TensorRT: tokenizing, batching and pooling around an engine on the GPU.

No torch, no transformers; the engine's inputs and outputs are numpy arrays (Session in
runtimes/engines/tensorrt/device.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from runtimes.engine import EngineError
from runtimes.engines.encoder import Reader, Settings, Text, padded, require_encoder, require_inputs, rows
from runtimes.engines.tensorrt.open import DEVICES as DEVICES
from runtimes.engines.tensorrt.open import Opened, open_plan
from runtimes.engines.tensorrt.plan import Profile
from runtimes.manifest import Run
from runtimes.process import resident_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

APP = "encoder_app"
EIGHT = 8  # tensor cores compute in eights, and TensorRT-RTX compiles kernels for every new shape


class TensorrtEncoder:
    """An opened engine. Raises EngineError when it does not fit the manifest or cannot answer."""

    def __init__(self, run: Run, opened: Opened, output: str, model: str) -> None:
        require_encoder(run)
        self.settings = Settings.of(run)
        self._session, self._profile, self._output = opened.session, opened.profile, output
        self.details: Mapping[str, str] = opened.details
        self.version = opened.session.version
        require_inputs(list(self._profile), self.settings, model)
        largest = {shapes.max for shapes in self._profile.values()}
        if len(largest) != 1 or len(shape := largest.pop()) != 2:
            raise EngineError(f"{model} has profiles that differ between its inputs; build the bundle anew.")
        self.task = run.task
        self.slots, self.context = min(run.slots, shape[0]), min(run.context, shape[1])
        self.reader = Reader(replace(run, context=self.context), self.settings)
        self._warm_up()

    def _warm_up(self) -> None:
        """Compute one text and the largest batch: a broken engine or too little memory fails at start-up."""
        self.compute([self.reader.read("a")])
        self.compute([Text((self.settings.pad_id,) * self.context, (0,) * self.context)] * self.slots)
        self._session.save_kernels()

    def compute(self, texts: Sequence[Text]) -> list[NDArray[np.float32]]:
        """A vector of float32 for each text: the embedding, or the logits. Raises EngineError."""
        inputs = padded(texts, self.settings)
        output = self._session.run(pad_to_profile(inputs, self._profile, self.settings.pad_id))[self._output]
        count, length = inputs["attention_mask"].shape
        states = output[:count, :length] if output.ndim == 3 else output[:count]
        return rows(states, inputs["attention_mask"], self.task, self.settings)

    def memory(self) -> int:
        """Resident bytes of this process, and the engine's known bytes on the device (on a Jetson the same memory, but
        it counts for no process).
        """
        return resident_bytes() + self._session.memory()

    def device_memory(self) -> int:
        """The engine's known bytes on the device: weights, activations and buffers."""
        return self._session.memory()

    def close(self) -> None:
        """Free the engine. No computation may run any more."""
        self._session.close()


def pad_to_profile(inputs: Mapping[str, NDArray[Any]], profile: Profile, pad: int) -> dict[str, NDArray[Any]]:
    """The inputs [texts, length], padded to a shape of the profile: lengths in steps of eight, at least its smallest.

    Added rows repeat the last one: a row without a token would be a softmax over nothing.
    """
    import numpy as np

    shapes = next(iter(profile.values()))
    count, length = next(iter(inputs.values())).shape
    tokens = min(-(-max(length, shapes.min[1]) // EIGHT) * EIGHT, shapes.max[1])
    more = (0, max(0, shapes.min[0] - count))
    arrays = {}
    for name, array in inputs.items():
        wide = np.pad(array, ((0, 0), (0, tokens - length)), constant_values=pad if name == "input_ids" else 0)
        arrays[name] = np.pad(wide, (more, (0, 0)), mode="edge") if more[1] else wide
    return arrays


def load(run: Run, *, verbose: bool) -> TensorrtEncoder:
    """The engine of a manifest. Raises ManifestError or EngineError."""
    plan, opened = open_plan(run, verbose=verbose)
    try:
        return TensorrtEncoder(run, opened, plan.outputs[0].name, plan.path.name)
    except Exception:
        opened.session.close()
        raise
