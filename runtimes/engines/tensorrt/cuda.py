"""CUDA without torch: memory, copies and a stream, through the driver API. The only module that imports cuda.bindings.

It uses the driver API (libcuda, part of every driver), not the runtime API: so no libcudart has to be located or
matched, and cuda-bindings 12 works with every driver since CUDA 12.0, which includes JetPack 6 (12.6), JetPack 7 (13.2)
and the drivers of a T4. cuda-bindings 13 needs driver 580; cupy is a whole array library.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

from runtimes.engine import EngineError

if TYPE_CHECKING:
    from numpy.typing import NDArray

MISSING = "GPU: expected an NVIDIA GPU with its driver, found none ({}); use a box with one, and its driver."


class Cuda:
    """The first GPU's primary context (which TensorRT uses too), a stream, and the allocated buffers.

    Every method raises EngineError with one sentence when the driver fails.
    """

    def __init__(self) -> None:
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise EngineError(
                f"The package cuda-bindings cannot be imported ({error}); install the bundle again."
            ) from None
        self._driver: Any = driver
        self._buffers: list[Any] = []
        self._context: Any = None
        self._stream: Any = None
        try:
            self._call(driver.cuInit, 0)
            if not self._call(driver.cuDeviceGetCount):
                raise EngineError(MISSING.format("the driver lists no device"))
            self._device = self._call(driver.cuDeviceGet, 0)
        except EngineError as error:
            raise error if str(error).startswith("GPU: ") else EngineError(MISSING.format(error)) from None
        except RuntimeError:  # from the bindings, when libcuda is missing
            raise EngineError(MISSING.format("its library libcuda cannot be loaded")) from None
        self._context = self._call(driver.cuDevicePrimaryCtxRetain, self._device)
        self.use()
        self._stream = self._call(driver.cuStreamCreate, driver.CUstream_flags.CU_STREAM_NON_BLOCKING)

    def _call(self, function: Any, *arguments: Any) -> Any:
        """Call the driver; its result beside the status. Raises EngineError for another status than 0."""
        status, *rest = function(*arguments)
        if int(status) != 0:
            _, name = self._driver.cuGetErrorName(status)
            text = name.decode() if isinstance(name, bytes) else f"error {int(status)}"
            if text == "CUDA_ERROR_OUT_OF_MEMORY":
                raise EngineError("The GPU's memory is full; end other programs that use it.")
            raise EngineError(f"{function.__name__} failed with {text}")
        return rest[0] if rest else None

    def use(self) -> None:
        """Make the context current in this thread; loading and computing use different threads."""
        self._call(self._driver.cuCtxSetCurrent, self._context)

    @property
    def stream(self) -> int:
        """The stream's handle."""
        return int(self._stream)

    def facts(self) -> dict[str, Any]:
        """The fields name, sm, bytes and cuda of device.Device."""
        driver = self._driver
        attribute = driver.CUdevice_attribute
        major, minor = (
            int(self._call(driver.cuDeviceGetAttribute, one, self._device))
            for one in (
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        name = self._call(driver.cuDeviceGetName, 256, self._device)
        version = int(self._call(driver.cuDriverGetVersion))
        return {
            "name": name.partition(b"\0")[0].decode("utf-8", "replace").strip(),
            "sm": f"{major}.{minor}",
            "bytes": int(self._call(driver.cuDeviceTotalMem, self._device)),
            "cuda": f"{version // 1000}.{version % 1000 // 10}",
        }

    def take(self, size: int) -> int:
        """Allocate device memory; size in bytes. Returns the address; ``close`` frees it."""
        buffer = self._call(self._driver.cuMemAlloc, max(size, 1))
        self._buffers.append(buffer)
        return int(buffer)

    def clear(self, address: int, size: int) -> None:
        """Set ``size`` bytes of device memory to zero, in stream order."""
        self._call(self._driver.cuMemsetD8Async, address, 0, size, self._stream)

    def send(self, array: NDArray[Any], address: int) -> None:
        """Copy an array in C order to the device, in stream order."""
        self._call(self._driver.cuMemcpyHtoDAsync, address, array.ctypes.data, array.nbytes, self._stream)

    def fetch(self, address: int, array: NDArray[Any]) -> None:
        """Copy from the device into an array in C order, in stream order; call ``wait`` before reading it."""
        self._call(self._driver.cuMemcpyDtoHAsync, array.ctypes.data, address, array.nbytes, self._stream)

    def wait(self) -> None:
        """Wait until the stream is idle."""
        self._call(self._driver.cuStreamSynchronize, self._stream)

    def close(self) -> None:
        """Free the buffers, the stream and the context."""
        driver = self._driver
        if self._context is None:
            return
        self.use()
        for buffer in self._buffers:
            self._call(driver.cuMemFree, buffer)
        self._buffers.clear()
        if self._stream is not None:
            self._call(driver.cuStreamDestroy, self._stream)
        self._call(driver.cuDevicePrimaryCtxRelease, self._device)
        self._context = self._stream = None

    def __enter__(self) -> Cuda:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
