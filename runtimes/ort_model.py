"""One ONNX decoder in onnxruntime (graph: packager/onnx_graph.py), its key/value caches in buffers of our own.

Every slot has a row in the caches, which the attention operator writes in place; so one run can decode all slots at
once, each at its own length. Runs release Python's lock (onnxruntime-genai's calls hold it, prompts included).
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtimes.engine import EngineError
from runtimes.ort_session import quiet_onnxruntime

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ERRORS_ONLY = 3


class Model:
    """A loaded graph with ``slots`` rows of ``context`` tokens. Not for two threads at once. Raises EngineError.

    optimized: False keeps the graph as it is written. threads: 0 means one a physical core, onnxruntime's own default.
    """

    def __init__(
        self, path: Path, *, context: int, slots: int, threads: int, optimized: bool = True, verbose: bool = False
    ) -> None:

        ort = quiet_onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 1 if verbose else ERRORS_ONLY
        options.enable_cpu_mem_arena = False  # it keeps what the longest prompt took
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
        if not optimized:  # in the default order every weight is cast before the first is used
            options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        try:
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own classes derive from Exception alone
            raise EngineError(f"onnxruntime cannot load {path.name}: {_first_line(error)}") from None
        self.version = f"onnxruntime {ort.__version__}"
        self.context, self.slots = context, slots
        self.vocabulary = int(self._session.get_outputs()[0].shape[2])
        caches = [entry for entry in self._session.get_inputs() if entry.name.startswith("past_key_values.")]
        if not caches:
            raise EngineError(f"{path.name} is no decoder that this runtime knows: it has no key/value cache.")
        shape = (slots, int(caches[0].shape[1]), context, int(caches[0].shape[3]))
        self._caches: dict[str, NDArray[np.float32]] = {entry.name: _zeros(shape) for entry in caches}
        self._bindings: dict[tuple[int, int], Any] = {}

    def run(
        self, ids: NDArray[np.int64], lengths: Sequence[int], *, slot: int = 0, kept: int = 1
    ) -> NDArray[np.float32]:
        """Compute tokens (rows, tokens) for the slots from ``slot`` on and give the logits of the last ``kept``, (rows,
        kept, vocabulary). lengths: tokens that each row holds before. Raises EngineError.
        """
        import numpy as np

        rows, tokens = ids.shape
        after = np.array(lengths, np.int32) + tokens
        if slot + rows > self.slots or int(after.max()) > self.context:
            raise EngineError(f"{rows} rows from slot {slot} or {after.max()} tokens are more than there is room for")
        logits = np.empty((rows, kept, self.vocabulary), np.float32)
        inputs: dict[str, NDArray[Any]] = {
            "input_ids": np.ascontiguousarray(ids, np.int64),
            "seqlens_k": np.ascontiguousarray(after - 1, np.int32),
            "total_length": np.array(after.max(), np.int32),
            "kept": np.array([kept], np.int64),
        }
        binding = self._binding(slot, rows)
        for name, value in inputs.items():
            binding.bind_input(name, "cpu", 0, value.dtype, value.shape, value.ctypes.data)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise EngineError(f"onnxruntime failed: {_first_line(error)}") from None
        return logits

    def memory(self) -> int:
        """Nothing outside this process."""
        return 0

    def close(self) -> None:
        """Free the session and the caches."""
        self._session = None
        self._bindings.clear()
        self._caches.clear()

    def _binding(self, slot: int, rows: int) -> Any:
        """The caches of these slots as inputs and outputs alike."""
        import numpy as np

        if (slot, rows) not in self._bindings:
            binding = self._session.io_binding()
            for name, cache in self._caches.items():
                part = cache[slot : slot + rows]
                binding.bind_input(name, "cpu", 0, np.float32, part.shape, part.ctypes.data)
                present = name.replace("past_key_values.", "present.")
                binding.bind_output(present, "cpu", 0, np.float32, part.shape, part.ctypes.data)
            self._bindings[slot, rows] = binding
        return self._bindings[slot, rows]


def _zeros(shape: Sequence[int]) -> NDArray[np.float32]:
    """Zeros that the system hands out as they are touched, so that memory follows what the conversations fill. numpy's
    own come in pages of 2 MiB, and every head's row begins in another one.
    """
    import numpy as np

    area = mmap.mmap(-1, 4 * math.prod(shape))
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            area.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(area, np.float32).reshape(shape)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
