"""Where set-up takes packages from: two package indexes on loopback, with real pip and real uv in a real .venv."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.package_index import Index, index_of
from tests.unit.bundle.parts import digest, wheel

pytestmark = pytest.mark.real

CPU_BUILD = "2.13.0+cpu"
# The environment and PyTorch alone: what comes after needs the real packages.
ONLY_TORCH = (
    "import sys; sys.path.insert(0, 'scripts'); import prepare, packages\n"
    "prepare.create()\n"
    "try: packages.install_torch()\n"
    "except packages.Stopped as reason: reason.show(); sys.exit(1)\n"
)


@pytest.fixture
def pips(tmp_path: Path) -> Iterator[Index]:
    """The index that pip is told to look in. It has PyTorch as the public one has it for Linux: no CPU build."""
    folder = tmp_path / "pips"
    folder.mkdir()
    wheel(folder, "torch", "py3-none-any", "2.13.0")
    with index_of(folder) as index:
        yield index


@pytest.fixture
def pytorchs(tmp_path: Path) -> Iterator[Index]:
    """The stand-in for PyTorch's own index, with a CPU build."""
    folder = tmp_path / "pytorchs"
    folder.mkdir()
    wheel(folder, "torch", "py3-none-any", CPU_BUILD)
    with index_of(folder) as index:
        yield index


@pytest.fixture
def checkout(tmp_path: Path, pytorchs: Index) -> Path:
    """A copy of what set-up reads, whose lock pins the stand-in's CPU build."""
    place = tmp_path / "checkout"
    for name in ("scripts", "locks"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, place / name)
    (place / "packager").mkdir()
    shutil.copy(ROOT / "packager/__init__.py", place / "packager")
    pinned(place, "torch-cpu", f"torch=={CPU_BUILD}", next(pytorchs.folder.glob("*.whl")))
    return place


def pinned(checkout: Path, lock: str, requirement: str, file: Path) -> None:
    """Make a lock hold one file."""
    (checkout / f"locks/{lock}.lock").write_text(f"{requirement} --hash=sha256:{digest(file)}\n", encoding="utf-8")


def add_uv(checkout: Path, index: Index) -> None:
    """Put the uv that set-up installed here into an index, as a wheel again."""
    try:
        installed = distribution("uv")
    except PackageNotFoundError:
        pytest.skip("set-up could not get uv here and took pip")
    path = index.folder / f"uv-{installed.version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file in installed.files or []:
            name = str(file)
            if "__pycache__" not in name and not name.endswith(("INSTALLER", "REQUESTED", "direct_url.json")):
                inside = f"uv-{installed.version}.data/scripts/{Path(name).name}" if ".." in name else name
                archive.write(str(file.locate()), inside)
    pinned(checkout, "uv", f"uv=={installed.version}", path)


def set_up(checkout: Path, pips: Index, pytorchs: Index, *argv: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run set-up with an empty cache, no configuration but these two indexes, and no word of this machine's."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}
    env |= {"PIP_CONFIG_FILE": os.devnull, "HOME": str(checkout), "XDG_CACHE_HOME": str(checkout / "cache")}
    env |= {"PIP_INDEX_URL": pips.url, "PACKAGER_TORCH_INDEX": pytorchs.url, "NO_PROXY": "127.0.0.1", **more}
    words = [sys.executable, *(argv or ("-c", ONLY_TORCH))]
    return subprocess.run(words, cwd=checkout, env=env, capture_output=True, text=True, check=False)


def torch_in(checkout: Path) -> list[str]:
    return [path.name for path in checkout.glob(".venv/lib/python*/site-packages/torch-*")]


@pytest.mark.parametrize("tool", ["uv", "pip"])
def test_pytorchs_own_index_is_asked_where_pips_has_no_cpu_build(
    checkout: Path, pips: Index, pytorchs: Index, tool: str
) -> None:
    """By itself, after the one that pip is told to look in; the CUDA build there is never taken."""
    if tool == "uv":
        add_uv(checkout, pips)
    done = set_up(checkout, pips, pytorchs)
    assert done.returncode == 0, done.stdout + done.stderr
    assert torch_in(checkout) == [f"torch-{CPU_BUILD}.dist-info"]
    assert "/simple/torch/" in pips.asked and not [path for path in pips.asked if "torch-" in path]
    assert f"{tool} failed" in done.stdout and f"from {pytorchs.url}: done" in done.stdout
    assert ("uv, which installs the rest: not available" in done.stdout) == (tool == "pip")


@pytest.mark.parametrize("tool", ["uv", "pip"])
def test_pytorchs_own_index_is_left_alone_where_pips_has_the_build(
    checkout: Path, pips: Index, pytorchs: Index, tool: str
) -> None:
    """A mirror or a folder that has the pinned file is enough."""
    if tool == "uv":
        add_uv(checkout, pips)
    done = set_up(checkout, pips, pytorchs, PIP_FIND_LINKS=str(pytorchs.folder))
    assert done.returncode == 0, done.stdout + done.stderr
    assert torch_in(checkout) == [f"torch-{CPU_BUILD}.dist-info"] and not pytorchs.asked


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the index's own torch is a CPU build")
def test_set_up_stops_where_neither_index_has_a_cpu_build(checkout: Path, pips: Index, pytorchs: Index) -> None:
    """It says where it looked and what to do, takes nothing else, and next time goes on there."""
    next(pytorchs.folder.glob("*.whl")).unlink()
    for _ in range(2):
        done = set_up(checkout, pips, pytorchs, "scripts/prepare.py", "build")
        assert done.returncode == 1
        assert "set-up stopped: the CPU build of PyTorch could not be installed" in done.stderr
        assert f"PyTorch's own index, {pytorchs.url}: No matching distribution" in done.stderr
        assert "PACKAGER_TORCH_INDEX" in done.stderr and "PIP_FIND_LINKS" in done.stderr
        assert not torch_in(checkout)
    assert "environment for Python" not in done.stdout


def test_other_bytes_under_the_same_name_are_refused(checkout: Path, pips: Index, pytorchs: Index) -> None:
    """Neither index has to be trusted: the lock has the file's digest."""
    (file,) = pytorchs.folder.glob("*.whl")
    file.write_bytes(file.read_bytes() + b"x")
    done = set_up(checkout, pips, pytorchs)
    assert done.returncode == 1 and "HASHES" in done.stderr
    assert not torch_in(checkout)


def test_no_index_is_asked_where_pip_may_ask_none(checkout: Path, pips: Index, pytorchs: Index) -> None:
    """PIP_NO_INDEX holds for PyTorch's own index too."""
    done = set_up(checkout, pips, pytorchs, PIP_NO_INDEX="1")
    assert done.returncode == 1 and "pip's configured indexes: No matching distribution" in done.stderr
    assert not pips.asked and not pytorchs.asked


def test_a_setting_that_uv_has_not_leaves_the_work_to_pip(checkout: Path, pips: Index, pytorchs: Index) -> None:
    """What a user told pip holds; set-up says which setting it was."""
    done = set_up(checkout, pips, pytorchs, PIP_KEYRING_PROVIDER="import")
    assert "not used, it has nothing like pip's setting keyring-provider" in done.stdout
    assert done.returncode == 0 and torch_in(checkout) == [f"torch-{CPU_BUILD}.dist-info"]
