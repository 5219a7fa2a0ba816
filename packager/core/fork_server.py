"""The client of workers/fork_server.py, whose children have torch and transformers imported already. Linux only.

A process has one server, and the server one child at a time. When it cannot serve (another system, a busy or broken
server), the caller starts an interpreter of its own.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from packager.core.code import libraries_of
from packager.core.folders import PACKAGE

SCRIPT = PACKAGE / "workers" / "fork_server.py"
HEAVY = frozenset({"torch", "transformers"})
CONVERTER = "convert.py"  # runs llama.cpp's converter, which imports both


class Forked:
    """A running child of the server, with the parts of subprocess.Popen that processes.py uses."""

    def __init__(self, server: ForkServer, pid: int, stdout: int) -> None:
        self._server, self.pid = server, pid
        self.stdout = os.fdopen(stdout, "rb", buffering=0)
        self.returncode: int | None = None
        self.max_rss = 0

    def finish(self) -> int:
        """Wait for the end and return the exit status as Popen has it. The child of a killed server is killed too."""
        try:
            ended = self._server.receive()
        except (OSError, ValueError):
            ended = {"status": -signal.SIGKILL, "max_rss": 0}
            self._server.close()
        self.returncode, self.max_rss = int(ended["status"]), int(ended["max_rss"])
        self._server.free()
        return self.returncode

    def end(self, grace: float) -> None:
        """Terminate the child, and kill it after ``grace`` seconds."""
        if self.returncode is not None:
            return
        killer = threading.Timer(grace, self._signal, [signal.SIGKILL])
        killer.start()
        self._signal(signal.SIGTERM)
        try:
            self.finish()
        finally:
            killer.cancel()

    def _signal(self, number: signal.Signals) -> None:
        if self.returncode is None:
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                return


class ForkServer:
    """The server's process and its socket, started at the first use and again after a failure."""

    def __init__(self) -> None:
        self._busy = threading.Lock()
        self._owner = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._link: socket.socket | None = None
        self._lines: Any = None

    def fits(self, script: Path | str, env: Mapping[str, str] | None) -> bool:
        """Whether a script is a worker that imports the heavy libraries, in the usual environment."""
        if sys.platform != "linux" or env or not isinstance(script, Path) or script.parent != SCRIPT.parent:
            return False
        return script.name == CONVERTER or bool(libraries_of(script) & HEAVY)

    def warm(self, env: Mapping[str, str]) -> None:
        """Start the server if none runs; it imports the libraries while the caller continues."""
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return
        self.close()
        ours, theirs = socket.socketpair()
        with theirs:
            command = [
                sys.executable,
                SCRIPT.with_name("with_parent.py"),
                str(os.getpid()),
                SCRIPT,
                str(theirs.fileno()),
            ]
            self._process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**env, "PYTHONPATH": str(PACKAGE.parent)},
                pass_fds=[theirs.fileno()],
            )
        self._owner, self._link, self._lines = os.getpid(), ours, ours.makefile("rb")

    def start(self, argv: Sequence[str], path: Sequence[str], env: Mapping[str, str]) -> Forked | None:
        """A child that runs a script; None when the server is busy or does not answer. ``finish`` frees the server."""
        if not self._busy.acquire(blocking=False):
            return None
        read, write = os.pipe()
        try:
            self.warm(env)
            request = {"argv": list(argv), "path": list(path), "env": dict(env), "cwd": str(Path.cwd())}
            assert self._link is not None
            socket.send_fds(self._link, [json.dumps(request).encode() + b"\n"], [write])
            return Forked(self, int(self.receive()["pid"]), read)
        except (OSError, ValueError, KeyError):
            os.close(read)
            self.close()
            self._busy.release()
            return None
        finally:
            os.close(write)

    def receive(self) -> dict[str, Any]:
        """The server's next answer. Raises ValueError when it is gone."""
        line = self._lines.readline() if self._lines is not None else b""
        answer: dict[str, Any] = json.loads(line)
        return answer

    def free(self) -> None:
        """The child has ended; the next one may start."""
        self._busy.release()

    def close(self) -> None:
        """End the server, if it is this process's own."""
        if self._link is not None:
            self._lines.close()
            self._link.close()
        if self._process is not None and self._owner == os.getpid():
            self._process.terminate()
            deadline = time.monotonic() + 1
            while self._process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
        self._process = self._link = self._lines = None


SERVER = ForkServer()
