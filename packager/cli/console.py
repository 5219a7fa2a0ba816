"""The only file that writes to the terminal: progress on stderr, results on stdout, errors in three lines.

Colours and progress bars appear only on a terminal; piped output has one plain line for each step. With ``--json``
stdout has one JSON document and nothing else. A closed pipe (``packager targets | head -1``) is no failure: further
output is discarded, and the verb ends with its normal exit code.
"""

from __future__ import annotations

import io
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from packager.core.errors import PackagerError
    from packager.core.progress import StepContext, Task

STREAMS = ("stdout", "stderr")
HEARTBEAT = 15.0  # seconds between lines of a long step without a progress bar


class _PipeEnd(io.FileIO):
    """The writing end of a pipe; once the reader has closed it, output is discarded."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # so that a child's output is discarded too
            os.close(nowhere)
            return super().write(data)


def prepare_streams() -> None:
    """Configure stdout and stderr: a character that the terminal's encoding does not have, such as ×, becomes a
    question mark, and a closed pipe is no error. Replaced streams (a test's capture) are left unchanged.
    """
    for name in STREAMS:
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):
            continue
        stream.reconfigure(errors="replace")
        raw = getattr(stream.buffer, "raw", stream.buffer)  # unbuffered, the raw file is the buffer
        if stream is getattr(sys, f"__{name}__") and type(raw) is io.FileIO:
            pipe = _PipeEnd(raw.fileno(), "w", closefd=False)
            buffer: Any = pipe if raw is stream.buffer else io.BufferedWriter(pipe)
            lines, through = stream.line_buffering, stream.write_through
            prepared = io.TextIOWrapper(buffer, stream.encoding, "replace", line_buffering=lines, write_through=through)
            setattr(sys, name, prepared)


class Console:
    """Output for one command. json_mode: results as one JSON document. quiet: no progress."""

    def __init__(self, *, json_mode: bool = False, quiet: bool = False) -> None:
        self.json_mode, self.quiet = json_mode, quiet

    # -- results -----------------------------------------------------------------------------------------------------
    def result(self, document: Mapping[str, Any], render: Callable[[], None] | None = None) -> None:
        """Show a command's result: the document with --json, else the text that ``render`` prints."""
        if self.json_mode:
            sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False, default=str) + "\n")
        elif render is not None:
            render()

    def line(self, text: str = "") -> None:
        """One line of a result on stdout."""
        sys.stdout.write(text + "\n")

    def table(
        self, columns: Sequence[str], rows: Iterable[Sequence[str]], title: str = "", right: Sequence[int] = ()
    ) -> None:
        """A table on stdout; right: indices of the columns that are aligned right."""
        from rich.console import Console as Rich
        from rich.table import Table

        rows = [[str(cell) for cell in row] for row in rows]
        table = Table(
            title=title or None,
            title_justify="left",
            title_style="bold",
            box=None,
            padding=(0, 2, 0, 0),
            show_edge=False,
        )
        for index, column in enumerate(columns):
            table.add_column(
                column, justify="right" if index in right else "left", header_style="bold", overflow="fold"
            )
        for row in rows:
            table.add_row(*row)
        terminal = sys.stdout.isatty()
        rich = Rich(file=sys.stdout, highlight=False, markup=False, width=None if terminal else 200)
        with rich.capture() as drawn:
            rich.print(table)
        self.line("\n".join(line.rstrip() for line in drawn.get().rstrip("\n").split("\n")))

    def facts(self, pairs: Iterable[tuple[str, str]], title: str = "") -> None:
        """Two columns of names and values, without empty values."""
        pairs = [(name, value) for name, value in pairs if value]
        if title:
            self.line(title)
        width = max((len(name) for name, _ in pairs), default=0)
        for name, value in pairs:
            first, *more = value.splitlines() or [""]
            self.line(f"  {name:<{width}}  {first}")
            for line in more:
                self.line(f"  {'':<{width}}  {line}")

    # -- failures ----------------------------------------------------------------------------------------------------
    def error(self, error: PackagerError) -> None:
        """Print what was wrong, why, and what to do next on stderr; with --json also a document on stdout."""
        if self.json_mode:
            sys.stdout.write(json.dumps({"error": error.as_dict()}, indent=2, ensure_ascii=False) + "\n")
        strong, plain = ("\x1b[1;31m", "\x1b[0m") if _colours() else ("", "")
        sys.stderr.write(f"{strong}error:{plain} {error.what}\n")
        for label, text in (("why", error.why), ("do", error.fix)):
            if text:
                sys.stderr.write(f"  {label + ':':<5}{text}\n")
        if "PACKAGER_DEBUG" in os.environ and (output := getattr(error, "output", "")):
            sys.stderr.write(f"{output}\n")
        sys.stderr.flush()

    # -- progress ----------------------------------------------------------------------------------------------------
    def note(self, text: str) -> None:
        if not self.quiet:
            sys.stderr.write(f"  {text}\n")
            sys.stderr.flush()

    def step(self, name: str, total: float | None = None, unit: str = "") -> StepContext:
        if self.quiet:
            from packager.core.progress import Silent

            return Silent().step(name, total, unit)
        return self._bar(name, total, unit) if sys.stderr.isatty() else self._lines(name, total, unit)

    @contextmanager
    def _bar(self, name: str, total: float | None, unit: str) -> Iterator[Task]:
        from rich.console import Console as Rich
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            ProgressColumn,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns: list[ProgressColumn] = [
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
        ]
        if total is not None:
            amount: ProgressColumn = DownloadColumn() if unit == "B" else MofNCompleteColumn()
            columns[2:] = [
                BarColumn(bar_width=24),
                amount,
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            ]
        with Progress(*columns, console=Rich(file=sys.stderr)) as bars:
            handle = bars.add_task(name, total=total)
            yield _Advance(lambda amount: bars.update(handle, advance=amount))
            bars.update(handle, total=total or 1, completed=total or 1)

    @contextmanager
    def _lines(self, name: str, total: float | None, unit: str) -> Iterator[Task]:
        start = time.monotonic()
        done = 0.0
        over = threading.Event()

        def advance(amount: float) -> None:
            nonlocal done
            done += amount

        def heartbeat() -> None:
            while not over.wait(HEARTBEAT):
                passed = time.monotonic() - start
                share = (
                    f" {done / total:.0%}, about {passed * (total - done) / done:.0f} s left" if total and done else ""
                )
                sys.stderr.write(f"  … {name}: {passed:.0f} s{share}\n")
                sys.stderr.flush()

        thread = threading.Thread(target=heartbeat, daemon=True)
        thread.start()
        try:
            yield _Advance(advance)
        finally:
            over.set()
        sys.stderr.write(f"  ✓ {name} ({time.monotonic() - start:.1f} s)\n")
        sys.stderr.flush()


class _Advance:
    def __init__(self, advance: Callable[[float], None]) -> None:
        self.advance = advance


def _colours() -> bool:
    return sys.stderr.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
