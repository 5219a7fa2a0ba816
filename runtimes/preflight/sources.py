"""Where the facts of a box come from: its files below a root, what its programs say, and this running Python.

A recorded box is a folder with the same files below it, so that a Jetson can be read on any machine: ``commands.json``
has what its programs said, ``process.json`` what only a running Python can tell. Standard library only, nothing is
written, and Python 3.8 can read this file: an old box gets a sentence, not a syntax error.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

LIMIT = 1 << 20  # characters of a file, bytes of a program's output: more than any of them has to say
PROBE = Path(__file__).with_name("driver_probe.py")


class Said(NamedTuple):
    """What a program printed. status: its exit status, None when it hung, was cut off or printed without end."""

    status: int | None
    output: str


class Box:
    """This box; with a root, the recorded one in that folder."""

    def __init__(self, root: Path | None = None) -> None:
        self.recorded = root is not None
        self.root = Path("/") if root is None else root
        self._commands: Mapping[str, Any] = {}
        self.process: Mapping[str, Any] = {}
        if root is not None:
            self._commands = json.loads((root / "commands.json").read_text("utf-8"))
            self.process = json.loads((root / "process.json").read_text("utf-8"))

    def path(self, name: str) -> Path:
        """The place of a file that is named by its absolute path on the box."""
        return self.root / name.lstrip("/")

    def text(self, name: str) -> str | None:
        """A small file's text without NULs and blanks at its ends; None when it is not there or cannot be read."""
        try:
            with self.path(name).open(encoding="utf-8", errors="replace") as file:
                return plain(file.read(LIMIT).replace("\0", "\n")).strip()
        except (OSError, ValueError):
            return None

    def lines(self, name: str) -> Iterator[str] | None:
        """The lines of a file of any size; None when it cannot be opened."""
        try:
            file = self.path(name).open(encoding="utf-8", errors="replace")
        except OSError:
            return None
        return _closing(file)

    def number(self, name: str) -> int | None:
        """A file that holds one whole number."""
        text = self.text(name)
        return int(text) if text is not None and text.isdigit() else None

    def names(self, folder: str) -> list[str]:
        """The names in a folder, sorted; none when it is not there."""
        try:
            return sorted(os.listdir(self.path(folder)))  # noqa: PTH208 - a box's folder may hold names that are no text
        except OSError:
            return []

    def exists(self, name: str) -> bool:
        return self.path(name).exists()

    def said(self, program: str, *arguments: str, seconds: float = 20) -> Said | None:
        """What a program says; None when there is no such program. ``program`` may name several places, by "|"."""
        if self.recorded:
            found = self._commands.get(" ".join([program.split("|")[0], *arguments]))
            return None if found is None else Said(found["status"], found["output"])
        place = next((found for name in program.split("|") if (found := shutil.which(name))), None)
        return None if place is None else run([place, *arguments], seconds)

    def probe(self, *, seconds: float = 30) -> Mapping[str, Any]:
        """What the driver's own libraries say, asked by a child because they may crash; {} without an answer."""
        if self.recorded:
            found = self._commands.get("probe")
        else:
            # the order of nvidia-smi, so that the two can be put together
            env = {**os.environ, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
            found = run([sys.executable, "-I", "-B", str(PROBE)], seconds, env)._asdict()
        if found is None or found["status"] != 0:
            return {}
        try:
            answer = json.loads(found["output"])
        except ValueError:
            return {}
        return answer if isinstance(answer, dict) else {}


def plain(text: str) -> str:
    """Text without what would steer a terminal: it is shown to people, and comes from firmware and foreign programs."""
    return "".join(mark for mark in text if mark.isprintable() or mark in "\n\t")


def _closing(file: Any) -> Iterator[str]:
    with file:
        yield from file


def run(command: Sequence[str], seconds: float, env: Mapping[str, str] | None = None) -> Said:
    """Run a program that may hang, in the driver or by itself, or print without end: then its status is None.

    A process that the kernel does not let go of (a wedged driver) is left behind after two seconds.
    """
    end = time.monotonic() + seconds
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=env,
        )
    except OSError:
        return Said(None, "")
    taken: list[bytes] = []
    stream = child.stdout
    assert stream is not None
    reader = threading.Thread(target=lambda: taken.append(stream.read(LIMIT)), daemon=True)
    reader.start()
    reader.join(seconds)
    if taken and len(taken[0]) < LIMIT:
        try:
            status = child.wait(max(0.1, end - time.monotonic()))
            return Said(status, plain(taken[0].decode("utf-8", "replace")))
        except subprocess.TimeoutExpired:  # it closed its output and goes on
            _end(child)
            return Said(None, "")
    _end(child)
    return Said(None, "")


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill a program and what it started."""
    try:
        if hasattr(os, "killpg"):
            os.killpg(child.pid, signal.SIGKILL)
        else:
            child.kill()
        child.wait(2)
    except (OSError, subprocess.TimeoutExpired):
        return
