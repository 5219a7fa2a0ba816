"""The cache of engines that this box built: one folder per engine, named by everything that the engine depends on.

TensorRT loads an engine only with the exact version and on the exact architecture that it was built for. So the key has
the compute capability, the device, TensorRT's full version, the driver's CUDA and the plan's digest. After an update of
JetPack the key differs, and the engine is built again automatically. An entry is made in a hidden sibling, flushed and
renamed; a lock prevents two starts from building the same engine. Standard library only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from runtimes.engine import EngineError
from runtimes.engines.tensorrt.device import Device
from runtimes.engines.tensorrt.plan import Plan
from runtimes.files import file_sha256, flush, lock

ENGINE, ENTRY, LOCK = "engine.plan", "entry.json", ".lock"
FORMAT = 1
KEPT = "engines"  # subfolder of each possible cache folder
Say = Callable[[str], None]


@dataclass(frozen=True)
class Key:
    """Everything that an engine depends on. plan: the digest of plan.json, which contains the model's digest."""

    sm: str
    device: str
    tensorrt: str
    cuda: str
    plan: str

    @classmethod
    def of(cls, plan: Plan, device: Device) -> Key:
        """The key of a plan's engine on a device."""
        return cls(device.sm, device.name, device.version, device.cuda, plan.digest)

    @property
    def name(self) -> str:
        """The folder's name: a readable prefix and a digest of all fields."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        plain = "".join(c if c.isalnum() or c in ".-" else "_" for c in f"{self.sm}-{self.tensorrt}-cuda{self.cuda}")
        return f"sm{plain}-{digest[:16]}"


@dataclass(frozen=True)
class Entry:
    """An engine in the cache. profile: the number of its profile in the plan. made: the facts of its build."""

    path: Path
    profile: int
    sha256: str
    bytes: int
    made: Mapping[str, object]

    @property
    def engine(self) -> Path:
        return self.path / ENGINE


def places(home: Path, environment: Mapping[str, str] = os.environ) -> list[Path]:
    """The possible cache folders of the install at ``home``, best first: systemd's CacheDirectory, the install itself,
    and the user's cache for an install that is not writable.
    """
    folders = []
    if given := environment.get("CACHE_DIRECTORY"):  # CacheDirectory= of systemd.exec(5); several are parted by colons
        folders.append(Path(given.partition(":")[0]))
    folders.append(home / "cache")
    base = environment.get("XDG_CACHE_HOME") or (f"{environment['HOME']}/.cache" if environment.get("HOME") else "")
    if base:
        folders.append(Path(base) / "packager" / home.name)
    return [place / KEPT for place in folders]


def writable(folders: list[Path]) -> Path | None:
    """The first folder that this process can create and write; None without one."""
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            continue
    return None


def find(folders: list[Path], key: Key, plan: Plan) -> Entry | None:
    """The engine of this key, checked by its digest; None where no folder has it."""
    for folder in folders:
        entry = read_entry(folder / key.name, key, plan)
        if entry is not None:
            return entry
    return None


def read_entry(path: Path, key: Key, plan: Plan) -> Entry | None:
    """An entry, or None unless it has this key and a profile of the plan, and is undamaged."""
    try:
        plain = json.loads((path / ENTRY).read_text("utf-8"))
        if plain["schema_version"] != FORMAT or plain["key"] != asdict(key):
            return None
        entry = Entry(path, int(plain["profile"]), str(plain["sha256"]), int(plain["bytes"]), dict(plain["made"]))
        whole = 0 <= entry.profile < len(plan.profiles) and entry.engine.stat().st_size == entry.bytes
        return entry if whole and file_sha256(entry.engine) == entry.sha256 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


Build = Callable[[Path], tuple[int, Mapping[str, object]]]
"""Builds the engine into the given file. Returns the profile's number and the facts of the build. Raises EngineError.
"""


def ensure(folders: list[Path], key: Key, plan: Plan, build: Build, say: Say, *, force: bool = False) -> Entry:
    """The engine of this key; built when no folder has it, and then other engines in its folder are removed.

    force: build it in any case. Raises EngineError when it cannot be built, or no folder can be written.
    """
    if not force and (entry := find(folders, key, plan)):
        return entry
    folder = writable(folders)
    if folder is None:
        raise EngineError(
            "Engine: expected a folder that this user may write, to keep this box's engine in, found "
            f"none ({', '.join(map(str, folders))}); run bin/engine build as the owner."
        )
    try:
        with locked(folder, say):
            if not force and (entry := find([folder], key, plan)):  # another start built it meanwhile
                return entry
            sweep(folder)
            entry = publish(folder, key, plan, build)
            for other in sorted(entries(folder)):
                if other != entry.path:
                    say(f"removing the engine that this box no longer uses: {other.name}")
                    shutil.rmtree(other, ignore_errors=True)
            return entry
    except OSError as error:
        raise EngineError(
            f"The engine could not be kept in {folder} ({error.strerror or error}); free some space "
            "there and start again."
        ) from error


def publish(folder: Path, key: Key, plan: Plan, build: Build) -> Entry:
    """Build into a hidden sibling, flush it and give it its name in one step. Under the lock. Raises OSError."""
    goal = folder / key.name
    work = Path(tempfile.mkdtemp(prefix=f".{key.name}.building-", dir=folder))
    try:
        profile, made = build(work / ENGINE)
        size, digest = (work / ENGINE).stat().st_size, file_sha256(work / ENGINE)
        plain = {
            "schema_version": FORMAT,
            "key": asdict(key),
            "profile": profile,
            "sha256": digest,
            "bytes": size,
            "made": dict(made),
        }
        (work / ENTRY).write_text(json.dumps(plain, indent=1, sort_keys=True) + "\n", "utf-8")
        for left in sorted(work.iterdir()):
            if left.name not in (ENGINE, ENTRY):
                left.unlink()
            else:
                flush(left)
        flush(work)
        if goal.exists():  # damaged, or rebuilt with --force
            shutil.rmtree(goal)
        work.chmod(0o755)
        work.rename(goal)
        flush(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Entry(goal, profile, digest, size, made)


def entries(folder: Path) -> Iterator[Path]:
    """All engines in a folder."""
    return (path for path in folder.glob("sm*") if (path / ENTRY).is_file()) if folder.is_dir() else iter(())


def sweep(folder: Path) -> None:
    """Remove the remains of killed builds. Under the lock, so no build is running."""
    for left in folder.glob(".*.building-*"):
        shutil.rmtree(left, ignore_errors=True)


def clear(folders: list[Path], say: Say) -> list[Path]:
    """Remove every engine and all cached kernels. Returns the removed paths."""
    removed = []
    for folder in folders:
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            continue
        with locked(folder, say):
            sweep(folder)
            for path in [*sorted(entries(folder)), *sorted(folder.glob("*.kernels"))]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                removed.append(path)
    return removed


@contextlib.contextmanager
def locked(folder: Path, say: Say, pause: float = 0.5) -> Iterator[None]:
    """Lock a cache folder; wait, with one message, for a process that builds in it. A killed process frees its lock."""
    if sys.platform == "win32":  # engines are built on Jetsons only
        yield
        return
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        waited = False
        while not lock(handle):
            if not waited:
                say("another process builds an engine here; waiting for it …")
            waited = True
            time.sleep(pause)
        yield
    finally:
        os.close(handle)
