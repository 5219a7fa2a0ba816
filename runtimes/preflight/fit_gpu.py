"""Checks of ``needs.gpu`` (a manifest's needs of a GPU and its software), and of what slows down a box that fits.

Keys of needs.gpu: capability ("8.7": the lowest, or with ``exact`` the only one), count, bytes on each GPU, and where
the engine needs them: jetpack (releases), tensorrt and cuda ({"min", "below"}), driver_min, vllm (lowest version). A
row is (name, True, False or None for unknown, expected, found, what to do). Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from runtimes.preflight.vllm import SETTING

UNKNOWN = "unknown (it could not be read)"
OTHER_BUNDLE = "use a bundle that was built for this box"


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "0.33.1rc2" as (0, 33, 1)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def size(count: float) -> str:
    """A number of bytes for a message: "4.0 GB" (10^9 bytes)."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def requirements(needs: Mapping[str, Any], facts: Mapping[str, Any]) -> list[tuple[str, bool | None, str, str, str]]:
    """Rows for the GPU itself (which no update changes), then JetPack, TensorRT, driver and CUDA where needed."""
    rows = [_gpu(needs, facts)]
    if needs.get("jetpack"):
        rows.append(_jetpack(needs["jetpack"], facts))
    if needs.get("tensorrt"):
        rows.append(_tensorrt(needs["tensorrt"], facts))
    if needs.get("driver_min"):
        least = str(needs["driver_min"])
        rows.append(
            _version(
                "driver",
                facts.get("driver"),
                "NVIDIA driver",
                {"min": least},
                f"update NVIDIA's driver to {least} or newer and start the box again",
            )
        )
    if needs.get("cuda"):
        rows.append(
            _version(
                "CUDA",
                facts.get("cuda_driver"),
                "a driver for CUDA",
                needs["cuda"],
                "update NVIDIA's driver: it brings the CUDA that it can run",
            )
        )
    return rows


def _jetpack(wanted: list[str], facts: Mapping[str, Any]) -> tuple[str, bool | None, str, str, str]:
    """A listed release includes its patch releases: "6.2" includes 6.2.1. A box of which only the generation is known
    ("6") can be refused, not accepted.
    """
    name, expected = "JetPack", "JetPack " + " or ".join(wanted)
    release, l4t = facts.get("jetpack"), facts.get("l4t")
    fix = f"install one of them (within a generation by apt, else by flashing), or {OTHER_BUNDLE}"
    if release is None:
        return name, None, expected, f"Jetson Linux {l4t}, of no JetPack that is known" if l4t else UNKNOWN, fix
    if not release:
        return name, False, expected, "none (this is no Jetson)", OTHER_BUNDLE
    shown = f"JetPack {release} (Jetson Linux {l4t or 'unknown'})"
    installed = numbers(release)
    verdicts = [_includes(installed, numbers(listed)) for listed in wanted]
    if True not in verdicts and None in verdicts:
        return name, None, expected, f"a release of JetPack {release} that is not known (Jetson Linux {l4t})", fix
    return name, True in verdicts, expected, shown, fix


def _includes(box: tuple[int, ...], listed: tuple[int, ...]) -> bool | None:
    shorter = min(len(box), len(listed))
    if box[:shorter] != listed[:shorter]:
        return False
    return True if len(box) >= len(listed) else None


def _gpu(needs: Mapping[str, Any], facts: Mapping[str, Any]) -> tuple[str, bool | None, str, str, str]:
    count, capability, least = int(needs["count"]), str(needs["capability"]), int(needs["bytes"])
    exact = bool(needs.get("exact"))
    number = "an NVIDIA GPU" if count == 1 else f"{count} NVIDIA GPUs"
    wanted = f"{number} of compute capability {capability}{'' if exact else ' or newer'} with {size(least)} of memory"
    fix = "use a box with such a GPU and its driver, or a bundle for this box"
    gpus = facts.get("gpus")
    if gpus is None:
        why = facts.get("gpus_unknown_because")
        return "GPU", None, wanted, f"unknown ({why})" if why else UNKNOWN, fix
    if not gpus and facts.get("card_without_driver"):
        fix = "install NVIDIA's driver and start the box again"
        return "GPU", False, wanted, "an NVIDIA card without its driver", fix
    fine = [gpu for gpu in gpus if _fits(gpu, capability, exact, least)]
    unknown = any(gpu.get("capability") is None or gpu.get("bytes") is None for gpu in fine)
    shown = ", ".join(f"{gpu['name']} ({gpu.get('capability') or '?'}, {_gb(gpu.get('bytes'))})" for gpu in gpus)
    if exact and gpus and not any(_capable(gpu, capability, exact) for gpu in gpus):
        fix = f"an engine for {capability} does not load on another architecture, so {OTHER_BUNDLE}"
    verdict = False if len(fine) < count else None if unknown else True
    return "GPU", verdict, wanted, shown or "none", fix


def _fits(gpu: Mapping[str, Any], capability: str, exact: bool, least: int) -> bool:
    """Whether no known fact of a GPU excludes it."""
    memory = gpu.get("bytes")
    return _capable(gpu, capability, exact) and (memory is None or memory >= least)


def _capable(gpu: Mapping[str, Any], capability: str, exact: bool) -> bool:
    known = gpu.get("capability")
    if known is None:
        return True
    return numbers(known) == numbers(capability) if exact else numbers(known) >= numbers(capability)


def _gb(count: int | None) -> str:
    return "memory unknown" if count is None else size(count)


def _tensorrt(wanted: Mapping[str, str], facts: Mapping[str, Any]) -> tuple[str, bool | None, str, str, str]:
    fix = f"update the box's JetPack, which brings it, or {OTHER_BUNDLE}"
    if facts.get("tensorrt") == "":
        fix = "install it with the rest of JetPack (the package nvidia-jetpack, from a copy of NVIDIA's repository)"
    return _version("TensorRT", facts.get("tensorrt"), "TensorRT", wanted, fix)


def _version(
    name: str,
    version: str | None,
    what: str,
    wanted: Mapping[str, str],
    fix: str,
) -> tuple[str, bool | None, str, str, str]:
    """A row for a version range [min, below); either end may be left out."""
    low, high = wanted.get("min"), wanted.get("below")
    expected = what + (f" {low} or newer" if low else "") + (" and" if low and high else "")
    expected += f" older than {high}" if high else ""
    if version is None:
        return name, None, expected, UNKNOWN, fix
    if not version:
        return name, False, expected, "none", fix
    parts = numbers(version)
    fine = (not low or parts >= numbers(low)) and (not high or parts < numbers(high))
    return name, fine, expected, f"{what.rsplit(' ', 1)[-1]} {version}", fix


def vllm(least: str, facts: Mapping[str, Any]) -> tuple[str, bool | None, str, str, str]:
    """The row for the box's own vLLM."""
    version = facts.get("vllm")
    wanted = f"vLLM {least} or newer, as the program vllm on PATH or in {SETTING}"
    new = None if version is None else numbers(version) >= numbers(least) if version else False
    shown = UNKNOWN if version is None else f"vLLM {version}" if version else "none"
    return "vLLM", new, wanted, shown, "install it there in an environment of its own (it brings its own torch)"


def cautions(needs: Mapping[str, Any], facts: Mapping[str, Any]) -> list[tuple[str, bool | None, str, str, str]]:
    """Rows for what makes a box slow or short of memory: known facts only, and a driver of unknown version."""
    gpu = needs.get("gpu") or {}
    rows: list[tuple[str, bool | None, str, str, str]] = []
    available = facts.get("ram_available_bytes")
    if available is not None and needs["ram_bytes"]:
        rows.append(
            (
                "free memory",
                available >= needs["ram_bytes"],
                f"{size(needs['ram_bytes'])} available now",
                size(available),
                "end other programs before you start the server",
            )
        )
    gpus = facts.get("gpus") or []
    if gpu:
        rows += _free_memory(gpu, gpus)
    if gpu and gpus and facts.get("driver") is None and not gpu.get("driver_min"):
        rows.append(
            (
                "driver",
                None,
                "an NVIDIA driver whose version is known",
                UNKNOWN,
                "look at it with nvidia-smi if the server does not start",
            )
        )
    if any(one.get("mig") for one in gpus) and gpu:
        rows.append(
            (
                "MIG",
                False,
                "a whole GPU",
                "one that is cut into slices (MIG), of which a server gets one",
                "choose the slice with CUDA_VISIBLE_DEVICES, or switch MIG off",
            )
        )
    return rows + _jetson(facts)


def _free_memory(
    needs: Mapping[str, Any], gpus: list[Mapping[str, Any]]
) -> list[tuple[str, bool | None, str, str, str]]:
    """A row for GPU memory that other programs hold. A GPU with unified memory is covered by "free memory"."""
    least, count = int(needs["bytes"]), int(needs["count"])
    known = [one["free_bytes"] for one in gpus if one.get("free_bytes") is not None and not one.get("unified")]
    if len(known) < count:
        return []
    roomy = sum(free >= least for free in known) >= count
    return [
        (
            "free GPU memory",
            roomy,
            f"{size(least)} free now",
            ", ".join(map(size, known)),
            "end the programs that nvidia-smi lists before you start the server",
        )
    ]


def _jetson(facts: Mapping[str, Any]) -> list[tuple[str, bool | None, str, str, str]]:
    rows: list[tuple[str, bool | None, str, str, str]] = []
    mode, modes = facts.get("power_mode"), facts.get("power_modes") or []
    if mode and modes:
        best = max(modes, key=_watts)
        number = f"the number of {best} in /etc/nvpmodel.conf"
        rows.append(
            (
                "power mode",
                _watts(mode) >= _watts(best),
                f"{best}, the fastest of this board",
                mode,
                f"where its cooling and power supply allow it, set it with sudo nvpmodel -m and {number}",
            )
        )
    least, most = facts.get("gpu_clock_least_hz"), facts.get("gpu_clock_most_hz")
    if least is not None and most is not None:
        shown = f"{least / 1e6:.0f} to {most / 1e6:.0f} MHz" if least != most else f"locked at {most / 1e6:.0f} MHz"
        rows.append(
            (
                "clocks",
                least == most,
                "GPU clocks that are locked, for figures that can be compared",
                shown,
                "run sudo jetson_clocks before you measure",
            )
        )
    return rows


def _watts(mode: str) -> float:
    """The rank of a power mode: its watts ("MODE_15W_6CORE"); the unlimited MAXN modes rank highest."""
    if "MAXN" in mode.upper():
        return 1e6 + ("SUPER" in mode.upper())
    match = re.search(r"(\d+)W", mode.upper())
    return float(match[1]) if match else 0.0
