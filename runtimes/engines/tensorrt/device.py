"""The interface to a GPU: the session of an opened engine, the facts of the device, and the child that reads them.

A GPU library can crash the process that loads it (TensorRT's runtime does, without a driver). So a child with a time
limit reads the facts, and this process uses the device only when the child succeeded.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from runtimes.engine import EngineError
from runtimes.engines.tensorrt.plan import Plan
from runtimes.preflight.nvidia import installed
from runtimes.preflight.sources import Box

if TYPE_CHECKING:
    from numpy.typing import NDArray

SECONDS = 120  # the first use of a Jetson's GPU after boot is slow
TITLES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}


@dataclass(frozen=True)
class Device:
    """A GPU and its library. sm: compute capability, "8.7". bytes: its memory; on a Jetson, the box's. cuda: the
    driver's CUDA version, "12.6". version: the library's, with its build number where that can be read.
    """

    name: str
    sm: str
    bytes: int
    cuda: str
    library: str
    version: str


class Session(Protocol):
    """An opened engine. ``run`` may be called from one thread at a time, any thread."""

    version: str
    device: str

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The outputs of one batch, by name, in the engine's own types. Raises EngineError."""
        ...

    def memory(self) -> int:
        """Bytes of device memory that the engine holds; 0 where it has none of its own."""
        ...

    def save_kernels(self) -> None:
        """Save the kernels that were compiled at run time, for a faster start; on failure print a message, no error."""
        ...

    def close(self) -> None: ...


RUNTIME = Path(__file__).resolve().parents[3]  # the working directory of children: ``python -m`` searches it first


def environment() -> dict[str, str]:
    """Environment variables for children: the path of this runtime, and lazy loading of CUDA kernels, which takes a
    third of the memory.
    """
    paths = [str(RUNTIME), os.environ.get("PYTHONPATH", "")]
    return {"CUDA_MODULE_LOADING": "LAZY", **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def query_device(library: str) -> Device:
    """The first GPU with the library that a plan needs, read in a child. Raises EngineError with one sentence."""
    command = [sys.executable, "-m", "runtimes.engines.tensorrt.device_probe", library]
    title = TITLES[library]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SECONDS,
            check=False,
            env=environment(),
            cwd=RUNTIME,
        )
    except subprocess.TimeoutExpired:
        raise EngineError(
            f"GPU: expected one that {title} can use, found none that answers within {SECONDS} s; "
            "look at dmesg and restart the box."
        ) from None
    except OSError as error:
        raise EngineError(f"{sys.executable} cannot be started: {error}.") from None
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise EngineError(
            f"GPU: expected one that {title} can use, found that asking for it crashes ({name}); "
            "install this box's own driver and libraries again."
        )
    try:
        facts = json.loads(done.stdout.decode("utf-8").strip().splitlines()[-1])
        if "error" in facts:
            raise EngineError(facts["error"])
        return Device(**facts)
    except (ValueError, IndexError, TypeError, KeyError):
        words = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise EngineError(
            f"GPU: expected one that {title} can use, found that asking for it fails "
            f"({words[-1][:300] if words else 'no message'})."
        ) from None


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "10.3.0.30-1+cuda12.5" as (10, 3, 0, 30)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def unfit(plan: Plan, device: Device) -> str | None:
    """Why the plan's engine must not run on this device, in one sentence; None where it may.

    Compute capabilities are compared exactly: an engine for 8.6 does not run on an Orin, which has 8.7.
    """
    allowed = plan.compiled.sm if plan.compiled else plan.sm
    if device.sm not in allowed:
        return (
            f"GPU: expected compute capability {' or '.join(allowed)}, found {device.name} with {device.sm}; "
            "use a bundle that was built for this GPU."
        )
    title = TITLES[device.library]
    if plan.compiled:
        wanted = numbers(plan.compiled.version)
        if numbers(device.version)[: len(wanted)] != wanted:
            return (
                f"{title}: expected {plan.compiled.version}, which compiled the engine, found {device.version}; "
                "install the bundle again."
            )
        return None
    version = numbers(device.version)
    low, high = plan.tensorrt_min, plan.tensorrt_below
    if (low and version < numbers(low)) or (high and version >= numbers(high)):
        range_ = " and ".join([*([f"{low} or newer"] if low else []), *([f"older than {high}"] if high else [])])
        return (
            f"{title}: expected {range_}, found {device.version}; update JetPack, or use a bundle that was built "
            "for this one."
        )
    return None


def full_version(version: str, box: Box | None = None) -> str:
    """TensorRT's version with the build number, which its Python package leaves out, from Debian's package list: an
    engine of 10.3.0.26 does not load with 10.3.0.30. The given version where the list does not have it.
    """
    packages = installed(box or Box()) or {}
    full = [text.partition("-")[0] for name, text in packages.items() if re.fullmatch(r"libnvinfer\d+", name)]
    return next((text for text in full if text.startswith(f"{version}.")), version)
