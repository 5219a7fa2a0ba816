"""What a box gets from templates, and what install.sh refuses before it writes anything."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from packager.bundle.assemble import assemble
from packager.bundle.installer import box_files
from packager.core.errors import PackagerError
from packager.core.progress import Silent
from tests.system_packages import system_package
from tests.unit.bundle.parts import RUN, contents, needs


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle that this machine fits."""
    here = needs(python_max=f"3.{sys.version_info.minor}", ram_bytes=1000)
    return assemble(contents(tmp_path / "in", needs=here), tmp_path / "out", Silent()).path


def install(bundle: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run install.sh as a person would."""
    return subprocess.run(
        ["/bin/sh", str(bundle / "install.sh"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **env},
    )


def test_every_mark_in_every_template_is_filled() -> None:
    """Only the prefix stays open: it is known on the box."""
    for system in ("linux", "macos", "windows"):
        for name, text in box_files("b-x", "m", "t", needs(system=system), RUN).items():
            assert "@PREFIX@" not in text or name.endswith(".service")
            assert not {mark for mark in ("@BUNDLE@", "@MODEL@", "@PYTHON_MIN@", "@RAM@", "@SLOTS@") if mark in text}


@pytest.mark.parametrize("engine", ["tensorrt", "tensorrt_decoder"])
def test_a_tensorrt_bundle_says_where_its_engine_is_kept(engine: str) -> None:
    """The service gets a folder of its own for it, on a Jetson the GPU's group too; other bundles say nothing of it."""
    run = {**RUN, "engine": engine}
    for machine, group in (("x86_64", False), ("aarch64", True)):
        files = box_files("b-x", "m", "t", needs(machine=machine), run)
        lines = files["packager.service"].splitlines()
        assert "CacheDirectory=b-x" in lines and ("SupplementaryGroups=video" in lines) == group
        assert "\n## The engine\n" in files["README.md"] and "PREFIX/bin/engine show" in files["README.md"]
    plain = box_files("b-x", "m", "t", needs(), RUN)
    assert "CacheDirectory" not in plain["packager.service"] and "engine show" not in plain["README.md"]


@pytest.mark.parametrize(("gpu", "line"), [
    (None, "| GPU | none is needed |"),
    ({"capability": "7.5", "count": 2, "bytes": 8_600_000_000, "vllm": "0.33"},
     "| GPU | 2 × NVIDIA, compute capability 7.5 or newer, 8.6 GB of memory; vLLM 0.33 or newer in an environment"),
    ({"capability": "8.7", "exact": True, "count": 1, "bytes": 10**9, "jetpack": ["6.2", "7.2"], "driver_min": None,
      "tensorrt": {"min": "10.3", "below": "11"}, "cuda": {"min": "12.6"}},
     "| GPU | NVIDIA, compute capability 8.7 and no other, 1.0 GB of memory; JetPack 6.2 or 7.2; TensorRT 10.3 or "
     "newer and older than 11; a driver for CUDA 12.6 or newer |"),
])  # fmt: skip
def test_the_readme_says_what_gpu_is_needed(gpu: dict[str, Any] | None, line: str) -> None:
    """With its software."""
    assert line in box_files("b-x", "m", "t", needs(gpu=gpu), RUN)["README.md"]


@pytest.mark.parametrize("name", ["a b", "x;rm", "$(id)", "'", "../x", ""])
def test_a_name_that_a_shell_could_read_as_more_is_refused(name: str) -> None:
    """Nothing is quoted, everything is refused."""
    with pytest.raises(PackagerError):
        box_files(name, "m", "t", needs(), RUN)


def test_the_installer_passes_shellcheck(bundle: Path) -> None:
    """POSIX sh."""
    done = subprocess.run(
        [system_package("shellcheck"), "--shell=sh", str(bundle / "install.sh")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_help_is_given_and_unknown_options_are_usage_errors(bundle: Path) -> None:
    """Exit codes 0 and 2."""
    assert "--prefix DIR" in install(bundle, "--help").stdout
    assert install(bundle, "--nonsense").returncode == 2
    assert install(bundle, "--prefix").returncode == 2
    assert install(bundle, "--python", sys.executable, HOME="").returncode == 2


def fake_python(folder: Path, version: str) -> str:
    """A program that prints the version of an old or new Python."""
    folder.mkdir(exist_ok=True)
    path = folder / "python3"
    path.write_text(f"#!/bin/sh\nprintf '%s' '{version}'\n", "utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.parametrize("version", ["2.7", "3.6", "3.8", "3.99"])
def test_a_wrong_python_is_refused_in_one_sentence_by_the_shell(bundle: Path, tmp_path: Path, version: str) -> None:
    """None of our Python is run by it."""
    done = install(bundle, "--prefix", str(tmp_path / "p"), "--python", fake_python(tmp_path / "bin", version))
    assert done.returncode == 4 and done.stderr.count("\n") == 1 and f"found {version}" in done.stderr
    assert not (tmp_path / "p").exists()


def test_without_any_python_the_refusal_says_what_is_needed(bundle: Path, tmp_path: Path) -> None:
    """An empty PATH but for the tools of sh."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("dirname", "cat"):
        (tools / name).symlink_to(str(shutil.which(name)))
    done = install(bundle, "--prefix", str(tmp_path / "p"), PATH=str(tools))
    assert done.returncode == 4 and "found none" in done.stderr


@pytest.mark.parametrize(
    ("machine", "starts"),
    [
        (None, "Python: expected Python 3.98 to 3.99, found Python 3."),
        ("riscv64", "processor: expected riscv64, found "),
    ],
)
def test_a_box_without_a_fitting_python_gets_the_gravest_refusal(
    tmp_path: Path, machine: str | None, starts: str
) -> None:
    """On an old JetPack that is not its Python: the check runs on the Python that is there."""
    wanted = needs(python_min="3.98", python_max="3.99", ram_bytes=1000, **({"machine": machine} if machine else {}))
    bundle = assemble(contents(tmp_path / "in", needs=wanted), tmp_path / "out", Silent()).path
    tools = tmp_path / "tools"
    tools.mkdir()
    programs = {"python3": sys.executable, "dirname": shutil.which("dirname"), "cat": shutil.which("cat")}
    for name, program in programs.items():
        (tools / name).symlink_to(str(program))
    done = install(bundle, "--prefix", str(tmp_path / "p"), PATH=str(tools))
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 4 and last.startswith(starts) and "Traceback" not in done.stderr
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("broken", ["runtime/runtimes/install/install.py", "runtime/runtimes/preflight/check.py"])
def test_the_installers_own_code_is_checked_before_it_runs(bundle: Path, tmp_path: Path, broken: str) -> None:
    """A damaged installer never starts."""
    (bundle / broken).write_text("raise SystemExit('ran')", "utf-8")
    done = install(bundle, "--prefix", str(tmp_path / "p"), "--python", sys.executable)
    assert done.returncode == 5 and done.stderr.startswith(broken) and done.stderr.count("\n") == 1
    assert not (tmp_path / "p").exists()


def test_a_damaged_model_is_refused_in_one_sentence_and_nothing_is_written(bundle: Path, tmp_path: Path) -> None:
    """Nor is the bundle touched: no bytecode appears in it."""
    before = {path for path in bundle.rglob("*")}
    (bundle / "model" / "model.gguf").write_bytes(b"short")
    done = install(bundle, "--prefix", str(tmp_path / "p"), "--python", sys.executable)
    assert done.returncode == 5 and done.stderr.splitlines()[-1].startswith("model/model.gguf: expected sha256")
    assert not (tmp_path / "p").exists() and {path for path in bundle.rglob("*")} == before


@pytest.mark.parametrize("kind", ["foreign", "file", "inside", "around"])
def test_a_prefix_that_is_not_free_is_refused_and_kept(bundle: Path, tmp_path: Path, kind: str) -> None:
    """A folder of the user's, a file, and places that mix up bundle and install."""
    places = {"foreign": tmp_path / "p", "file": tmp_path / "f", "inside": bundle / "p", "around": bundle.parent}
    prefix = places[kind]
    if kind == "foreign":
        prefix.mkdir()
        (prefix / "diary").write_text("mine", "utf-8")
        (prefix / "installed.json").write_text("{}", "utf-8")  # some other program's
    if kind == "file":
        prefix.write_text("mine", "utf-8")
    done = install(bundle, "--prefix", str(prefix), "--python", sys.executable)
    assert done.returncode == 4 and done.stderr.splitlines()[-1].startswith("Refused: ")
    if kind == "foreign":
        assert (prefix / "diary").read_text("utf-8") == "mine"
    assert not list(tmp_path.glob(".*installing*"))


def test_the_box_can_be_checked_without_an_install(bundle: Path, tmp_path: Path) -> None:
    """Line by line, or its facts alone; the exit codes are the preflight's, and nothing is written."""
    before = {path for path in tmp_path.rglob("*")}
    checked = install(bundle, "--check", "--prefix", str(tmp_path / "p"), "--python", sys.executable)
    assert checked.returncode == 0 and "ok       processor: " in checked.stdout and "ok       files: " in checked.stdout
    printed = install(bundle, "--facts", "--python", sys.executable)
    assert printed.returncode == 0 and json.loads(printed.stdout)["system"] == "linux"
    (bundle / "model" / "tokenizer.json").write_bytes(b"")
    assert install(bundle, "--check", "--python", sys.executable).returncode == 5
    assert {path for path in tmp_path.rglob("*")} == before


def test_a_wrong_box_is_refused_before_the_prefix_is_made(tmp_path: Path) -> None:
    """A bundle for another processor."""
    other = assemble(contents(tmp_path / "in", needs=needs(machine="riscv64")), tmp_path / "out", Silent()).path
    done = install(other, "--prefix", str(tmp_path / "deep" / "p"), "--python", sys.executable)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 4 and last.startswith("processor: expected riscv64, found ")
    assert not (tmp_path / "deep").exists()
