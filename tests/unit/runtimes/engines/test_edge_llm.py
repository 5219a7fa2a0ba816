"""TensorRT Edge-LLM is started by one command line; what the box lacks is one sentence.

The server itself needs a Jetson; a module in its place writes down how it was called.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtimes.engines.edge_llm import cache_folder, command, environment, find_tensorrt, link_tensorrt
from runtimes.manifest import ManifestError, read_bundle
from tests.conftest import ROOT
from tests.unit.runtimes.serving import write_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    settings = {"edgellm": "0.11.0", "reasoning": "deepseek_r1"}
    run = {"engine": "edgellm", "context": 2048, "slots": 1, "settings": settings}
    return write_bundle(tmp_path / "a bundle", run=run, needs={"gpu": None})


@pytest.fixture
def system(tmp_path: Path) -> Path:
    """A dist-packages folder as JetPack leaves it: TensorRT beside what must not get in."""
    folder = tmp_path / "dist-packages"
    for name in ("tensorrt", "tensorrt_lean", "numpy", "tensorrt-10.16.2.dist-info"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"where = {name!r}\n", encoding="utf-8")
    return folder


def served(bundle: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), *([environment.pop("MORE")] if "MORE" in environment else [])])
    return subprocess.run(
        [sys.executable, "-m", "runtimes", "serve", "--bundle", str(bundle), *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_the_command_line_is_the_manifests(bundle: Path) -> None:
    words = command(read_bundle(bundle), "python", "127.0.0.1", 8000, Path("/cache"))
    assert words[:3] == ["python", "-P", "-c"]
    assert words[4] == str(bundle / "model")
    flags = dict(zip(words[5::2], words[6::2], strict=True))
    assert flags == {
        "--host": "127.0.0.1",
        "--port": "8000",
        "--served-model-name": "tiny",
        "--cache-dir": "/cache",
        "--max-input-len": "2048",
        "--max-kv-cache-capacity": "2048",
        "--max-batch-size": "1",
        "--reasoning-parser": "deepseek_r1",
    }


def test_several_slots_share_the_running_batch(bundle: Path) -> None:
    words = command(replace(read_bundle(bundle), slots=4), "python", "127.0.0.1", 8000, Path("/cache"))
    assert words[-1] == "--enable-in-flight-batching"


def test_settings_of_another_engine_are_refused(bundle: Path) -> None:
    with pytest.raises(ManifestError, match="reasoning is None"):
        command(replace(read_bundle(bundle), settings={}), "python", "127.0.0.1", 8000, Path("/cache"))


def test_without_tensorrt_the_refusal_says_what_to_install(bundle: Path, tmp_path: Path) -> None:
    done = served(bundle, PACKAGER_TENSORRT=str(tmp_path))
    assert done.returncode == 4
    assert "python3-libnvinfer" in done.stderr
    assert done.stderr.count("\n") == 1


def test_only_tensorrt_of_the_systems_packages_gets_in(system: Path, tmp_path: Path) -> None:
    """A folder of links, made twice: after an update of JetPack it points to what is there then."""
    assert find_tensorrt({}, (str(system),)) == system
    links = link_tensorrt(system, tmp_path / "links")
    assert sorted(path.name for path in links.iterdir()) == ["tensorrt", "tensorrt-10.16.2.dist-info", "tensorrt_lean"]
    moved = system.rename(tmp_path / "elsewhere")
    assert (link_tensorrt(moved, links) / "tensorrt" / "__init__.py").is_file()
    assert find_tensorrt({}, (str(system),)) is None


def test_the_server_takes_this_process_with_tensorrt_on_its_path(bundle: Path, system: Path, tmp_path: Path) -> None:
    """A module of its name stands for the server and prints how it was called."""
    package = tmp_path / "site" / "experimental" / "server"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package.parent / "__init__.py").touch()
    (package / "cli.py").write_text(
        "import json, os, sys, tensorrt\n"
        "def main():\n"
        "    print(json.dumps({'argv': sys.argv[1:], 'where': tensorrt.where, 'path': os.environ['PYTHONPATH'],\n"
        "                      'offline': os.environ['HF_HUB_OFFLINE'], 'pid': os.getpid()}))\n",
        encoding="utf-8",
    )
    # the server's own package would be the venv's: here it lies beside TensorRT
    (system / "tensorrt_bindings").mkdir()
    link = tmp_path / "cache" / "tensorrt"
    link.mkdir(parents=True)
    (link / "experimental").symlink_to(package.parent, target_is_directory=True)
    done = served(bundle, "--port", "0", PACKAGER_TENSORRT=str(system), PACKAGER_ENGINE_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("tiny by TensorRT Edge-LLM on http://127.0.0.1:")
    call: dict[str, Any] = json.loads(second)
    assert call["where"] == "tensorrt"
    assert call["path"] == str(link)
    assert call["argv"][0] == str(bundle / "model")
    assert call["offline"] == "1"


def test_engines_lie_beside_the_install_or_in_the_users_cache(bundle: Path, tmp_path: Path) -> None:
    assert cache_folder(bundle, {"PACKAGER_ENGINE_CACHE": "/var/cache/x"}) == Path("/var/cache/x")
    assert cache_folder(bundle, {"CACHE_DIRECTORY": "/var/cache/a:/b"}) == Path("/var/cache/a/edgellm")
    assert cache_folder(bundle, {}) == bundle / "cache" / "edgellm"
    assert cache_folder(tmp_path / "gone", {"XDG_CACHE_HOME": "/c"}) == Path("/c/packager/gone/edgellm")


def test_our_own_search_path_does_not_reach_the_server() -> None:
    variables = environment({"PYTHONPATH": "/runtime", "VIRTUAL_ENV": "/venv", "PATH": "/bin"}, Path("/links"))
    assert variables["PYTHONPATH"] == "/links"
    assert "VIRTUAL_ENV" not in variables
