"""The unit ring's rules, enforced: no network, no heavy imports, no bare print, nothing outside the test's own
folders.
"""

from __future__ import annotations

import builtins
import ipaddress
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HEAVY = ("torch", "transformers")
TALKERS = (
    "packager.cli.console",
    "packager.workers",
)  # the console's owner, and scripts that run in a child of their own


@pytest.fixture(scope="module", autouse=True)  # not the session: it would outlast the ring and blind the real one
def own_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Caches of a unit test lie in the session's folder, and children have no package index."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    patch.setenv("PIP_NO_INDEX", "1")
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection to anything but this machine fails the test."""
    real_connect, real_connect_ex, real_lookup = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def check(address: Any) -> None:
        if isinstance(address, tuple) and not _loopback(str(address[0])):
            raise AssertionError(f"a unit test tried to reach {address[0]}")

    def connect(self: socket.socket, address: Any) -> None:
        check(address)
        return real_connect(self, address)

    def connect_ex(self: socket.socket, address: Any) -> int:
        check(address)
        return real_connect_ex(self, address)

    def lookup(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host is not None and not _loopback(host.decode() if isinstance(host, bytes) else str(host)):
            raise AssertionError(f"a unit test tried to look up {host}")
        return real_lookup(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket.socket, "connect_ex", connect_ex)
    monkeypatch.setattr(socket, "getaddrinfo", lookup)


def _loopback(host: str) -> bool:
    if host in ("", "localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback or ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


@pytest.fixture(autouse=True)
def no_bare_print(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only console.py writes to the terminal: a print in any other module of packager/ fails the test."""
    real_print = builtins.print

    def guarded(*args: Any, **kwargs: Any) -> None:
        caller = str(sys._getframe(1).f_globals.get("__name__", ""))
        if caller.startswith("packager") and not caller.startswith(TALKERS) and kwargs.get("file") is None:
            raise AssertionError(f"{caller} prints; use the console")
        real_print(*args, **kwargs)

    monkeypatch.setattr(builtins, "print", guarded)


@pytest.fixture(autouse=True)
def no_heavy_import() -> Iterator[None]:
    """A unit test that imports torch or transformers into this process fails: it would not stay in the fast ring."""
    before = {name for name in HEAVY if name in sys.modules}
    yield
    now = {name for name in HEAVY if name in sys.modules}
    assert now == before, f"this unit test imported {', '.join(sorted(now - before))}"


@pytest.fixture
def child_environment(root: Path) -> dict[str, str]:
    """The environment of a child process that must find the checkout's packager."""
    return {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
