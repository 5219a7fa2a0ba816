"""Memory at the same addresses in every process, by processes that only look where theirs lies."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from packager.formats.tensorrt.compiler import ENVIRONMENT
from packager.workers import fixed_addresses
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() != "x86_64", reason="for Linux on x86-64"
)
LOOK = """
import ctypes
from packager.workers.fixed_addresses import call, one_thread
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
def places(_):
    with one_thread():
        processors = libc.get_nprocs()
    return [*(libc.malloc(size) for size in (40, 5000, 1 << 20, 40)), processors]
print(call(lambda: None, places))
"""


def look(**environment: str) -> str:
    """What a fresh process finds."""
    outside = {key: value for key, value in os.environ.items() if key not in ENVIRONMENT}
    done = subprocess.run(
        [sys.executable, "-c", LOOK],
        env={**outside, "PYTHONPATH": str(ROOT), **environment},
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


def test_addresses_are_the_same_whatever_was_there_before() -> None:
    """Another environment and hash seed, and random addresses of libraries: small and large pieces lie as before."""
    first = look(**ENVIRONMENT)
    assert first.endswith("1], True)"), first
    assert look(**ENVIRONMENT, PYTHONHASHSEED="7", OTHER="x" * 3000) == first


def test_a_process_without_arenas_of_its_threads_says_so() -> None:
    """With one arena for all, memory lies where the kernel put the heap; the result reports that."""
    assert look(MALLOC_ARENA_MAX="1").endswith("False)")


@pytest.mark.parametrize(
    ("name", "version", "keeps"),
    [("glibc", "2.36", True), ("glibc", "2.30", True), ("glibc", "2.28", False), ("glibc", "", False), ("", "", False)],
)
def test_a_c_library_that_shares_what_is_given_back_is_not_trusted(name: str, version: str, keeps: bool) -> None:
    assert fixed_addresses.keeps_small_pieces(name, version) is keeps


def test_what_fails_inside_is_raised_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fixed_addresses, "reserve", lambda: False)  # this process goes on with other tests

    def fails(_: None) -> None:
        raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fixed_addresses.call(lambda: None, fails)
