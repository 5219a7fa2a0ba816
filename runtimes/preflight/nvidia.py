"""NVIDIA's part of a box: GPUs, driver, CUDA and TensorRT, from nvidia-smi, files and a child that reads the driver.

TensorRT is never loaded to read its version: its library segfaults on some boxes without a GPU, and its package, file
name or header hold the same version.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from runtimes.preflight.jetson import CAPABILITIES, GPUS
from runtimes.preflight.sources import Box

SMI = "nvidia-smi|/usr/lib/wsl/lib/nvidia-smi|/usr/sbin/nvidia-smi"
FIELDS = ("name", "compute_cap", "memory.total", "memory.free", "driver_version", "mig.mode.current")
DEVICES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/nvgpu", "/dev/dxg", "/proc/driver/nvidia/version")
MIB = 1 << 20
HANGS = "nvidia-smi does not answer"
VERSION = r"\d+(?:\.\d+)+"
PACKAGES = ("nvidia-", "libnvinfer", "cuda-toolkit-", "cuda-cudart-")
LIBRARIES = (
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib64",
    "/usr/local/lib",
    "/usr/lib",
    "/usr/local/cuda/lib64",
    "/opt/tensorrt/lib",
    "/usr/local/tensorrt/lib",
)
HEADERS = (
    "/usr/include/aarch64-linux-gnu",
    "/usr/include/x86_64-linux-gnu",
    "/usr/include",
    "/usr/local/tensorrt/include",
    "/opt/tensorrt/include",
)


def installed(box: Box) -> dict[str, str] | None:
    """Versions of the installed Debian packages of NVIDIA's, by name; None without dpkg's list."""
    lines = box.lines("/var/lib/dpkg/status")
    if lines is None:
        return None
    versions: dict[str, str] = {}
    name, is_installed = "", False
    for line in lines:
        if line.startswith("Package: "):
            name, is_installed = line[9:].strip(), False
        elif line.startswith("Status: "):
            is_installed = line.split()[-1] == "installed"
        elif line.startswith("Version: ") and is_installed and name.startswith(PACKAGES):
            versions[name] = line[9:].strip()
    return versions


def read_facts(box: Box, jetson: Mapping[str, Any], memory: tuple[int | None, int | None]) -> dict[str, Any]:
    """``gpus``, ``driver``, ``cuda_driver`` (the newest CUDA that the driver runs) and, where GPUs stay unknown,
    ``gpus_unknown_because``. memory: the machine's total and available bytes; an integrated GPU shares them.
    """
    gpus, driver, because = _from_smi(box)
    has_driver = any(box.exists(name) for name in DEVICES) or bool(jetson["soc"])
    if gpus is None and not because and not has_driver:  # there may still be an NVIDIA card
        return {"gpus": [], "driver": "", "cuda_driver": "", "card_without_driver": _has_card(box)}
    hangs = because == HANGS  # then the driver's libraries hang too
    whole = bool(gpus) and not any(_has_gap(gpu, bool(jetson["soc"])) for gpu in gpus or [])
    probed: Mapping[str, Any] = {} if hangs or whole else box.probe()
    gpus = _merge(gpus or [], probed) or ([_soc_gpu(jetson)] if jetson["soc"] in CAPABILITIES else gpus)
    for gpu in gpus or []:
        if gpu["unified"] or (gpu["unified"] is None and jetson["soc"]):
            gpu.update(unified=True, bytes=memory[0] or gpu["bytes"], free_bytes=memory[1])
    loaded = re.search(rf"(?:Module|for \w+)\s+({VERSION})", box.text("/proc/driver/nvidia/version") or "")
    facts = {
        "gpus": gpus,
        "driver": driver or probed.get("driver") or (loaded[1] if loaded else None),
        "cuda_driver": probed.get("cuda_driver") or (None if hangs else _cuda_of_smi(box)),
    }
    return facts if gpus is not None else {**facts, "gpus_unknown_because": because or "the driver does not answer"}


def _from_smi(box: Box) -> tuple[list[dict[str, Any]] | None, str | None, str]:
    """The GPUs that nvidia-smi lists (None without a list), the driver's version, and why there is no list."""
    fields: tuple[str, ...] = FIELDS
    smi = box.output(SMI, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
    if smi is not None and smi.status and "not a valid field" in smi.output:  # drivers before 510
        fields = tuple(field for field in FIELDS if field != "compute_cap")
        smi = box.output(SMI, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
    if smi is None:
        return None, None, ""
    if smi.status is None:
        return None, None, HANGS
    if smi.output.startswith("No devices were found"):
        return [], None, ""
    rows = [[part.strip() for part in line.split(",")] for line in smi.output.splitlines() if line.strip()]
    if smi.status != 0 or not rows or any(len(row) != len(fields) for row in rows):
        first = next((line.strip() for line in smi.output.splitlines() if line.strip()), "")
        reason = f"nvidia-smi says: {first[:120].rstrip('.')}" if first else f"nvidia-smi failed, status {smi.status}"
        return None, None, reason
    gpus, driver = [], None
    for row in rows:
        values = dict(zip(fields, row))  # noqa: B905 - Python 3.8 has no strict; the lengths are checked above
        driver = values["driver_version"] if re.fullmatch(VERSION, values["driver_version"]) else driver
        capability = values.get("compute_cap", "")
        gpus.append(
            {
                "name": values["name"],
                "capability": capability if re.fullmatch(r"\d+\.\d+", capability) else None,
                "bytes": _mib(values["memory.total"]),
                "free_bytes": _mib(values["memory.free"]),
                "mig": values["mig.mode.current"] == "Enabled",
                "unified": None,
            }
        )
    return gpus, driver, ""


def _mib(text: str) -> int | None:
    return int(text) * MIB if text.isdigit() else None


def _has_gap(gpu: Mapping[str, Any], of_a_jetson: bool) -> bool:
    """Whether nvidia-smi leaves a field empty: an old one the capability, with MIG the memory of a slice."""
    return bool(gpu["capability"] is None or gpu["mig"] or (gpu["bytes"] is None and not of_a_jetson))


def _merge(gpus: list[dict[str, Any]], probed: Mapping[str, Any]) -> list[dict[str, Any]]:
    """nvidia-smi's list with its gaps filled from the driver's libraries; without a list, the libraries' own."""
    known = probed.get("gpus") or []
    free = probed.get("free") or []
    if not gpus:
        return [
            {**gpu, "free_bytes": free[at] if len(free) == len(known) else None, "mig": None}
            for at, gpu in enumerate(known)
        ]
    if len(known) != len(gpus):
        known = [{}] * len(gpus)
    result = []
    for gpu, other in zip(gpus, known):  # noqa: B905 - as above
        merged = {key: other.get(key) if gpu[key] is None else gpu[key] for key in gpu}
        if gpu["mig"]:  # nvidia-smi has the whole GPU's memory, a process gets one slice
            merged.update(bytes=other.get("bytes"), free_bytes=None)
        result.append(merged)
    return result


def _soc_gpu(jetson: Mapping[str, Any]) -> dict[str, Any]:
    """A Jetson's GPU: it is part of the processor, so the device tree identifies it."""
    soc = jetson["soc"]
    return {
        "name": GPUS[soc],
        "capability": CAPABILITIES[soc],
        "bytes": None,
        "free_bytes": None,
        "mig": None,
        "unified": True,
    }


def _cuda_of_smi(box: Box) -> str | None:
    smi = box.output(SMI)
    match = re.search(r"CUDA (?:UMD )?Version\s*:\s*(\d+\.\d+)", smi.output) if smi and smi.status == 0 else None
    return match[1] if match else None


def _has_card(box: Box) -> bool:
    """Whether an NVIDIA display controller is on the PCI bus."""
    for name in box.names("/sys/bus/pci/devices"):
        folder = f"/sys/bus/pci/devices/{name}"
        if box.text(f"{folder}/vendor") == "0x10de" and (box.text(f"{folder}/class") or "").startswith("0x03"):
            return True
    return False


def tensorrt(box: Box, packages: Mapping[str, str] | None) -> str:
    """TensorRT's version, from its package, else its library's name, else its header, else its Python package; "" when
    there is none of them. The newest of several.
    """
    versions = [
        match[0]
        for name, version in (packages or {}).items()
        if re.fullmatch(r"libnvinfer\d+", name) and (match := re.match(VERSION, version))
    ]
    if not versions:
        versions = [
            match[1]
            for folder in LIBRARIES
            for name in box.names(folder)
            if (match := re.fullmatch(rf"libnvinfer\.so\.({VERSION})", name))
        ]
    if not versions:
        versions = [version for folder in HEADERS if (version := _header(box.text(f"{folder}/NvInferVersion.h") or ""))]
    if not versions:
        versions = [
            match[1]
            for place in ("/usr/lib", "/usr/local/lib")
            for python in box.names(place)
            if python.startswith("python3")
            for name in box.names(f"{place}/{python}/dist-packages")
            if (match := re.fullmatch(rf"tensorrt-({VERSION})\.dist-info", name))
        ]
    return max(versions, key=lambda text: [int(part) for part in text.split(".")], default="")


def _header(text: str) -> str:
    """ "10.16.2" from NvInferVersion.h, whose newer versions call the numbers TRT_MAJOR_ENTERPRISE and so on."""
    numbers = dict(re.findall(r"#define\s+(?:NV_TENSORRT|TRT)_(MAJOR|MINOR|PATCH)(?:_ENTERPRISE)?\s+(\d+)", text))
    return ".".join(numbers[part] for part in ("MAJOR", "MINOR", "PATCH")) if len(numbers) == 3 else ""


def toolkit(box: Box, packages: Mapping[str, str] | None) -> str:
    """The version of the CUDA toolkit, else of the CUDA runtime; "" when there is neither."""
    listed = box.text("/usr/local/cuda/version.json") or ""
    match = re.search(rf'"cuda"\s*:\s*{{[^}}]*"version"\s*:\s*"({VERSION})"', listed)
    match = match or re.search(rf"CUDA Version ({VERSION})", box.text("/usr/local/cuda/version.txt") or "")
    if match:
        return match[1]
    versions = [
        match[0]
        for name, version in (packages or {}).items()
        if re.fullmatch(r"cuda-(toolkit|cudart)-\d+-\d+", name) and (match := re.match(VERSION, version))
    ]
    return max(versions, key=lambda text: [int(part) for part in text.split(".")], default="")
