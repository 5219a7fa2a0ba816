"""Reads the GPUs from NVIDIA's driver libraries and prints them as JSON; run as a child, because they may crash.

libcuda gives the CUDA version and each device's name, compute capability and memory as this process would see them (of
a GPU with MIG: the slice). NVML gives the driver's version and the free memory. What cannot be read is left out. No
CUDA context is made, so nothing is allocated on the GPU.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from typing import Any

MAJOR, MINOR, INTEGRATED = 75, 76, 18  # CUdevice_attribute of cuda.h


class _Memory(ctypes.Structure):  # nvmlMemory_t
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


def cuda() -> dict[str, Any]:
    """``cuda_driver`` and ``gpus``: {"name", "capability", "bytes", "unified"}. Raises OSError without the library."""
    library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    facts: dict[str, Any] = {}
    number = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(number)) == 0 and number.value > 0:
        facts["cuda_driver"] = f"{number.value // 1000}.{number.value % 1000 // 10}"
    if library.cuInit(0) != 0 or library.cuDeviceGetCount(ctypes.byref(number)) != 0:
        return facts
    gpus: list[dict[str, Any]] = []
    for index in range(number.value):
        device, size, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(96)
        if library.cuDeviceGet(ctypes.byref(device), index) != 0:
            continue
        values: dict[int, int] = {}
        for attribute in (MAJOR, MINOR, INTEGRATED):
            value = ctypes.c_int()
            if library.cuDeviceGetAttribute(ctypes.byref(value), attribute, device) == 0:
                values[attribute] = value.value
        named = library.cuDeviceGetName(name, len(name), device) == 0
        sized = library.cuDeviceTotalMem_v2(ctypes.byref(size), device) == 0
        gpus.append(
            {
                "name": name.value.decode("utf-8", "replace") if named else None,
                "capability": f"{values[MAJOR]}.{values[MINOR]}" if MAJOR in values and MINOR in values else None,
                "bytes": size.value if sized else None,
                "unified": bool(values[INTEGRATED]) if INTEGRATED in values else None,
            }
        )
    return {**facts, "gpus": gpus}


def nvml() -> dict[str, Any]:
    """``driver`` and ``free``: free bytes of each GPU, None where unknown. Raises OSError without the library."""
    library = ctypes.CDLL("nvml.dll" if os.name == "nt" else "libnvidia-ml.so.1")
    if library.nvmlInit_v2() != 0:
        return {}
    facts: dict[str, Any] = {}
    version, count = ctypes.create_string_buffer(96), ctypes.c_uint()
    if library.nvmlSystemGetDriverVersion(version, ctypes.c_uint(len(version))) == 0:
        facts["driver"] = version.value.decode("ascii", "replace")
    if library.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0:
        free: list[Any] = []
        for index in range(count.value):
            handle, memory = ctypes.c_void_p(), _Memory()
            there = library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)) == 0
            known = there and library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) == 0
            free.append(memory.free if known else None)
        facts["free"] = free
    return facts


def main() -> int:
    """Print the facts of both libraries."""
    facts: dict[str, Any] = {}
    for read in (nvml, cuda):
        try:
            facts.update(read())
        except (OSError, AttributeError):  # no such library, or it lacks a function
            facts.setdefault("silent", []).append(read.__name__)
    json.dump(facts, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
