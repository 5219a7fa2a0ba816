"""What tests need of the system: one table, tests/system-packages.txt, and one way to skip for want of it."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

TABLE = Path(__file__).with_name("system-packages.txt")
REQUIRED = "REQUIRE_SYSTEM_PACKAGES"  # set where a missing package fails the test: .ci/run does it
_WANTS = re.compile(r"needs the system package (\S+)")


def table() -> dict[str, str]:
    """Program (or file) -> Debian's package."""
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    return dict(line.split() for line in lines if line.strip() and not line.startswith("#"))


def system_package(program: str) -> str:
    """Where a program of the table is; without it the test is skipped or, in CI, fails, with the package's name."""
    package = table()[program]
    found = program if program.startswith("/") and Path(program).exists() else shutil.which(program)
    if found:
        return found
    reason = f"needs the system package {package} (for {program})"
    if os.environ.get(REQUIRED):
        pytest.fail(f"{reason}, and {REQUIRED} is set")
    pytest.skip(reason)


def summary(reasons: list[str]) -> str:
    """One line over the reasons of all skips; nothing where none was for want of a package."""
    wanted = Counter(match[1] for reason in reasons if (match := _WANTS.search(reason)))
    if not wanted:
        return ""
    named = ", ".join(f"{package} ({count})" for package, count in sorted(wanted.items()))
    return (
        f"{wanted.total()} test{'s' * (wanted.total() > 1)} skipped for want of system packages: {named}. "
        f"Debian, Ubuntu: apt install {' '.join(sorted(wanted))}"
    )
