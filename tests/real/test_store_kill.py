"""A build that is killed, or not alone, ends in the same bytes as one that nobody disturbed."""

from __future__ import annotations

import filecmp
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
from packager.core.progress import Silent
from tests.conftest import ROOT
from tests.real.conftest import TARGET


def start(store: Path, out: Path, checkpoint: Path, *more: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "packager.cli.main",
        "build",
        checkpoint,
        "--target",
        TARGET,
        "-o",
        out,
        "--json",
        *more,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PACKAGER_STORE": str(store)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(child: subprocess.Popen[str]) -> Path:
    out, err = child.communicate(timeout=600)
    assert child.returncode == 0, err
    return Path(json.loads(out)["bundle"])


def partials(*folders: Path) -> list[Path]:
    """What an interrupted write would leave: hidden temporary files and folders."""
    return [
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.name.startswith(".") or path.name.endswith((".partial", ".tmp", ".part"))
    ]


def same(left: Path, right: Path) -> bool:
    comparison = filecmp.dircmp(left, right, ignore=[])
    stack = [comparison]
    while stack:
        here = stack.pop()
        if here.left_only or here.right_only or here.funny_files:
            return False
        if filecmp.cmpfiles(here.left, here.right, here.common_files, shallow=False)[1:] != ([], []):
            return False
        stack += here.subdirs.values()
    return True


def below(process: int) -> list[int]:
    """Every process that descends from one: a worker's parent may be the server that forked it."""
    children = list(children_of(process))
    return [*children, *(deeper for child in children for deeper in below(child))]


def children_of(process: int) -> Iterator[int]:
    """Processes whose parent is ``process``, read from /proc."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[1]) == process and fields[0] != "Z":
                yield int(folder.name)


def runs(process: int) -> bool:
    """Whether it is more than an entry that its new parent has not collected yet."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_build_killed_at_many_moments_ends_in_the_same_bytes(
    random_bundle: Path, random_qwen2: Path, tmp_path: Path
) -> None:
    """SIGKILL in the samples, in the converter, in the scoring, in the quantizer, in the assembly.

    Each time no child survives and no bundle shows; the last run finishes, verifies, leaves nothing temporary, and the
    bundle equals, byte for byte, the one that was built in another store, another folder and from another place.
    """
    store, out = tmp_path / "store", tmp_path / "out"
    checkpoint = Path(shutil.copytree(random_qwen2, tmp_path / "elsewhere" / random_qwen2.name))
    moments = ["samples", "reference", "gguf-convert", "score", "gguf-quantize", "tokenizer-files"]
    killed = 0
    for step in moments:
        child = start(store, out, checkpoint)
        end = time.monotonic() + 300
        while child.poll() is None and not any((store / step).glob(".*.partial")):
            assert time.monotonic() < end, f"the step {step} did not begin"
            time.sleep(0.005)
        time.sleep(0.05)
        family = below(child.pid)
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
            killed += 1
        child.communicate()
        gone = time.monotonic() + 15
        while any(map(runs, family)) and time.monotonic() < gone:
            time.sleep(0.02)
        assert not any(map(runs, family)), f"a child outlived the build in {step}"
        assert not [path for path in out.glob("*") if not path.name.startswith(".")] or child.returncode == 0
    assert killed >= 4
    bundle = finished(start(store, out, checkpoint))
    assert not verify(bundle, Silent()).problems
    assert partials(out, store) == []
    assert bundle.name == random_bundle.name
    assert same(bundle, random_bundle)


def test_a_build_interrupted_in_a_child_ends_at_once(random_qwen2: Path, tmp_path: Path) -> None:
    """Ctrl-C while the converter runs: 130, within seconds, and nothing half-written."""
    store, out = tmp_path / "store", tmp_path / "out"
    child = start(store, out, random_qwen2)
    while not any((store / "gguf-convert").glob(".*.partial")):
        assert child.poll() is None, child.communicate()
        time.sleep(0.01)
    time.sleep(0.5)
    begun = time.monotonic()
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=30)
    assert child.returncode == 130, err
    assert time.monotonic() - begun < 10
    assert "Traceback" not in err
    assert partials(store) == []
    assert not out.exists() or not list(out.iterdir())


def test_two_builds_at_once_share_the_work(
    random_qwen2: Path, own_store: Path, random_bundle: Path, tmp_path: Path
) -> None:
    """The same command twice at the same time into the same folder: one bundle, both report it, and it verifies."""
    out = tmp_path / "out"
    pair = [
        start(own_store, out, random_qwen2, "--no-verify", "--set", "quant=Q4_0", "--set", "imatrix=off")
        for _ in range(2)
    ]
    found = [finished(child) for child in pair]
    assert found[0] == found[1]
    assert not verify(found[0], Silent()).problems
    assert partials(out) == []
    assert len(list((own_store / "gguf-convert").glob("*"))) >= 1
