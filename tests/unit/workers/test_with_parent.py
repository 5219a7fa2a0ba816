"""The shim runs scripts and modules as Python itself would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from packager.core.processes import WORKERS


def shim(*arguments: str | Path, **more: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(WORKERS / "with_parent.py"), str(os.getpid()), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **more)  # type: ignore[call-overload,no-any-return]


def test_a_script_sees_itself_as_main_with_its_own_arguments(tmp_path: Path) -> None:
    """__name__, __file__ and sys.argv are those of a direct run."""
    script = tmp_path / "a.py"
    script.write_text("import sys\nprint(__name__, __file__ == sys.argv[0], sys.argv[1:])\n", encoding="utf-8")
    assert shim(script, "x", "--y").stdout == "__main__ True ['x', '--y']\n"


def test_an_exit_status_and_a_traceback_pass_through(tmp_path: Path) -> None:
    """The parent sees the same status and the same last line."""
    script = tmp_path / "a.py"
    script.write_text("import sys\nsys.exit(7 if sys.argv[1:] else int('x'))\n", encoding="utf-8")
    assert shim(script, "y").returncode == 7
    failed = shim(script)
    assert failed.returncode == 1
    assert failed.stderr.strip().splitlines()[-1].startswith("ValueError")


def test_a_script_that_is_not_there() -> None:
    """Its own error, not silence."""
    ran = shim("absent.py")
    assert ran.returncode != 0
    assert "absent.py" in ran.stderr


def test_a_parent_that_is_gone_already_is_no_parent(tmp_path: Path) -> None:
    """It died while Python started: nothing is run."""
    script = tmp_path / "s.py"
    script.write_text("print('ran')", encoding="utf-8")
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    command = [sys.executable, str(WORKERS / "with_parent.py"), gone.stdout.decode().strip(), str(script)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.stdout == "" and (ran.returncode == 1 or sys.platform != "linux")
