"""Prints the preflight's results for every recorded box of tests/unit/boxes/cases.json.

    .venv/bin/python benchmarks/refusals.py              # a table for the terminal
    .venv/bin/python benchmarks/refusals.py --markdown   # the rows of docs/reference/refusals.md

Each row is one run of runtimes/preflight/check.py, as bin/check starts it, on a bundle with only a manifest.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BOXES = ROOT / "tests" / "unit" / "boxes"


class Row(NamedTuple):
    """One box against one bundle. result: the preflight's sentences."""

    box: str
    bundle: str
    code: int
    result: str


def rows() -> list[Row]:
    """Every case, in the order of the file."""
    cases = json.loads((BOXES / "cases.json").read_text(encoding="utf-8"))
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases["cases"]:
            bundle = Path(folder) / case["needs"]
            write_bundle(bundle, cases["bundles"][case["needs"]]["needs"])
            done = subprocess.run(
                [
                    sys.executable,
                    "-I",
                    "-B",
                    ROOT / "runtimes" / "preflight" / "check.py",
                    "--bundle",
                    bundle,
                    "--no-files",
                    "--json",
                    "--facts",
                    BOXES / f"{case['box']}.json",
                ],
                capture_output=True,
                text=True,
                check=False,
                encoding="utf-8",
            )
            results.append(
                Row(case["is"], cases["bundles"][case["needs"]]["is"], done.returncode, sentences(done.stdout))
            )
    return results


def write_bundle(folder: Path, needs: object) -> None:
    """Write a bundle with only a manifest."""
    folder.mkdir(exist_ok=True)
    manifest = {"schema_version": 1, "bundle": folder.name, "run": {}, "needs": needs, "files": []}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def sentences(document: str) -> str:
    """The refusal, else that it fits, with the warnings and the unknown facts."""
    verdict = json.loads(document)
    if verdict["refusal"]:
        return str(verdict["refusal"])
    unknown = [f"{one['name']}: {one['found']}." for one in verdict["findings"] if one["ok"] is None]
    fits = "It fits, as far as is known." if unknown else "It fits."
    return " ".join([fits, *(f"Warning: {sentence}" for sentence in verdict["warnings"]), *unknown])


def markdown() -> str:
    """The rows as a table; bars inside cells are escaped."""
    lines = ["| box | bundle | exit | result |", "| --- | --- | --- | --- |"]
    for row in rows():
        cells = (row.box, row.bundle, str(row.code), row.result)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    if sys.argv[1:] == ["--markdown"]:
        print(markdown(), end="")
        return 0
    for row in rows():
        print(f"{row.box}\n    for {row.bundle}\n    exit {row.code}: {row.result}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
