"""bin/check and its like: they run the install's own code, wherever they are called from."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runtimes.install.launchers import write_launchers


@pytest.mark.skipif(os.name == "nt", reason="sh scripts")
@pytest.mark.parametrize("python", [name for name in ("python3.10", "python3.11", "python3.13") if shutil.which(name)])
def test_a_folder_of_the_same_name_in_the_working_directory_is_not_run(tmp_path: Path, python: str) -> None:
    """Arguments arrive as they were given, and -m's look into the working directory does not happen."""
    path = shutil.which(python)
    works = path and subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0
    home, elsewhere = tmp_path / "an install", tmp_path / "elsewhere"
    for place, words in ((home / "runtime", "mine"), (elsewhere, "another's")):
        (place / "runtimes").mkdir(parents=True)
        (place / "runtimes" / "__init__.py").touch()
        (place / "runtimes" / "__main__.py").write_text(f"import sys\nprint({words!r}, sys.argv[1:])\n", "utf-8")
    write_launchers(home, ("check",))
    (home / "venv" / "bin").mkdir(parents=True)
    (home / "venv" / "bin" / "python").symlink_to(path if works and path else sys.executable)
    done = subprocess.run(
        [str(home / "bin" / "check"), "a b", "$c"], cwd=elsewhere, capture_output=True, text=True, check=False
    )
    assert done.stdout == f"mine {['check', '--bundle', str(home.resolve()), 'a b', '$c']}\n", done.stderr
