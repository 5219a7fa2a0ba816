"""A stand-in for TensorRT's Python package, for tests alone, never for users: engines are JSON files that name an ONNX,
and are run by onnxruntime on the CPU, or echo their token ids where the "ONNX" is the word echo. The parts of the real
interface that runtimes/engines/tensorrt/session.py uses, with its checks: an engine of another device or version is
refused in the library's own words, shapes outside the profile are refused, addresses must have been given.
"""

from __future__ import annotations

import ctypes
import enum
import json
import os
from pathlib import Path

FACTS = json.loads(os.environ.get("GPU_DOUBLE", "{}"))
__version__ = FACTS.get("tensorrt", "10.3.0.30")


class TensorIOMode(enum.Enum):
    NONE, INPUT, OUTPUT = 0, 1, 2


class DataType(enum.Enum):
    FLOAT, HALF, INT8, INT32, INT64 = 0, 1, 2, 3, 8


KINDS = {"float32": DataType.FLOAT, "float16": DataType.HALF, "int32": DataType.INT32, "int64": DataType.INT64}


class ILogger:
    class Severity(enum.Enum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = 0, 1, 2, 3, 4

    def __init__(self):
        self.made = True


class Runtime:
    def __init__(self, logger):
        assert logger.made, "the logger's own __init__ must be called"
        self.logger = logger

    def deserialize_cuda_engine(self, data):
        try:
            plain = json.loads(data)
        except ValueError:
            return self._refuse("Serialization assertion failed: magicTag does not match")
        if plain["sm"] != FACTS["sm"]:
            return self._refuse(
                "IRuntime::deserializeCudaEngine: Error Code 6: API Usage Error (The engine plan file is generated on "
                f"an incompatible device, expecting compute {FACTS['sm']} got compute {plain['sm']}, please rebuild.)"
            )
        if plain["version"] != FACTS["tensorrt"]:
            return self._refuse(
                "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Serialization assertion stdVersionRead "
                "== kSERIALIZATION_VERSION failed.Version tag does not match.)"
            )
        return Engine(plain)

    def _refuse(self, words):
        self.logger.log(ILogger.Severity.ERROR, words)


class Engine:
    device_memory_size_v2 = 1000

    def __init__(self, plain):
        self.profile = {name: tuple(map(tuple, shapes)) for name, shapes in plain["profile"].items()}
        self.path = Path(plain["onnx"])
        self.session = None
        if plain["onnx"] == "echo" or self.path.read_bytes()[:4] == b"echo":
            self.inputs = {name: "int64" for name in self.profile}
            self.outputs = {"states": "float16"}
        else:
            import onnxruntime

            self.session = onnxruntime.InferenceSession(str(self.path), providers=["CPUExecutionProvider"])
            types = {
                "tensor(int64)": "int64",
                "tensor(int32)": "int32",
                "tensor(float)": "float32",
                "tensor(float16)": "float16",
            }
            self.inputs = {one.name: types[one.type] for one in self.session.get_inputs()}
            self.outputs = {one.name: types[one.type] for one in self.session.get_outputs()}
        self.names = [*self.inputs, *self.outputs]
        self.num_io_tensors = len(self.names)

    def get_tensor_name(self, number):
        return self.names[number]

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return KINDS[{**self.inputs, **self.outputs}[name]]

    def get_tensor_profile_shape(self, name, number):
        assert number == 0
        return [list(shape) for shape in self.profile[name]]

    def create_execution_context(self):
        return Context(self)


class Context:
    def __init__(self, engine):
        self.engine, self.shapes, self.addresses = engine, {}, {}

    def set_input_shape(self, name, shape):
        low, _, high = self.engine.profile[name]
        if any(not a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            return False
        self.shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name):
        if name in self.shapes:
            return self.shapes[name]
        batch, length = self.shapes["input_ids"]
        if self.engine.session is None:
            return batch, length, 2
        (output,) = self.engine.session.get_outputs()
        return tuple(
            {0: batch, 1: length}.get(place, size) if isinstance(size, str) or size is None else size
            for place, size in enumerate(output.shape)
        )

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def _array(self, name, kind):
        import numpy as np

        shape = self.get_tensor_shape(name)
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        buffer = (ctypes.c_char * size).from_address(self.addresses[name])
        return np.frombuffer(buffer, kind).reshape(shape)

    def execute_async_v3(self, stream):
        import numpy as np

        assert stream == 7
        given = {name: self._array(name, kind) for name, kind in self.engine.inputs.items()}
        if self.engine.session is None:
            ids = given["input_ids"].astype(np.float16)
            made = [np.stack([ids, np.ones_like(ids)], axis=2)]
        else:
            made = self.engine.session.run(None, given)
        for (name, kind), array in zip(self.engine.outputs.items(), made, strict=True):
            assert array.dtype == kind and array.shape == self.get_tensor_shape(name)
            self._array(name, kind)[...] = array
        return True


class NetworkDefinitionCreationFlag(enum.IntEnum):
    EXPLICIT_BATCH, STRONGLY_TYPED = 0, 1


class MemoryPoolType(enum.Enum):
    WORKSPACE = 0


class Builder:
    def __init__(self, logger):
        assert logger.made

    def create_network(self, flags):
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return {}

    def create_builder_config(self):
        return Config()

    def create_optimization_profile(self):
        return Shapes()

    def build_serialized_network(self, network, config):
        return json.dumps(
            {
                "sm": FACTS["sm"],
                "version": FACTS["tensorrt"],
                "onnx": network["onnx"],
                "profile": config.profile.shapes,
                "workspace": config.workspace,
            }
        ).encode()


class Config:
    def set_memory_pool_limit(self, pool, size):
        assert pool is MemoryPoolType.WORKSPACE
        self.workspace = size

    def add_optimization_profile(self, profile):
        self.profile = profile


class Shapes:
    def __init__(self):
        self.shapes = {}

    def set_shape(self, name, low, likely, high):
        self.shapes[name] = [low, likely, high]


class OnnxParser:
    num_errors = 0

    def __init__(self, network, logger):
        self.network = network

    def parse_from_file(self, path):
        self.network["onnx"] = path
        return True
