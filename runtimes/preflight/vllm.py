"""Finds the box's own vLLM, which has a Python environment of its own, and its version. Standard library only."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from runtimes.preflight.sources import run

SETTING = "PACKAGER_VLLM"  # the path of another vllm than the one on PATH


def find_vllm() -> str | None:
    """The program ``vllm``: the one that PACKAGER_VLLM names, else the first on PATH; None when there is none."""
    named = os.environ.get(SETTING)
    return shutil.which(named) if named else shutil.which("vllm")


def vllm_version(program: str) -> str | None:
    """vLLM's version, read by the Python of its script (importing vLLM itself takes half a minute); None if unknown."""
    python = _interpreter(Path(program))
    code = "import importlib.metadata as m; print(m.version('vllm'))"
    output = _output([*python, "-I", "-c", code], 60) if python else ""
    if not output:
        output = _output([program, "--version"], 300)
    versions = re.findall(r"\d+\.\d+[\w.+]*", output)
    return versions[-1] if versions else None


def _interpreter(script: Path) -> list[str]:
    """The Python named in a script's first lines: pip writes ``#!/bin/sh`` and an exec when its path is too long."""
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


def _output(command: Sequence[str], seconds: float) -> str:
    """A program's standard output; "" when it failed or hung."""
    done = run(command, seconds)
    return done.output if done.status == 0 else ""
