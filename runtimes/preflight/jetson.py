"""A Jetson's facts, from its files: module, Jetson Linux (L4T) and JetPack, power mode and clocks.

Files: /etc/nv_tegra_release (L4T), /proc/device-tree/{model,compatible} (board, module and processor),
/var/lib/nvpmodel/status with /etc/nvpmodel.conf (power mode), /sys/class/devfreq (GPU clocks; jetson_clocks locks them
by raising the minimum to the maximum). Checked against public records of JetPack 5.1, 6.2 and 7.2 boards.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from runtimes.preflight.sources import Box

# From NVIDIA's page "CUDA GPUs", by the processor in the device tree.
CAPABILITIES = {"tegra210": "5.3", "tegra186": "6.2", "tegra194": "7.2", "tegra234": "8.7", "tegra264": "11.0"}
GPUS = {"tegra210": "Maxwell", "tegra186": "Pascal", "tegra194": "Xavier", "tegra234": "Orin", "tegra264": "Thor"}
# From NVIDIA's page "JetPack Archive": Jetson Linux -> JetPack.
JETPACKS = {
    "32.7.1": "4.6.1", "32.7.2": "4.6.2", "32.7.3": "4.6.3", "32.7.4": "4.6.4", "32.7.5": "4.6.5", "32.7.6": "4.6.6",
    "35.1.0": "5.0.2", "35.2.1": "5.1", "35.3.1": "5.1.1", "35.4.1": "5.1.2", "35.5.0": "5.1.3", "35.6.0": "5.1.4",
    "35.6.1": "5.1.5", "36.3.0": "6.0", "36.4.0": "6.1", "36.4.3": "6.2", "36.4.4": "6.2.1", "36.4.7": "6.2.1",
    "36.5.0": "6.2.2", "38.2.0": "7.0", "38.2.1": "7.0", "38.2.2": "7.0", "38.4.0": "7.1", "39.2.0": "7.2",
    "39.2.1": "7.2.1",
}  # fmt: skip
# The generation of a release that is not in the list, by its first number.
GENERATIONS = {"32": "4", "34": "5", "35": "5", "36": "6", "38": "7", "39": "7"}
GPU_CLOCKS = re.compile(r"\.(gpu|ga10b|gv11b|gp10b|gm20b)$|^gpu-gpc")
NONE: dict[str, Any] = {
    "jetson_model": "",
    "jetson_module": "",
    "soc": "",
    "l4t": "",
    "jetpack": "",
    "power_mode": "",
    "power_modes": [],
    "gpu_clock_least_hz": None,
    "gpu_clock_most_hz": None,
}


def read_facts(box: Box, packages: Mapping[str, str] | None, *, programs: bool) -> dict[str, Any]:
    """The facts: "" for all of them on a box that is no Jetson, None for each that cannot be read.

    packages: the installed Debian packages with their versions, None when unknown. programs: also run ``nvpmodel``.
    """
    compatible = box.text("/proc/device-tree/compatible") or ""
    release = box.text("/etc/nv_tegra_release")
    kernel = box.text("/proc/sys/kernel/osrelease") or ""  # a container hides the device tree, not the kernel's name
    if "nvidia,tegra" not in compatible and release is None and not kernel.endswith("-tegra"):
        return dict(NONE)
    parts = compatible.split()
    soc = next((part[len("nvidia,") :] for part in parts if re.fullmatch(r"nvidia,tegra\d+", part)), None)
    module = next((match[1] for part in parts if (match := re.search(r"[+,](p\d{4}-\d{4})(-super)?$", part))), None)
    l4t = l4t_release(release, packages)
    mode, modes = power(box, programs=programs)
    least, most = gpu_clocks(box)
    return {
        "jetson_model": box.text("/proc/device-tree/model"),
        "jetson_module": module,
        "soc": soc,
        "l4t": l4t,
        "jetpack": jetpack(l4t, packages),
        "power_mode": mode,
        "power_modes": modes,
        "gpu_clock_least_hz": least,
        "gpu_clock_most_hz": most,
    }


def l4t_release(text: str | None, packages: Mapping[str, str] | None) -> str | None:
    """ "36.4.3" from "# R36 (release), REVISION: 4.3, …", else from the version of nvidia-l4t-core."""
    if match := re.match(r"# R(\d+) \(release\), REVISION: ([\d.]+)", text or ""):
        return f"{match[1]}.{match[2]}"
    match = re.match(r"\d+\.\d+(\.\d+)?", (packages or {}).get("nvidia-l4t-core", ""))
    return match[0] if match else None


def jetpack(l4t: str | None, packages: Mapping[str, str] | None) -> str | None:
    """JetPack by its Jetson Linux; else by its package; else its generation alone, as "6"."""
    if l4t in JETPACKS:
        return JETPACKS[l4t]
    if match := re.match(r"\d+(\.\d+)+", (packages or {}).get("nvidia-jetpack", "")):
        return match[0]
    return GENERATIONS.get(l4t.split(".")[0]) if l4t else None


def power(box: Box, *, programs: bool) -> tuple[str | None, list[str] | None]:
    """The name of the power mode ("7W", "MAXN_SUPER"), and the names of all modes of this board."""
    text = box.text("/etc/nvpmodel.conf")
    named = {
        int(number): name
        for number, name in re.findall(r"<\s*POWER_MODEL\s+ID\s*=\s*(\d+)\s+NAME\s*=\s*([^\s>]+)", text or "")
    }
    modes = [named[number] for number in sorted(named)] or None
    if match := re.search(r"pmode:\s*(\d+)", box.text("/var/lib/nvpmodel/status") or ""):
        return named.get(int(match[1])), modes
    nvpmodel = box.output("nvpmodel|/usr/sbin/nvpmodel", "-q", seconds=5) if programs else None
    match = re.search(r"NV Power Mode:\s*(\S+)", nvpmodel.output) if nvpmodel and nvpmodel.status == 0 else None
    return (match[1] if match else None), modes


def gpu_clocks(box: Box) -> tuple[int | None, int | None]:
    """The lowest and the highest GPU clock now allowed, in Hz."""
    for name in box.names("/sys/class/devfreq"):
        if GPU_CLOCKS.search(name):
            folder = f"/sys/class/devfreq/{name}"
            return box.number(f"{folder}/min_freq"), box.number(f"{folder}/max_freq")
    return None, None
