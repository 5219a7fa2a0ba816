"""Facts of the machine for the benchmark: memory bandwidth, memory of a process tree, load, versions. Stdlib only."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import threading
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from runtimes.preflight.check import read_facts

MIB = 1 << 20
METHOD = (
    "read: memchr(3) for a byte that is not there, over one private buffer a thread, all threads at once, "
    "best of {passes} passes; {mib} MiB in all"
)


def physical_cores() -> int:
    """Physical cores that this process may use; logical cores where that is unknown."""
    allowed = getattr(os, "sched_getaffinity", lambda _pid: set(range(os.cpu_count() or 1)))(0)
    cores = set()
    for cpu in allowed:
        try:
            siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text("ascii")
        except OSError:
            return len(allowed)
        cores.add(siblings.strip())
    return len(cores)


def last_level_cache() -> int | None:
    """Bytes of the largest cache of the first processor; None when unknown."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        if match := re.fullmatch(r"(\d+)([KMG]?)", file.read_text("ascii").strip()):
            sizes.append(int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]])
    return max(sizes, default=None)


def bandwidth(threads: int, *, total_bytes: int | None = None, passes: int = 7) -> dict[str, Any]:
    """Bytes per second that ``threads`` threads read from memory together.

    Decoding is bound by reading: it reads all weights once per token. The buffers are several times the caches, and are
    written first, because untouched pages are all the same page of zeros.
    """
    threads = max(1, threads)
    if total_bytes is None:
        available = read_facts().get("ram_available_bytes") or 2048 * MIB
        total_bytes = max(256 * MIB, min(4 * (last_level_cache() or 32 * MIB), 2048 * MIB))
        total_bytes = max(64 * MIB, min(total_bytes, available // 4))
    size = total_bytes // threads // MIB * MIB or MIB
    library = ctypes.CDLL("msvcrt" if os.name == "nt" else None)
    library.memchr.restype = ctypes.c_void_p
    library.memchr.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    start = threading.Barrier(threads + 1)
    end = threading.Barrier(threads + 1)

    def work() -> None:
        buffer = ctypes.create_string_buffer(size)
        ctypes.memset(buffer, 1, size)
        for _ in range(passes):
            start.wait()
            library.memchr(buffer, 2, size)  # ctypes releases the GIL meanwhile
            end.wait()

    workers = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
    for worker in workers:
        worker.start()
    rates = []
    for _ in range(passes):
        start.wait()
        began = time.perf_counter()
        end.wait()
        rates.append(size * threads / (time.perf_counter() - began))
    for worker in workers:
        worker.join()
    return {
        "bytes_per_second": max(rates),
        "threads": threads,
        "passes": [round(rate) for rate in rates],
        "method": METHOD.format(passes=passes, mib=size * threads // MIB),
    }


def tree(pid: int) -> Iterator[int]:
    """A process and all its descendants (Linux; elsewhere only itself)."""
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text("ascii").split()
        except OSError:  # it ended meanwhile
            continue
        for child in children:
            yield from tree(int(child))


def process_memory(pid: int) -> dict[str, int | None]:
    """Memory of a process tree in bytes. peak_rss: the sum of each process's highest resident memory (VmHWM).
    pss: its memory now, with shared pages divided among their users. None where unknown."""
    peak = pss = 0
    known_peak = known_pss = False
    for one in tree(pid):
        if (value := _field(Path(f"/proc/{one}/status"), "VmHWM")) is not None:
            peak, known_peak = peak + value, True
        if (value := _field(Path(f"/proc/{one}/smaps_rollup"), "Pss")) is not None:
            pss, known_pss = pss + value, True
    return {"peak_rss_bytes": peak if known_peak else None, "pss_bytes": pss if known_pss else None}


def _field(file: Path, name: str) -> int | None:
    """A "Name:  123 kB" line, in bytes."""
    try:
        match = re.search(rf"^{name}:\s+(\d+) kB$", file.read_text("ascii", "replace"), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None


def load_average() -> list[float] | None:
    """Runnable processes over the last 1, 5 and 15 minutes; None where unknown."""
    try:
        return [round(value, 2) for value in os.getloadavg()]
    except (AttributeError, OSError):
        return None


def machine() -> dict[str, Any]:
    """The facts of the machine that figures depend on. No host name, no user."""
    facts = read_facts()
    return {
        "system": facts["system"],
        "machine": facts["machine"],
        "processor": _processor(),
        "logical_cores": os.cpu_count(),
        "physical_cores": physical_cores(),
        "ram_bytes": facts["ram_bytes"],
        "last_level_cache_bytes": last_level_cache(),
        "kernel": platform.release(),
        "glibc": facts["glibc"],
    }


def _processor() -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:
        return platform.processor() or None
    match = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else None


def versions() -> dict[str, str]:
    """The versions of Python and of every installed package."""
    packages = {dist.metadata["Name"]: dist.version for dist in metadata.distributions()}
    return {"python": platform.python_version(), **dict(sorted(packages.items(), key=lambda item: item[0].lower()))}
