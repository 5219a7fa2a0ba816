"""Writes an install's launchers (bin/check and so on) and systemd units; builds a Jetson's engine. Standard library
only.
"""

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

# -m searches the working directory first, which may have a folder runtimes too; -P needs Python 3.11.
START = (
    "import runpy, sys; sys.path[:] = [place for place in sys.path if place]; "
    "runpy.run_module('runtimes', run_name='__main__', alter_sys=True)"
)
# $0 may be a link. The folder is resolved at every call, so that an install can be moved.
LAUNCHER = """#!/bin/sh
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
LAUNCHER_CMD = """@echo off\r
setlocal\r
set "PYTHONPATH=%~dp0..\\runtime"\r
set PYTHONNOUSERSITE=1\r
set PYTHONDONTWRITEBYTECODE=1\r
set PYTHONUTF8=1\r
set PYTHONSAFEPATH=1\r
"%~dp0..\\venv\\Scripts\\python.exe" -c "@START@" @VERB@ --bundle "%~dp0.." %*\r
"""


def write_launchers(work: Path, names: tuple[str, ...]) -> None:
    """Write bin/check, bin/serve and so on."""
    folder = work / "bin"
    folder.mkdir()
    for verb in names:
        (folder / verb).write_text(LAUNCHER.replace("@START@", START).replace("@VERB@", verb), "utf-8")
        (folder / verb).chmod(0o755)
        if os.name == "nt":
            (folder / f"{verb}.cmd").write_bytes(
                LAUNCHER_CMD.replace("@START@", START).replace("@VERB@", verb).encode()
            )


def write_units(bundle: Path, work: Path, prefix: Path) -> None:
    """Write the systemd units with the prefix filled in, quoted for systemd (systemd.syntax(7), "%" as "%%")."""
    quoted = str(prefix).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    for unit in sorted(bundle.glob("*.service")):
        (work / unit.name).write_text(unit.read_text("utf-8").replace("@PREFIX@", quoted), "utf-8")


def verbs(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """The programs in bin/ of a bundle."""
    return (*VERBS, "engine") if manifest["run"].get("engine") in COMPILED else VERBS


def make_engine(home: Path, old: Path | None = None) -> tuple[int, str]:
    """Run ``bin/engine build``; its exit code and its error sentence, "" for code 0. old: an earlier install, whose
    cached engines are copied first.
    """
    kept = old / "cache" / "engines" if old is not None else None
    if kept is not None and kept.is_dir():
        shutil.copytree(kept, home / "cache" / "engines", ignore=shutil.ignore_patterns(".*"), dirs_exist_ok=True)
    program = home / "bin" / ("engine.cmd" if os.name == "nt" else "engine")
    # standard error is inherited, so that its progress is visible
    done = subprocess.run([program, "build", "--json"], check=False, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    try:
        error = str(json.loads(done.stdout)["error"])
    except (ValueError, KeyError, TypeError):
        error = f"bin/engine build ended with status {done.returncode}."
    return done.returncode, "" if done.returncode == 0 else error
