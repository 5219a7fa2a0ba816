"""Compiles llama-cpp-python once per machine and stores the wheel outside the checkout. Standard library only.

The package index has its source only, and compiling takes minutes, so the wheel is kept under
``${XDG_CACHE_HOME:-~/.cache}/packager/wheels/KEY``. It is compiled for this processor (``-march=native``), so the key
covers the processor's features and the compiler as well as the locks. An incomplete wheel is never used: the folder is
published by one rename, with the wheel's digest beside it.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from steps import Step, Stopped, locked, run

ROOT = Path(__file__).resolve().parent.parent
LOCKS = [ROOT / "locks/llama-cpp-python.lock", ROOT / "locks/llama-cpp-python-build.lock"]
# LLAVA is the image side: not used, and a third of the compile time.
CMAKE_ARGS = "-DLLAVA_BUILD=OFF"
NINJA = re.compile(r"^\s*\[(\d+)/(\d+)\]")


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "packager" / "wheels"


def _first_line(argv: list[str]) -> str:
    try:
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.partition("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return ""


def compiler() -> str:
    """The C++ compiler's own name and version. Raises Stopped when there is none."""
    name = os.environ.get("CXX", "c++").split()[0]
    answer = _first_line([name, "--version"])
    if not answer:
        raise Stopped(
            f"no C++ compiler: `{name} --version` did not answer.",
            "the tests compile llama-cpp-python, which the package index has as source only.",
            "install one (Debian, Ubuntu: apt install g++; macOS: xcode-select --install) and run the same command "
            "again. `make demo` needs none.",
        )
    return answer


def processor() -> str:
    """What determines the compiler's instructions: the processor's features on Linux, its name elsewhere."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        facts: dict[str, str] = {}
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
        names = ("model name", "flags", "Features", "CPU implementer", "CPU part")
        return "|".join(" ".join(sorted(facts.get(name, "").split())) for name in names)
    return _first_line(["sysctl", "-n", "machdep.cpu.brand_string"]) or platform.processor()


def cache_key() -> str:
    """``0.3.36-cp311-x86_64-<12 hex digits>``: with an equal key the stored wheel runs on this machine."""
    locked = LOCKS[0].read_text(encoding="utf-8")
    version = re.search(r"^llama-cpp-python==([\w.]+)", locked, re.MULTILINE)
    assert version, "locks/llama-cpp-python.lock names no version"
    parts = [lock.read_text(encoding="utf-8") for lock in LOCKS]
    parts += [CMAKE_ARGS, *(os.environ.get(name, "") for name in ("CMAKE_ARGS", "CFLAGS", "CXXFLAGS"))]
    parts += [compiler(), processor(), platform.system(), " ".join(platform.libc_ver())]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return f"{version[1]}-{tag}-{platform.machine()}-{digest}"


def kept_wheel(folder: Path) -> Path | None:
    """The wheel in a cache folder; None when there is none or its digest does not match."""
    for wheel in sorted(folder.glob("*.whl")):
        noted = folder / (wheel.name + ".sha256")
        if noted.exists() and noted.read_text(encoding="ascii").strip() == _sha256(wheel):
            return wheel
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def wheel_for_this_machine(log: Path) -> Path:
    """The compiled wheel, from the cache or made now (about 5 minutes on two idle cores)."""
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / cache_key()
    with locked(cache / f"{folder.name}.lock"):  # a second checkout waits instead of compiling the same
        if wheel := kept_wheel(folder):
            return wheel
        shutil.rmtree(folder, ignore_errors=True)
        for left in cache.glob(f"{folder.name}.partial-*"):
            shutil.rmtree(left, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=cache))
        try:
            _compile(partial, log)
            partial.replace(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    wheel = kept_wheel(folder)
    assert wheel, "the wheel was published just now"
    return wheel


def _compile(out: Path, log: Path) -> None:
    step = Step("compiling llama-cpp-python (once per machine)")
    tools = out / "tools"
    pip: list[str | Path] = [tools / "bin/python", "-m", "pip"]
    commands: list[list[str | Path]] = [
        [sys.executable, "-m", "venv", tools],
        [*pip, "install", "--no-deps", "--only-binary", ":all:", "--require-hashes", "-r", LOCKS[1]],
    ]
    for argv in commands:
        code, tail = run(argv, log=log)
        if code:
            raise Stopped("the tools that compile llama-cpp-python could not be installed.", _last(tail), f"see {log}.")
    path = f"{tools / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
    cmake = f"{CMAKE_ARGS} {os.environ.get('CMAKE_ARGS', '')}".strip()
    env = {**os.environ, "PATH": path, "CMAKE_ARGS": cmake, "CMAKE_GENERATOR": "Ninja"}

    def show(line: str) -> None:
        if match := NINJA.match(line):
            step.news(f"{match[1]} of {match[2]} files")

    code, tail = run(
        [
            *pip,
            "wheel",
            "-v",
            "--no-deps",
            "--no-build-isolation",
            "--no-cache-dir",
            "--require-hashes",
            "-r",
            LOCKS[0],
            "-w",
            out,
        ],
        on_line=show,
        env=env,
        log=log,
    )
    wheels = list(out.glob("*.whl"))
    if code or len(wheels) != 1:
        raise Stopped("llama-cpp-python could not be compiled.", _last(tail), f"read the compiler's output in {log}.")
    shutil.rmtree(tools)
    (out / (wheels[0].name + ".sha256")).write_text(_sha256(wheels[0]) + "\n", encoding="ascii")
    (out / "made.txt").write_text(f"{time.strftime('%Y-%m-%d')} {compiler()}\n", encoding="utf-8")
    step.done("compiled and kept")


def _last(tail: str) -> str:
    lines = [line for line in tail.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it printed nothing."
