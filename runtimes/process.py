"""This process: how its worker threads wait, its memory, and when it ends."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

SPINS = "1000"


def limit_spinning() -> None:
    """Make idle OpenMP threads sleep soon instead of spinning; call it before the engine's library is loaded.

    llama.cpp's threads wait at hundreds of barriers per token. When another program takes one of their cores, all other
    threads spin until that core is free. The user's own GOMP_SPINCOUNT and OMP_WAIT_POLICY are kept.
    """
    if "GOMP_SPINCOUNT" not in os.environ and "OMP_WAIT_POLICY" not in os.environ:
        os.environ["GOMP_SPINCOUNT"] = SPINS


def resident_bytes() -> int:
    """Resident set of this process in bytes; 0 where it is unknown."""
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


def release_freed_memory() -> None:
    """Return freed memory to the system, which glibc would keep: loading a model leaves much of it."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # musl has none
        trim(0)


def die_with_parent() -> None:
    """Called in a child before exec: the child ends when its parent is killed, and so frees its memory."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
