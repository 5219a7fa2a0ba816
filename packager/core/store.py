"""The store: every step of a build is a folder named by the digest of its inputs.

A step in the store is complete: it is made in a ``.partial`` sibling under a lock, flushed to disk and renamed. A
killed build therefore leaves finished steps (reused by the next run) and at most one partial folder per step, which the
next run of the same step continues (``resumable``) or clears.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from packager.core.code import describe
from packager.core.errors import MachineError
from packager.core.hashing import write_atomic
from packager.core.progress import Progress

RECORD = "step.json"
# One time for every file (1 January 1980, the oldest a zip can hold), so that archives of equal bundles are equal.
FIXED_TIME = 315532800


class StepCost(TypedDict):
    """A step's entry in the build record. reused: the step was in the store; seconds is 0 then."""

    step: str
    seconds: float
    peak_rss_bytes: int
    reused: bool


@dataclass(frozen=True)
class Step:
    """A finished step: its folder, and the time and memory it took (seconds is 0 when the step is reused)."""

    name: str
    key: str
    path: Path
    seconds: float
    peak_rss_bytes: int
    reused: bool

    def cost(self) -> StepCost:
        """Its time and memory for the build record, which stays outside the bundle: equal builds differ in it."""
        return {
            "step": self.name,
            "seconds": round(self.seconds, 2),
            "peak_rss_bytes": self.peak_rss_bytes,
            "reused": self.reused,
        }

    def read_json(self, name: str) -> Any:
        """The content of a JSON file that the step wrote."""
        return json.loads((self.path / name).read_text(encoding="utf-8"))


@dataclass
class Cost:
    """The highest resident memory of a running step's child processes, in bytes."""

    peak_rss_bytes: int = 0

    def saw(self, peak_rss_bytes: int) -> None:
        """Raise the maximum to the peak of one child, if that is higher."""
        self.peak_rss_bytes = max(self.peak_rss_bytes, peak_rss_bytes)


def default_root() -> Path:
    """``PACKAGER_STORE``, else ``packager/store`` under the user's cache folder."""
    if chosen := os.environ.get("PACKAGER_STORE"):
        return Path(chosen).expanduser()
    return cache_root() / "store"


def cache_root() -> Path:
    """The folder for files that can be made again: ``$XDG_CACHE_HOME/packager`` or ``~/.cache/packager``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "packager"


def digest_of(value: object) -> str:
    """SHA-256 (hex) of a value's canonical JSON form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class Store:
    """Content-addressed steps under one folder; safe for several builds at once."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def step(
        self,
        name: str,
        inputs: Mapping[str, object],
        make: Callable[[Path, Cost], None],
        *,
        progress: Progress,
        resumable: bool = False,
    ) -> Step:
        """The folder of step ``name`` for these inputs, made by ``make(folder, cost)`` when it is not there yet.

        inputs must be JSON-serialisable and name all data and options that the result depends on; the code of ``make``
        and its libraries are added to the key (code.py). Raises MachineError when the disk is full, the store cannot be
        written or its copy is damaged; errors of ``make`` pass through, and the step stays unmade.
        """
        program = describe(make)
        key = digest_of({"step": name, "inputs": dict(inputs), "program": program})[:40]
        final = self.root / name / key
        with machine_errors(self.root):
            if finished := self._finished(name, key, final):
                return finished
            with self._lock(name, key, progress):
                if finished := self._finished(name, key, final):
                    return finished
                partial = final.with_name(f".{key}.partial")
                if partial.exists() and not resumable:
                    shutil.rmtree(partial)
                partial.mkdir(parents=True, exist_ok=True)
                cost = Cost()
                start = time.monotonic()
                try:
                    make(partial, cost)
                except BaseException:
                    if not resumable:
                        shutil.rmtree(partial, ignore_errors=True)
                    raise
                seconds = time.monotonic() - start
                files = {
                    str(path.relative_to(partial)): path.stat().st_size
                    for path in sorted(partial.rglob("*"))
                    if path.is_file()
                }
                record = {
                    "step": name,
                    "inputs": dict(inputs),
                    "program": program,
                    "files": files,
                    "time": FIXED_TIME,
                    "seconds": round(seconds, 3),
                    "peak_rss_bytes": cost.peak_rss_bytes,
                }
                (partial / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True), encoding="utf-8")
                flush_tree(partial)
                partial.rename(final)
                flush_folder(final.parent)
        return Step(name, key, final, seconds, cost.peak_rss_bytes, reused=False)

    def _finished(self, name: str, key: str, final: Path) -> Step | None:
        """The step from the store; None when it is not made. Raises MachineError when a file was changed."""
        if not final.is_dir():
            return None
        try:
            record = json.loads((final / RECORD).read_text(encoding="utf-8"))
            time_set = record.get("time")  # a bundle may hard-link a file of the store: an edit there changes its mtime
            whole = all(_is_as_made(final / file, size, time_set) for file, size in record["files"].items())
            peak = int(record["peak_rss_bytes"])
        except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
            whole, peak = False, 0
        if not whole:
            raise MachineError(
                f"the store's copy of step {name} is damaged: a file of {final} is missing or was changed.",
                why="Something outside the packager changed the store, or a bundle that shares its files.",
                fix=f"Remove the folder {final} and run the same command again.",
            )
        return Step(name, key, final, 0.0, peak, reused=True)

    @contextmanager
    def _lock(self, name: str, key: str, progress: Progress) -> Iterator[None]:
        from filelock import FileLock, Timeout

        folder = self.root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{name}-{key}.lock")
        try:
            lock.acquire(timeout=0.05)
        except Timeout:
            progress.note(f"waiting: another build is making the step {name}")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


@contextmanager
def machine_errors(where: Path) -> Iterator[None]:
    """Turn a full disk or a denied permission into a MachineError that names the path."""
    try:
        yield
    except OSError as error:
        place = error.filename or where
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MachineError(
                f"the disk is full: {place} could not be written.",
                why=f"{shutil.disk_usage(_existing(where)).free / 1e9:.1f} GB are free at {where}.",
                fix="Free some space, or point PACKAGER_STORE and -o at another disk; finished steps are kept.",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise MachineError(
                f"{place} could not be written: {error.strerror}.",
                fix="Choose a folder you may write to with -o or PACKAGER_STORE.",
            ) from error
        raise


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _is_as_made(file: Path, size: int, time_set: int | None) -> bool:
    try:
        stat = file.stat()
    except FileNotFoundError:
        return False
    return stat.st_size == size and time_set in (None, int(stat.st_mtime))


def flush_tree(folder: Path) -> None:
    """fsync every file and folder under ``folder``, so that a rename publishes data that is on the disk. Every file
    gets the mtime FIXED_TIME.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            os.utime(path, (FIXED_TIME, FIXED_TIME))
            with path.open("rb") as file:
                os.fsync(file.fileno())
    for path in [*(p for p in folder.rglob("*") if p.is_dir()), folder]:
        flush_folder(path)


def flush_folder(folder: Path) -> None:
    """fsync a folder's entries; does nothing on Windows, which has no fsync for folders."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new, never a part of it."""
    with machine_errors(path.parent):
        write_atomic(path, text.encode("utf-8"))
        flush_folder(path.parent)


def fetched_once(final: Path, title: str, fill: Callable[[Path], None], progress: Progress) -> Path:
    """An outside tool's folder in the cache. A missing one is made in a temporary sibling and renamed.

    fill: makes ``tree`` in the working folder that it receives. title: the step's name, for progress. Raises
    MachineError, and the errors of fill.
    """
    if final.is_dir():
        return final
    with machine_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
        try:
            with progress.step(title):
                fill(work)
            try:
                (work / "tree").rename(final)
            except OSError:
                if not final.is_dir():  # another build may have published it meanwhile
                    raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return final
