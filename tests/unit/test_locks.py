"""The locks: every file pinned by a hash, no CUDA build by accident, one version on both sides of the copy."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.conftest import ROOT

LOCKS = ROOT / "locks"
NAMES = sorted(path.name for path in LOCKS.glob("*.lock"))


def entries(name: str) -> list[tuple[Requirement, list[str]]]:
    """Each requirement of a lock with its hashes."""
    text = (LOCKS / name).read_text(encoding="utf-8").replace("\\\n", " ")
    locked = []
    for line in text.splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            wanted, *hashes = re.split(r"\s+--hash=", line.strip())
            locked.append((Requirement(wanted.strip()), hashes))
    return locked


def pinned(name: str) -> dict[str, str]:
    return {canonicalize_name(wanted.name): str(wanted.specifier).removeprefix("==") for wanted, _ in entries(name)}


@pytest.mark.parametrize("name", NAMES)
def test_every_requirement_is_one_version_with_hashes(name: str) -> None:
    """A lock without a hash would install whatever the index serves that day."""
    locked = entries(name)
    assert locked
    for wanted, hashes in locked:
        assert re.fullmatch(r"==[^,*]+", str(wanted.specifier)), wanted
        assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", item) for item in hashes), wanted


# NVIDIA's Python interface to the driver that a box has: some MB, and nothing of CUDA itself
BINDINGS = {"cuda-python", "cuda-bindings", "cuda-core", "cuda-pathfinder"}
# What onnxruntime's CUDA provider is linked with, so that the box needs a driver alone.
LINKED = {"box-ort_cuda.lock": {"nvidia-cublas", "nvidia-cuda-nvrtc", "nvidia-cuda-runtime", "nvidia-curand"}}
# What TensorRT Edge-LLM's own server runs is its own choice; of this bundle our code renders the template alone.
OURS = {"box-edgellm.lock": {"jinja2", "markupsafe", "tokenizers"}}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "torch-cpu.lock"])
def test_no_lock_brings_torch_or_cuda(name: str) -> None:
    """torch stands in its own lock only; nothing else may bring gigabytes of CUDA along."""
    locked = [package for package in pinned(name) if re.match(r"torch$|nvidia|triton|cuda", package)]
    assert set(locked) - BINDINGS == LINKED.get(name, set())


def test_linux_gets_the_cpu_build_by_its_exact_name() -> None:
    """On Linux only 2.13.0+cpu will do: the plain version is the index's CUDA build."""
    for wanted, _ in entries("torch-cpu.lock"):
        assert wanted.marker is not None
        on_linux = wanted.marker.evaluate({"sys_platform": "linux"})
        assert on_linux == str(wanted.specifier).endswith("+cpu")


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("box-")])
def test_box_and_build_machine_run_the_same_versions(name: str) -> None:
    """What is scored here is what runs there: packages in both locks have one version. Nor do the tests run others."""
    build, box, test = pinned("build.lock"), pinned(name), pinned("test.lock")
    box = {package: version for package, version in box.items() if package in OURS.get(name, box)}
    assert {name: build[name] for name in box if name in build} == {name: box[name] for name in box if name in build}
    assert build.items() <= test.items()


def test_a_wheel_asks_for_all_that_its_runtime_imports() -> None:
    """What the box gets is also run on the build machine, so whoever installs the wheel gets it too."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    required = {Requirement(line).name for line in config["options"]["install_requires"].splitlines() if line.strip()}
    lines = (LOCKS / "box-llamacpp.in").read_text(encoding="utf-8").splitlines()
    assert {Requirement(line.split("#")[0]).name for line in lines if line.split("#")[0].strip()} <= required


def test_the_locks_hold_what_setup_cfg_asks_for() -> None:
    """Every range in setup.cfg is met by the pin that was tested."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    pins = pinned("test.lock") | {"torch": "2.13.0"}
    extras = [value for _, value in config.items("options.extras_require")]
    for line in "\n".join([config["options"]["install_requires"], *extras]).splitlines():
        if line.strip() and not line.startswith("#"):
            wanted = Requirement(line)
            assert Version(pins[canonicalize_name(wanted.name)]) in wanted.specifier, line


def test_nothing_is_compiled_on_the_build_machine() -> None:
    """llama-cpp-python has no wheel: it is in no lock; its sdist is fetched for the converter alone, by its hash."""
    from packager.formats.gguf.llamacpp import SDIST_SHA256

    assert all("llama-cpp-python" not in pinned(name) for name in NAMES)
    assert re.fullmatch(r"[0-9a-f]{64}", SDIST_SHA256)


def test_no_lock_names_an_index() -> None:
    """Where packages come from is the machine's own configuration."""
    for path in sorted(LOCKS.iterdir()):
        assert not re.search(r"https?://|--(extra-)?index-url|--find-links", _without_scripts(path)), path.name


def _without_scripts(path: Path) -> str:
    return "" if path.suffix == ".sh" else path.read_text(encoding="utf-8")
