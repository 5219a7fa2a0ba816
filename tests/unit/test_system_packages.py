"""System packages of the tests: a missing one skips by name, fails in CI, and is counted at the end of the run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import system_packages
from tests.conftest import ROOT
from tests.system_packages import REQUIRED, summary, system_package, table


@pytest.fixture(autouse=True)
def no_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PATH on which nothing is."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(REQUIRED, raising=False)


def test_a_missing_package_skips_the_test_by_its_name() -> None:
    """Not by the program's, which may be another."""
    with pytest.raises(pytest.skip.Exception, match="needs the system package util-linux"):
        system_package("unshare")


def test_a_missing_package_fails_the_test_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    """There it was to be installed."""
    monkeypatch.setenv(REQUIRED, "1")
    with pytest.raises(pytest.fail.Exception, match="needs the system package strace"):
        system_package("strace")
    assert f"export {REQUIRED}=1" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_a_file_may_stand_for_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library has no program on PATH."""
    (tmp_path / "driver.json").touch()
    monkeypatch.setattr(system_packages, "table", lambda: {str(tmp_path / "driver.json"): "some-driver"})
    assert system_package(str(tmp_path / "driver.json")) == str(tmp_path / "driver.json")


def test_the_run_ends_with_how_many_and_which() -> None:
    """One line, only where a test was skipped for that reason."""
    reasons = ["Skipped: needs the system package strace (for strace)"] * 2 + ["no GPU here"]
    assert summary(reasons).startswith("2 tests skipped for want of system packages: strace (2). ")
    assert summary(["no GPU here"]) == ""


def test_every_program_that_a_test_asks_for_is_in_the_table() -> None:
    """And nothing is in it that no test asks for."""
    asked = {
        name
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if path.name != Path(__file__).name
        for name in re.findall(r"system_package\(\"([^\"]+)\"\)", path.read_text(encoding="utf-8"))
    }
    assert asked == set(table())
