"""Set-up: a Python is found or its absence explained, and a foreign .venv is left alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what set-up reads."""
    for name in ("scripts", "locks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "Makefile"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "packager").mkdir()
    shutil.copy(ROOT / "packager/__init__.py", tmp_path / "packager")
    return tmp_path


def run(*argv: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    words = [str(part) for part in argv]
    return subprocess.run(words, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, check=False)


def test_the_python_that_is_named_is_taken(checkout: Path) -> None:
    """PYTHON chooses the interpreter."""
    assert run("scripts/python.sh", cwd=checkout, PYTHON=sys.executable).stdout.strip() == sys.executable


def test_no_fitting_python_is_told_in_words(checkout: Path) -> None:
    """Without a Python 3.11 set-up says what it looked for and what to do, and ends."""
    done = run("scripts/python.sh", cwd=checkout, PYTHON="no-such-python")
    assert done.returncode == 1
    assert "no Python 3.11 or newer was found (looked for: no-such-python)" in done.stderr
    assert "do:" in done.stderr


def test_an_environment_of_someone_else_is_left_alone(checkout: Path) -> None:
    """A .venv that set-up did not make is neither used nor removed."""
    (checkout / ".venv").mkdir()
    (checkout / ".venv/mine").write_text("keep", encoding="utf-8")
    done = run(sys.executable, "scripts/prepare.py", "build", cwd=checkout)
    assert done.returncode == 1
    assert "was not made by this set-up" in done.stderr
    assert (checkout / ".venv/mine").read_text(encoding="utf-8") == "keep"


def test_an_unknown_stage_is_a_usage_error(checkout: Path) -> None:
    """The stages are named."""
    done = run(sys.executable, "scripts/prepare.py", "everything", cwd=checkout)
    assert (done.returncode, done.stderr) == (2, "usage: python scripts/prepare.py build | demo | test\n")
