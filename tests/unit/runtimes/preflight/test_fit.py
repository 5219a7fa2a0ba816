"""The edges of the comparison: ends of ranges, power modes, memory in use, MIG; and of the reading: gaps and hangs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runtimes.preflight import nvidia
from runtimes.preflight.facts import read_facts
from runtimes.preflight.fit import Finding, compare
from runtimes.preflight.sources import Box

NEEDS: dict[str, Any] = {
    "system": "linux",
    "machine": "x86_64",
    "python_min": "3.10",
    "python_max": "3.12",
    "glibc_min": None,
    "ram_bytes": 2_000,
    "disk_bytes": 0,
    "gpu": None,
}
GPU: dict[str, Any] = {"capability": "7.5", "count": 1, "bytes": 1_000}
T4: dict[str, Any] = {
    "name": "Tesla T4",
    "capability": "7.5",
    "bytes": 2_000,
    "free_bytes": 2_000,
    "mig": False,
    "unified": None,
}


def findings(name: str, gpu: dict[str, Any] | None = None, **facts: Any) -> list[Finding]:
    """The findings of that name."""
    return [one for one in compare({**NEEDS, "gpu": gpu}, facts, installing=False) if one.name == name]


@pytest.mark.parametrize(("version", "fits"), [
    ("10.2.9", False), ("10.3", True), ("10.3.0.30", True), ("10.16.2.10", True), ("11", False), ("11.0.0", False),
])  # fmt: skip
def test_a_range_holds_its_lower_end_and_not_its_upper(version: str, fits: bool) -> None:
    """Parts are compared as numbers: 10.16 is newer than 10.3."""
    (row,) = findings("TensorRT", {**GPU, "tensorrt": {"min": "10.3", "below": "11"}}, tensorrt=version)
    assert row.ok is fits and row.expected == "TensorRT 10.3 or newer and older than 11"


@pytest.mark.parametrize(("wanted", "expected", "version", "fits"), [
    ({"min": "12.0"}, "a driver for CUDA 12.0 or newer", "12.0", True),
    ({"below": "13"}, "a driver for CUDA older than 13", "13.0", False),
    ({"below": "13"}, "a driver for CUDA older than 13", "12.9", True),
])  # fmt: skip
def test_a_range_may_be_open_at_one_end(wanted: dict[str, str], expected: str, version: str, fits: bool) -> None:
    """And says so."""
    (row,) = findings("CUDA", {**GPU, "cuda": wanted}, cuda_driver=version)
    assert (row.expected, row.ok) == (expected, fits)


@pytest.mark.parametrize(("driver", "ok"), [("525.60.13", True), ("525.60.2", False), ("", False), (None, None)])
def test_a_driver_is_compared_number_by_number(driver: str | None, ok: bool | None) -> None:
    """Without one there is none; unknown stays unknown."""
    (row,) = findings("driver", {**GPU, "driver_min": "525.60.13"}, driver=driver, gpus=[T4])
    assert row.ok is ok and row.severity == "refuses"


@pytest.mark.parametrize(("mode", "modes", "ok", "best"), [
    ("7W", ["15W", "25W", "MAXN_SUPER", "7W"], False, "MAXN_SUPER"),
    ("MAXN", ["MAXN", "MAXN_SUPER"], False, "MAXN_SUPER"),
    ("MAXN", ["MAXN", "MODE_15W", "MODE_50W"], True, "MAXN"),
    ("MODE_20W_2CORE", ["MODE_10W_DESKTOP", "MODE_20W_2CORE", "MODE_20W_6CORE"], True, "MODE_20W_2CORE"),
    ("MODE_10W_DESKTOP", ["MODE_10W_DESKTOP", "MODE_20W_6CORE"], False, "MODE_20W_6CORE"),
])  # fmt: skip
def test_a_power_mode_below_the_boards_best_is_a_warning(mode: str, modes: list[str], ok: bool, best: str) -> None:
    """By its watts; the unlimited modes are above all."""
    (row,) = findings("power mode", power_mode=mode, power_modes=modes)
    assert (row.ok, row.severity) == (ok, "warns") and row.expected.startswith(f"{best},")
    assert not row.refuses and row.warns is not ok


def test_memory_that_is_in_use_is_a_warning() -> None:
    """The machine has enough, and others hold it."""
    rows = compare(NEEDS, {"ram_bytes": 3_000, "ram_available_bytes": 1_999}, installing=False)
    assert [(one.name, one.ok, one.severity) for one in rows if "memory" in one.name] == [
        ("memory", True, "refuses"),
        ("free memory", False, "warns"),
    ]
    assert findings("free memory", ram_available_bytes=2_000)[0].ok is True


def test_gpu_memory_that_is_in_use_is_a_warning_but_not_where_it_is_the_machines() -> None:
    """It is reported once, as the machine's."""
    assert findings("free GPU memory", GPU, gpus=[{**T4, "free_bytes": 999}])[0].ok is False
    assert findings("free GPU memory", GPU, gpus=[{**T4, "free_bytes": 1_000}])[0].ok is True
    assert findings("free GPU memory", GPU, gpus=[{**T4, "free_bytes": 999, "unified": True}]) == []
    assert findings("free GPU memory", {**GPU, "count": 2}, gpus=[{**T4, "free_bytes": 999}, T4])[0].ok is False


def test_a_gpu_in_slices_is_a_warning() -> None:
    """Which of them a server gets is the user's choice."""
    assert [one.severity for one in findings("MIG", GPU, gpus=[{**T4, "mig": True}])] == ["warns"]
    assert findings("MIG", GPU, gpus=[T4]) == [] and findings("MIG", gpus=[{**T4, "mig": True}]) == []


def test_an_unknown_driver_is_a_warning_where_none_is_asked_for() -> None:
    """It is shown as unknown and refuses nothing."""
    (row,) = findings("driver", GPU, gpus=[T4], driver=None)
    assert row.ok is None and row.warns and findings("driver", GPU, gpus=[T4], driver="535.1") == []


QUERY = f"nvidia-smi --query-gpu={','.join(nvidia.FIELDS)} --format=csv,noheader,nounits"


def tree(folder: Path, commands: dict[str, Any], **files: str) -> Box:
    for name, text in {"commands.json": json.dumps(commands), "process.json": "{}", **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return Box(folder)


def probe(**facts: Any) -> dict[str, Any]:
    return {"status": 0, "output": json.dumps(facts)}


def test_the_memory_of_a_gpu_in_slices_is_that_of_the_slice(tmp_path: Path) -> None:
    """nvidia-smi tells the whole card's; the driver's library what a process gets."""
    row = {"status": 0, "output": "NVIDIA A100-SXM4-40GB, 8.0, 40960, 40000, 535.1, Enabled\n"}
    slices = [{"name": "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "capability": "8.0", "bytes": 4864 << 20, "unified": False}]
    (gpu,) = read_facts(box=tree(tmp_path, {QUERY: row, "probe": probe(gpus=slices)}))["gpus"]
    assert (gpu["bytes"], gpu["free_bytes"], gpu["mig"]) == (4864 << 20, None, True)
    (gpu,) = read_facts(box=tree(tmp_path, {QUERY: row}))["gpus"]
    assert gpu["bytes"] is None


def test_after_an_nvidia_smi_that_hangs_the_driver_is_not_asked_again(tmp_path: Path) -> None:
    """Its libraries would hang too."""
    hangs = {QUERY: {"status": None, "output": ""}, "probe": probe(cuda_driver="12.6", gpus=[T4])}
    facts = read_facts(box=tree(tmp_path, hangs))
    assert facts["gpus"] is None and facts["cuda_driver"] is None
    assert facts["gpus_unknown_because"] == "nvidia-smi does not answer"


def test_an_nvidia_smi_that_fails_without_device_nodes_is_not_taken_for_no_gpu(tmp_path: Path) -> None:
    """The program is there, so a driver was installed."""
    failed = {QUERY: {"status": 9, "output": "NVIDIA-SMI has failed because it couldn't communicate.\n"}}
    assert read_facts(box=tree(tmp_path, failed))["gpus"] is None


@pytest.mark.parametrize(("line", "cuda"), [
    ("| NVIDIA-SMI 535.183.01    Driver Version: 535.183.01    CUDA Version: 12.2  |", "12.2"),
    ("| NVIDIA-SMI 610.43.02   KMD Version: 610.43.02   CUDA UMD Version: 13.3 |", "13.3"),
    ("| NVIDIA-SMI 610.43.02   KMD Version: 610.43.02   CUDA UMD Version: N/A |", None),
])  # fmt: skip
def test_the_drivers_cuda_is_read_from_old_and_new_headings(line: str, cuda: str | None, tmp_path: Path) -> None:
    """Driver 610 calls it the version of the user mode driver."""
    row = {"status": 0, "output": "Tesla T4, 7.5, 15360, 15000, 610.43.02, [N/A]\n"}
    facts = read_facts(box=tree(tmp_path, {QUERY: row, "nvidia-smi": {"status": 0, "output": line}}))
    assert facts["cuda_driver"] == cuda


@pytest.mark.parametrize(("text", "driver"), [
    ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\n", "535.183.01"),
    ("NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build\n", "540.4.0"),
])  # fmt: skip
def test_the_loaded_driver_is_known_without_nvidia_smi(text: str, driver: str, tmp_path: Path) -> None:
    """From the kernel's own file, in both of its forms."""
    facts = read_facts(box=tree(tmp_path, {}, **{"proc/driver/nvidia/version": text}))
    assert facts["driver"] == driver and facts["gpus"] is None


@pytest.mark.parametrize(("kind", "card"), [("0x030000", True), ("0x030200", True), ("0x040300", False)])
def test_a_card_without_a_driver_is_seen_on_the_bus(kind: str, card: bool, tmp_path: Path) -> None:
    """As a display or 3D controller; the audio part of a card is none."""
    place = "sys/bus/pci/devices/one"
    facts = read_facts(box=tree(tmp_path, {}, **{f"{place}/vendor": "0x10de\n", f"{place}/class": f"{kind}\n"}))
    assert facts["card_without_driver"] is card and facts["gpus"] == []


@pytest.mark.parametrize(("files", "expected"), [
    ({"run/.containerenv": ""}, "podman"), ({".dockerenv": ""}, "docker"), ({"run/systemd/container": "lxc"}, "lxc"),
    ({"proc/1/cgroup": "0::/kubepods/burstable/pod1\n"}, "kubepods"), ({"proc/1/cgroup": "0::/init.scope\n"}, ""),
])  # fmt: skip
def test_a_container_is_known_by_its_marks(files: dict[str, str], expected: str, tmp_path: Path) -> None:
    """It limits what can be read: no device tree, no power mode."""
    assert read_facts(box=tree(tmp_path, {}, **files))["container"] == expected


def test_wsl_is_known_by_its_kernel(tmp_path: Path) -> None:
    """Microsoft builds it."""
    kernel = "5.15.167.4-microsoft-standard-WSL2\n"
    assert read_facts(box=tree(tmp_path, {}, **{"proc/sys/kernel/osrelease": kernel}))["wsl"] is True
