"""Workers forked from a server that has torch: the same as an interpreter of their own, and as easy to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from packager.core import processes
from packager.core.fork_server import ForkServer
from packager.core.processes import WORKERS, ChildFailed, run_python
from tests.conftest import ROOT

pytestmark = [pytest.mark.real, pytest.mark.skipif(sys.platform != "linux", reason="forked on Linux alone")]

PROBE = """
import json, os, sys, time
import torch
import beside
print(json.dumps({"argv": sys.argv[1:], "cwd": os.getcwd(), "hash": hash("x"), "offline": os.environ["HF_HUB_OFFLINE"],
                  "sum": float(torch.arange(10.0).sum()), "beside": beside.NAME, "pid": os.getpid(),
                  }))
sys.stdout.flush()
if "fail" in sys.argv:
    raise SystemExit("because")
if "raise" in sys.argv:
    raise ValueError("broken")
if "wait" in sys.argv:
    time.sleep(60)
"""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ForkServer]:
    """A server of the test's own, that takes any script."""
    made = ForkServer()
    monkeypatch.setattr(processes, "SERVER", made)
    monkeypatch.setattr(made, "fits", lambda script, env: True)
    yield made
    made.close()


@pytest.fixture
def probe(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "beside.py").write_text("NAME = 'of the request'", encoding="utf-8")
    (tmp_path / "probe.py").write_text(PROBE, encoding="utf-8")
    return tmp_path / "probe.py"


def asked(probe: Path, *words: str) -> dict[str, object]:
    import json

    lines: list[str] = []
    run_python(probe, words, name="the probe", path=[probe.parent / "folder"], on_line=lines.append)
    answer: dict[str, object] = json.loads(lines[0])
    return answer


def test_a_forked_worker_is_the_same_as_one_with_an_interpreter(
    server: ForkServer, probe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arguments, folder, environment, search path, hash seed, result; and the imports are there already."""
    forked = [asked(probe, "a", "b c"), asked(probe, "a", "b c")]
    monkeypatch.setattr(server, "fits", lambda script, env: False)
    alone = asked(probe, "a", "b c")
    assert len({answer.pop("pid") for answer in (*forked, alone)}) == 3
    assert forked == [alone, alone]


def test_its_failures_are_the_same_and_the_next_one_works(server: ForkServer, probe: Path) -> None:
    """A message, a traceback, and a server that goes on."""
    with pytest.raises(ChildFailed, match="because") as caught:
        asked(probe, "fail")
    assert caught.value.code == 1
    with pytest.raises(ChildFailed, match="ValueError: broken"):
        asked(probe, "raise")
    assert asked(probe)["sum"] == 45.0


def test_a_second_child_at_once_gets_an_interpreter_of_its_own(server: ForkServer, probe: Path) -> None:
    """The server has one child at a time; nobody waits for it."""
    asked(probe)
    waiting = server.start([str(probe), "wait"], [str(probe.parent / "folder")], dict(os.environ, HF_HUB_OFFLINE="1"))
    assert waiting is not None
    assert asked(probe)["sum"] == 45.0
    waiting.end(1.0)
    assert waiting.returncode == -signal.SIGTERM


def test_an_interrupt_ends_the_child_and_keeps_the_server(server: ForkServer, probe: Path) -> None:
    """As Ctrl-C does in a build."""
    asked(probe)
    pids: list[int] = []

    def interrupt(line: str) -> None:
        import json

        pids.append(int(json.loads(line)["pid"]))
        threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]).start()

    with pytest.raises(KeyboardInterrupt):
        run_python(probe, ["wait"], name="the probe", path=[probe.parent / "folder"], on_line=interrupt)
    assert not Path(f"/proc/{pids[0]}").exists()
    assert asked(probe)["sum"] == 45.0


def test_a_server_that_was_killed_is_started_again(server: ForkServer, probe: Path) -> None:
    """By the system, for want of memory: the child that ran fails, the next one works."""
    asked(probe)
    assert server._process is not None
    server._process.kill()
    server._process.wait()
    assert asked(probe)["sum"] == 45.0


BUILD = """
import sys, threading
from pathlib import Path
from packager.core import processes
processes.SERVER.fits = lambda script, env: True
processes.run_python(Path(sys.argv[1]), ["wait"], name="p", path=[Path(sys.argv[1]).parent / "folder"],
                     on_line=lambda line: print(line, flush=True))
"""


def test_nothing_outlives_a_build_that_is_killed(probe: Path) -> None:
    """SIGKILL: the server and its child end with their parent, so that no orphan writes into the next run's folder."""
    import json

    command = [sys.executable, "-c", BUILD, str(probe)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}) as parent:
        assert parent.stdout is not None
        child = int(json.loads(parent.stdout.readline())["pid"])
        parent.kill()
    end = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()


def test_the_workers_that_import_torch_are_forked() -> None:
    """And no other: an engine's own settings need an interpreter that begins with them."""
    fits = {path.name for path in WORKERS.glob("*.py") if ForkServer().fits(path, None)}
    assert {"tune.py", "reference.py", "samples.py", "convert.py", "export_encoder.py"} <= fits
    assert "tensorrt_compile.py" not in fits and "with_parent.py" not in fits
    assert not ForkServer().fits(WORKERS / "tune.py", {"MALLOC_ARENA_MAX": "1"})
    assert not ForkServer().fits("runtimes", None)
