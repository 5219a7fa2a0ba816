"""What a bundle for vLLM asks of a box beside this Python: NVIDIA's GPUs, and vLLM in an environment of its own.

Standard library only; a fact that cannot be read is None, and refuses nothing.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SETTING = "PACKAGER_VLLM"  # the path of another vllm than the one on PATH
DEVICES = ("/dev/nvidia0", "/dev/nvhost-gpu", "/dev/nvgpu", "/dev/dxg")
QUERY = ("--query-gpu=name,compute_cap,memory.total", "--format=csv,noheader,nounits")
MIB = 1 << 20


def read_facts() -> dict[str, Any]:
    """``gpus``: {"name", "capability", "bytes"} of each, [] without a driver; ``vllm``: its version, "" for none."""
    program = find_vllm()
    return {"gpus": read_gpus(), "vllm": "" if program is None else vllm_version(program)}


def read_gpus() -> list[dict[str, Any]] | None:
    """The GPUs as nvidia-smi lists them; a value that it does not tell is None."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None if any(Path(name).exists() for name in DEVICES) else []
    said = _said([program, *QUERY], 60)
    if said is None:
        return None
    rows = [[part.strip() for part in line.split(",")] for line in said.splitlines() if line.count(",") == 2]
    return [
        {
            "name": name,
            "capability": capability if re.fullmatch(r"\d+\.\d+", capability) else None,
            "bytes": int(memory) * MIB if memory.isdigit() else None,
        }
        for name, capability, memory in rows
    ]


def find_vllm() -> str | None:
    """The program ``vllm``: the one that PACKAGER_VLLM names, else the first on PATH; None when there is none."""
    named = os.environ.get(SETTING)
    return shutil.which(named) if named else shutil.which("vllm")


def vllm_version(program: str) -> str | None:
    """Its version, asked of the Python that the script starts (importing vLLM itself takes half a minute)."""
    python = _interpreter(Path(program))
    code = "import importlib.metadata as m; print(m.version('vllm'))"
    said = _said([*python, "-I", "-c", code], 60) if python else None
    if said is None:
        said = _said([program, "--version"], 300)
    found = re.findall(r"\d+\.\d+[\w.+]*", said or "")
    return found[-1] if found else None


def _interpreter(script: Path) -> list[str]:
    """The Python in a script's first lines: pip writes ``#!/bin/sh`` and an exec where its path is too long."""
    try:
        with script.open("rb") as file:
            lines = [file.readline(4096).decode("utf-8", "replace") for _ in range(2)]
    except OSError:
        return []
    if not lines[0].startswith("#!"):
        return []
    try:
        command = shlex.split(lines[0][2:])
        if command and Path(command[0]).name == "sh" and lines[1].startswith("'''exec'"):
            command = shlex.split(lines[1])[1:2]
    except ValueError:
        return []
    return command if any("python" in Path(word).name for word in command) else []


def _said(command: Sequence[str], seconds: float) -> str | None:
    """What a program wrote to standard output; None when it failed."""
    try:
        done = subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, timeout=seconds)  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", "replace")


def lacking(needs: Mapping[str, Any], facts: Mapping[str, Any]) -> list[tuple[str, bool | None, str, str, str]]:
    """(name, fine or not or unknown, expected, found, what to do) of GPUs and vLLM. needs: the manifest's
    ``needs.gpu``: capability ("7.5"), count, bytes on each, vllm (its least version).
    """
    count, least, size = int(needs["count"]), str(needs["capability"]), int(needs["bytes"])
    gpus, version = facts.get("gpus"), facts.get("vllm")
    number = "an NVIDIA GPU" if count == 1 else f"{count} NVIDIA GPUs"
    wanted = f"{number} of compute capability {least} or newer with {size / 1e9:.1f} GB of memory"
    rows: list[tuple[str, bool | None, str, str, str]] = []
    fix = "use a box with such a GPU and its driver, or a bundle for this box"
    if gpus is None:
        rows.append(("GPU", None, wanted, "unknown (it could not be read)", fix))
    else:
        fine = [gpu for gpu in gpus if _fits(gpu, least, size)]
        unknown = any(None in (gpu["capability"], gpu["bytes"]) for gpu in gpus)
        shown = ", ".join(f"{gpu['name']} ({gpu['capability'] or '?'}, {_gb(gpu['bytes'])})" for gpu in gpus)
        verdict = False if len(fine) < count else None if unknown else True
        rows.append(("GPU", verdict, wanted, shown or "none", fix))
    if "vllm" in needs:
        wanted = f"vLLM {needs['vllm']} or newer, as the program vllm on PATH or in {SETTING}"
        fix = "install it there in an environment of its own (it brings its own torch)"
        new = None if version is None else numbers(version) >= numbers(str(needs["vllm"])) if version else False
        shown = "unknown (it could not be read)" if version is None else f"vLLM {version}" if version else "none"
        rows.append(("vLLM", new, wanted, shown, fix))
    return rows


def _fits(gpu: Mapping[str, Any], capability: str, size: int) -> bool:
    """Whether nothing that is known of a GPU speaks against it."""
    known, memory = gpu["capability"], gpu["bytes"]
    return (known is None or numbers(known) >= numbers(capability)) and (memory is None or memory >= size)


def _gb(size: int | None) -> str:
    return "memory unknown" if size is None else f"{size / 1e9:.1f} GB"


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "0.33.1rc2" as (0, 33, 1)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()
