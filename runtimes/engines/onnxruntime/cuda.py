"""ONNX decoders on an NVIDIA GPU with onnxruntime's CUDA provider. Only ids and logits cross to and from the GPU.

The graph is that of packager/formats/onnx/decoder_cuda.py: float16, and a CUDA kernel for every node. onnxruntime falls
back to the CPU when its CUDA provider does not start, with a log line only. Here that is an error: the session has that
one provider and no fallback, and its providers are checked afterwards. ``--device cpu`` runs the same file with the
same library on the CPU.

The wheel is linked with CUDA's libraries and contains none. They are installed beside it as NVIDIA's own wheels and
loaded from there by name, so the box needs a driver and no CUDA (onnxruntime's preload_dlls does the same, and prints).
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtimes.decoding.scheduler import PREFILL_CHUNK, Scheduler, Scorer
from runtimes.engine import EngineError
from runtimes.engines.onnxruntime.decoder import Host, Model, Place, first_line
from runtimes.engines.onnxruntime.session import quiet_onnxruntime
from runtimes.manifest import Run

if TYPE_CHECKING:
    from numpy.typing import NDArray

DEVICES = ("gpu", "cpu")
PROVIDER = "CUDAExecutionProvider"
DRIVER = "580.65.06"  # the first of CUDA 13
# in the order of their dependencies, which is the load order; the driver's own library comes last
FOLDER = ("nvidia", "cu13", "lib")
LIBRARIES = ("libcudart.so.13", "libnvrtc.so.13", "libcublasLt.so.13", "libcublas.so.13", "libcurand.so.10")
DRIVERS = "libcuda.so.1"
# the bundle has no cuDNN; the arena grows by the requested size, not by doubling
OPTIONS = {"device_id": "0", "enable_cudnn": "0", "arena_extend_strategy": "kSameAsRequested"}
FULL = ("out of memory", "failed to allocate memory", "available memory of")
NO_GPU = ("cuda failure 100", "cuda failure 35", "cuda failure 803", "no cuda-capable device")
NO_KERNEL = ("no kernel image", "cuda failure 209")


class Cuda:
    """The first GPU and its memory. Raises EngineError with one sentence when no GPU can be used."""

    device = "cuda"

    def __init__(self) -> None:
        self._ort = quiet_onnxruntime()
        self._held: list[Any] = []
        self._bytes = 0
        if PROVIDER not in self._ort.get_available_providers():
            raise EngineError(
                f"onnxruntime: expected a build with {PROVIDER} (onnxruntime-gpu), found "
                f"{self._ort.__version__} without it; install the bundle again."
            )
        load_libraries(Path(self._ort.__file__).parent.parent)

    def open(self, path: Path, options: Any) -> Any:
        """A session in which every operator runs on the GPU."""
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        try:
            session = self._ort.InferenceSession(str(path), options, providers=[(PROVIDER, OPTIONS)], enable_fallback=0)
        except Exception as error:  # onnxruntime's own classes derive from Exception alone
            raise self.failed(error) from None
        if PROVIDER not in session.get_providers():
            raise EngineError(
                f"GPU: expected {path.name} on {PROVIDER}, found it on "
                f"{', '.join(session.get_providers())}; look at its log with --verbose."
            )
        self._bytes += sum(one.stat().st_size for one in (path, path.with_name(f"{path.name}.data")) if one.is_file())
        return session

    def zeros(self, names: Sequence[str], shape: Sequence[int], kind: Any) -> Mapping[str, int]:
        import numpy as np

        empty: NDArray[Any] = np.zeros(shape, kind)  # attention masks positions beyond a row's end, but 0 x NaN is NaN
        addresses = {}
        try:
            for name in names:
                value = self._ort.OrtValue.ortvalue_from_numpy(empty, self.device, 0)
                self._held.append(value)
                self._bytes += empty.nbytes
                addresses[name] = int(value.data_ptr())
        except Exception as error:
            raise self.failed(error) from None
        return addresses

    def failed(self, error: Exception) -> EngineError:
        """One sentence for the long errors of CUDA and onnxruntime."""
        text = str(error).lower()
        if any(words in text for words in FULL):
            return EngineError(
                "The GPU's memory is full; end other programs that use it, or build the bundle with "
                "fewer slots or a shorter context (--set slots=1, --set context=2048)."
            )
        if any(words in text for words in NO_GPU):
            return EngineError(
                f"GPU: expected an NVIDIA GPU and its driver {DRIVER} or newer, found none that CUDA 13 "
                "can use; update the driver, or start with --device cpu."
            )
        if any(words in text for words in NO_KERNEL):
            return EngineError(
                "GPU: expected compute capability 7.5 or newer, found one that onnxruntime has no "
                "machine code for; use another box, or start with --device cpu."
            )
        if "fallback to cpu ep has been explicitly disabled" in text:
            return EngineError(
                f"GPU: expected every operator of the model on {PROVIDER}, found that it did not start "
                "or leaves some out (its log is above); install the bundle again, or start with "
                "--device cpu."
            )
        return EngineError(f"onnxruntime failed on the GPU: {first_line(error)}")

    def memory(self) -> int:
        """Known bytes on the device: weights and caches, without CUDA's own."""
        return self._bytes

    def close(self) -> None:
        self._held.clear()


def load_libraries(packages: Path) -> None:
    """Load CUDA's libraries globally, from the wheels in ``packages`` or else from the system's path. Raises
    EngineError with one sentence.
    """
    folder = packages.joinpath(*FOLDER)
    for name in LIBRARIES:
        try:
            ctypes.CDLL(str(folder / name) if (folder / name).is_file() else name, ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise EngineError(
                f"CUDA: expected {name} from the bundle's wheels, found that it cannot be loaded "
                f"({error}); install the bundle again."
            ) from None
    try:
        ctypes.CDLL(DRIVERS, ctypes.RTLD_GLOBAL)
    except OSError:
        raise EngineError(
            f"GPU: expected an NVIDIA GPU and its driver {DRIVER} or newer, found no driver ({DRIVERS} "
            "cannot be loaded); install it, or start with --device cpu."
        ) from None


def device_of(run: Run) -> str:
    """The device: of ``--device``, else of the manifest, else the GPU. Raises EngineError for an unknown one."""
    device = run.device or str(run.settings.get("device", DEVICES[0]))
    if device not in DEVICES:
        raise EngineError(f"There is no device {device!r}; choose {', '.join(DEVICES)}.")
    return device


def open_model(run: Run, *, context: int, slots: int, verbose: bool) -> Model:
    """The model on the chosen device, and on no other. Raises EngineError."""
    place: Place = Cuda() if device_of(run) == "gpu" else Host()
    # the graph has its final operators; fusing would skip roundings to float16 that the fidelity gate scored
    return Model(
        run.model, context=context, slots=slots, threads=run.threads, optimized=False, verbose=verbose, place=place
    )


def warm_up(model: Model) -> None:
    """Run one prefill chunk and one token for every slot, so that a GPU that cannot compute, or lacks memory, fails at
    start-up and not on the first request. The first requests overwrite what this writes into the caches. Raises
    EngineError.
    """
    import numpy as np

    model.run(np.zeros((1, min(PREFILL_CHUNK, model.context)), np.int64), [0])
    model.run(np.zeros((model.slots, 1), np.int64), [0] * model.slots)


@contextlib.contextmanager
def open_scorer(run: Run, *, longest: int, max_rss_bytes: int | None, verbose: bool) -> Iterator[Scorer]:
    """A Scorer for sequences of up to ``longest`` tokens. max_rss_bytes has no effect. Raises EngineError."""
    model = open_model(run, context=max(longest, 1), slots=1, verbose=verbose)
    try:
        yield Scorer(run, model)
    finally:
        model.close()


def load(run: Run, *, verbose: bool) -> Scheduler:
    """The engine of a manifest. Raises EngineError."""
    model = open_model(run, context=run.context, slots=run.slots, verbose=verbose)
    try:
        if device_of(run) == DEVICES[0]:
            warm_up(model)
    except EngineError:
        model.close()
        raise
    return Scheduler(run, model)
