"""Runs an engine with TensorRT or TensorRT-RTX, whose Python packages share one interface. The only module that imports
them.

TensorRT-RTX is a wheel in the bundle. TensorRT on a Jetson is the box's own, installed by JetPack for the system's
Python; only that one package is imported from its folder, and no other system package.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtimes.engine import EngineError
from runtimes.engines.tensorrt.cuda import Cuda
from runtimes.engines.tensorrt.device import TITLES, full_version
from runtimes.engines.tensorrt.plan import Plan, Profile
from runtimes.files import write_atomically

if TYPE_CHECKING:
    from numpy.typing import NDArray

SETTING = "PACKAGER_TENSORRT"  # a folder with the package tensorrt, for one that was installed elsewhere
RTX_MODULES = ("tensorrt_rtx_bindings", "tensorrt_rtx")
# JetPack installs it for the system's Python; for a .tar of TensorRT set SETTING
SYSTEM = (
    "/usr/lib/python{0}/dist-packages", "/usr/lib/python3/dist-packages", "/usr/local/lib/python{0}/dist-packages",
)  # fmt: skip


def library(name: str) -> Any:
    """The Python package of "tensorrt" or "tensorrt-rtx". Raises EngineError with one sentence."""
    if name == "tensorrt-rtx":
        for known in RTX_MODULES:
            if importlib.util.find_spec(known):
                return _imported(known, name)
        raise EngineError(
            "TensorRT-RTX: expected its package among the bundle's, found none; install the bundle again."
        )
    if "tensorrt" in sys.modules or importlib.util.find_spec("tensorrt"):
        return _imported("tensorrt", name)
    version = sysconfig.get_python_version()
    named = os.environ.get(SETTING)
    folders = [named] if named else [folder.format(version) for folder in SYSTEM]
    spec = importlib.machinery.PathFinder.find_spec("tensorrt", folders)
    if spec is None or spec.loader is None:
        raise EngineError(
            f"TensorRT: expected its Python package for Python {version} in {folders[0]}, found none; install "
            f"JetPack's package python3-libnvinfer, install this bundle with the system's own Python, or name the "
            f"folder in {SETTING}."
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules["tensorrt"] = module  # the package imports its own modules by this name
    try:
        spec.loader.exec_module(module)
    except (ImportError, OSError) as error:
        del sys.modules["tensorrt"]
        raise EngineError(
            f"TensorRT: expected that {spec.origin} loads, found that it does not ({error}); install "
            "JetPack's TensorRT packages again."
        ) from None
    return module


def _imported(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise EngineError(
            f"{TITLES[name]}: expected that its package loads, found that it does not ({error}); "
            "install the bundle again."
        ) from None


def library_version(name: str) -> str:
    """The version, with TensorRT's build number where the box has it. Raises EngineError."""
    version = str(library(name).__version__)
    return full_version(version) if name == "tensorrt" else version


def make_log(trt: Any, verbose: bool) -> Any:
    """A logger for the library that keeps its errors (the first is the cause). verbose: also print every message."""

    class Log(trt.ILogger):  # type: ignore[misc] # the base class is known only at run time
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors = [*self.errors[:19], message]
            if verbose:
                sys.stderr.write(f"[{severity.name[0]}] {message}\n")  # as trtexec marks them

    return Log()


class NativeSession:
    """An engine on the GPU, with buffers for the largest batch of its profile.

    kernels: the file for kernels that TensorRT-RTX compiles at run time; None for no file. Raises EngineError with one
    sentence when the library does not load the engine, or the engine is not the plan's.
    """

    def __init__(self, plan: Plan, profile: Profile, engine: Path, *, kernels: Path | None, verbose: bool) -> None:
        import numpy as np

        self._trt = trt = library(plan.library)
        self._log = make_log(trt, verbose)
        self.version = f"{TITLES[plan.library]} {library_version(plan.library)}"
        self._kernels = kernels
        self._cuda = Cuda()
        self.device = str(self._cuda.facts()["name"])
        self._runtime: Any = None
        self._cache: Any = None
        self._engine: Any = None
        self._context: Any = None
        try:
            data = engine.read_bytes()
            self._runtime = trt.Runtime(self._log)
            self._engine = self._runtime.deserialize_cuda_engine(data)
            if self._engine is None:
                raise self._failed(f"{engine.name} cannot be loaded by {self.version} on {self.device}")
            self._require(plan, profile)
            self._context = self._make_context()
            self._inputs = {one.name: np.dtype(one.dtype) for one in plan.inputs}
            self._outputs = {one.name: np.dtype(one.dtype) for one in plan.outputs}
            shapes = self._shaped({name: shapes.max for name, shapes in profile.items()})
            sizes = {name: _bytes(shape, kind) for name, (shape, kind) in shapes.items()}
            self._largest = {name: shape for name, (shape, _) in shapes.items()}
            self._addresses = self._take(sizes)
            for name, address in self._addresses.items():
                self._context.set_tensor_address(name, address)
            buffers = {address: sizes[name] for name, address in self._addresses.items()}
            self._held = len(data) + self._activations() + sum(buffers.values())
        except Exception:
            self.close()
            raise

    def _take(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Allocate the tensors; sizes in bytes. Returns their addresses."""
        return {name: self._cuda.take(size) for name, size in sizes.items()}

    def _failed(self, what: str) -> EngineError:
        reason = f": {self._log.errors[0]}" if self._log.errors else ""
        return EngineError(f"{what}{reason}".rstrip(". ") + ".")

    def _require(self, plan: Plan, profile: Profile) -> None:
        """Raise EngineError unless the engine has the plan's tensors and this profile."""
        engine, trt = self._engine, self._trt
        actual = {}
        for number in range(engine.num_io_tensors):
            name = engine.get_tensor_name(number)
            actual[name] = (
                engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
                _dtype(trt, engine.get_tensor_dtype(name)),
            )
        wanted = {one.name: (True, one.dtype) for one in plan.inputs}
        wanted |= {one.name: (False, one.dtype) for one in plan.outputs}
        if actual != wanted:
            names = ", ".join(sorted(name for name in {*actual, *wanted} if actual.get(name) != wanted.get(name)))
            raise EngineError(f"The engine does not match the plan: {names} differ; build it again.")
        for name, shapes in profile.items():
            given = tuple(tuple(shape) for shape in engine.get_tensor_profile_shape(name, 0))
            if given != (shapes.min, shapes.opt, shapes.max):
                raise EngineError(
                    f"The engine has another profile: {name} goes from {given[0]} to {given[2]}, "
                    f"not from {shapes.min} to {shapes.max}; build it again."
                )

    def _make_context(self) -> Any:
        engine = self._engine
        if self._kernels is not None and hasattr(engine, "create_runtime_config"):
            config = engine.create_runtime_config()
            self._cache = config.create_runtime_cache()
            if self._kernels.is_file():
                self._cache.deserialize(self._kernels.read_bytes())  # it ignores kernels of another box or version
            config.set_runtime_cache(self._cache)
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context()
        if context is None:
            raise self._failed("The engine has no room in the GPU's memory; end other programs that use it")
        return context

    def _activations(self) -> int:
        """Bytes of the activations."""
        for name in ("device_memory_size_v2", "device_memory_size"):
            if hasattr(self._engine, name):
                return int(getattr(self._engine, name))
        return 0

    def _shaped(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Set the inputs' shapes. Returns the shape and type of every tensor. Raises EngineError."""
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise self._failed(f"The engine refuses {name} of {shape}")
        tensors = {}
        for name, kind in {**self._inputs, **self._outputs}.items():
            shape = tuple(self._context.get_tensor_shape(name))
            if min(shape, default=0) < 0:
                raise EngineError(f"The engine does not say how large {name} gets; build it again.")
            tensors[name] = (shape, kind)
        return tensors

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The outputs of one batch, in the engine's own types. Raises EngineError."""
        import numpy as np

        cuda = self._cuda
        cuda.use()
        self._log.errors = []
        arrays = {name: np.ascontiguousarray(inputs[name], kind) for name, kind in self._inputs.items()}
        shapes = self._shaped({name: array.shape for name, array in arrays.items()})
        for name, array in arrays.items():
            cuda.send(array, self._addresses[name])
        if not self._context.execute_async_v3(cuda.stream):
            raise self._failed("TensorRT failed")
        outputs = {name: np.empty(*shapes[name]) for name in self._outputs}
        for name, array in outputs.items():
            cuda.fetch(self._addresses[name], array)
        cuda.wait()
        return outputs

    def memory(self) -> int:
        """Known bytes on the device: weights, activations and buffers, without CUDA's own."""
        return self._held

    def save_kernels(self) -> None:
        """Save the kernels that TensorRT-RTX compiled, if there are new ones; the next start is faster."""
        if self._cache is None or self._kernels is None:
            return
        try:
            data = bytes(self._cache.serialize())
            if not self._kernels.is_file() or self._kernels.read_bytes() != data:
                write_atomically(self._kernels, data)
        except OSError as error:  # a full disk must not stop the server
            sys.stderr.write(f"{self._kernels} could not be written: {error}.\n")

    def close(self) -> None:
        """Free the engine. No computation may run any more."""
        if self._engine is not None:
            self._cuda.use()  # the caller may be another thread than the one that computed
        if self._context is not None:
            self.save_kernels()
        self._context = self._engine = self._cache = self._runtime = None
        self._cuda.close()


def _first(log: Any) -> str:
    return str(log.errors[0]) if log.errors else "it gives no reason"


def _bytes(shape: tuple[int, ...], kind: Any) -> int:
    size = int(kind.itemsize)
    for count in shape:
        size *= count
    return size


def _dtype(trt: Any, kind: Any) -> str:
    """numpy's name of a tensor's type; for other types TensorRT's name, which no plan has."""
    names = {"INT32": "int32", "INT64": "int64", "HALF": "float16", "FLOAT": "float32"}
    return next((plain for name, plain in names.items() if kind == getattr(trt.DataType, name, None)), str(kind))


def build(plan: Plan, number: int, goal: Path) -> None:
    """Build the engine of a profile with the Python interface, where there is no trtexec, into the file ``goal``.

    Raises EngineError with the library's own message.
    """
    trt = library(plan.library)
    log = make_log(trt, verbose=True)
    with Cuda():  # the builder's context; raises one sentence without a GPU
        builder = trt.Builder(log)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, log)
        if not parser.parse_from_file(str(plan.onnx)):
            errors = "; ".join(str(parser.get_error(place)) for place in range(parser.num_errors))
            raise EngineError(f"TensorRT does not read {plan.onnx.name}: {errors or _first(log)}")
        config = builder.create_builder_config()
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, plan.workspace)
        profile = builder.create_optimization_profile()
        for name, shapes in plan.profiles[number].items():
            profile.set_shape(name, shapes.min, shapes.opt, shapes.max)
        config.add_optimization_profile(profile)
        made = builder.build_serialized_network(network, config)
        if made is None:
            raise EngineError(f"TensorRT builds no engine: {_first(log)}")
        goal.write_bytes(bytes(made))
