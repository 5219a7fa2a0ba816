"""What an install has of its own: bin/check and its like, systemd units, a Jetson's engine. Standard library only."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtimes.engines.registry import COMPILED

VERBS = ("check", "serve", "bench")

# -m looks into the working directory first, where a folder may be called runtimes too, and -P begins with Python 3.11.
START = (
    "import runpy, sys; sys.path[:] = [place for place in sys.path if place]; "
    "runpy.run_module('runtimes', run_name='__main__', alter_sys=True)"
)
# $0 may be a link; the folder is resolved at every call, so an install can be moved.
WRAPPER = """#!/bin/sh
set -eu
self=$0
while [ -h "$self" ]; do
    link=$(readlink "$self")
    case $link in /*) self=$link ;; *) self=$(dirname "$self")/$link ;; esac
done
home=$(CDPATH='' cd -- "$(dirname -- "$self")/.." && pwd -P)
unset PYTHONHOME PYTHONSTARTUP
PYTHONPATH=$home/runtime PYTHONNOUSERSITE=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUTF8=1 PYTHONSAFEPATH=1
export PYTHONPATH PYTHONNOUSERSITE PYTHONDONTWRITEBYTECODE PYTHONUTF8 PYTHONSAFEPATH
exec "$home/venv/bin/python" -c "@START@" @VERB@ --bundle "$home" "$@"
"""
WRAPPER_CMD = """@echo off\r
setlocal\r
set "PYTHONPATH=%~dp0..\\runtime"\r
set PYTHONNOUSERSITE=1\r
set PYTHONDONTWRITEBYTECODE=1\r
set PYTHONUTF8=1\r
set PYTHONSAFEPATH=1\r
"%~dp0..\\venv\\Scripts\\python.exe" -c "@START@" @VERB@ --bundle "%~dp0.." %*\r
"""


def write_wrappers(work: Path, names: tuple[str, ...]) -> None:
    """bin/check, bin/serve and so on."""
    folder = work / "bin"
    folder.mkdir()
    for verb in names:
        (folder / verb).write_text(WRAPPER.replace("@START@", START).replace("@VERB@", verb), "utf-8")
        (folder / verb).chmod(0o755)
        if os.name == "nt":
            (folder / f"{verb}.cmd").write_bytes(WRAPPER_CMD.replace("@START@", START).replace("@VERB@", verb).encode())


def write_units(bundle: Path, work: Path, prefix: Path) -> None:
    """The systemd units with the prefix put in, quoted as systemd reads it (systemd.syntax(7), "%" as "%%")."""
    quoted = str(prefix).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    for unit in sorted(bundle.glob("*.service")):
        (work / unit.name).write_text(unit.read_text("utf-8").replace("@PREFIX@", quoted), "utf-8")


def verbs(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """The programs in bin/ of a bundle."""
    return (*VERBS, "engine") if manifest["run"].get("engine") in COMPILED else VERBS


def make_engine(home: Path, old: Path | None = None) -> tuple[int, str]:
    """Have the box's engine there, where a bundle needs one; exit code and sentence of ``bin/engine build``, 0 and ""
    when it is. old: an earlier install, whose engine of the same key is taken over.
    """
    kept = old / "cache" / "engines" if old is not None else None
    if kept is not None and kept.is_dir():
        shutil.copytree(kept, home / "cache" / "engines", ignore=shutil.ignore_patterns(".*"), dirs_exist_ok=True)
    program = home / "bin" / ("engine.cmd" if os.name == "nt" else "engine")
    # standard error is not caught: its progress is to be seen
    done = subprocess.run([program, "build", "--json"], check=False, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    try:
        said = str(json.loads(done.stdout)["error"])
    except (ValueError, KeyError, TypeError):
        said = f"bin/engine build ended with status {done.returncode}."
    return done.returncode, "" if done.returncode == 0 else said
