"""A stand-in for cuda.bindings.driver, for tests alone: "device" memory is this process's own.

GPU_DOUBLE holds the facts of the pretended device as JSON; without it there is no driver, as on a box without one.
"""

from __future__ import annotations

import ctypes
import json
import os
from types import SimpleNamespace

FACTS = json.loads(os.environ.get("GPU_DOUBLE", "{}"))
CUdevice_attribute = SimpleNamespace(
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76
)
CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
NAMES = {2: b"CUDA_ERROR_OUT_OF_MEMORY", 100: b"CUDA_ERROR_NO_DEVICE", 201: b"CUDA_ERROR_INVALID_CONTEXT"}
_memory: dict[int, object] = {}
_current: list[object] = []


def cuInit(flags):
    if not FACTS:  # what cuda-bindings raises where libcuda.so.1 is not there
        raise RuntimeError("Failed to dlopen libcuda.so.1")
    if FACTS.get("crash"):
        os.abort()
    return (FACTS.get("init", 0),)


def cuGetErrorName(status):
    return 0, NAMES.get(int(status), b"CUDA_ERROR_UNKNOWN")


def cuDeviceGetCount():
    return 0, FACTS.get("count", 1)


def cuDeviceGet(number):
    return 0, number


def cuDeviceGetAttribute(attribute, device):
    major, minor = FACTS["sm"].split(".")
    return 0, int(major if attribute == 75 else minor)


def cuDeviceGetName(length, device):
    return 0, FACTS["name"].encode().ljust(length, b"\0")


def cuDeviceTotalMem(device):
    return 0, FACTS["bytes"]


def cuDriverGetVersion():
    major, minor = FACTS["cuda"].split(".")
    return 0, int(major) * 1000 + int(minor) * 10


def cuDevicePrimaryCtxRetain(device):
    return 0, object()


def cuDevicePrimaryCtxRelease(device):
    return (0,)


def cuCtxSetCurrent(context):
    import threading

    _current.append(threading.get_ident())
    return (0,)


def _needs_context():
    import threading

    return 0 if threading.get_ident() in _current else 201  # each thread has its own, in CUDA


def cuStreamCreate(flags):
    return 0, 7


def cuStreamDestroy(stream):
    return (0,)


def cuStreamSynchronize(stream):
    return (_needs_context(),)


def cuMemAlloc(size):
    if size > FACTS.get("free", FACTS["bytes"]):
        return 2, None
    buffer = ctypes.create_string_buffer(size)
    _memory[ctypes.addressof(buffer)] = buffer
    return 0, ctypes.addressof(buffer)


def cuMemFree(address):
    del _memory[address]
    return (0,)


def _held(address, size):
    """Whether the address is of a buffer that is large enough: a real device would fault, or worse."""
    return address in _memory and size <= ctypes.sizeof(_memory[address])


def cuMemcpyHtoDAsync(address, source, size, stream):
    if _needs_context() or not _held(address, size):
        return (201,)
    ctypes.memmove(address, source, size)
    return (0,)


def cuMemcpyDtoHAsync(goal, address, size, stream):
    if _needs_context() or not _held(address, size):
        return (201,)
    ctypes.memmove(goal, address, size)
    return (0,)
