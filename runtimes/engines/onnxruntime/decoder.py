"""One ONNX decoder in onnxruntime, with its KV cache in our buffers. Graphs: packager/formats/onnx/decoder_graph.py and
decoder_cuda.py.

Every slot has a row in the KV cache, which the attention operator writes in place. So one run decodes all slots, each
at its own length. Runs release the GIL (onnxruntime-genai's calls hold it, during prefill too). A Place is the device
of the session and its cache: the CPU's is here, the GPU's in cuda.py.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from runtimes.engine import EngineError
from runtimes.engines.onnxruntime.session import quiet_onnxruntime

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ERRORS_ONLY = 3
PAST, PRESENT = "past_key_values.", "present."
HALF = "tensor(float16)"


class Place(Protocol):
    """The device of a session and its KV cache. device: onnxruntime's name for its memory."""

    device: str

    def open(self, path: Path, options: Any) -> Any:
        """A session. Raises onnxruntime's exceptions, or EngineError."""
        ...

    def zeros(self, names: Sequence[str], shape: Sequence[int], kind: Any) -> Mapping[str, int]:
        """The address of an array of zeros, in C order, for each name; ``close`` frees them. Raises EngineError."""
        ...

    def failed(self, error: Exception) -> EngineError:
        """The one-sentence error for a failed run."""
        ...

    def memory(self) -> int:
        """Bytes held outside this process's memory."""
        ...

    def close(self) -> None: ...


class Host:
    """The CPU and main memory."""

    device = "cpu"

    def __init__(self) -> None:
        self._held: list[NDArray[Any]] = []

    def open(self, path: Path, options: Any) -> Any:
        return quiet_onnxruntime().InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def zeros(self, names: Sequence[str], shape: Sequence[int], kind: Any) -> Mapping[str, int]:
        arrays = {name: _zeros(shape, kind) for name in names}
        self._held += arrays.values()
        return {name: int(array.ctypes.data) for name, array in arrays.items()}

    def failed(self, error: Exception) -> EngineError:
        return EngineError(f"onnxruntime failed: {first_line(error)}")

    def memory(self) -> int:
        """0: the arrays are in this process."""
        return 0

    def close(self) -> None:
        self._held.clear()


class Model:
    """A loaded graph with ``slots`` rows of ``context`` tokens. Not thread-safe. Raises EngineError.

    optimized: False runs the graph as it is in the file. threads: 0 means one per physical core, onnxruntime's default.
    place: the CPU by default.
    """

    def __init__(
        self,
        path: Path,
        *,
        context: int,
        slots: int,
        threads: int,
        optimized: bool = True,
        verbose: bool = False,
        place: Place | None = None,
    ) -> None:
        import numpy as np

        ort = quiet_onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 1 if verbose else ERRORS_ONLY
        options.enable_cpu_mem_arena = False  # the arena keeps the memory of the longest prompt
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
        if not optimized:  # in the default order every weight is cast before the first is used
            options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        self._place: Place = place or Host()
        try:
            self._session = self._place.open(path, options)
        except EngineError:
            raise
        except Exception as error:  # onnxruntime's own classes derive from Exception alone
            raise EngineError(f"onnxruntime cannot load {path.name}: {first_line(error)}") from None
        self.version = f"onnxruntime {ort.__version__}"
        self.context, self.slots = context, slots
        logits = self._session.get_outputs()[0]
        self.vocabulary = int(logits.shape[2])
        self._logits: Any = np.float16 if logits.type == HALF else np.float32
        inputs = self._session.get_inputs()
        self._kept_input = next((entry.name for entry in inputs if entry.name in ("kept", "wanted")), "")
        caches = [entry for entry in inputs if entry.name.startswith(PAST)]
        if not caches or not self._kept_input:
            raise EngineError(f"{path.name} is not a decoder that this runtime supports: it has no KV cache.")
        self._kind: Any = np.float16 if caches[0].type == HALF else np.float32
        self._row = (int(caches[0].shape[1]), context, int(caches[0].shape[3]))
        self._caches = self._place.zeros([entry.name for entry in caches], (slots, *self._row), self._kind)
        self._bindings: dict[tuple[int, int], Any] = {}

    def run(
        self, ids: NDArray[np.int64], lengths: Sequence[int], *, slot: int = 0, kept: int = 1
    ) -> NDArray[np.float32]:
        """Compute tokens (rows, tokens) for the slots from ``slot`` on and give the logits of the last ``kept``, (rows,
        kept, vocabulary). lengths: tokens in each row's cache before. Raises EngineError.
        """
        import numpy as np

        rows, tokens = ids.shape
        after = np.array(lengths, np.int32) + tokens
        if slot + rows > self.slots or int(after.max()) > self.context:
            raise EngineError(f"{rows} rows from slot {slot} or {after.max()} tokens are more than there is room for")
        logits = np.empty((rows, kept, self.vocabulary), self._logits)
        wanted = [kept] if self._kept_input == "kept" else range(tokens - kept, tokens)
        inputs: dict[str, NDArray[Any]] = {
            "input_ids": np.ascontiguousarray(ids, np.int64),
            "seqlens_k": np.ascontiguousarray(after - 1, np.int32),
            "total_length": np.array(after.max(), np.int32),
            self._kept_input: np.array(wanted, np.int64),
        }
        try:
            binding = self._binding(slot, rows)
            for name, value in inputs.items():
                binding.bind_input(name, "cpu", 0, value.dtype, value.shape, value.ctypes.data)
            binding.bind_output("logits", "cpu", 0, self._logits, logits.shape, logits.ctypes.data)
            binding.synchronize_inputs()
            self._session.run_with_iobinding(binding)
            binding.synchronize_outputs()
        except Exception as error:
            raise self._place.failed(error) from None
        return logits.astype(np.float32, copy=False)

    def memory(self) -> int:
        """Known bytes outside this process's memory."""
        return self._place.memory()

    def close(self) -> None:
        """Free the session and the caches."""
        self._bindings.clear()
        self._session = None
        self._place.close()

    def _binding(self, slot: int, rows: int) -> Any:
        """An IO binding with the caches of these slots as both inputs and outputs."""
        import numpy as np

        if (slot, rows) not in self._bindings:
            binding = self._session.io_binding()
            shape, begin = (rows, *self._row), slot * math.prod(self._row) * np.dtype(self._kind).itemsize
            for name, address in self._caches.items():
                binding.bind_input(name, self._place.device, 0, self._kind, shape, address + begin)
                present = PRESENT + name.removeprefix(PAST)
                binding.bind_output(present, self._place.device, 0, self._kind, shape, address + begin)
            self._bindings[slot, rows] = binding
        return self._bindings[slot, rows]


def _zeros(shape: Sequence[int], kind: Any) -> NDArray[Any]:
    """Zeros in pages that the system allocates at the first write, so that memory grows with the conversations. numpy
    allocates huge pages of 2 MiB, of which every head's row would touch another one.
    """
    import numpy as np

    area = mmap.mmap(-1, np.dtype(kind).itemsize * math.prod(shape))
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            area.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(area, kind).reshape(shape)


def first_line(error: Exception) -> str:
    """The first line of an error of onnxruntime, without its stack."""
    return str(error).strip().partition("\n")[0]
