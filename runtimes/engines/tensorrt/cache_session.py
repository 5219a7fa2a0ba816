"""An engine whose keys and values stay on the GPU: written where they lie, never copied out.

TensorRT's KVCacheUpdate demands that a cache's input and output are one address. Each has room for all rows; a run for
some of them begins at their first. Nothing of this could be run where it was written: no GPU was at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from runtimes.engines.tensorrt.session import NativeSession

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PAST, PRESENT, LOGITS = "past_key_values.", "present.", "logits"


class ResidentSession(NativeSession):
    """Raises EngineError as NativeSession does."""

    def _take(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """One buffer for a cache's input and output, zeroed: what no token has written is masked, and nothing times a
        number that is none would still be none.
        """
        found = super()._take({name: size for name, size in sizes.items() if not name.startswith(PRESENT)})
        for name in [name for name in found if name.startswith(PAST)]:
            self._cuda.clear(found[name], sizes[name])
            found[PRESENT + name.removeprefix(PAST)] = found[name]
        return found

    def rows_at(self, slot: int, rows: int) -> dict[str, tuple[int, ...]]:
        """Point the caches at the rows from ``slot`` on; their shapes."""
        shapes = {}
        for name, (_, *rest) in self._largest.items():
            if name.startswith(PAST):
                size = 2  # float16
                for count in rest:
                    size *= count
                for one in (name, PRESENT + name.removeprefix(PAST)):
                    self._context.set_tensor_address(one, self._addresses[one] + slot * size)
                shapes[name] = (rows, *rest)
        return shapes

    def step(self, inputs: Mapping[str, NDArray[Any]], slot: int, rows: int) -> NDArray[np.float32]:
        """The logits of one step for the rows from ``slot`` on."""
        import numpy as np

        self._cuda.use()
        arrays = {name: np.ascontiguousarray(value, self._inputs[name]) for name, value in inputs.items()}
        shapes = self._shaped({**{name: array.shape for name, array in arrays.items()}, **self.rows_at(slot, rows)})
        for name, array in arrays.items():
            self._cuda.send(array, self._addresses[name])
        if not self._context.execute_async_v3(self._cuda.stream):
            raise self._failed("TensorRT failed")
        logits: NDArray[np.float32] = np.empty(*shapes[LOGITS])
        self._cuda.fetch(self._addresses[LOGITS], logits)
        self._cuda.wait()
        return logits
