"""Fetches the wheels for a target's platform and every Python that it may run, from a universal lock with hashes.

pip evaluates environment markers for the host it runs on, even with ``--platform``. This module evaluates them for the
target, and pip only fetches: exact versions, hashes required, wheels only, from the index that the user's pip is
configured for.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from packager.core.errors import InputError, NetworkError, PackagerError, PlanRefused, ToolError
from packager.core.hashing import hash_file
from packager.core.pip import Run, command, fetch, output, torch_index, unreachable, without_pip

if TYPE_CHECKING:
    from packaging.requirements import Requirement

    from packager.core.progress import Progress

# A marker may depend on the patch release, which is unknown: both ends of a minor version are evaluated.
PATCH_ENDS = ("0", "99")
SYSTEMS = {
    "linux": {"os_name": "posix", "sys_platform": "linux", "platform_system": "Linux"},
    "windows": {"os_name": "nt", "sys_platform": "win32", "platform_system": "Windows"},
    "macos": {"os_name": "posix", "sys_platform": "darwin", "platform_system": "Darwin"},
}


class Platform(Protocol):
    """The properties of a target that this module reads (packager.target.Target has them).

    system: "linux", "windows" or "macos". machine: "x86_64", "aarch64" or "arm64". python: minor versions such as
    "3.10". wheel_platforms: every platform tag that loads there, best first (pip takes ``--platform`` literally).
    """

    @property
    def name(self) -> str: ...
    @property
    def system(self) -> str: ...
    @property
    def machine(self) -> str: ...
    @property
    def python(self) -> tuple[str, ...]: ...
    @property
    def wheel_platforms(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Locked:
    """One entry of the lock: a requirement pinned with ``==``, with its marker, and its sha256 hashes."""

    requirement: Requirement
    hashes: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.requirement.name

    def line(self, *, marker: bool) -> str:
        """The requirement as pip reads it, hashes included."""
        text = f"{self.name}{self.requirement.specifier}"
        if marker and self.requirement.marker is not None:
            text += f" ; {self.requirement.marker}"
        return " \\\n    ".join([text, *(f"--hash=sha256:{digest}" for digest in self.hashes)])


@dataclass(frozen=True)
class WheelSet:
    """files: the wheels, sorted by name, pip's own included. requirements: text of the hashed requirements.txt. python:
    the minor versions of Python that they are for, oldest first, without gaps.
    """

    files: tuple[Path, ...]
    requirements: str
    python: tuple[str, ...] = ()


def read_lock(path: Path) -> list[Locked]:
    """Read a hashed requirements lock. Raises InputError with the file and the line that cannot be used."""
    from packaging.requirements import InvalidRequirement, Requirement

    text = re.sub(r"\\\n\s*", " ", path.read_text("utf-8"))
    entries = []
    for raw in text.splitlines():
        line = re.sub(r"(^|\s)#.*$", "", raw).strip()
        if not line:
            continue
        pinned, *hashes = re.split(r"\s+--hash=sha256:", line)
        try:
            requirement = Requirement(pinned)
        except InvalidRequirement as error:
            raise InputError(f"{path.name}: {pinned!r} is not a requirement.", why=str(error)) from error
        exact = [part for part in requirement.specifier if part.operator == "=="]
        if len(exact) != 1 or len(requirement.specifier) != 1 or not hashes or requirement.url:
            raise InputError(
                f"{path.name}: {pinned!r} is not pinned with == and a sha256 hash.",
                fix="Make the lock again with the script beside it.",
            )
        entries.append(Locked(requirement, tuple(sorted(hash_.strip() for hash_ in hashes))))
    return sorted(entries, key=lambda entry: (entry.name.lower(), str(entry.requirement)))


def environments(target: Platform, python: str) -> list[dict[str, str]]:
    """The marker environments (PEP 508) of a target for one minor version of Python."""
    if target.system not in SYSTEMS:
        raise InputError(
            f"Target {target.name} has the unknown system {target.system!r}.", fix=f"Known: {', '.join(SYSTEMS)}."
        )
    machine = "AMD64" if (target.system, target.machine) == ("windows", "x86_64") else target.machine
    return [
        {
            **SYSTEMS[target.system],
            "platform_machine": machine,
            "platform_release": "",
            "platform_version": "",
            "platform_python_implementation": "CPython",
            "implementation_name": "cpython",
            "python_version": python,
            "python_full_version": f"{python}.{patch}",
            "implementation_version": f"{python}.{patch}",
            "extra": "",
        }
        for patch in PATCH_ENDS
    ]


def select(lock: Iterable[Locked], target: Platform, python: str) -> list[Locked]:
    """The entries of the lock that a target needs with one minor version of Python."""
    wanted = environments(target, python)
    return [
        entry
        for entry in lock
        if entry.requirement.marker is None or any(entry.requirement.marker.evaluate(env) for env in wanted)
    ]


def pip_download(lines: Path, platforms: Sequence[str], python: str, folder: Path) -> list[str]:
    """The command that fetches wheels for another platform from the index that pip is configured for."""
    tag = "cp" + python.replace(".", "")
    line = [*command("download"), "--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    for abi in (tag, "abi3", "none"):
        line += ["--abi", abi]
    for platform in platforms:
        line += ["--platform", platform]
    return [*line, "--dest", str(folder), "--requirement", str(lines)]


def run_pip(command: Sequence[str]) -> None:
    """Run pip through the owner of subprocess."""
    from packager.core.processes import run

    run(command, name="pip download")


def fetch_wheels(
    lock: Path,
    target: Platform,
    cache: Path,
    progress: Progress,
    *,
    more: Sequence[Path] = (),
    scarce: Collection[str] = (),
    run: Run = run_pip,
) -> WheelSet:
    """Fetch the wheels of a lock for every Python of a target; a set already in ``cache`` is not fetched again.

    more: further locks, read as one with the first. scarce: packages that the index may have for some Pythons only; the
    bundle is then for these, and a note lists the others. Raises PlanRefused with package, platform and Python when
    there is no wheel, NetworkError when the index did not deliver, ToolError when pip is missing or the cache changed.
    """
    entries = [entry for path in (lock, *more) for entry in read_lock(path)]
    if not target.python or not target.wheel_platforms:
        raise InputError(
            f"Target {target.name} names no Python version or no wheel platform.", fix="Give it at least one of each."
        )
    platforms = target.wheel_platforms
    wanted = {python: select(entries, target, python) for python in target.python}
    home = cache / _key(wanted, platforms)
    if not home.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{home.name}.", dir=cache))
        try:
            with progress.step(f"wheels for {target.name}", total=len(wanted), unit="Python") as task:
                if scarce:
                    wanted = _narrowed(wanted, scarce, platforms, target, work, progress, run)
                    home = cache / _key(wanted, platforms)
                for python, needed in {} if home.is_dir() else wanted.items():
                    lacking = _lacking(needed, work, python, platforms)
                    if lacking:
                        _download(lacking, platforms, python, target, work, run)
                    task.advance(1)
            _publish(work, home)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    files = _checked(home, entries, wanted, platforms)
    used = [entry for entry in entries if any(entry in needed for needed in wanted.values())]
    header = "# Every package the server needs, with hashes; installed with --require-hashes --no-deps.\n"
    bundled = {hash_file(file) for file in files}  # the lock also knows source archives and other platforms
    lines = "".join(
        replace(entry, hashes=tuple(h for h in entry.hashes if h in bundled)).line(marker=True) + "\n"
        for entry in used
        if entry.name != "pip"
    )
    return WheelSet(files, header + lines, tuple(wanted))


def _narrowed(
    wanted: Mapping[str, list[Locked]],
    scarce: Collection[str],
    platforms: Sequence[str],
    target: Platform,
    work: Path,
    progress: Progress,
    run: Run,
) -> dict[str, list[Locked]]:
    """The first consecutive Pythons for which the index has every scarce package; raises as fetch_wheels when it has
    them for none. They are consecutive because a box may have any version between the first and the last.
    """
    kept: dict[str, list[Locked]] = {}
    refusal: PlanRefused | None = None
    for python, needed in wanted.items():
        rare = [entry for entry in _lacking(needed, work, python, platforms) if entry.name in scarce]
        try:
            if rare:
                _download(rare, platforms, python, target, work, run)
            kept[python] = needed
        except PlanRefused as error:
            refusal = error
            if kept:
                break
    if not kept and refusal is not None:
        raise refusal
    if left := [python for python in wanted if python not in kept]:
        own = torch_index() if "torch" in scarce else ""
        indexes = f"the package index and {own} have" if own else "the package index has"
        progress.note(
            f"The bundle is for Python {', '.join(kept)}: {indexes} no wheel of "
            f"{', '.join(sorted(scarce))} for {', '.join(left)} on {platforms[0]}."
        )
    return kept


def _key(wanted: Mapping[str, Sequence[Locked]], platforms: Sequence[str]) -> str:
    parts = ["3", *platforms]
    for python, needed in wanted.items():
        parts += [python, *(entry.line(marker=False) for entry in needed)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _lacking(needed: Iterable[Locked], folder: Path, python: str, platforms: Sequence[str]) -> list[Locked]:
    """The entries for which no wheel in the folder loads on that Python and platform."""
    from packaging.tags import compatible_tags, cpython_tags
    from packaging.utils import canonicalize_name, parse_wheel_filename

    major, minor = (int(part) for part in python.split("."))
    short = f"cp{major}{minor}"
    loads = set(cpython_tags((major, minor), [short], platforms))
    loads |= set(compatible_tags((major, minor), short, platforms))
    present = set()
    for wheel in folder.glob("*.whl"):
        name, version, _, tags = parse_wheel_filename(wheel.name)
        if tags & loads:
            present.add((name, str(version)))
    return [
        entry
        for entry in needed
        if (canonicalize_name(entry.name), next(iter(entry.requirement.specifier)).version) not in present
    ]


def _checked(
    home: Path, entries: Sequence[Locked], wanted: Mapping[str, Sequence[Locked]], platforms: Sequence[str]
) -> tuple[Path, ...]:
    """The wheels of a cached set. Raises ToolError when a file has no hash of the lock, or a wheel is missing."""
    known = {digest for entry in entries for digest in entry.hashes}
    wheels = tuple(sorted(home.glob("*.whl")))
    changed = [wheel.name for wheel in wheels if hash_file(wheel) not in known]
    lacking = {entry.name for python, needed in wanted.items() for entry in _lacking(needed, home, python, platforms)}
    if changed or lacking:
        raise ToolError(
            f"The cached wheels are not those of the lock: {', '.join([*changed, *sorted(lacking)])}.",
            why="A file in the cache was changed or deleted.",
            fix=f"Delete the folder {home} and build again.",
        )
    return wheels


def _download(
    wanted: Sequence[Locked], platforms: Sequence[str], python: str, target: Platform, work: Path, run: Run
) -> None:
    lines = work / "requirements.txt"
    lines.write_text("".join(entry.line(marker=False) + "\n" for entry in wanted), "utf-8")
    try:
        fetch(pip_download(lines, platforms, python, work), [entry.name for entry in wanted], run)
    except PackagerError as error:
        raise _explain(error, wanted, platforms, python, target, work, run) from error


def _explain(
    error: PackagerError,
    wanted: Sequence[Locked],
    platforms: Sequence[str],
    python: str,
    target: Platform,
    work: Path,
    run: Run,
) -> PackagerError:
    """The error for a failed download. It fetches the packages one by one, because pip stops at the first, and
    distinguishes a missing wheel from a failed connection.
    """
    if lacking := without_pip(error):
        return lacking
    missing: list[Locked] = []
    other: list[Locked] = []
    second = ""  # what became of the attempt at PyTorch's own index
    for entry in wanted:
        lines = work / "one.txt"
        lines.write_text(entry.line(marker=False) + "\n", "utf-8")
        try:
            fetch(pip_download(lines, platforms, python, work), [entry.name], run)
        except PackagerError as single:
            text = output(single)
            # pip prints ResolutionImpossible when the user's own constraint excludes the version
            none = "No matching distribution" in text or "ResolutionImpossible" in text
            (missing if none and not unreachable(text) else other).append(entry)
            if isinstance(single.__cause__, PackagerError):
                second = f"PyTorch's own CPU index, {torch_index()}, was tried too: {single.__cause__.why} "
    if missing:
        names = ", ".join(f"{entry.name} {entry.requirement.specifier}".replace("==", "") for entry in missing)
        return PlanRefused(
            f"There is no wheel of {names} for {target.wheel_platforms[0]} and Python {python} (target {target.name}).",
            why=f"{second}A box cannot compile, so only wheels are bundled.",
            fix="Change Python or the platform tag in the target, or add the wheel to a package index of your own"
            + (" (PACKAGER_TORCH_INDEX names a copy of PyTorch's)." if second else "."),
        )
    names = ", ".join(entry.name for entry in other) or "the wheels"
    return NetworkError(
        f"The package index did not deliver {names}.",
        why=error.why,
        fix="Check pip's index configuration (`pip config list`) and the connection, then build again.",
    )


def _publish(work: Path, home: Path) -> None:
    for file in work.iterdir():
        if file.suffix != ".whl":
            file.unlink()
    try:
        os.rename(work, home)  # noqa: PTH104 - Path.rename hides that this must not replace a full folder
    except OSError:
        if not home.is_dir():  # otherwise another build published the same files first
            raise
