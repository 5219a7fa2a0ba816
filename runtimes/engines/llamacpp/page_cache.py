"""Bounds resident memory while a large mapped model is read: drops its pages, which stay in the page cache. Linux only.

llama.cpp maps the file with MAP_POPULATE, so all of it becomes resident during loading. With
``mlockall(MCL_FUTURE | MCL_ONFAULT)`` the kernel does not populate (mm/gup.c: it never prefaults a VM_LOCKONFAULT
mapping); the lock is released right after. That needs CAP_IPC_LOCK or a memory lock limit above the file's size.
Without it the watcher drops pages while the kernel populates them; the pages are clean and shared in any case.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

WATCH_SECONDS = 0.005
MCL_FUTURE, MCL_ONFAULT = 2, 4


@contextlib.contextmanager
def bounded_memory(model: Path, ceiling: int | None) -> Iterator[Callable[[], None]]:
    """Keep resident memory near ``ceiling`` bytes. Yields a function to call once the model is mapped.

    Does nothing without a ceiling, and on other systems than Linux. Reading a dropped page again costs a minor fault
    and, while the page cache has the file, no disk read.
    """
    if ceiling is None or not sys.platform.startswith("linux"):
        yield lambda: None
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    _no_populating(libc, model)
    stop = threading.Event()
    watcher = threading.Thread(target=_watch, args=(libc, model.resolve(), int(ceiling), stop), daemon=True)
    watcher.start()
    try:
        yield libc.munlockall
    finally:
        libc.munlockall()
        stop.set()
        watcher.join()


def _no_populating(libc: ctypes.CDLL, model: Path) -> None:
    if libc.mlockall(MCL_FUTURE | MCL_ONFAULT) != 0:
        return
    try:
        with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
            return  # a mapping of this size is allowed
    except OSError:
        libc.munlockall()  # above the limit: llama.cpp's own mapping would fail too


def _watch(libc: ctypes.CDLL, model: Path, ceiling: int, stop: threading.Event) -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    statm = Path("/proc/self/statm")
    while not stop.wait(WATCH_SECONDS):
        if int(statm.read_text(encoding="ascii").split()[1]) * page > ceiling:
            for start, size in mappings(model):
                # read-only pages of a shared file mapping: dropping them loses nothing
                libc.madvise(start, size, mmap.MADV_DONTNEED)


def mappings(model: Path) -> list[tuple[int, int]]:
    """Start address and size in bytes of this process's read-only mappings of the file, from /proc/self/maps."""
    ranges = []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[1].startswith("r-") and fields[5] == str(model):
            start, end = (int(part, 16) for part in fields[0].split("-"))
            ranges.append((start, end - start))
    return ranges
