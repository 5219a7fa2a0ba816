"""The compiler's process: the same addresses every time, so that equal builds give equal engines."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

SCRIPT = """
import ctypes, sys
sys.path.insert(0, "packager/children")
from tensorrt_compile import RANDOM_OFF, fix_addresses
fix_addresses()
print(bool(ctypes.CDLL(None).personality(0xFFFFFFFF) & RANDOM_OFF), id(object()), sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="address randomization is switched off on Linux alone")
def test_the_process_has_the_same_addresses_and_keeps_its_arguments() -> None:
    command = [sys.executable, "-c", SCRIPT, "job.json"]
    said = [
        subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": "0"}, check=True, capture_output=True,
                       text=True, timeout=60).stdout
        for _ in range(2)
    ]  # fmt: skip
    if said[0].startswith("False"):
        pytest.skip("this system does not let a process switch it off")
    assert said[0] == said[1]
    assert "['job.json']" in said[0]
