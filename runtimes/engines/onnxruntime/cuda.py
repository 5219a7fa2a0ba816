"""ONNX decoders on an NVIDIA GPU, through onnxruntime's CUDA provider: only ids go in and logits come out.

The graph is packager/formats/onnx/decoder_cuda.py's: float16, an operator with a CUDA kernel in every node. onnxruntime
goes on with the processor where its CUDA provider does not start, and says so in a log line; here that is an error: the
session is made with that one provider, without a fall-back, and asked afterwards. ``--device cpu`` runs the same file
by the same library on the processor, for whoever asks for it.

The wheel is linked with CUDA's libraries and brings none. They lie beside it as NVIDIA's own wheels, and are loaded
from there by name, so the box needs a driver and no CUDA (onnxruntime's preload_dlls does the like, and prints).
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
# in the order of their needs, which is the order in which they are loaded; then the driver's own
FOLDER = ("nvidia", "cu13", "lib")
LIBRARIES = ("libcudart.so.13", "libnvrtc.so.13", "libcublasLt.so.13", "libcublas.so.13", "libcurand.so.10")
DRIVERS = "libcuda.so.1"
# no cuDNN in the bundle; and memory is taken as it is needed, not doubled
OPTIONS = {"device_id": "0", "enable_cudnn": "0", "arena_extend_strategy": "kSameAsRequested"}
FULL = ("out of memory", "failed to allocate memory", "available memory of")
NO_GPU = ("cuda failure 100", "cuda failure 35", "cuda failure 803", "no cuda-capable device")
NO_KERNEL = ("no kernel image", "cuda failure 209")


class Cuda:
    """The first GPU and its memory. Raises EngineError with one sentence where there is none that can be used."""

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

        empty: NDArray[Any] = np.zeros(shape, kind)  # attention skips what lies beyond a row's end, but 0 x NaN is NaN
        found = {}
        try:
            for name in names:
                value = self._ort.OrtValue.ortvalue_from_numpy(empty, self.device, 0)
                self._held.append(value)
                self._bytes += empty.nbytes
                found[name] = int(value.data_ptr())
        except Exception as error:
            raise self.failed(error) from None
        return found

    def failed(self, error: Exception) -> EngineError:
        """One sentence for what CUDA and onnxruntime say at length."""
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
        """Bytes on the device that are known: weights and caches, not what CUDA itself takes."""
        return self._bytes

    def close(self) -> None:
        self._held.clear()


def load_libraries(packages: Path) -> None:
    """Load CUDA's libraries from the wheels in ``packages``, or where the system finds them, for all that comes after.
    Raises EngineError with one sentence.
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
    """What ``--device`` said, or else the manifest, or else the GPU. Raises EngineError for one that is not known."""
    device = run.device or str(run.settings.get("device", DEVICES[0]))
    if device not in DEVICES:
        raise EngineError(f"There is no device {device!r}; choose {', '.join(DEVICES)}.")
    return device


def open_model(run: Run, *, context: int, slots: int, verbose: bool) -> Model:
    """The model on the device that was asked for, and no other. Raises EngineError."""
    place: Place = Cuda() if device_of(run) == "gpu" else Host()
    # the graph is written with the operators that it needs; fusing would skip roundings that were scored
    return Model(
        run.model, context=context, slots=slots, threads=run.threads, optimized=False, verbose=verbose, place=place
    )


def warm_up(model: Model) -> None:
    """A piece of a prompt and a token for every slot: a GPU that cannot answer, or has no room for it, is told now.
    What is written at the caches' beginnings is overwritten by whoever comes first. Raises EngineError.
    """
    import numpy as np

    model.run(np.zeros((1, min(PREFILL_CHUNK, model.context)), np.int64), [0])
    model.run(np.zeros((model.slots, 1), np.int64), [0] * model.slots)


@contextlib.contextmanager
def open_scorer(run: Run, *, longest: int, max_rss_bytes: int | None, verbose: bool) -> Iterator[Scorer]:
    """A Scorer for sequences of up to ``longest`` tokens. max_rss_bytes bounds nothing."""
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
