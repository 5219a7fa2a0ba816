"""The facts of a box, as plain JSON: system, Python, memory, disk, and NVIDIA's GPUs, CUDA, TensorRT and JetPack.

None means that a fact could not be read, "" or [] that the thing is known to be absent; nothing is guessed. Standard
library only; runs from a bundle before anything is installed, on Python 3.8 too.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import shutil
import struct
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from runtimes.preflight import jetson as box_jetson
from runtimes.preflight import nvidia, vllm
from runtimes.preflight.sources import Box

VERSION = 1
MACHINES = {"amd64": "x86_64", "x64": "x86_64"}
# Standard library modules that the installer and the server need and some Linux distributions leave out.
NEEDED_MODULES = ("venv", "zlib", "ctypes")


def read_facts(prefix: Path | None = None, *, programs: bool = True, box: Box | None = None) -> dict[str, Any]:
    """Every fact. Memory and disk in bytes; disk is the free space where ``prefix`` is, or would be made.

    programs: also run nvidia-smi and the like, which takes seconds; without them a GPU stays unknown.
    box: a recorded box instead of this one.
    """
    box = box or Box()
    facts: dict[str, Any] = {"facts_version": VERSION, **(box.process if box.recorded else process_facts(prefix))}
    facts["os"] = os_name(box)
    total, available = memory(box)
    facts.update(ram_bytes=total, ram_available_bytes=available, container=container(box), wsl=wsl(box))
    packages = nvidia.installed(box)
    jetson = box_jetson.read_facts(box, packages, programs=programs)
    facts.update(jetson)
    facts.update(tensorrt=nvidia.tensorrt(box, packages), cuda_toolkit=nvidia.toolkit(box, packages))
    if programs:
        facts.update(nvidia.read_facts(box, jetson, (total, available)))
        if not box.recorded:
            program = vllm.find_vllm()
            facts["vllm"] = "" if program is None else vllm.vllm_version(program)
    return facts


def process_facts(prefix: Path | None) -> dict[str, Any]:
    """The facts that only a running Python can read: itself, its system and the disk."""
    system = {"Linux": "linux", "Windows": "windows", "Darwin": "macos"}.get(platform.system())
    machine = platform.machine().lower()
    libc, glibc = c_library() if system == "linux" else (None, None)
    return {
        "system": system,
        "machine": MACHINES.get(machine, machine) or None,
        "bits": struct.calcsize("P") * 8,
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "free_threaded": bool(getattr(sys, "_is_gil_enabled", lambda: True)() is False),
        "modules_missing": [name for name in NEEDED_MODULES if find_spec(name) is None],
        "libc": libc,
        "glibc": glibc,
        "disk_free_bytes": disk_free(prefix) if prefix is not None else None,
    }


def c_library() -> tuple[str | None, str | None]:
    """Name of the C library and glibc's version, each None when unknown."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (AttributeError, ValueError, OSError):
        name, version = "", ""
    if name == "glibc" and version:
        return "glibc", version
    if any(Path("/lib").glob("ld-musl-*.so.1")):
        return "musl", None
    return None, None


def memory(box: Box) -> tuple[int | None, int | None]:
    """Total and available bytes of memory. A container's limit counts as the machine's total."""
    if not box.recorded and sys.platform == "win32":
        return _windows_memory()
    total: int | None = None
    if not box.recorded:
        try:
            total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):  # a system without these names
            total = None
    text = box.text("/proc/meminfo") or ""
    sizes = {name: int(count) * 1024 for name, count in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
    total, available = sizes.get("MemTotal", total), sizes.get("MemAvailable")
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        limit = box.number(name)  # None where there is no such file, or it holds "max"
        if limit is not None:
            total = limit if total is None else min(total, limit)
            available = available if available is None else min(available, limit)
    return total, available


def _windows_memory() -> tuple[int | None, int | None]:
    class Status(ctypes.Structure):  # MEMORYSTATUSEX
        _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong)] + [
            (name, ctypes.c_ulonglong) for name in ("total", "available", "c", "d", "e", "f", "g")
        ]

    status = Status()
    status.length = ctypes.sizeof(Status)
    kernel = getattr(ctypes, "windll", None)
    if kernel is None or not kernel.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None, None
    return int(status.total), int(status.available)


def disk_free(prefix: Path) -> int | None:
    """Bytes free for this user on the disk where the folder is or would be made."""
    place = prefix.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return None


def os_name(box: Box) -> str | None:
    """The system's own name for itself, as "Ubuntu 22.04.5 LTS"."""
    if not box.recorded and sys.platform != "linux":
        return f"{platform.system()} {platform.release()}".strip() or None
    match = re.search(r'^PRETTY_NAME="?([^"\n]+)"?$', box.text("/etc/os-release") or "", re.MULTILINE)
    return match[1] if match else None


def container(box: Box) -> str:
    """The kind of container that this runs in, by each kind's marks; "" for none of them."""
    if box.exists("/run/.containerenv"):
        return "podman"
    if box.exists("/.dockerenv"):
        return "docker"
    named = box.text("/run/systemd/container")
    groups = box.text("/proc/1/cgroup") or ""
    mark = re.search(r"kubepods|docker|lxc|containerd", groups)
    return named or (mark[0] if mark else "")


def wsl(box: Box) -> bool:
    """Whether this Linux is a guest of Windows (WSL)."""
    return "microsoft" in (box.text("/proc/sys/kernel/osrelease") or "").lower()


# The types of recorded facts, so that a wrong edit by hand gets a clear error.
KINDS: dict[str, tuple[type, ...]] = {
    "system": (str,), "machine": (str,), "bits": (int,), "python": (str,), "implementation": (str,),
    "free_threaded": (bool,), "modules_missing": (list,), "libc": (str,), "glibc": (str,), "disk_free_bytes": (int,),
    "os": (str,), "ram_bytes": (int,), "ram_available_bytes": (int,), "container": (str,), "wsl": (bool,),
    "jetson_model": (str,), "jetson_module": (str,), "soc": (str,), "l4t": (str,), "jetpack": (str,),
    "power_mode": (str,), "power_modes": (list,), "gpu_clock_least_hz": (int,), "gpu_clock_most_hz": (int,),
    "tensorrt": (str,), "cuda_toolkit": (str,), "gpus": (list,), "driver": (str,), "cuda_driver": (str,),
    "card_without_driver": (bool,), "gpus_unknown_because": (str,), "vllm": (str,), "facts_version": (int,),
}  # fmt: skip
OF_A_GPU: dict[str, tuple[type, ...]] = {
    "name": (str,), "capability": (str,), "bytes": (int,), "free_bytes": (int,), "mig": (bool,), "unified": (bool,)
}  # fmt: skip


def recorded_facts(file: Path) -> dict[str, Any]:
    """Facts that ``--facts-only`` wrote. Raises ValueError with one sentence when the file holds anything else."""
    try:
        facts = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as recorded facts ({error}); make it with --facts-only.") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{file} holds no facts of a box; record them with --facts-only.")
    _check(facts, KINDS, file, "")
    for number, one in enumerate(facts.get("gpus") or []):
        if not isinstance(one, dict):
            raise ValueError(f"{file}: gpus[{number}] has to be an object; record the facts again with --facts-only.")
        _check(one, OF_A_GPU, file, f"gpus[{number}].")
    return facts


def _check(facts: dict[str, Any], kinds: dict[str, tuple[type, ...]], file: Path, place: str) -> None:
    for name, kind in kinds.items():
        value = facts.get(name)
        if value is not None and (not isinstance(value, kind) or (isinstance(value, bool) and bool not in kind)):
            raise ValueError(
                f"{file}: {place}{name} has to be {kind[0].__name__} or null, and is {value!r}; "
                "record the facts again with --facts-only."
            )
