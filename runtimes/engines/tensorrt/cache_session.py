"""A decoder's engine whose KV cache stays on the GPU: updated in place, never copied.

TensorRT's KVCacheUpdate requires one address for a cache's input and output. Each cache has room for all rows; a run
for some rows starts at the first of them. This module has not been run on a GPU: none was available to its authors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from runtimes.engines.tensorrt.session import NativeSession

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PAST, PRESENT, LOGITS = "past_key_values.", "present.", "logits"


class CacheSession(NativeSession):
    """A NativeSession with a KV cache. Raises EngineError as NativeSession does."""

    def _take(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """One zeroed buffer for a cache's input and output: masked positions may not hold NaN, as 0 x NaN is NaN."""
        addresses = super()._take({name: size for name, size in sizes.items() if not name.startswith(PRESENT)})
        for name in [name for name in addresses if name.startswith(PAST)]:
            self._cuda.clear(addresses[name], sizes[name])
            addresses[PRESENT + name.removeprefix(PAST)] = addresses[name]
        return addresses

    def rows_at(self, slot: int, rows: int) -> dict[str, tuple[int, ...]]:
        """Set the caches' addresses to the rows from ``slot`` on. Returns their shapes."""
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
        """The logits of one step for the rows from ``slot`` on. Raises EngineError."""
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
