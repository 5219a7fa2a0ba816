"""A bundle installed and served for real: without a network, by the oldest and a newer Python, and killed half way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from packager.bundle.verify import verify
from tests.system_packages import system_package

ALONE = ["unshare", "--net", "--map-root-user"]  # a namespace whose only interface, loopback, is still down

# Runs inside the namespace: bring loopback up, serve, ask, and print the answer.
ASK = r"""
import fcntl, json, os, signal, socket, struct, subprocess, sys, time, urllib.request
serve = sys.argv[1]
with socket.socket() as s:
    fcntl.ioctl(s, 0x8914, struct.pack("16sH14s", b"lo", 0x1 | 0x40, b""))
    s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
child = subprocess.Popen([serve, "--port", str(port)], stdout=subprocess.DEVNULL)
base = f"http://127.0.0.1:{port}"
for _ in range(1200):
    try:
        urllib.request.urlopen(base + "/health", timeout=2).read(); break
    except OSError:
        assert child.poll() is None, "the server ended"
        time.sleep(0.1)
body = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0, "max_tokens": 24}
kind = {"Content-Type": "application/json"}
request = urllib.request.Request(base + "/v1/chat/completions", json.dumps(body).encode(), kind)
answer = json.load(urllib.request.urlopen(request, timeout=300))
child.send_signal(signal.SIGTERM); assert child.wait(60) in (0, -signal.SIGTERM), child.returncode
print(answer["choices"][0]["message"]["content"])
"""


def pythons() -> list[str]:
    """The oldest and the newest supported Python on this machine (one of them where there is only one)."""
    found = [path for minor in range(10, 15) if (path := _python(minor))]
    return list(dict.fromkeys([found[0], found[-1]])) if found else [sys.executable]


def _python(minor: int) -> str | None:
    candidates = [
        shutil.which(f"python3.{minor}"),
        *(str(path) for path in sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python3"))),
    ]
    for path in candidates:
        if path and subprocess.run([path, "-c", "import venv"], capture_output=True, check=False).returncode == 0:
            return str(path)
    return None


@pytest.fixture(scope="module")
def alone() -> list[str]:
    """How to run something where no network is; skipped where the machine does not allow it."""
    system_package("unshare")
    if subprocess.run([*ALONE, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine does not let a test make a network namespace")
    return ALONE


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder to install into, emptied afterwards: an install takes some hundred megabytes."""
    yield tmp_path / "box"
    shutil.rmtree(tmp_path, ignore_errors=True)


def install(bundle: Path, prefix: Path, python: str, before: list[str]) -> subprocess.CompletedProcess[str]:
    """Run install.sh; pip settings of this machine must not matter, so a wrong index is set."""
    env = {**os.environ, "PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_FIND_LINKS": "/nowhere", "PYTHONPATH": "/nowhere"}
    return subprocess.run(
        [*before, str(bundle / "install.sh"), "--prefix", str(prefix), "--python", python],
        capture_output=True,
        text=True,
        check=False,
        env=env,
    )


@pytest.mark.parametrize("python", pythons())
def test_it_installs_and_answers_where_no_network_exists(
    q8_bundle: Path, place: Path, alone: list[str], python: str
) -> None:
    """Into an empty folder; then served and asked there; a second run changes nothing; check finds all in order."""
    place.mkdir()
    done = install(q8_bundle, place, python, alone)
    assert done.returncode == 0, done.stderr
    inode = (place / "installed.json").stat().st_ino
    asked = subprocess.run(
        [*alone, sys.executable, "-c", ASK, str(place / "bin" / "serve")], capture_output=True, text=True, check=False
    )
    assert asked.returncode == 0 and len(asked.stdout.split()) > 2, asked.stderr[-2000:]
    again = install(q8_bundle, place, python, alone)
    assert (
        again.returncode == 0 and "nothing to do" in again.stderr and (place / "installed.json").stat().st_ino == inode
    )
    checked = subprocess.run([str(place / "bin" / "check"), "--json"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0 and json.loads(checked.stdout)["ok"], checked.stdout
    assert [path.name for path in place.parent.iterdir()] == [place.name]
    assert verify(q8_bundle).ok  # installing and asking left the bundle as it was


def test_an_install_can_be_moved_and_reached_through_a_link(q8_bundle: Path, place: Path) -> None:
    """The commands find their own folder."""
    assert install(q8_bundle, place, sys.executable, []).returncode == 0
    moved = place.with_name("moved here")
    place.rename(moved)
    link = place.with_name("check")
    link.symlink_to(moved / "bin" / "check")
    done = subprocess.run([str(link)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    unit = (moved / "packager.service").read_text("utf-8")
    assert f'ExecStart="{place}/bin/serve"' in unit and "@PREFIX@" not in unit


def test_a_killed_installer_leaves_no_half_install_and_the_next_run_cleans_up(q8_bundle: Path, place: Path) -> None:
    """SIGKILL while the new one is half made: an old install stays whole, hidden leftovers go with the next run."""
    start = f".{place.name}.installing-*"
    for round_ in ("nothing there", "an install there"):
        if round_ == "an install there":
            (place / "model" / "tokenizer.json").write_text("damaged", "utf-8")  # so that the next run replaces it
        before = sorted(path.name for path in place.glob("*"))
        child = subprocess.Popen(
            [str(q8_bundle / "install.sh"), "--prefix", str(place), "--python", sys.executable],
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        end = time.monotonic() + 120
        while not any(path.joinpath("venv").exists() for path in place.parent.glob(start)):
            assert child.poll() is None and time.monotonic() < end, "the installer was never half way"
            time.sleep(0.01)
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        assert sorted(path.name for path in place.glob("*")) == before
        assert list(place.parent.glob(start))
        done = install(q8_bundle, place, sys.executable, [])
        assert done.returncode == 0, done.stderr
        assert [path.name for path in place.parent.iterdir()] == [place.name]
        assert subprocess.run([str(place / "bin" / "check")], capture_output=True, check=False).returncode == 0


def test_a_full_disk_is_one_sentence_and_leaves_nothing(q8_bundle: Path, tmp_path: Path) -> None:
    """A filesystem of 64 MB, where this machine allows one to be mounted."""
    small = tmp_path / "small"
    small.mkdir()
    if (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(small)], capture_output=True, check=False
        ).returncode
        != 0
    ):
        pytest.skip("this machine does not let a test mount a filesystem")
    try:
        done = install(q8_bundle, small / "box", sys.executable, [])
        assert done.returncode == 4 and done.stderr.splitlines()[-1].startswith("disk: expected ")
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_the_install_does_not_even_try_to_reach_out(q8_bundle: Path, place: Path, tmp_path: Path) -> None:
    """No network is not proof of no attempt: every connect of every process is counted."""
    trace = tmp_path / "trace"
    watch = [system_package("strace"), "-f", "-qq", "-e", "trace=connect,sendto", "-o", str(trace)]
    done = install(q8_bundle, place, sys.executable, watch)
    assert done.returncode == 0, done.stderr
    reached = [line for line in trace.read_text("utf-8").splitlines() if "AF_INET" in line]
    assert reached == []
