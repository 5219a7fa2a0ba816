"""Set-up: it finds a Python or explains its absence, leaves a foreign .venv alone, and gives uv pip's configuration."""

from __future__ import annotations

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


def test_pips_configuration_is_read_as_pip_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable beats the section of `pip install`, and that beats the general one."""
    import packages

    (tmp_path / "pip.conf").write_text(
        "[global]\nfind-links = /general\nproxy = http://general\ntimeout = 60\n"
        "[install]\nfind-links =\n    /one\n    ~/two\nproxy = http://particular\n[download]\ntimeout = 1\n",
        encoding="utf-8",
    )
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.setenv("PIP_PROXY", "http://variable")
    monkeypatch.setattr(packages, "LOG", tmp_path / "log")
    monkeypatch.setattr(packages, "PIP", [sys.executable, "-m", "pip"])
    options = packages.settings.__wrapped__()
    assert options["find-links"].split() == ["/one", "~/two"]
    assert (options["proxy"], options["timeout"]) == ("http://variable", "60")


def test_uv_gets_pips_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Indexes, folders, proxy, certificates and patience; uv reads none of pip's own configuration."""
    import packages

    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/someone")
    configured = {
        "index-url": "http://127.0.0.1/a",
        "extra-index-url": "http://127.0.0.1/b\nfile:///c",
        "find-links": "/one\n~/two",
        "proxy": "http://127.0.0.1:3128",
        "cert": "/a company/certificates.pem",
        "default-timeout": "180",
        "no-index": "false",
        "quiet": "1",
    }
    assert packages.for_uv(configured) == {
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_DEFAULT_INDEX": "http://127.0.0.1/a",
        "UV_INDEX": "http://127.0.0.1/b file:///c",
        "UV_FIND_LINKS": "/one,/someone/two",
        "HTTP_PROXY": "http://127.0.0.1:3128",
        "HTTPS_PROXY": "http://127.0.0.1:3128",
        "ALL_PROXY": "http://127.0.0.1:3128",
        "SSL_CERT_FILE": "/a company/certificates.pem",
        "UV_HTTP_TIMEOUT": "180",
    }
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/requests.pem")
    assert packages.for_uv({})["SSL_CERT_FILE"] == "/requests.pem"
    assert packages.for_uv({"keyring-provider": "import"}) == "keyring-provider"


@pytest.mark.parametrize(
    ("tail", "why"),
    [
        (
            "Looking\nERROR: Could not find it\nERROR: No matching distribution found for torch",
            "No matching distribution",
        ),
        (
            "  × No solution found:\n  ╰─▶ Because there is no\n      version of torch",
            "there is no version of torch",
        ),
        ("Segmentation fault", "Segmentation fault"),
        ("", "it gave no reason"),
    ],
)
def test_the_reason_is_what_the_tool_gave_as_its_error(tail: str, why: str) -> None:
    """One line of it, from pip's or uv's last words."""
    import packages

    assert packages.reason(tail).startswith(why)
