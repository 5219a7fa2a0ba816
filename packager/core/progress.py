"""The interface between long work and the terminal: work reports to a Progress; only cli/console.py draws it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """One running step. ``advance`` takes the amount done since the last call, in the step's unit."""

    def advance(self, amount: float) -> None: ...


StepContext = AbstractContextManager[Task]


class Progress(Protocol):
    """What long work reports to.

    step: a context manager around one named step; total is in ``unit`` ("B" for bytes) or None when unknown.
    note: one line that stays visible after the step has ended.
    """

    def step(self, name: str, total: float | None = None, unit: str = "") -> StepContext: ...

    def note(self, text: str) -> None: ...


class _SilentTask:
    def advance(self, amount: float) -> None:
        return None


class Silent:
    """A Progress that shows nothing: for tests and library use."""

    @contextmanager
    def _step(self) -> Iterator[Task]:
        yield _SilentTask()

    def step(self, name: str, total: float | None = None, unit: str = "") -> StepContext:
        return self._step()

    def note(self, text: str) -> None:
        return None
