"""What this process takes, for /metrics."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path


def resident_bytes() -> int:
    """Resident set of this process in bytes; 0 where the system does not tell."""
    try:
        with Path("/proc/self/statm").open(encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        pass
    try:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    except ImportError:
        return 0


def give_back() -> None:
    """Return freed memory to the system, where glibc would keep it: what loading a model leaves behind."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # musl has none
        trim(0)
