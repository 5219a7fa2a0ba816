"""Set-up: a Python is found or its absence explained, a foreign .venv is left alone, a damaged wheel is not used."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))


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


def test_no_fitting_python_stops_with_a_sentence(checkout: Path) -> None:
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


def test_a_kept_wheel_is_used_only_when_it_is_whole(tmp_path: Path) -> None:
    """A wheel without its digest, or with other bytes than its digest says, is compiled again."""
    from llama_wheel import kept_wheel

    wheel = tmp_path / "llama_cpp_python-0-py3-none-any.whl"
    wheel.write_bytes(b"compiled")
    assert kept_wheel(tmp_path) is None
    noted = tmp_path / f"{wheel.name}.sha256"
    noted.write_text(hashlib.sha256(b"compiled").hexdigest() + "\n", encoding="ascii")
    assert kept_wheel(tmp_path) == wheel
    wheel.write_bytes(b"compile")
    assert kept_wheel(tmp_path) is None


def test_another_compiler_flag_is_another_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key of the kept wheel follows what the code was compiled with and for."""
    import llama_wheel

    monkeypatch.setattr(llama_wheel, "compiler", lambda: "c++ 12")
    first = llama_wheel.cache_key()
    assert first == llama_wheel.cache_key()
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_NATIVE=OFF")
    assert llama_wheel.cache_key() != first
    monkeypatch.delenv("CMAKE_ARGS")
    monkeypatch.setattr(llama_wheel, "processor", lambda: "another")
    assert llama_wheel.cache_key() != first


def test_a_machine_without_a_compiler_stops_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiler is a sentence with the package to install, and a word that the demo needs none."""
    import llama_wheel
    from steps import Stopped

    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(Stopped) as caught:
        llama_wheel.cache_key()
    assert "no C++ compiler" in caught.value.what
    assert "make demo" in caught.value.fix
