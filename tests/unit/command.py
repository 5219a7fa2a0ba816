"""The command line in this process: what a verb prints and how it ends, without Python's start a second time."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path
from unittest import mock

from packager.cli import main


def packager(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """As ``packager ARGUMENTS`` does, to its exit code. What hangs on the process itself (signals, streams, what is
    imported) needs one of its own.
    """
    words = ["packager", *map(str, arguments)]
    with (
        contextlib.redirect_stdout(io.StringIO()) as printed,
        contextlib.redirect_stderr(io.StringIO()) as errors,
        mock.patch.object(sys, "argv", words),
    ):
        try:
            main.main()
        except SystemExit as end:
            code = end.code
    assert isinstance(code, int)
    return subprocess.CompletedProcess(words, code, printed.getvalue(), errors.getvalue())
