"""Assembles a bundle beside its final place and publishes it with one rename.

All files are copied or linked into a hidden temporary sibling, which is synced and renamed. File modes, times and order
are fixed: the same inputs give the same bytes, in a tar as well.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from packager.bundle.engines import runtime_files
from packager.bundle.installer import box_files
from packager.bundle.manifest import MANIFEST, SUMS, FileEntry, Manifest, Needs, is_inside, to_json
from packager.bundle.wheels import WheelSet
from packager.core.errors import InputError, MachineError, PackagerError
from packager.core.hashing import hash_file
from packager.core.progress import Progress, Task
from packager.core.store import FIXED_TIME, flush_folder

CHUNK = 1 << 22
FICLONE = 0x40049409  # ioctl of linux/fs.h: share the blocks, copy on write
RENAME_EXCHANGE = 2
AT_FDCWD = -100


@dataclass(frozen=True)
class Contents:
    """The contents of a bundle.

    name: the model's name. target: {"name", "digest"}. recipe: {"name", "options"}. files: name under model/ -> file.
    extra: name at the top level -> file or folder. wheels: None for a target whose server is not ours. runtimes: the
    folder to copy the allow-listed runtime files from. store: files below this folder may be hard-linked.
    """

    name: str
    target: Mapping[str, str]
    recipe: Mapping[str, Any]
    needs: Needs
    run: Mapping[str, Any]
    files: Mapping[str, Path]
    runtimes: Path
    wheels: WheelSet | None
    report: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Path] = field(default_factory=dict)
    store: Path | None = None

    @property
    def bundle(self) -> str:
        """The folder's name."""
        return f"{self.name}-{self.target['name']}-{self.recipe['name']}"


@dataclass(frozen=True)
class Assembled:
    """path: the bundle. fresh: False when the same bundle was already there. bytes: size of all its files."""

    path: Path
    fresh: bool
    bytes: int
    manifest: Manifest


def assemble(
    contents: Contents, out: Path, progress: Progress, *, digest: Callable[[Path], str] = hash_file
) -> Assembled:
    """Publish the bundle at ``out/<bundle>`` and return it.

    digest: sha256 of a file; with a cached one an unchanged bundle is recognised without reading it. A different bundle
    in its place is replaced only when the new one is complete. Raises InputError when something else than a bundle is
    in its place, MachineError when the disk is full or not writable.
    """
    goal = out / contents.bundle
    texts, sources = _plan(contents)
    entries = sorted(
        [_entry(path, text) for path, text in texts.items()]
        + [FileEntry(path, source.stat().st_size, digest(source)) for path, source in sources.items()],
        key=lambda entry: entry.path,
    )
    manifest = Manifest(
        contents.name,
        contents.bundle,
        dict(contents.target),
        dict(contents.recipe),
        dict(contents.run),
        contents.needs,
        tuple(entries),
        dict(contents.report),
        dict(contents.provenance),
    )
    texts[MANIFEST] = to_json(manifest).encode()
    texts[SUMS] = _sums(entries, texts[MANIFEST])
    total = sum(entry.bytes for entry in entries) + len(texts[MANIFEST]) + len(texts[SUMS])
    _refuse_foreign(goal)
    if _is_same(goal, entries, texts, digest):
        return Assembled(goal, False, total, manifest)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _sibling(goal) as work:
            with progress.step(f"bundle {contents.bundle}", total=total, unit="B") as task:
                _fill(work, texts, sources, entries, task, contents.store)
            _publish(work, goal)
    except OSError as error:
        raise MachineError(
            f"The bundle could not be written to {out}.",
            why=str(error),
            fix=f"It takes {total / 1e6:.0f} MB; free some space or choose another folder with -o.",
        ) from error
    return Assembled(goal, True, total, manifest)


def _plan(contents: Contents) -> tuple[dict[str, bytes], dict[str, Path]]:
    """(path -> bytes of files to write, path -> source of files to copy). Raises PackagerError for a wrong path."""
    texts = {
        name: text.encode()
        for name, text in box_files(
            contents.bundle, contents.name, contents.target["name"], contents.needs, contents.run
        ).items()
    }
    sources: dict[str, Path] = {}
    for name, source in contents.files.items():
        sources[f"model/{name.removeprefix('model/')}"] = source
    for name, source in contents.extra.items():
        if source.is_dir():
            for file in sorted(path for path in source.rglob("*") if path.is_file()):
                sources[f"{name}/{file.relative_to(source).as_posix()}"] = file
        else:
            sources[name] = source
    for name in runtime_files(contents.run["engine"]):
        sources[f"runtime/runtimes/{name}"] = contents.runtimes / name
    if contents.wheels is not None:
        texts["wheels/requirements.txt"] = contents.wheels.requirements.encode()
        sources |= {f"wheels/{wheel.name}": wheel for wheel in contents.wheels.files}
    for path, source in sources.items():
        if not is_inside(path) or path in texts or path in (MANIFEST, SUMS):
            raise PackagerError(f"A bundle cannot hold a file of the name {path!r}.", fix="Correct the recipe.")
        if not source.is_file():
            raise PackagerError(f"The bundle's file {path} has no source ({source}).", fix="Correct the recipe.")
    return texts, sources


def _entry(path: str, text: bytes) -> FileEntry:
    return FileEntry(path, len(text), hashlib.sha256(text).hexdigest())


def _sums(entries: list[FileEntry], manifest: bytes) -> bytes:
    lines = {entry.path: entry.sha256 for entry in entries} | {MANIFEST: hashlib.sha256(manifest).hexdigest()}
    return "".join(f"{lines[path]}  {path}\n" for path in sorted(lines)).encode()


def _refuse_foreign(goal: Path) -> None:
    """Raise InputError unless the goal is a bundle, an empty folder or missing."""
    if not goal.exists() and not goal.is_symlink():
        return
    if goal.is_symlink() or not goal.is_dir() or (any(goal.iterdir()) and not _is_bundle(goal)):
        raise InputError(
            f"{goal} is not a bundle, so it is not replaced.",
            why="Something else has this name.",
            fix="Move it away or choose another folder with -o.",
        )


def _is_bundle(folder: Path) -> bool:
    try:
        plain = json.loads((folder / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(plain, dict) and {"schema_version", "bundle", "files"} <= plain.keys()


def _is_same(goal: Path, entries: list[FileEntry], texts: Mapping[str, bytes], digest: Callable[[Path], str]) -> bool:
    """Whether the bundle at the goal has exactly these files with these digests."""
    try:
        if any((goal / name).read_bytes() != texts[name] for name in (MANIFEST, SUMS)):
            return False
        present = {path.relative_to(goal).as_posix() for path in goal.rglob("*") if not path.is_dir()}
        if present != {entry.path for entry in entries} | {MANIFEST, SUMS}:
            return False
        return all(
            not (goal / entry.path).is_symlink()
            and (goal / entry.path).stat().st_size == entry.bytes
            and digest(goal / entry.path) == entry.sha256
            for entry in entries
        )
    except OSError:
        return False


@contextlib.contextmanager
def _sibling(goal: Path) -> Iterator[Path]:
    """A locked temporary folder beside the goal; removes the folders that killed builds left there."""
    start = f".{goal.name}.building-"
    for left in goal.parent.glob(f"{start}*"):
        with contextlib.suppress(OSError), _lock(left):
            shutil.rmtree(left, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=start, dir=goal.parent))
    try:
        with _lock(work):
            yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)  # after an exchange it is the replaced bundle


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Lock a folder. Raises OSError when another process has locked it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _fill(
    work: Path,
    texts: Mapping[str, bytes],
    sources: Mapping[str, Path],
    entries: list[FileEntry],
    task: Task,
    store: Path | None,
) -> None:
    expected = {entry.path: entry.sha256 for entry in entries}
    for path in sorted([*texts, *sources]):
        goal = work / PurePosixPath(path)
        goal.parent.mkdir(parents=True, exist_ok=True)
        if path in texts:
            with goal.open("wb") as stream:
                stream.write(texts[path])
                stream.flush()
                os.fsync(stream.fileno())
            task.advance(len(texts[path]))
        elif store and _link(sources[path], goal, store):
            task.advance(goal.stat().st_size)
        elif _copy(sources[path], goal, task) not in (None, expected[path]):
            raise PackagerError(f"{sources[path]} changed while it was copied into the bundle.", fix="Build again.")
        goal.chmod(0o444 if path.startswith("model/") else 0o755 if path.endswith(".sh") else 0o644)
        os.utime(goal, (FIXED_TIME, FIXED_TIME))
    folders = sorted((folder for folder in work.rglob("*") if folder.is_dir()), reverse=True)
    for folder in [*folders, work]:
        folder.chmod(0o755)
        flush_folder(folder)
        os.utime(folder, (FIXED_TIME, FIXED_TIME))


def _link(source: Path, goal: Path, store: Path) -> bool:
    """Hard-link a file of the store into the bundle, which takes no time or space; False when it is not the store's own
    or is on another disk. Both names are read-only, and the store detects a changed file by its mtime.
    """
    if source.is_symlink() or not source.resolve().is_relative_to(store.resolve()):
        return False
    try:
        goal.hardlink_to(source)
    except OSError:  # another disk, or a filesystem without links
        return False
    return True


def _copy(source: Path, goal: Path, task: Task) -> str | None:
    """Copy to disk; returns the sha256 of the copied bytes, or None when the blocks are shared with the source."""
    with source.open("rb") as reader, goal.open("wb") as writer:
        try:
            if sys.platform == "linux":
                fcntl.ioctl(writer.fileno(), FICLONE, reader.fileno())
                task.advance(source.stat().st_size)
                os.fsync(writer.fileno())
                return None
        except OSError:
            writer.seek(0)  # this file system cannot share blocks
        digest = hashlib.sha256()
        while block := reader.read(CHUNK):
            digest.update(block)
            writer.write(block)
            task.advance(len(block))
        writer.flush()
        os.fsync(writer.fileno())
    return digest.hexdigest()


def _publish(work: Path, goal: Path) -> None:
    for attempt in range(5):
        try:
            if goal.is_dir() and any(goal.iterdir()):
                _exchange(work, goal)
            else:
                work.rename(goal)
            break
        except OSError:
            if attempt == 4 or not goal.exists():
                raise  # otherwise another build published first: try again
    flush_folder(goal.parent)


def _exchange(one: Path, other: Path) -> None:
    """Swap two folders in one step where the system can, else by two renames."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 and renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return
    aside = one.with_name(one.name + ".old")
    other.rename(aside)
    one.rename(other)
    aside.rename(one)
