"""Files on the box: digests, atomic writes, locks, and atomic swaps of folders. Standard library only; Python 3.8 can
parse it, because the preflight imports it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Optional

CHUNK = 1 << 20  # bytes per read
EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
AT_FDCWD = -100
FICLONE = 0x40049409  # ioctl of linux/fs.h: share the blocks, copy on write


def say(text: str) -> None:
    """One line of progress on standard error."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def file_sha256(path: Path) -> str:
    """The sha256 of a file in hex, read in pieces. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Flush a file, or a folder's names, to the disk. Windows has no call for folders."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a temporary file beside the path, flush it and rename it. Raises OSError; the old file then stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
    work = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        work.chmod(0o644)
        work.replace(path)
    finally:
        if work.exists():
            work.unlink()


def lock(handle: int) -> bool:
    """Lock an open file or folder until it is closed; False when another process holds it. Windows: always True.

    Raises OSError where the filesystem has no locks.
    """
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock_folder(folder: Path) -> Optional[int]:  # noqa: UP045 - Python 3.8
    """Lock a folder: the handle to close, or None when another process holds it or the filesystem has no locks."""
    handle = os.open(os.devnull if os.name == "nt" else folder, os.O_RDONLY)
    try:
        held = lock(handle)
    except OSError:
        held = False
    if held:
        return handle
    os.close(handle)
    return None


def clone(source: Path, goal: Path) -> bool:
    """Share the file's blocks where the filesystem can (Btrfs, XFS): as safe as a copy, without a second copy on disk.
    Never a hard link: a later change of the source would change the goal. False where the filesystem cannot.
    """
    if sys.platform != "linux":
        return False
    import fcntl

    with source.open("rb") as reader, goal.open("wb") as writer:
        try:
            fcntl.ioctl(writer.fileno(), FICLONE, reader.fileno())
        except OSError:
            return False
    return True


def copy(source: Path, goal: Path) -> str:
    """Copy a file and flush it; the sha256 of the bytes that were read. Raises OSError."""
    digest = hashlib.sha256()
    with source.open("rb") as reader, goal.open("wb") as writer:
        while block := reader.read(CHUNK):
            digest.update(block)
            writer.write(block)
        writer.flush()
        os.fsync(writer.fileno())
    return digest.hexdigest()


def exchange(one: Path, other: Path) -> bool:
    """Swap two folders atomically; False where the system or the filesystem cannot."""
    if sys.platform != "linux":
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return bool(renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), EXCHANGE) == 0)
