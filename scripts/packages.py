"""Installs into .venv from the locks: with uv if it can be installed, which is several times faster, else with pip.

Both use pip's configuration of indexes. Standard library only.
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
# This Python's own pip installs into .venv: installing pip there first would take longer than all of uv's work.
HAS_PIP = find_spec("pip") is not None
PIP: list[str | Path] = [sys.executable, "-m", "pip", "--python", PYTHON] if HAS_PIP else [PYTHON, "-m", "pip"]
PIP += ["--disable-pip-version-check", "--no-input"]
# --no-deps: the lock is complete, so no package can install a CUDA build of torch. --no-compile: Python compiles the
# imported modules, a tenth of the installed ones.
LOCKED: list[str | Path] = ["install", "--no-deps", "--no-compile", "--only-binary", ":all:", "--require-hashes"]
WORKS_ON = re.compile(r"^\s*(?:Collecting|Downloading|Using cached|Installing|Building) (?:collected )?([\w.+-]+)")
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"

# pip's setting -> uv's variables for it. pip's has several values in one line.
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
# Settings of pip's behaviour, or that our own flags set anyway; none is a source of packages.
OF_NO_MATTER = re.compile(
    "break-system-packages|cache-dir|compile|config-file|disable-pip-version-check|log|no-color|no-compile|no-deps|"
    "no-input|no-python-version-warning|no-warn-conflicts|no-warn-script-location|only-binary|prefer-binary|"
    "progress-bar|quiet|require-hashes|require-virtualenv|root-user-action|upgrade|upgrade-strategy|user|verbose"
)
ON = ("1", "true", "yes", "on", "t", "y")


@functools.cache
def settings() -> dict[str, str]:
    """pip's configuration as `pip install` sees it: PIP_* variables over the section [install] over [global]."""
    options: list[tuple[int, str, str]] = []

    def read(line: str) -> None:
        if match := re.fullmatch(r"(global|install|:env:)\.([\w-]+)=('.*'|\".*\")", line):
            rank = ("global", "install", ":env:").index(match[1])
            options.append((rank, match[2], str(ast.literal_eval(match[3]))))

    run([*PIP, "config", "list"], on_line=read, log=LOG)
    return {name: value for _, name, value in sorted(options) if value}


def for_uv(configured: dict[str, str]) -> dict[str, str] | str:
    """uv's variables for pip's configuration, or the name of the first setting that uv does not have."""
    # as pip: any index may have a package, because the hashes are pinned
    variables = {"UV_INDEX_STRATEGY": "unsafe-best-match"}
    if bundle := os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE"):
        variables["SSL_CERT_FILE"] = bundle
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
        variables |= dict.fromkeys(SAME[name], value)
    return variables


@functools.cache
def uv_environment() -> dict[str, str] | None:
    """Install uv, once; returns its environment, or None when pip has to be used."""
    step = Step("uv, which installs the rest")
    variables = for_uv(settings())
    if isinstance(variables, str):
        step.done(f"not used, it has nothing like pip's setting {variables}; pip takes longer")
        return None
    code, tail = run([*PIP, *LOCKED, "-r", ROOT / "locks/uv.lock"], log=LOG)
    if code:
        step.done(f"not available, pip takes longer: {reason(tail)}")
        return None
    step.done()
    # UV_SYSTEM_CERTS: as a new pip, which trusts the system's certificates, a company's own included.
    return {"UV_SYSTEM_CERTS": "1", **os.environ, **variables}


def uv(arguments: list[str | Path], index: str, show: Callable[[str], None]) -> tuple[int, str]:
    """Run `uv pip`; returns its exit status and last lines."""
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
    """Run pip; returns its exit status and last lines."""
    more: list[str | Path] = ["--index-url", index] if index else []
    if UV.exists():
        more.append("--force-reinstall")  # uv may have left half a package, which pip treats as installed
    return run([*PIP, *arguments, *more], on_line=show, log=LOG)


def reason(tail: str) -> str:
    """The error of pip or uv, on one line; of uv's chain of reasons the first."""
    sentence = re.split(r"╰─▶|^\W*(?:error|cause):", tail, flags=re.IGNORECASE | re.MULTILINE)[-1]
    sentence = re.sub(r"\{[^}]*\}|^Because | and you require .*", "", " ".join(sentence.split()))
    return sentence[:300] or "it gave no reason"


def attempt(name: str, arguments: list[str | Path], indexes: tuple[str, ...] = ("",)) -> list[str]:
    """Install with uv, else with pip, from each index in turn ("": pip's configured ones) until one succeeds. Returns
    the reasons, index by index; [] when it is installed.
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
            f"if the network or disk failed, repair it and run the same command again: it resumes here. Log: {LOG}.",
        )


def install_torch() -> None:
    """Install PyTorch's CPU build from pip's configured indexes, else from PyTorch's own. The hashes are pinned, so
    both are equally safe.
    """
    lock = ROOT / "locks/torch-cpu.lock"
    own = "" if settings().get("no-index", "").lower() in ON else os.environ.get("PACKAGER_TORCH_INDEX", TORCH_INDEX)
    failed = attempt("PyTorch (CPU)", [*LOCKED, "-r", lock], ("", own) if own else ("",))
    if not failed:
        return
    places = ["pip's configured indexes", f"PyTorch's own index, {own}"]
    python = f"Python {sys.version_info.major}.{sys.version_info.minor} on {platform.system()} {platform.machine()}"
    raise Stopped(
        f"the CPU build of PyTorch could not be installed for {python}.",
        "; ".join(f"{place}: {why}" for place, why in zip(places, failed, strict=False)),
        "repair the network and run the same command again: it resumes here. Behind a mirror: export "
        "PACKAGER_TORCH_INDEX=<its copy of PyTorch's CPU index>, or put the wheel into a folder and export "
        "PIP_FIND_LINKS=<that folder>. If they have it for another Python, name that one: make PYTHON=python3.11 … "
        f"Log: {LOG}.",
    )
