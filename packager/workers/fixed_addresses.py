"""Fixes heap addresses so that TensorRT-RTX output is reproducible.

TensorRT-RTX 1.7.1 numbers symbolic lengths in the order of their addresses, so its engine depended on the kernel's
random addresses and on all earlier allocations. glibc gives every thread its own arena, at a multiple of 64 MiB. This
module first reserves all address space above a fixed address, holes between libraries included, without storing
anything there; later mappings are below it, one after the other. One thread loads the library and another, whose arena
is still empty, calls it. The library's own threads allocate memory and free some of the caller's: small blocks stay
with the thread that frees them (packager/formats/tensorrt/compiler.py's ENVIRONMENT), and on one processor, where a
waking thread does not preempt the running one (SCHED_BATCH), the other allocations have a fixed order. This needs no
privilege and no outside program, unlike a process without random addresses (personality(2)), which a container may not
start.
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
SLICE = 100_000_000  # nanoseconds a thread runs before another's turn; the most that Linux accepts (from 6.12)
ARENA, EMPTY = 64 << 20, 64 << 10  # bytes: an arena's alignment, and the most that an empty one uses


def keeps_small_pieces(name: str, version: str) -> bool:
    """Whether this C library accepts ENVIRONMENT's tcache_count: glibc from 2.30 on."""
    return name == "glibc" and tuple(int(part) for part in re.findall(r"\d+", version)[:2]) >= (2, 30)


def reserve() -> bool:
    """Reserve the address space above BELOW; False on another system than Linux x86-64 with glibc, or when refused."""
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
    """Whether this thread allocates from an arena under BELOW that was not used before."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    libc.free.argtypes = (ctypes.c_void_p,)
    place = int(libc.malloc(4 * PAGE))  # larger than a block that a thread keeps in its cache
    libc.free(place)
    return place < BELOW and place % ARENA < EMPTY


def take_turns() -> bool:
    """Set SCHED_BATCH for this thread and its children: a waking thread does not preempt the running one for SLICE."""
    size = struct.calcsize(ATTRIBUTES)
    attributes = struct.pack(ATTRIBUTES, size, os.SCHED_BATCH, 0, os.nice(0), 0, SLICE, 0, 0, 0, 0)
    return int(ctypes.CDLL(None).syscall(SCHED_SETATTR, 0, ctypes.create_string_buffer(attributes, size), 0)) == 0


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, the C library reports one processor and the process opens no file.

    Threads that run at once allocate in a random order. glibc reads the number of processors from /sys and /proc, and
    counts those that the process may run on when it can open neither (getsysstats.c).
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
    """(result of ``work`` on the result of ``load``, whether addresses were fixed). Raises their errors.

    ``work`` must not use a path whose length differs between machines, because names are allocated too. The process
    must have packager/formats/tensorrt/compiler.py's ENVIRONMENT.
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
        except BaseException as fault:  # raised again in the calling thread
            faults.append(fault)
        loaded.set()
        finished.wait()  # the arena of a thread that ended would be reused by the next one

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
