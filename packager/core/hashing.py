"""SHA-256 of files, cached as long as a file does not change, and atomic writes of small files."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from packager.core.errors import InputError
from packager.core.progress import Task

CHUNK_BYTES = 1 << 20


def file_digest(path: Path, cache: Path, task: Task | None = None) -> str:
    """SHA-256 of a file in hex, cached under ``cache`` by (path, size, mtime_ns, ctime_ns, inode).

    Links are followed. Raises InputError when the file changes while it is read.
    """
    real = path.resolve()
    before = real.stat()
    key = f"{real}\n{before.st_size}\n{before.st_mtime_ns}\n{before.st_ctime_ns}\n{before.st_ino}"
    cached = cache / "digests" / hashlib.sha256(key.encode()).hexdigest()
    try:
        digest = cached.read_text(encoding="ascii").strip()
    except (FileNotFoundError, UnicodeDecodeError):
        digest = ""
    if len(digest) == 64:
        if task is not None:
            task.advance(before.st_size)
        return digest
    digest = hash_file(real, task)
    after = real.stat()
    if (after.st_size, after.st_mtime_ns, after.st_ino) != (before.st_size, before.st_mtime_ns, before.st_ino):
        raise InputError(
            f"{path} changed while it was read.",
            why="Another program writes to it.",
            fix="Wait for it, then try again.",
        )
    write_atomic(cached, digest.encode("ascii"))
    return digest


def hash_file(path: Path, task: Task | None = None) -> str:
    """SHA-256 of a file in hex; task advances by the bytes read."""
    state = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            state.update(buffer[:count])
            if task is not None:
                task.advance(count)
    return state.hexdigest()


def combined_digest(parts: Iterable[tuple[str, str]]) -> str:
    """SHA-256 over sorted (name, sha256) pairs: independent of the folder's place and of other files in it."""
    return hashlib.sha256(json.dumps(sorted(parts), separators=(",", ":")).encode()).hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Write a whole file or nothing: a temporary sibling, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
