"""Calls a library whose output hangs on where its objects lie, so that they lie at the same addresses each time.

TensorRT-RTX 1.7.1 keeps symbolic lengths in an order that comes from their addresses, and numbers them in that order:
its engine hung on the kernel's random addresses and on all that had been allocated before. glibc gives every thread an
arena of its own, at a multiple of 64 MiB. So all address space above a fixed address is reserved first (nothing is ever
stored in it), holes between libraries as well; what is mapped afterwards lies below it, one after the other. One thread
loads the library and another, whose arena is still empty, calls it. The library has threads of its own, which take
memory of their own and give back some of the caller's: small pieces stay with the thread that gives them back
(packager/formats/tensorrt/compiler.py's ENVIRONMENT), and on one processor, where a thread that wakes does not take it
from the one that runs (SCHED_BATCH), the rest has an order. This takes no right and no outside program, unlike a
process without random addresses (personality(2)), which a container may not start.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Library = TypeVar("Library")
Result = TypeVar("Result")

# 2 TiB under the top of a process: random addresses begin at most 1 TiB and a stack's limit under the top.
BELOW = 0x7E00_0000_0000
PAGE, LARGEST = 4096, 64 << 20  # bytes; LARGEST: a thread's stack, and more than any hole between libraries
PRIVATE, ANONYMOUS, NO_RESERVE = 0x02, 0x20, 0x4000  # mmap's, on Linux
SCHED_SETATTR, ATTRIBUTES = 314, "IIQiIQQQII"  # a system call's number on x86-64, and its struct sched_attr
SLICE = 100_000_000  # nanoseconds, the most that Linux takes (from 6.12): what a thread runs before another's turn
ARENA, EMPTY = 64 << 20, 64 << 10  # bytes: an arena begins at a multiple of the one, and less than the other is used


def keeps_small_pieces(name: str, version: str) -> bool:
    """Whether this C library takes ENVIRONMENT's number of pieces that a thread keeps: glibc from 2.30 on."""
    return name == "glibc" and tuple(int(part) for part in re.findall(r"\d+", version)[:2]) >= (2, 30)


def reserve() -> bool:
    """Take the address space above BELOW; False where the system does not let us, or is not one that this is for."""
    if platform.system() != "Linux" or platform.machine() != "x86_64" or not keeps_small_pieces(*platform.libc_ver()):
        return False
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    failed = int(ctypes.c_void_p(-1).value or 0)

    def take(size: int) -> int:
        return int(libc.mmap(None, size, 0, PRIVATE | ANONYMOUS | NO_RESERVE, -1, 0))

    lowest = take(LARGEST)
    if lowest == failed or lowest < BELOW or (lowest > BELOW and take(lowest - BELOW) != BELOW):
        return False
    size = LARGEST
    while size >= PAGE:
        place = take(size)
        if place == failed:
            return False
        if place < BELOW:
            libc.munmap(place, size)
            size //= 2
    return True


def in_new_arena() -> bool:
    """Whether this thread's memory comes from an arena under BELOW that nothing was taken from before."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    libc.free.argtypes = (ctypes.c_void_p,)
    place = int(libc.malloc(4 * PAGE))  # larger than what a thread keeps for itself
    libc.free(place)
    return place < BELOW and place % ARENA < EMPTY


def take_turns() -> bool:
    """From here on, a thread of this one's that wakes does not take the processor from one that runs, for a while."""
    size = struct.calcsize(ATTRIBUTES)
    asked = struct.pack(ATTRIBUTES, size, os.SCHED_BATCH, 0, os.nice(0), 0, SLICE, 0, 0, 0, 0)
    return int(ctypes.CDLL(None).syscall(SCHED_SETATTR, 0, ctypes.create_string_buffer(asked, size), 0)) == 0


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, a library that asks the C library for the number of processors is told one, and opens no file.

    Threads that run at once allocate in an order that hangs on their luck. glibc reads the number from /sys and /proc,
    and where it can open neither counts the processors that the process may run on (getsysstats.c).
    """
    if platform.system() != "Linux":
        yield
        return
    import resource

    allowed, files = os.sched_getaffinity(0), resource.getrlimit(resource.RLIMIT_NOFILE)
    os.sched_setaffinity(0, {ctypes.CDLL(None).sched_getcpu()})
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, files[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, files)
        os.sched_setaffinity(0, allowed)


def call(load: Callable[[], Library], work: Callable[[Library], Result]) -> tuple[Result, bool]:
    """What ``work`` gives for what ``load`` gives, and whether addresses were settled for it. Raises what they raise.

    ``work`` must not name a path whose length is another on another machine: names are allocated like all else. The
    process began with packager/formats/tensorrt/compiler.py's ENVIRONMENT.
    """
    reserved = reserve()
    if reserved:
        threading.stack_size(LARGEST)
    settled: list[bool] = []
    loaded, finished = threading.Event(), threading.Event()
    library: list[Library] = []
    results: list[Result] = []
    faults: list[BaseException] = []

    def first() -> None:
        try:
            library.append(load())
        except BaseException as fault:  # raised below, by the thread that asked
            faults.append(fault)
        loaded.set()
        finished.wait()  # an arena whose thread ended is given to the next one

    def second() -> None:
        settled.append(reserved and in_new_arena() and take_turns())
        try:
            results.append(work(library[0]))
        except BaseException as fault:
            faults.append(fault)

    loader = threading.Thread(target=first)
    loader.start()
    loaded.wait()
    if not faults:
        worker = threading.Thread(target=second)
        worker.start()
        worker.join()
    finished.set()
    loader.join()
    if faults:
        raise faults[0]
    return results[0], settled[0]
