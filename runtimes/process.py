"""This process: how its worker threads wait, what memory it holds, and when it ends."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

SPINS = "1000"


def wait_politely() -> None:
    """Let OpenMP threads sleep soon instead of spinning; call it before the engine's library is loaded.

    llama.cpp's threads meet at hundreds of barriers a token. Where another program takes one of their cores, all others
    spin until it is given back. The user's own settings (GOMP_SPINCOUNT, OMP_WAIT_POLICY) are left alone.
    """
    if "GOMP_SPINCOUNT" not in os.environ and "OMP_WAIT_POLICY" not in os.environ:
        os.environ["GOMP_SPINCOUNT"] = SPINS


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


def die_with_parent() -> None:
    """In the child, before it becomes the server: end when the benchmark is killed, else it would hold the memory."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
