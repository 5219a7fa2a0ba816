"""Installs into .venv from the locks: with uv where it can be had, which is several times faster, else with pip.

pip's own configuration says where packages come from, for both. Standard library only.
"""

from __future__ import annotations

import ast
import functools
import os
import platform
import re
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from steps import Step, Stopped, run

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin/python"
UV = VENV / "bin/uv"
LOG = VENV / "prepare.log"
# The pip beside this Python works on .venv too: to put a pip into .venv first takes longer than all that uv does.
HAS_PIP = find_spec("pip") is not None
PIP: list[str | Path] = [sys.executable, "-m", "pip", "--python", PYTHON] if HAS_PIP else [PYTHON, "-m", "pip"]
PIP += ["--disable-pip-version-check", "--no-input"]
# --no-deps: the lock is complete, and so no package can bring a CUDA build of torch along. --no-compile: Python
# compiles what is imported, which is a tenth of what is installed.
LOCKED: list[str | Path] = ["install", "--no-deps", "--no-compile", "--only-binary", ":all:", "--require-hashes"]
WORKS_ON = re.compile(r"^\s*(?:Collecting|Downloading|Using cached|Installing|Building) (?:collected )?([\w.+-]+)")
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"

# What pip calls it, and uv's variables for the same. Several values stand in one line in pip's.
SAME = {
    "index-url": ("UV_DEFAULT_INDEX",),
    "extra-index-url": ("UV_INDEX",),
    "find-links": ("UV_FIND_LINKS",),
    "trusted-host": ("UV_INSECURE_HOST",),
    "constraint": ("UV_CONSTRAINT",),
    "cert": ("SSL_CERT_FILE",),
    "client-cert": ("SSL_CLIENT_CERT",),
    "proxy": ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"),
    "timeout": ("UV_HTTP_TIMEOUT",),
    "default-timeout": ("UV_HTTP_TIMEOUT",),
    "retries": ("UV_HTTP_RETRIES",),
    "no-cache-dir": ("UV_NO_CACHE",),
    "no-index": ("UV_NO_INDEX",),  # ours: uv has the flag only
}
# They say how pip behaves, or what our own flags say anyway; not where a package comes from.
OF_NO_MATTER = re.compile(
    "break-system-packages|cache-dir|compile|config-file|disable-pip-version-check|log|no-color|no-compile|no-deps|"
    "no-input|no-python-version-warning|no-warn-conflicts|no-warn-script-location|only-binary|prefer-binary|"
    "progress-bar|quiet|require-hashes|require-virtualenv|root-user-action|upgrade|upgrade-strategy|user|verbose"
)
ON = ("1", "true", "yes", "on", "t", "y")


@functools.cache
def settings() -> dict[str, str]:
    """pip's configuration as `pip install` sees it: PIP_* variables over the section [install] over [global]."""
    found: list[tuple[int, str, str]] = []

    def read(line: str) -> None:
        if match := re.fullmatch(r"(global|install|:env:)\.([\w-]+)=('.*'|\".*\")", line):
            rank = ("global", "install", ":env:").index(match[1])
            found.append((rank, match[2], str(ast.literal_eval(match[3]))))

    run([*PIP, "config", "list"], on_line=read, log=LOG)
    return {name: value for _, name, value in sorted(found) if value}


def for_uv(configured: dict[str, str]) -> dict[str, str] | str:
    """uv's variables that say what pip's configuration says, or the name of the first setting that uv has not."""
    said = {"UV_INDEX_STRATEGY": "unsafe-best-match"}  # as pip: any index may have it, and the hashes say what it is
    if bundle := os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE"):
        said["SSL_CERT_FILE"] = bundle
    for name, value in configured.items():
        if OF_NO_MATTER.fullmatch(name):
            continue
        if name not in SAME:
            return name
        if name == "find-links":
            value = re.sub(r"(^|,)~(?=/)", rf"\g<1>{Path.home()}", ",".join(value.split()))
        elif name in ("no-cache-dir", "no-index"):
            if value.lower() not in ON:
                continue
            value = "1"
        elif name != "cert":
            value = " ".join(value.split())
        said |= dict.fromkeys(SAME[name], value)
    return said


@functools.cache
def uv_environment() -> dict[str, str] | None:
    """Install uv, once; what it is run with, or None where pip has to do its work."""
    step = Step("uv, which installs the rest")
    said = for_uv(settings())
    if isinstance(said, str):
        step.done(f"not used, it has nothing like pip's setting {said}; pip takes longer")
        return None
    code, tail = run([*PIP, *LOCKED, "-r", ROOT / "locks/uv.lock"], log=LOG)
    if code:
        step.done(f"not to be had, pip takes longer: {reason(tail)}")
        return None
    step.done()
    # UV_SYSTEM_CERTS: a new pip trusts the system's certificates too, and a company's own stands there.
    return {"UV_SYSTEM_CERTS": "1", **os.environ, **said}


def uv(arguments: list[str | Path], index: str, show: Callable[[str], None]) -> tuple[int, str]:
    """Run `uv pip`; its exit status and last words."""
    env = uv_environment() or {}
    more: list[str | Path] = ["--no-index"] if "UV_NO_INDEX" in env else []
    if index:
        env = {**env, "UV_DEFAULT_INDEX": index}
    if "UV_CONSTRAINT" in env:
        # uv refuses a range beside --require-hashes. Every line of a lock has hashes (a test looks), and they are
        # checked without the flag too.
        arguments = [part for part in arguments if part != "--require-hashes"]
    return run([UV, "pip", *arguments, "--no-config", "--python", PYTHON, *more], on_line=show, env=env, log=LOG)


def pip(arguments: list[str | Path], index: str, show: Callable[[str], None]) -> tuple[int, str]:
    """Run pip; its exit status and last words."""
    more: list[str | Path] = ["--index-url", index] if index else []
    if UV.exists():
        more.append("--force-reinstall")  # uv may have left half a package, which pip takes for a whole one
    return run([*PIP, *arguments, *more], on_line=show, log=LOG)


def reason(tail: str) -> str:
    """What pip or uv gave as its error, on one line."""
    said = re.split(r"╰─▶|^error:", tail, flags=re.IGNORECASE | re.MULTILINE)[-1]
    return " ".join(said.split())[:300] or "it gave no reason"


def attempt(name: str, arguments: list[str | Path], indexes: tuple[str, ...] = ("",)) -> list[str]:
    """Install with uv, else with pip, from each index in turn ("": where pip is told to look) until one has done it.
    Returns why it failed, index by index; nothing when it is installed.
    """
    failed: list[str] = []
    for tool in (uv, pip) if uv_environment() is not None else (pip,):
        failed = []
        for index in indexes:
            step = Step(f"{name} from {index}" if index else name)
            count = 0

            def show(line: str, step: Step = step) -> None:
                nonlocal count
                if match := WORKS_ON.match(line):
                    count += 1
                    step.news(f"{count} packages, {match[1]}")

            code, tail = tool(arguments, index, show)
            if code == 0:
                step.done()
                return []
            failed.append(reason(tail))
            step.done(f"{tool.__name__} failed: {failed[-1]}")
    return failed


def install(name: str, arguments: list[str | Path]) -> None:
    """Install, or raise Stopped with pip's reason."""
    if failed := attempt(name, arguments):
        raise Stopped(
            f"{name} could not be installed.",
            failed[-1],
            f"if this is the network or the disk, mend it and run the same command again: it goes on here. Log: {LOG}.",
        )


def install_torch() -> None:
    """PyTorch's CPU build: from where pip is told to look, else from PyTorch's own index. The hashes are pinned, so
    either will do.
    """
    lock = ROOT / "locks/torch-cpu.lock"
    own = "" if settings().get("no-index", "").lower() in ON else os.environ.get("PACKAGER_TORCH_INDEX", TORCH_INDEX)
    failed = attempt("PyTorch (CPU)", [*LOCKED, "-r", lock], ("", own) if own else ("",))
    if not failed:
        return
    places = ["where pip is told to look", f"PyTorch's own index, {own}"]
    python = f"Python {sys.version_info.major}.{sys.version_info.minor} on {platform.system()} {platform.machine()}"
    raise Stopped(
        f"the CPU build of PyTorch could not be installed for {python}.",
        "; ".join(f"{place}: {why}" for place, why in zip(places, failed, strict=False)),
        "mend the network and run the same command again: it goes on here. Behind a mirror: export "
        "PACKAGER_TORCH_INDEX=<its copy of PyTorch's CPU index>, or put the wheel into a folder and export "
        "PIP_FIND_LINKS=<that folder>. If they have it for another Python, name that one: make PYTHON=python3.11 … "
        f"Log: {LOG}.",
    )
