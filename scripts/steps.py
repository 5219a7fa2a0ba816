"""The console of set-up: named steps, a live line on a terminal, plain lines in a log. Standard library only."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

HELD: list[int] = []  # descriptors of the locks in use; children inherit them


class Stopped(Exception):
    """Set-up cannot continue. what: the failure; why: its cause; fix: what to do next; shown as three lines."""

    def __init__(self, what: str, why: str, fix: str) -> None:
        super().__init__(what)
        self.what, self.why, self.fix = what, why, fix

    def show(self) -> None:
        print(f"\nset-up stopped: {self.what}\n  why: {self.why}\n  do:  {self.fix}", file=sys.stderr, flush=True)


class Step:
    """One step's line: rewritten in place on a terminal; in a log a first and a last line, news every 30 seconds."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.live = sys.stdout.isatty()
        self.start = time.monotonic()
        self.shown = self.start
        self._write("…")

    def _write(self, text: str, end: str = "") -> None:
        if self.live:
            print(f"\r\x1b[2K  {self.name}: {text}"[:160], end=end, flush=True)
        else:
            print(f"  {self.name}: {text}", flush=True)

    def news(self, text: str) -> None:
        now = time.monotonic()
        if now - self.shown >= (0.1 if self.live else 30):
            self.shown = now
            self._write(f"{text} ({now - self.start:.0f} s)")

    def done(self, text: str = "done") -> None:
        self._write(f"{text}, {time.monotonic() - self.start:.0f} s", end="\n")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a file. A second process waits, also for children that outlive a killed set-up."""
    handle = os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        HELD.append(handle)
        yield
    finally:
        if handle in HELD:
            HELD.remove(handle)
        os.close(handle)


def run(
    argv: Sequence[str | Path],
    *,
    on_line: Callable[[str], None] | None = None,
    env: Mapping[str, str] | None = None,
    log: Path | None = None,
) -> tuple[int, str]:
    """(exit status, last 30 lines) of a program. Every line goes to ``on_line`` and to the log file."""
    tail: deque[str] = deque(maxlen=30)
    with subprocess.Popen(
        [str(part) for part in argv],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=env,
        pass_fds=HELD,
    ) as child:
        assert child.stdout is not None
        try:
            with (log or Path("/dev/null")).open("a", encoding="utf-8") as record:
                for line in child.stdout:
                    record.write(line)
                    tail.append(line.rstrip())
                    if on_line:
                        on_line(line.rstrip())
        except BaseException:
            child.terminate()
            raise
    return child.returncode, "\n".join(tail)
