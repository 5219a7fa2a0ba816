"""Sources of a box's facts: its files below a root, the output of its programs, and this running Python.

A recorded box is a folder with the same files, so a Jetson's facts can be read on any machine: ``commands.json`` holds
the output of its programs, ``process.json`` the facts of its Python process. Standard library only; writes nothing.
Python 3.8 can parse this file, so that an old box gets a refusal and not a syntax error.
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
from typing import Any, NamedTuple, TextIO

LIMIT = 1 << 20  # characters of a file, bytes of a program's output: more than any of them needs
PROBE = Path(__file__).with_name("driver_probe.py")


class Output(NamedTuple):
    """A program's standard output. status: its exit status; None when it hung, did not start or exceeded LIMIT."""

    status: int | None
    output: str


class Box:
    """This box, or with a root the recorded box in that folder. Raises OSError or ValueError for a bad recording."""

    def __init__(self, root: Path | None = None) -> None:
        self.recorded = root is not None
        self.root = Path("/") if root is None else root
        self._commands: Mapping[str, Any] = {}
        self.process: Mapping[str, Any] = {}
        if root is not None:
            self._commands = json.loads((root / "commands.json").read_text("utf-8"))
            self.process = json.loads((root / "process.json").read_text("utf-8"))

    def path(self, name: str) -> Path:
        """The local path of a file that is given by its absolute path on the box."""
        return self.root / name.lstrip("/")

    def text(self, name: str) -> str | None:
        """A small file's text, stripped of NULs and outer blanks; None when it is missing or unreadable."""
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
            return sorted(os.listdir(self.path(folder)))  # noqa: PTH208 - names may not be valid text
        except OSError:
            return []

    def exists(self, name: str) -> bool:
        return self.path(name).exists()

    def output(self, program: str, *arguments: str, seconds: float = 20) -> Output | None:
        """A program's output; None when there is no such program. ``program`` may list several places, split by "|"."""
        if self.recorded:
            recording = self._commands.get(" ".join([program.split("|")[0], *arguments]))
            return None if recording is None else Output(recording["status"], recording["output"])
        path = next((path for name in program.split("|") if (path := shutil.which(name))), None)
        return None if path is None else run([path, *arguments], seconds)

    def probe(self, *, seconds: float = 30) -> Mapping[str, Any]:
        """The facts from the driver's libraries, read in a child because they may crash; {} when it fails."""
        if self.recorded:
            output = self._commands.get("probe")
        else:
            # the order of nvidia-smi, so that both lists can be merged
            env = {**os.environ, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
            output = run([sys.executable, "-I", "-B", str(PROBE)], seconds, env)._asdict()
        if output is None or output["status"] != 0:
            return {}
        try:
            answer = json.loads(output["output"])
        except ValueError:
            return {}
        return answer if isinstance(answer, dict) else {}


def plain(text: str) -> str:
    """Text without control characters: it comes from firmware and other programs, and is shown on a terminal."""
    return "".join(mark for mark in text if mark.isprintable() or mark in "\n\t")


def _closing(file: TextIO) -> Iterator[str]:
    with file:
        yield from file


def run(command: Sequence[str], seconds: float, env: Mapping[str, str] | None = None) -> Output:
    """Run a program that may hang or print without end; its status is then None. seconds: the time limit.

    A process that cannot be killed (a wedged driver) is abandoned after two seconds.
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
        return Output(None, "")
    taken: list[bytes] = []
    stream = child.stdout
    assert stream is not None
    reader = threading.Thread(target=lambda: taken.append(stream.read(LIMIT)), daemon=True)
    reader.start()
    reader.join(seconds)
    if taken and len(taken[0]) < LIMIT:
        try:
            status = child.wait(max(0.1, end - time.monotonic()))
            return Output(status, plain(taken[0].decode("utf-8", "replace")))
        except subprocess.TimeoutExpired:  # it closed its output but keeps running
            _end(child)
            return Output(None, "")
    _end(child)
    return Output(None, "")


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill a program and its children."""
    try:
        if hasattr(os, "killpg"):
            os.killpg(child.pid, signal.SIGKILL)
        else:
            child.kill()
        child.wait(2)
    except (OSError, subprocess.TimeoutExpired):
        return
