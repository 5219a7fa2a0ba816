"""The facts of a box: parsed from recorded trees, from programs that hang or lie, and from libraries that crash."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from runtimes.preflight import nvidia, sources
from runtimes.preflight.facts import KINDS, OF_A_GPU, read_facts
from runtimes.preflight.jetson import jetpack, l4t_release
from runtimes.preflight.sources import PROBE, Box, run
from tests.conftest import ROOT
from tests.system_packages import system_package

BOXES = ROOT / "tests" / "unit" / "boxes"
TREES = sorted(path.name for path in (BOXES / "trees").iterdir() if path.is_dir())
PREFLIGHT = [f"preflight/{path.stem}" for path in sorted((ROOT / "runtimes/preflight").glob("*.py"))]
ON_THE_BOX_ALONE = ["__init__", "__main__", "files", "install/__init__", "install/install", *PREFLIGHT]


@pytest.mark.parametrize("name", TREES)
def test_a_recorded_tree_gives_the_recorded_facts(name: str) -> None:
    """The fact files that the refusals are made of are what the reader makes of the files and programs of a box."""
    facts = read_facts(box=Box(BOXES / "trees" / name))
    assert facts == json.loads((BOXES / f"{name}.json").read_text(encoding="utf-8"))
    assert facts.keys() <= KINDS.keys()
    assert all(gpu.keys() == OF_A_GPU.keys() for gpu in facts["gpus"])


@pytest.mark.parametrize(("name", "expected"), [
    ("orin_nano_jetpack_6_2", {"jetpack": "6.2", "l4t": "36.4.3", "soc": "tegra234", "jetson_module": "p3767-0005",
                               "tensorrt": "10.3.0.30", "cuda_driver": "12.6", "cuda_toolkit": "12.6.11",
                               "driver": "540.4.0", "power_mode": "MAXN_SUPER"}),
    ("orin_nano_jetpack_7_2_1", {"jetpack": "7.2.1", "l4t": "39.2.1", "tensorrt": "10.16.2.10", "cuda_driver": "13.2",
                                 "driver": "595.78", "cuda_toolkit": "13.2.2", "power_mode": "25W",
                                 "gpu_clock_least_hz": 306000000, "gpu_clock_most_hz": 918000000}),
    ("agx_orin_jetpack_7_2", {"jetpack": "7.2", "jetson_module": "p3701-0005", "power_mode": "MAXN",
                              "gpu_clock_least_hz": 1300500000, "gpu_clock_most_hz": 1300500000}),
    ("xavier_nx_jetpack_5_1", {"jetpack": "5.1.3", "soc": "tegra194", "tensorrt": "8.5.2", "cuda_driver": "11.4",
                               "driver": None, "power_mode": "MODE_10W_DESKTOP", "python": "3.8.10"}),
    ("t4_driver_470", {"driver": "470.256.02", "cuda_driver": "11.4", "tensorrt": "", "jetpack": "", "soc": ""}),
    ("t4_driver_535", {"driver": "535.183.01", "cuda_driver": "12.2", "container": "", "wsl": False}),
    ("desktop_no_gpu", {"gpus": [], "driver": "", "card_without_driver": False}),
    ("desktop_card_without_driver", {"gpus": [], "driver": "", "card_without_driver": True}),
    ("orin_in_docker", {"container": "docker", "jetpack": None, "l4t": None, "soc": None, "tensorrt": "10.3.0",
                        "ram_bytes": 6442450944}),
])  # fmt: skip
def test_the_facts_of_a_tree_are_these(name: str, expected: dict[str, Any]) -> None:
    """Written down beside the fact file, so that both cannot be wrong together."""
    facts = read_facts(box=Box(BOXES / "trees" / name))
    assert {key: facts[key] for key in expected} == expected


@pytest.mark.parametrize(("name", "gpu"), [
    ("orin_nano_jetpack_6_2", ("Orin (nvgpu)", "8.7", 7802880 * 1024, 6348800 * 1024, True)),
    ("xavier_nx_jetpack_5_1", ("Xavier", "7.2", 7018496 * 1024, 5242880 * 1024, True)),
    ("t4_driver_470", ("Tesla T4", "7.5", 15109 << 20, 15106 << 20, False)),
    ("t4_driver_535", ("Tesla T4", "7.5", 15360 << 20, 14928 << 20, None)),
    ("desktop_rtx_3060", ("NVIDIA GeForce RTX 3060", "8.6", 12288 << 20, 11020 << 20, None)),
    ("orin_in_docker", ("Orin", "8.7", 6442450944, 6442450944, True)),
])  # fmt: skip
def test_the_gpu_of_a_tree_is_this(name: str, gpu: tuple[object, ...]) -> None:
    """A Jetson's shares the machine's memory, which nvidia-smi does not tell; an old nvidia-smi tells no capability."""
    (facts,) = read_facts(box=Box(BOXES / "trees" / name))["gpus"]
    assert tuple(facts[key] for key in ("name", "capability", "bytes", "free_bytes", "unified")) == gpu


def tree(folder: Path, files: dict[str, str] | None = None, commands: dict[str, Any] | None = None) -> Box:
    for name, text in (files or {}).items():
        place = folder / name.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")
    (folder / "commands.json").write_text(json.dumps(commands or {}), encoding="utf-8")
    (folder / "process.json").write_text("{}", encoding="utf-8")
    return Box(folder)


def test_an_empty_box_has_no_facts_and_none_is_guessed(tmp_path: Path) -> None:
    """Neither memory nor GPU nor JetPack."""
    facts = read_facts(box=tree(tmp_path))
    assert facts["ram_bytes"] is None and facts["ram_available_bytes"] is None and facts["os"] is None
    assert facts["gpus"] == [] and facts["jetpack"] == "" and facts["tensorrt"] == ""


@pytest.mark.parametrize(("smi", "because"), [
    ({"status": None, "output": ""}, "nvidia-smi does not answer"),
    ({"status": 0, "output": "lorem ipsum\n"}, "nvidia-smi says: lorem ipsum"),
    ({"status": 0, "output": ""}, "nvidia-smi failed, status 0"),
    ({"status": -11, "output": ""}, "nvidia-smi failed, status -11"),
    ({"status": 0, "output": "a, b\n"}, "nvidia-smi says: a, b"),
    ({"status": 9, "output": "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 570\n"},
     "nvidia-smi says: Failed to initialize NVML: Driver/library version mismatch"),
])  # fmt: skip
def test_an_nvidia_smi_that_does_not_tell_leaves_the_gpu_unknown(
    smi: dict[str, Any], because: str, tmp_path: Path
) -> None:
    """With its own first words as the reason."""
    query = f"nvidia-smi --query-gpu={','.join(nvidia.FIELDS)} --format=csv,noheader,nounits"
    facts = read_facts(box=tree(tmp_path, {"/dev/nvidia0": ""}, {query: smi}))
    assert facts["gpus"] is None and facts["gpus_unknown_because"] == because


def test_a_driver_without_a_gpu_is_no_gpu(tmp_path: Path) -> None:
    """nvidia-smi says so itself."""
    query = f"nvidia-smi --query-gpu={','.join(nvidia.FIELDS)} --format=csv,noheader,nounits"
    smi = {"status": 6, "output": "No devices were found\n"}
    assert read_facts(box=tree(tmp_path, {"/dev/nvidiactl": ""}, {query: smi}))["gpus"] == []


def test_a_jetsons_gpu_is_known_from_its_processor_alone(tmp_path: Path) -> None:
    """Where neither nvidia-smi nor libcuda answers."""
    files = {"/proc/device-tree/compatible": "nvidia,p3701-0000\0nvidia,tegra234\0", "/proc/meminfo": "MemTotal: 8 kB"}
    (gpu,) = read_facts(box=tree(tmp_path, files))["gpus"]
    assert (gpu["name"], gpu["capability"], gpu["bytes"]) == ("Orin", "8.7", 8192)


@pytest.mark.parametrize(("text", "version"), [
    ("#define NV_TENSORRT_MAJOR 8 //!< x\n#define NV_TENSORRT_MINOR 5\n#define NV_TENSORRT_PATCH 2\n", "8.5.2"),
    ("#define TRT_MAJOR_ENTERPRISE 10\n#define TRT_MINOR_ENTERPRISE 16\n#define TRT_PATCH_ENTERPRISE 2\n"
     "#define NV_TENSORRT_MAJOR TRT_MAJOR_ENTERPRISE //!< x\n", "10.16.2"),
    ("#define NV_TENSORRT_MAJOR 8\n", ""),
])  # fmt: skip
def test_tensorrts_version_is_read_from_its_header(text: str, version: str, tmp_path: Path) -> None:
    """Both of its forms, where neither a package nor the library's name tells it."""
    assert nvidia.tensorrt(tree(tmp_path, {"/usr/include/NvInferVersion.h": text}), None) == version


def test_of_two_tensorrts_the_newest_counts_and_a_removed_one_does_not(tmp_path: Path) -> None:
    """dpkg's list keeps the names of removed packages."""
    status = (
        "Package: libnvinfer8\nStatus: install ok installed\nVersion: 8.6.2.3-1+cuda12.2\n\n"
        "Package: libnvinfer10\nStatus: install ok installed\nVersion: 10.3.0.30-1+cuda12.5\n\n"
        "Package: libnvinfer11\nStatus: deinstall ok config-files\nVersion: 11.0.0-1\n"
    )
    box = tree(tmp_path, {"/var/lib/dpkg/status": status})
    assert nvidia.tensorrt(box, nvidia.installed(box)) == "10.3.0.30"


@pytest.mark.parametrize(("l4t", "packages", "expected"), [
    ("36.4.3", {}, "6.2"), ("39.2.1", {}, "7.2.1"), ("36.4.3", {"nvidia-jetpack": "6.1+b123"}, "6.2"),
    ("36.9.9", {"nvidia-jetpack": "6.3-b1"}, "6.3"), ("36.9.9", None, "6"), ("50.1", {}, None), (None, {}, None),
])  # fmt: skip
def test_jetpack_follows_from_its_jetson_linux(
    l4t: str | None, packages: dict[str, str] | None, expected: str | None
) -> None:
    """What runs counts, not what package was installed once; of an unknown release the generation is known."""
    assert jetpack(l4t, packages) == expected


def test_jetson_linux_is_told_by_its_package_where_the_release_file_is_lost() -> None:
    """And by nothing else."""
    assert l4t_release(None, {"nvidia-l4t-core": "36.4.3-20250107174145"}) == "36.4.3"
    assert l4t_release("something else", {}) is None


def program(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)


def until_it_ran(program: Path, mark: Path) -> None:
    """A program that leaves a mark and never ends has no status; a busy machine may need some seconds to start it."""
    for seconds in (0.2, 1, 5, 25):
        assert run([str(program)], seconds).status is None
        if mark.exists():
            return
    raise AssertionError(f"{program.name} did not run")


def gone(process: int) -> bool:
    """Whether a process has ended; one that nobody has waited for yet counts."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_program_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    """A child that holds the pipe open is no reason to wait."""
    program(tmp_path / "hangs", f"sleep 3600 &\necho $! > {tmp_path}/new\nmv {tmp_path}/new {tmp_path}/child\nwait")
    until_it_ran(tmp_path / "hangs", tmp_path / "child")
    child = int((tmp_path / "child").read_text(encoding="ascii"))
    for _ in range(3000):
        if gone(child):
            break
        time.sleep(0.01)
    assert gone(child)


def test_a_program_that_prints_without_end_is_ended(tmp_path: Path) -> None:
    """A megabyte is read, not all memory filled."""
    program(tmp_path / "prints", "yes 'Tesla T4, 7.5, 15360, 15000, 535.1, [N/A]'")
    assert run([str(tmp_path / "prints")], 60) == (None, "")


def test_a_program_that_closes_its_output_and_stays_is_ended(tmp_path: Path) -> None:
    """Its silence says nothing of when it ends."""
    program(tmp_path / "stays", f"exec >&-\ntouch {tmp_path}/closed\nsleep 600")
    until_it_ran(tmp_path / "stays", tmp_path / "closed")


def test_what_a_program_prints_cannot_steer_a_terminal(tmp_path: Path) -> None:
    """Colours, NULs and bytes that are no text are taken out."""
    program(tmp_path / "colours", r"printf '\033[31mred\000\377 T4\n'")
    assert run([str(tmp_path / "colours")], 60) == (0, "[31mred\N{REPLACEMENT CHARACTER} T4\n")


def test_a_program_that_cannot_be_started_says_nothing(tmp_path: Path) -> None:
    """A folder, a text without a first line."""
    assert run([str(tmp_path)], 5) == (None, "")


FAKE_CUDA = """
#include <stdlib.h>
#include <string.h>
int cuDriverGetVersion(int *v) { *v = 12060; return 0; }
int cuInit(unsigned f) { if (getenv("CRASH")) abort(); return 0; }
int cuDeviceGetCount(int *n) { *n = 1; return 0; }
int cuDeviceGet(int *d, int i) { *d = i; return 0; }
int cuDeviceGetName(char *name, int size, int d) { strncpy(name, "Orin", size); return 0; }
int cuDeviceGetAttribute(int *v, int a, int d) { *v = a == 75 ? 8 : a == 76 ? 7 : 1; return 0; }
int cuDeviceTotalMem_v2(size_t *size, int d) { *size = 7990149120ul; return 0; }
"""


def test_the_drivers_library_is_asked_in_a_child_and_may_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A libcuda of our own in place of the driver's: what it answers is read, and when it aborts nothing is known."""
    (tmp_path / "cuda.c").write_text(FAKE_CUDA, encoding="utf-8")
    compiler = system_package("cc")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", tmp_path / "cuda.c"], check=True)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    gpu = {"name": "Orin", "capability": "8.7", "bytes": 7990149120, "unified": True}
    assert Box().probe() == {"silent": ["nvml"], "cuda_driver": "12.6", "gpus": [gpu]}
    monkeypatch.setenv("CRASH", "1")
    assert Box().probe() == {}


def test_without_the_drivers_libraries_the_child_answers_with_nothing() -> None:
    """As on most machines that run this test."""
    done = subprocess.run(
        [sys.executable, "-I", "-B", PROBE],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "LD_LIBRARY_PATH": ""},
    )
    assert isinstance(json.loads(done.stdout), dict)


def test_a_box_can_be_recorded_as_a_tree(tmp_path: Path) -> None:
    """tests/device/record_box.py on this machine: the tree gives the facts that the machine itself gives."""
    script = ROOT / "tests" / "device" / "record_box.py"
    done = subprocess.run(
        [sys.executable, "-I", "-B", script, tmp_path / "box"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and json.loads(done.stdout)["different"] == [], done.stderr
    assert read_facts(box=Box(tmp_path / "box"))["ram_bytes"] > 1 << 28


def test_what_runs_before_an_install_can_be_read_by_python_3_8() -> None:
    """JetPack 5's own Python gets the preflight's sentence, not a syntax error; neither are new names used there."""
    newer = ("removeprefix", "removesuffix", "is_relative_to", "strict=", "math.lcm", "zoneinfo", "ParamSpec")
    for name in ON_THE_BOX_ALONE:
        text = (ROOT / "runtimes" / f"{name}.py").read_text(encoding="utf-8")
        ast.parse(text, name, feature_version=(3, 8))
        assert "from __future__ import annotations" in text or name.endswith("__init__"), name
        assert not [word for word in newer if word in text], name


def test_the_limit_is_more_than_any_of_these_files_has_to_say() -> None:
    """A truncated release file would be an unknown release."""
    sizes = [path.stat().st_size for path in (BOXES / "trees").rglob("*") if path.is_file()]
    assert max(sizes) < sources.LIMIT
