"""The commands that the documents' figures come from still run; what hangs on no clock is what the documents show."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SCRIPTS = sorted(path.name for path in (ROOT / "benchmarks").glob("*.py") if "argparse" in path.read_text("utf-8"))


def printed(script: str, *arguments: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_benchmark_starts(script: str) -> None:
    """Its imports are there, and it says what it measures."""
    assert "usage:" in printed(script, "--help")


def test_the_plans_in_the_documents_are_those_of_the_code(smollm2: Path, minilm: Path) -> None:
    shown = (ROOT / "docs" / "explanation" / "tensorrt-decoders.md").read_text(encoding="utf-8")
    table = printed("tensorrt_plans.py", "--smollm2", smollm2, "--minilm", minilm).strip()
    assert table.count("\n") > 80
    assert shown.endswith(table + "\n"), "run benchmarks/tensorrt_plans.py and put its tables there"
