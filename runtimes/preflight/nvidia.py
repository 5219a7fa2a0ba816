"""NVIDIA's part of a box: GPUs, driver, CUDA and TensorRT, from nvidia-smi, files and a child that asks the driver.

TensorRT is never loaded to ask its version: its library segfaults on some boxes without a GPU, and its package, file
name or header tell as much.
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
    """The Debian packages that matter here and are installed, with their versions; None without dpkg's list."""
    lines = box.lines("/var/lib/dpkg/status")
    if lines is None:
        return None
    found: dict[str, str] = {}
    name, there = "", False
    for line in lines:
        if line.startswith("Package: "):
            name, there = line[9:].strip(), False
        elif line.startswith("Status: "):
            there = line.split()[-1] == "installed"
        elif line.startswith("Version: ") and there and name.startswith(PACKAGES):
            found[name] = line[9:].strip()
    return found


def read_facts(box: Box, jetson: Mapping[str, Any], memory: tuple[int | None, int | None]) -> dict[str, Any]:
    """``gpus``, ``driver``, ``cuda_driver`` (the newest CUDA that the driver runs) and, where GPUs stay unknown,
    ``gpus_unknown_because``. memory: the machine's total and available bytes, which an integrated GPU shares.
    """
    gpus, driver, because = _from_smi(box)
    there = any(box.exists(name) for name in DEVICES) or bool(jetson["soc"])
    if gpus is None and not because and not there:  # no program and no driver: a card of NVIDIA's may still be in it
        return {"gpus": [], "driver": "", "cuda_driver": "", "card_without_driver": _has_card(box)}
    hangs = because == HANGS  # then the driver's libraries do too
    whole = bool(gpus) and not any(_has_gap(gpu, bool(jetson["soc"])) for gpu in gpus or [])
    probed: Mapping[str, Any] = {} if hangs or whole else box.probe()
    gpus = _together(gpus or [], probed) or ([_of_soc(jetson)] if jetson["soc"] in CAPABILITIES else gpus)
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
    """The GPUs as nvidia-smi lists them (None without a list), the driver's version, and why there is no list."""
    fields: tuple[str, ...] = FIELDS
    said = box.said(SMI, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
    if said is not None and said.status and "not a valid field" in said.output:  # drivers before 510
        fields = tuple(field for field in FIELDS if field != "compute_cap")
        said = box.said(SMI, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
    if said is None:
        return None, None, ""
    if said.status is None:
        return None, None, HANGS
    if said.output.startswith("No devices were found"):
        return [], None, ""
    rows = [[part.strip() for part in line.split(",")] for line in said.output.splitlines() if line.strip()]
    if said.status != 0 or not rows or any(len(row) != len(fields) for row in rows):
        first = next((line.strip() for line in said.output.splitlines() if line.strip()), "")
        words = f"nvidia-smi says: {first[:120].rstrip('.')}" if first else f"nvidia-smi failed, status {said.status}"
        return None, None, words
    gpus, driver = [], None
    for row in rows:
        told = dict(zip(fields, row))  # noqa: B905 - Python 3.8 has no strict; the lengths are checked above
        driver = told["driver_version"] if re.fullmatch(VERSION, told["driver_version"]) else driver
        capability = told.get("compute_cap", "")
        gpus.append(
            {
                "name": told["name"],
                "capability": capability if re.fullmatch(r"\d+\.\d+", capability) else None,
                "bytes": _mib(told["memory.total"]),
                "free_bytes": _mib(told["memory.free"]),
                "mig": told["mig.mode.current"] == "Enabled",
                "unified": None,
            }
        )
    return gpus, driver, ""


def _mib(text: str) -> int | None:
    return int(text) * MIB if text.isdigit() else None


def _has_gap(gpu: Mapping[str, Any], of_a_jetson: bool) -> bool:
    """Whether nvidia-smi leaves something open: an old one the capability, MIG the memory of a slice."""
    return bool(gpu["capability"] is None or gpu["mig"] or (gpu["bytes"] is None and not of_a_jetson))


def _together(gpus: list[dict[str, Any]], probed: Mapping[str, Any]) -> list[dict[str, Any]]:
    """nvidia-smi's list, its gaps filled from what the driver's libraries say; theirs where it has none."""
    asked = probed.get("gpus") or []
    free = probed.get("free") or []
    if not gpus:
        return [
            {**gpu, "free_bytes": free[at] if len(free) == len(asked) else None, "mig": None}
            for at, gpu in enumerate(asked)
        ]
    if len(asked) != len(gpus):
        asked = [{}] * len(gpus)
    together = []
    for gpu, other in zip(gpus, asked):  # noqa: B905 - as above
        seen = {key: other.get(key) if gpu[key] is None else gpu[key] for key in gpu}
        if gpu["mig"]:  # nvidia-smi tells the whole GPU's memory, a process gets one slice
            seen.update(bytes=other.get("bytes"), free_bytes=None)
        together.append(seen)
    return together


def _of_soc(jetson: Mapping[str, Any]) -> dict[str, Any]:
    """A Jetson's GPU, which is part of its processor and needs no program to be known."""
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
    said = box.said(SMI)
    told = re.search(r"CUDA (?:UMD )?Version\s*:\s*(\d+\.\d+)", said.output) if said and said.status == 0 else None
    return told[1] if told else None


def _has_card(box: Box) -> bool:
    """Whether a display controller of NVIDIA's is on the PCI bus."""
    for name in box.names("/sys/bus/pci/devices"):
        folder = f"/sys/bus/pci/devices/{name}"
        if box.text(f"{folder}/vendor") == "0x10de" and (box.text(f"{folder}/class") or "").startswith("0x03"):
            return True
    return False


def tensorrt(box: Box, packages: Mapping[str, str] | None) -> str:
    """TensorRT's version: its package's, else its library's name, else its header, else its Python package; "" when
    none of them is there. Of several the newest.
    """
    found = [
        match[0]
        for name, version in (packages or {}).items()
        if re.fullmatch(r"libnvinfer\d+", name) and (match := re.match(VERSION, version))
    ]
    if not found:
        found = [
            match[1]
            for folder in LIBRARIES
            for name in box.names(folder)
            if (match := re.fullmatch(rf"libnvinfer\.so\.({VERSION})", name))
        ]
    if not found:
        found = [version for folder in HEADERS if (version := _header(box.text(f"{folder}/NvInferVersion.h") or ""))]
    if not found:
        found = [
            match[1]
            for place in ("/usr/lib", "/usr/local/lib")
            for python in box.names(place)
            if python.startswith("python3")
            for name in box.names(f"{place}/{python}/dist-packages")
            if (match := re.fullmatch(rf"tensorrt-({VERSION})\.dist-info", name))
        ]
    return max(found, key=lambda text: [int(part) for part in text.split(".")], default="")


def _header(text: str) -> str:
    """ "10.16.2" from NvInferVersion.h, whose newer forms name the numbers TRT_MAJOR_ENTERPRISE and so on."""
    numbers = dict(re.findall(r"#define\s+(?:NV_TENSORRT|TRT)_(MAJOR|MINOR|PATCH)(?:_ENTERPRISE)?\s+(\d+)", text))
    return ".".join(numbers[part] for part in ("MAJOR", "MINOR", "PATCH")) if len(numbers) == 3 else ""


def toolkit(box: Box, packages: Mapping[str, str] | None) -> str:
    """The CUDA toolkit's or, without one, the CUDA runtime's version; "" when neither is there."""
    listed = box.text("/usr/local/cuda/version.json") or ""
    told = re.search(rf'"cuda"\s*:\s*{{[^}}]*"version"\s*:\s*"({VERSION})"', listed)
    told = told or re.search(rf"CUDA Version ({VERSION})", box.text("/usr/local/cuda/version.txt") or "")
    if told:
        return told[1]
    found = [
        match[0]
        for name, version in (packages or {}).items()
        if re.fullmatch(r"cuda-(toolkit|cudart)-\d+-\d+", name) and (match := re.match(VERSION, version))
    ]
    return max(found, key=lambda text: [int(part) for part in text.split(".")], default="")
