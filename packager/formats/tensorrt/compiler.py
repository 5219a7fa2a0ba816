"""Compiles engines with TensorRT-RTX, which is fetched once, pinned by hashes, and run in a child without a GPU. The
only owner of TensorRT-RTX.

TensorRT-RTX compiles ahead of time for the given compute capabilities (NVIDIA, "CPU-Only AOT and TensorRT-RTX
Engines"); the rest is compiled just in time on the GPU. Its package on the index has dependencies that a build machine
does not need, so only two of its wheels are fetched: the bindings and the libraries.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packager.core.errors import ToolError
from packager.core.folders import lock_file
from packager.core.pip import pip
from packager.core.processes import WORKERS, ChildFailed, follow, last_words
from packager.core.store import cache_root, fetched_once

if TYPE_CHECKING:
    from packager.core.progress import Progress
    from packager.core.store import Cost, Step
    from packager.recipe import Job

VERSION = "1.7.1"
BUILD = "1.7.1.116"  # the wheels' own number
LIBRARY = "tensorrt-rtx"
MODULE = "tensorrt_rtx_bindings"
DOWNLOAD_MB = 91
# Compute capabilities of 1.7.1 ("TensorRT-RTX Support Matrix"); no Jetson is among them.
CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0")
# "TensorRT-RTX 1.5 Support Matrix", GPU Architecture and Precision Support: FP32 and FP16 alone.
FLOAT_ONLY = ("7.5",)
ENGINE = "engine.rtx"
RESULT = "told.json"  # written by the child beside the engine
CHILD = WORKERS / "tensorrt_compile.py"
OURS = WORKERS.parent.parent  # the child imports this installation's modules
# glibc's settings for workers/fixed_addresses.py. The default limit of arenas depends on the number of processors. With
# tcache_count=65535 a thread keeps all small blocks that it frees of another thread's arena, so that their reuse does
# not depend on scheduling.
ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "128",
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=65535:glibc.malloc.mmap_threshold=131072",
}
SYSTEMS = ("Linux x86_64", "Windows AMD64")


def lock() -> Path:
    """The lock file of the two wheels."""
    return lock_file("tensorrt")


def folder() -> Path:
    """The cache folder of the unpacked wheels; its name contains the lock's digest and this Python's version."""
    pin = hashlib.sha256(lock().read_bytes()).hexdigest()[:12]
    return cache_root() / "tools" / f"tensorrt-rtx-{VERSION}-cp{sys.version_info.major}{sys.version_info.minor}-{pin}"


def why_not_here() -> str | None:
    """None, or why this machine cannot compile, as one sentence. Needs no network and imports nothing."""
    here = f"{platform.system()} {platform.machine()}"
    if here not in SYSTEMS:
        return (
            f"TensorRT-RTX compiles on {' and '.join(SYSTEMS)}, and this machine is {here}; build there (no GPU is "
            "needed)."
        )
    return None


def to_fetch() -> str | None:
    """One sentence on a build's download; None when it is in the cache."""
    if folder().is_dir():
        return None
    return (
        f"TensorRT-RTX {VERSION} ({DOWNLOAD_MB} MB, NVIDIA's compiler and libraries) is fetched from the package index "
        "once and kept in the cache."
    )


def unlisted(capability: str | None, precision: str) -> str | None:
    """A warning when NVIDIA lists no INT8 products for this GPU, although the compiler accepts the file; else None."""
    if precision == "fp16" or capability not in FLOAT_ONLY:
        return None
    return (
        f"NVIDIA's support matrix lists no INT8 products for compute capability {capability}: INT8 is smaller, and "
        "may be computed in fp16, no faster; precision=fp16 is what it lists."
    )


def compiler(progress: Progress) -> Path:
    """The folder with tensorrt_rtx_bindings and its libraries, fetched once into the cache.

    Raises NetworkError when the wheels cannot be fetched, ToolError when they are not the pinned ones.
    """
    title = f"fetching TensorRT-RTX {VERSION} ({DOWNLOAD_MB} MB, once)"
    return fetched_once(folder(), title, lambda work: _install(work / "tree"), progress)


def _install(goal: Path) -> None:
    pip(
        ["install", "--only-binary", ":all:", "--target", goal, "-r", lock()],
        what=f"TensorRT-RTX {VERSION}",
        wrong="the TensorRT-RTX wheels of the package index are not the pinned ones.",
        by_hand=f"the wheels that {lock().name} names",
    )


def compile_engine(
    job: Job, model: Path, model_key: str, profile: Mapping[str, Any], sm: Sequence[str], steps: list[Step]
) -> Step:
    """The step with ``engine.rtx`` and ``told.json``. model: the ONNX file; model_key: of the step that made it.
    profile: input name -> {"min", "opt", "max"}. sm: compute capabilities, as "7.5".

    Raises ToolError when TensorRT-RTX cannot be loaded or refuses the graph.
    """
    place = compiler(job.progress)

    def make(work: Path, cost: Cost) -> None:
        child_job = {
            "onnx": str(model.resolve()),
            "profile": dict(profile),
            "sm": list(sm),
            "output": str(work / ENGINE),
            "told": str(work / RESULT),
        }
        name = f"compiling for SM {', '.join(sm)} with TensorRT-RTX {VERSION}"
        try:
            follow(CHILD, child_job, name, job.progress, cost, work=work, path=(place, OURS), env=ENVIRONMENT)
        except ChildFailed as error:
            raise _explained(error, place) from error
        if not (work / ENGINE).is_file() or not (work / ENGINE).stat().st_size:
            raise ToolError("TensorRT-RTX wrote no engine and gave no reason.", fix=f"Remove {place} and build again.")

    inputs = {
        "model": model_key,
        "profile": dict(profile),
        "sm": list(sm),
        "version": BUILD,
        "lock": hashlib.sha256(lock().read_bytes()).hexdigest()[:16],
        "environment": dict(ENVIRONMENT),
    }
    step = job.store.step("tensorrt-engine", inputs, make, progress=job.progress)
    steps.append(step)
    return step


def same_bytes(engine: Step) -> bool:
    """Whether the engine was compiled with fixed addresses, so that the same ONNX gives the same engine again."""
    return bool(json.loads((engine.path / RESULT).read_text(encoding="utf-8"))["settled"])


def _explained(error: ChildFailed, place: Path) -> ToolError:
    """The error for the user from a failed child."""
    text = error.output
    if "ModuleNotFoundError" in text or "ImportError" in text or "OSError" in text or error.code in (-11, -6, -7):
        return ToolError(
            f"TensorRT-RTX {VERSION} cannot be loaded.",
            why=last_words(text),
            fix=f"Remove {place}: the next build fetches it again.",
        )
    refused = [line for line in text.splitlines() if "refuses node" in line or "[E]" in line or "Error" in line]
    return ToolError(
        "TensorRT-RTX does not compile this model.",
        why=(refused[0].strip()[:400] if refused else last_words(text)),
        fix="Use the recipe onnx_int8, or report the architecture with PACKAGER_DEBUG=1's output.",
    )
