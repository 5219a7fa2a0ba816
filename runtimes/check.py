"""The preflight: does this box fit the bundle, and are all its files whole? Standard library only, writes nothing.

A fact that cannot be read stays unknown: it is shown as such and never guessed. ``--facts FILE`` compares the facts
recorded in a JSON file instead of this box's (``--facts-only`` prints this box's, to record them).
Exit codes: 0 fits, 4 the box does not fit, 5 the files are damaged.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import platform
import re
import shutil
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

FITS, REFUSED, DAMAGED, MACHINE = 0, 4, 5, 9
MANIFEST, SUMS, MARKER = "manifest.json", "SHA256SUMS", "installed.json"
CHUNK = 1 << 20
SYSTEMS = {"linux": "Linux", "windows": "Windows", "macos": "macOS"}
MACHINES = {"amd64": "x86_64", "x64": "x86_64"}
# What an install and the server use of the standard library and some Linux distributions leave out.
NEEDED_MODULES = ("venv", "zlib", "ctypes")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. ok: True, False, or None when the fact is unknown. fix: what to do when not ok."""

    name: str
    ok: bool | None
    expected: str
    found: str
    fix: str = ""

    def sentence(self) -> str:
        """Expected, found and what to do, in one sentence."""
        return f"{self.name}: expected {self.expected}, found {self.found}; {self.fix}."


def read_facts(prefix: Path | None = None, *, gpu: bool = False) -> dict[str, Any]:
    """The facts of this box; None for each that cannot be read. Memory and disk in bytes; disk is what is free where
    ``prefix`` is, or would be made. gpu: GPUs and vLLM too, which takes seconds."""
    more: dict[str, Any] = {}
    if gpu:
        from runtimes.gpu import read_facts as read_gpu_facts  # not at the top: this file also runs alone

        more = read_gpu_facts()
    system = {"Linux": "linux", "Windows": "windows", "Darwin": "macos"}.get(platform.system())
    machine = platform.machine().lower()
    ram, available = _memory()
    libc, glibc = _libc() if system == "linux" else (None, None)
    return {
        "system": system,
        "machine": MACHINES.get(machine, machine) or None,
        "bits": struct.calcsize("P") * 8,
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "free_threaded": bool(getattr(sys, "_is_gil_enabled", lambda: True)() is False),
        "modules_missing": [name for name in NEEDED_MODULES if find_spec(name) is None],
        "libc": libc,
        "glibc": glibc,
        "ram_bytes": ram,
        "ram_available_bytes": available,
        "disk_free_bytes": _disk_free(prefix) if prefix is not None else None,
        **more,
    }


def _libc() -> tuple[str | None, str | None]:
    """Name of the C library and glibc's version, each None when it cannot be told."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (AttributeError, ValueError, OSError):
        name, version = "", ""
    if name == "glibc" and version:
        return "glibc", version
    if any(Path("/lib").glob("ld-musl-*.so.1")):
        return "musl", None
    return None, None


def _memory() -> tuple[int | None, int | None]:
    """Memory of the machine and what of it is available now. A container's limit counts as the machine's memory."""
    total: int | None = None
    available: int | None = None
    if sys.platform == "win32":
        return _windows_memory()
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        total = None
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
        total, available = sizes.get("MemTotal", total), sizes.get("MemAvailable")
    except (OSError, ValueError, IndexError):
        available = None
    for limit_file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = int(Path(limit_file).read_text("ascii"))
        except (OSError, ValueError):  # no such file, or "max"
            continue
        total = limit if total is None else min(total, limit)
    return total, available


def _windows_memory() -> tuple[int | None, int | None]:
    class Status(ctypes.Structure):  # MEMORYSTATUSEX
        _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong)] + [
            (name, ctypes.c_ulonglong) for name in ("total", "available", "c", "d", "e", "f", "g")]

    status = Status()
    status.length = ctypes.sizeof(Status)
    kernel = getattr(ctypes, "windll", None)
    if kernel is None or not kernel.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None, None
    return int(status.total), int(status.available)


def _disk_free(prefix: Path) -> int | None:
    """Bytes free for this user where the folder is or would be made."""
    place = prefix.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return None


def version_tuple(text: str) -> tuple[int, ...]:
    """"3.13.0rc1" as (3, 13, 0): the leading number of each part, up to the first part that has none."""
    parts: list[int] = []
    for part in text.split("."):
        match = re.match(r"\d+", part)
        if match is None:
            break
        parts.append(int(match[0]))
    return tuple(parts)


def size(count: float) -> str:
    """Bytes for people: "4.0 GB" (10^9)."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def compare(needs: Mapping[str, Any], facts: Mapping[str, Any], *, installing: bool) -> list[Finding]:
    """What the manifest's ``needs`` ask against a box's facts, gravest first. installing: disk counts too."""
    found: list[Finding] = []

    def look(name: str, fact: str, expected: str, test: Callable[[Any], bool], fix: str,
             show: Callable[[Any], str] = str) -> None:
        value = facts.get(fact)
        if value is None:
            found.append(Finding(name, None, expected, "unknown (it could not be read)", fix))
        else:
            found.append(Finding(name, test(value), expected, show(value), fix))

    system, machine = needs["system"], needs["machine"]
    oldest, newest = needs["python_min"], needs["python_max"]
    pythons = f"Python {oldest} to {newest}" if oldest != newest else f"Python {oldest}"
    low, high = version_tuple(oldest), version_tuple(newest)
    name = SYSTEMS.get(system, system)
    look("system", "system", name, lambda value: value == system,
         f"use a bundle that was built for this system, or a {name} box", lambda value: SYSTEMS.get(value, value))
    look("processor", "machine", machine, lambda value: MACHINES.get(value.lower(), value.lower()) == machine,
         "use a bundle that was built for this processor")
    look("Python", "python", pythons, lambda value: low <= version_tuple(value)[:2] <= high,
         f"install one of them beside the system's own and name it with --python python{newest}",
         lambda value: f"Python {value}")
    look("Python implementation", "implementation", "CPython", lambda value: value == "CPython",
         "name a CPython with --python")
    look("Python word size", "bits", "64 bit", lambda value: value == 64,
         "install a 64-bit system or name a 64-bit Python with --python", lambda value: f"{value} bit")
    look("Python build", "free_threaded", "a Python with its global lock", lambda value: not value,
         "name an ordinary build with --python", lambda value: "a free-threaded one" if value else "one with it")
    look("Python modules", "modules_missing", ", ".join(NEEDED_MODULES), lambda value: not value,
         "install the full python3 of the system (on Debian and Ubuntu the package python3)",
         lambda value: f"no {', '.join(value)}" if value else "all")
    if needs.get("glibc_min"):
        least = needs["glibc_min"]
        fix = f"use a system with glibc {least} or newer, or a bundle that was built for this older one"
        if facts.get("libc") not in (None, "glibc"):
            found.append(Finding("C library", False, f"glibc {least} or newer", str(facts["libc"]), fix))
        else:
            look("C library", "glibc", f"glibc {least} or newer",
                 lambda value: version_tuple(value) >= version_tuple(least), fix, lambda value: f"glibc {value}")
    look("memory", "ram_bytes", f"at least {size(needs['ram_bytes'])} of RAM",
         lambda value: value >= needs["ram_bytes"],
         "use a box with more memory, or a bundle with a smaller context or smaller weights", size)
    if needs.get("gpu"):
        from runtimes.gpu import lacking

        found += [Finding(*row) for row in lacking(needs["gpu"], facts)]
    if installing:
        look("disk", "disk_free_bytes", f"{size(needs['disk_bytes'])} free where it is installed",
             lambda value: value >= needs["disk_bytes"], "free some space or choose another place with --prefix", size)
    return found


def read_manifest(bundle: Path) -> dict[str, Any]:
    """The manifest as far as a box needs it. Raises ValueError with one sentence when it cannot be used."""
    try:
        plain = json.loads((bundle / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{bundle / MANIFEST} cannot be read ({error}); copy the bundle again.") from error
    if not isinstance(plain, dict) or plain.get("schema_version") != 1:
        raise ValueError(f"{bundle / MANIFEST} is not a manifest of version 1; use the tools that came with it.")
    missing = [key for key in ("bundle", "run", "needs", "files") if key not in plain]
    if missing:
        raise ValueError(f"{bundle / MANIFEST} has no {', '.join(missing)}; copy the bundle again.")
    return plain


def sums(bundle: Path) -> Iterator[tuple[str, str]]:
    """(path, sha256) of every line of SHA256SUMS. Raises ValueError for a line or path that cannot be trusted."""
    try:
        lines = (bundle / SUMS).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{bundle / SUMS} cannot be read ({error}); copy the bundle again.") from error
    for line in lines:
        digest, _, path = line.partition("  ")
        parts = path.split("/")
        if len(digest) != 64 or not path or "\\" in path or ":" in path or any(p in ("", ".", "..") for p in parts):
            raise ValueError(f"{SUMS} has a line that cannot be trusted ({line[:120]!r}); copy the bundle again.")
        yield path, digest


def file_sha256(path: Path) -> str:
    """The sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def check_files(bundle: Path) -> list[Finding]:
    """Every file of SHA256SUMS (in an installed copy: those that were installed) against its digest."""
    try:
        listed = list(sums(bundle))
    except ValueError as error:
        return [Finding("files", False, f"a sound {SUMS}", str(error), "copy the bundle again")]
    if (bundle / MARKER).is_file():
        listed = [(path, digest) for path, digest in listed if is_installed(path)]
    fix = "copy the bundle again"
    bad: list[Finding] = []
    for path, expected in listed:
        file = bundle / path
        try:
            if file.is_symlink() or not file.is_file():
                bad.append(Finding(path, False, "a file", "a link" if file.is_symlink() else "nothing", fix))
            elif (found := file_sha256(file)) != expected:
                bad.append(Finding(path, False, f"sha256 {expected[:16]}…", f"{found[:16]}…", fix))
        except OSError as error:
            bad.append(Finding(path, False, "a readable file", f"{error.strerror or error}", fix))
    return bad or [Finding("files", True, f"{len(listed)} files with their digests", f"all {len(listed)}", fix)]


def is_installed(path: str) -> bool:
    """Whether a file of the bundle is also part of an install as it is: wheels are unpacked, units get the prefix."""
    return not path.startswith(("wheels/", "install.")) and not ("/" not in path and path.endswith(".service"))


def exit_code(findings: list[Finding], files: list[Finding]) -> int:
    """4 when the box does not fit, else 5 when files are damaged, else 0. Unknown facts do not refuse."""
    if any(finding.ok is False for finding in findings):
        return REFUSED
    return DAMAGED if any(finding.ok is False for finding in files) else FITS


def refusal(findings: list[Finding], files: list[Finding]) -> str:
    """The one sentence that refuses: the gravest finding, and the names of the others; "" when nothing is wrong."""
    bad = [finding for finding in findings + files if finding.ok is False]
    if not bad:
        return ""
    others = f" (and {len(bad) - 1} more: {', '.join(item.name for item in bad[1:9])})" if len(bad) > 1 else ""
    return f"{bad[0].sentence()[:-1]}{others}."


def parser() -> argparse.ArgumentParser:
    """The options of ``check``."""
    options = argparse.ArgumentParser(
        prog="check", description="Does this box fit the bundle, and are its files whole? Writes nothing.",
        epilog="Exit codes: 0 fits, 4 the box does not fit, 5 files are damaged. Example: bin/check --json")
    options.add_argument("--bundle", type=Path, required=True, help="the bundle's folder, or an install of it")
    options.add_argument("--prefix", type=Path, help="where it would be installed: the disk there is looked at")
    options.add_argument("--facts", type=Path, help="compare these recorded facts (JSON) instead of this box's")
    options.add_argument("--facts-only", action="store_true", help="print this box's facts as JSON and end")
    options.add_argument("--no-files", action="store_true", help="do not compare the digests of the files")
    options.add_argument("--json", action="store_true", help="one JSON document on standard output")
    return options


def main(argv: list[str] | None = None) -> int:
    """Run the preflight; the exit code."""
    given = parser().parse_args(argv)
    installing = not (given.bundle / MARKER).is_file()
    prefix = given.prefix or given.bundle
    if given.facts_only:
        sys.stdout.write(json.dumps(read_facts(prefix), indent=2) + "\n")
        return FITS
    try:
        manifest = read_manifest(given.bundle)
        gpu = bool(manifest["needs"].get("gpu"))
        facts = json.loads(given.facts.read_text("utf-8")) if given.facts else read_facts(prefix, gpu=gpu)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return DAMAGED
    findings = compare(manifest["needs"], facts, installing=installing)
    files = [] if given.no_files else check_files(given.bundle)
    code = exit_code(findings, files)
    sentence = refusal(findings, files)
    if given.json:
        document = {"bundle": manifest["bundle"], "ok": code == FITS, "exit_code": code, "refusal": sentence,
                    "facts": facts, "findings": [asdict(item) for item in findings + files]}
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    else:
        marks = {True: "ok     ", False: "NO     ", None: "unknown"}
        for item in findings + files:
            sys.stdout.write(f"{marks[item.ok]}  {item.name}: {item.found} (needed: {item.expected})\n")
        sys.stdout.flush()
        sys.stderr.write(f"{sentence}\n" if sentence else "")
    return code


if __name__ == "__main__":
    sys.exit(main())
