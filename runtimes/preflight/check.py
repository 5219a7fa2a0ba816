"""The preflight: does this box fit the bundle, and are all its files intact? Standard library only, writes nothing.

A fact that cannot be read is shown as unknown and never guessed. ``--facts FILE`` uses the facts recorded in a JSON
file instead of this box's (``--facts-only`` prints this box's facts, to record them). It runs without an install, on
Python 3.8 too: python3 runtime/runtimes/preflight/check.py --bundle . Exit codes: 0 fits (warnings included), 2 usage,
4 the box does not fit, 5 the files are damaged.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the package's parent is three folders up
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from runtimes.files import file_sha256
from runtimes.preflight.facts import read_facts as read_box
from runtimes.preflight.facts import recorded_facts
from runtimes.preflight.fit import (
    DAMAGED,
    FITS,
    MACHINE,
    REFUSED,
    WARNS,
    Finding,
    compare,
    exit_code,
    refusal,
    warnings,
)
from runtimes.preflight.fit_gpu import size

__all__ = ["DAMAGED", "FITS", "MACHINE", "REFUSED", "Finding", "compare", "exit_code", "refusal", "size", "warnings"]

USAGE = 2
MANIFEST, SUMS, MARKER = "manifest.json", "SHA256SUMS", "installed.json"
NEEDED = ("system", "machine", "python_min", "python_max", "ram_bytes", "disk_bytes")
NEEDED_OF_A_GPU = ("capability", "count", "bytes")


def read_facts(prefix: Path | None = None, *, gpu: bool = False) -> dict[str, Any]:
    """The facts of this box; disk is the free space where ``prefix`` is, or would be made. gpu: also read GPUs and
    vLLM, which takes seconds.
    """
    return read_box(prefix, programs=gpu)


def read_manifest(bundle: Path, *, needs: bool = False) -> dict[str, Any]:
    """The manifest. needs: require a complete ``needs``. Raises ValueError with one sentence when it cannot be used."""
    try:
        manifest = json.loads((bundle / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{bundle / MANIFEST} cannot be read ({error}); copy the bundle again.") from error
    if not isinstance(manifest, dict) or manifest.get("schema_version") != 1:
        raise ValueError(f"{bundle / MANIFEST} is not a manifest of version 1; use the tools that came with it.")
    missing = [key for key in ("bundle", "run", "needs", "files") if key not in manifest]
    needed: Any = manifest.get("needs")
    if needs and not missing:
        missing = [f"needs.{key}" for key in NEEDED if not isinstance(needed, dict) or key not in needed]
    if needs and not missing and (gpu := needed.get("gpu")):
        missing = [f"needs.gpu.{key}" for key in NEEDED_OF_A_GPU if not isinstance(gpu, dict) or key not in gpu]
    if missing:
        raise ValueError(f"{bundle / MANIFEST} has no {', '.join(missing)}; copy the bundle again.")
    return manifest


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


def check_files(bundle: Path) -> list[Finding]:
    """Compare every file of SHA256SUMS with its digest (of an install: the installed files)."""
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
            elif (digest := file_sha256(file)) != expected:
                bad.append(Finding(path, False, f"sha256 {expected[:16]}…", f"{digest[:16]}…", fix))
        except OSError as error:
            bad.append(Finding(path, False, "a readable file", f"{error.strerror or error}", fix))
    return bad or [Finding("files", True, f"{len(listed)} files with their digests", f"all {len(listed)}", fix)]


def is_installed(path: str) -> bool:
    """Whether an install copies a file of the bundle unchanged: wheels are unpacked, units get the prefix."""
    return not path.startswith(("wheels/", "install.")) and not ("/" not in path and path.endswith(".service"))


def parser() -> argparse.ArgumentParser:
    """The options of ``check``."""
    options = argparse.ArgumentParser(
        prog="check",
        description="Does this box fit the bundle, and are its files whole? Writes nothing.",
        epilog="Exit codes: 0 fits, 4 the box does not fit, 5 files are damaged. Example: bin/check --json",
    )
    options.add_argument("--bundle", type=Path, help="the bundle's folder, or an install of it")
    options.add_argument("--prefix", type=Path, help="where it would be installed: check the free disk there")
    options.add_argument("--facts", type=Path, help="compare these recorded facts (JSON) instead of this box's")
    options.add_argument("--facts-only", action="store_true", help="print this box's facts as JSON and end")
    options.add_argument("--no-files", action="store_true", help="do not compare the digests of the files")
    options.add_argument("--json", action="store_true", help="one JSON document on standard output")
    options.add_argument("--needs", type=Path, help=argparse.SUPPRESS)  # packager doctor: name -> needs, no bundle
    options.add_argument("--output", type=Path, help=argparse.SUPPRESS)  # packager doctor: where the document goes
    return options


def main(argv: list[str] | None = None) -> int:
    """Run the preflight; the exit code."""
    given = parser().parse_args(argv)
    if given.facts_only:
        sys.stdout.write(json.dumps(read_facts(given.prefix or given.bundle or Path.home(), gpu=True), indent=2) + "\n")
        return FITS
    if given.bundle is None and given.needs is None:
        sys.stderr.write("--bundle is missing: name the bundle to compare this box with.\n")
        return USAGE
    try:
        facts = recorded_facts(given.facts) if given.facts else None
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return USAGE
    if given.bundle is None:
        return _write(compare_each(json.loads(given.needs.read_text("utf-8")), facts), given.output)
    try:
        manifest = read_manifest(given.bundle, needs=True)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return DAMAGED
    if facts is None:
        facts = read_facts(given.prefix or given.bundle, gpu=bool(manifest["needs"].get("gpu")))
    findings = compare(manifest["needs"], facts, installing=not (given.bundle / MARKER).is_file())
    files = [] if given.no_files else check_files(given.bundle)
    document = {"bundle": manifest["bundle"], "facts": facts, **verdict(findings, files)}
    if given.json or given.output:
        return _write(document, given.output)
    show(findings, files)
    return int(document["exit_code"])


def verdict(findings: list[Finding], files: list[Finding]) -> dict[str, Any]:
    """The findings as the JSON document has them."""
    code = exit_code(findings, files)
    return {
        "ok": code == FITS,
        "exit_code": code,
        "refusal": refusal(findings, files),
        "warnings": warnings(findings),
        "findings": [asdict(item) for item in [*findings, *files]],
    }


def compare_each(needs: Mapping[str, Any], facts: dict[str, Any] | None) -> dict[str, Any]:
    """Compare this box, or the recorded one, with several needs, by name."""
    if facts is None:
        facts = read_facts(Path.home(), gpu=True)
    results = {name: verdict(compare(needed, facts, installing=False), []) for name, needed in needs.items()}
    return {"facts": facts, "results": results, "exit_code": FITS}


def _write(document: dict[str, Any], output: Path | None) -> int:
    text = json.dumps(document, indent=2) + "\n"
    if output is None:
        sys.stdout.write(text)
    else:
        output.write_text(text, "utf-8")
    return int(document["exit_code"])


def show(findings: list[Finding], files: list[Finding]) -> None:
    """Print a line for each finding, with the fix for a warning; the refusal goes to standard error."""
    for item in [*findings, *files]:
        mark = {True: "ok     ", False: "warning" if item.warns else "NO     ", None: "unknown"}[item.ok]
        word = "better" if item.severity == WARNS else "needed"
        advice = f"; {item.fix}" if item.warns else ""
        sys.stdout.write(f"{mark}  {item.name}: {item.found} ({word}: {item.expected}){advice}\n")
    sys.stdout.flush()
    if sentence := refusal(findings, files):
        sys.stderr.write(f"{sentence}\n")


if __name__ == "__main__":
    sys.exit(main())
