"""plan.json: how a box builds an engine from the ONNX file, and where that engine may run. Written here, read by
runtimes/engines/tensorrt/plan.py.

The build machine compiles an engine when TensorRT-RTX supports the GPU. A Jetson builds its own with its own TensorRT,
because a default engine runs only with the version and architecture it was built with (TensorRT documentation, "Version
Compatibility"). The plan contains no time and no path: equal builds give equal plans.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packager.core.hashing import hash_file
from packager.formats.onnx.external_data import DATA, MODEL
from packager.formats.tensorrt.compiler import BUILD, CAPABILITIES, ENGINE, LIBRARY, VERSION

if TYPE_CHECKING:
    from packager.fidelity.encoders import Encoded
    from packager.target import Target

PLAN, REFERENCE = "plan.json", "reference.json"
SCHEMA_VERSION = 1
# Versions with strongly typed networks ("TensorRT 10.0 Release Notes"); before, the ONNX file's types are only hints.
# 11 is not known to read these plans.
LEAST, BELOW = (10, 0), "11"
# The oldest driver for CUDA 12, for which TensorRT-RTX is built ("CUDA Toolkit Release Notes", drivers for Linux).
DRIVER, CUDA = "525.60.13", "12.0"
MIB = 1 << 20
REFERENCES = 6  # texts in the bundle, with the source's outputs
SLACK = 0.005  # subtracted from the cosine, for another machine's order of sums
Profile = dict[str, dict[str, list[int]]]


def capability(target: Target) -> str | None:
    """The GPU's compute capability as "8.7"; None for a target without one."""
    match = re.fullmatch(r"sm_(\d+)(\d)", target.gpu.architecture) if target.gpu is not None else None
    return f"{match[1]}.{match[2]}" if match else None


def compiled_here(target: Target) -> bool:
    """Whether the bundle has an engine: TensorRT-RTX supports the GPU, and no system image has its own TensorRT."""
    return not target.software and capability(target) in CAPABILITIES


def numbers(version: str) -> tuple[int, ...]:
    """ "10.16.2" as (10, 16, 2)."""
    return tuple(int(part) for part in version.split("."))


def releases(target: Target) -> list[tuple[str, str]]:
    """(JetPack, TensorRT) of the target's system images whose TensorRT has strongly typed networks."""
    known = [(entry.jetpack, entry.tensorrt) for entry in target.software if entry.tensorrt is not None]
    return [(jetpack, version) for jetpack, version in known if LEAST <= numbers(version) < numbers(BELOW)]


def why_not(target: Target) -> str | None:
    """None, or why no engine can be made for this target, as one sentence."""
    version = capability(target)
    if target.gpu is None or version is None:
        return f"{target.title} has no NVIDIA GPU that the target names, and TensorRT runs on nothing else."
    if compiled_here(target):
        return None
    if not target.software:
        return (
            f"TensorRT-RTX {VERSION} compiles for compute capability {', '.join(CAPABILITIES)} and the "
            f"{target.gpu.name} has {version}; an engine of another one would not run there."
        )
    if releases(target):
        return None
    named = [entry for entry in target.software if entry.tensorrt is not None]
    if not named:
        listed = ", ".join(entry.jetpack for entry in target.software)
        return (
            f"which TensorRT JetPack {listed} brings is not confirmed, so no plan can name it; add tensorrt to "
            "[[software]] in a copy of the target file."
        )
    last = named[-1]
    return (
        f"JetPack {last.jetpack} brings TensorRT {last.tensorrt}, which has no strongly typed networks (10.0 and newer "
        "have): it would choose other precisions than those that were compared with the model."
    )


def profiles(inputs: Sequence[str], texts: int, length: int) -> list[Profile]:
    """The shapes of an engine, [texts, tokens] of every input: the first for ``texts`` at once, then half as many down
    to one, for a box that runs out of memory. The longest text is the same in all.
    """
    shrinking = []
    batch = texts
    while True:
        shape = {"min": [1, 1], "opt": [max(1, batch // 2), max(1, min(64, length // 2))], "max": [batch, length]}
        shrinking.append({name: {key: list(value) for key, value in shape.items()} for name in inputs})
        if batch == 1:
            return shrinking
        batch //= 2


def workspace(target: Target) -> int:
    """Bytes of the builder's workspace: a sixteenth of the machine's memory, at most 1 GiB."""
    return min(1024, target.memory_bytes // 16 // MIB) * MIB


def allowed(target: Target) -> dict[str, Any]:
    """The GPUs, TensorRT versions and JetPacks of the plan and its engine."""
    known = releases(target) if target.software else []
    return {
        "sm": [capability(target)],
        "tensorrt": {"min": min((version for _, version in known), key=numbers), "below": BELOW} if known else None,
        "jetpack": [jetpack for jetpack, _ in known] or None,
    }


def trtexec(profile: Profile, workspace_bytes: int) -> list[str]:
    """The arguments for the box's own trtexec; the box adds the engine's path."""

    def shapes(key: str) -> str:
        return ",".join(f"{name}:{'x'.join(map(str, shape[key]))}" for name, shape in profile.items())

    return [
        f"--onnx={MODEL}",
        "--stronglyTyped",
        f"--minShapes={shapes('min')}",
        f"--optShapes={shapes('opt')}",
        f"--maxShapes={shapes('max')}",
        f"--memPoolSize=workspace:{workspace_bytes // MIB}M",
        "--skipInference",
    ]


def make_plan(
    target: Target,
    folder: Path,
    *,
    precision: str,
    shapes: Sequence[Profile],
    outputs: Sequence[Mapping[str, str]],
    engine: Path | None,
    reference: Path | None,
    kinds: Mapping[str, str] = {},
) -> dict[str, Any]:
    """The plan. folder: with the ONNX file and its data. engine: compiled here, or None. reference: the file with the
    source's outputs for some texts, None when nothing was compared. kinds: types of inputs that are not int64.
    """
    room = workspace(target)
    own = None
    if engine is not None:
        own = {
            "file": ENGINE,
            "sha256": hash_file(engine),
            "bytes": engine.stat().st_size,
            "library": LIBRARY,
            "version": BUILD,
            "sm": [capability(target)],
        }
    return {
        "schema_version": SCHEMA_VERSION,
        "onnx": {
            "file": MODEL,
            "sha256": hash_file(folder / MODEL),
            "data": [{"file": DATA, "sha256": hash_file(folder / DATA)}],
        },
        "precision": precision,
        "strongly_typed": True,
        "inputs": [{"name": name, "dtype": kinds.get(name, "int64")} for name in shapes[0]],
        "outputs": [dict(output) for output in outputs],
        "profiles": list(shapes),
        "workspace_bytes": room,
        "allowed": allowed(target),
        "builder": {"trtexec": trtexec(shapes[0], room)},
        "engine": own,
        "reference": None if reference is None else {"file": REFERENCE, "sha256": hash_file(reference)},
    }


def references(places: Sequence[int], source: Encoded, artifact: Encoded) -> dict[str, Any]:
    """Some texts of different lengths as token ids, with the source's outputs, to check the engine on a box.

    places: indices of the texts. cosine_min: the least cosine of the shipped file (``artifact``), less SLACK.
    """
    import numpy as np

    order = sorted(places, key=lambda place: (len(source.ids[place]), place))
    chosen = [order[number * (len(order) - 1) // (REFERENCES - 1)] for number in range(REFERENCES)]
    cosines = []
    for place in chosen:
        one, other = (np.asarray(side.outputs[place], np.float64) for side in (source, artifact))
        size = float(np.linalg.norm(one)) * float(np.linalg.norm(other))
        cosines.append(float(one @ other) / max(size, 1e-12))
    return {
        "schema_version": 1,
        "cosine_min": round(min(cosines) - SLACK, 4),
        "ids": [source.ids[place] for place in chosen],
        "outputs": [source.outputs[place] for place in chosen],
    }


def gpu_needs(target: Target, size: int) -> dict[str, Any]:
    """The required GPU, for the manifest: exactly the plan's architecture, with ``size`` bytes of memory."""
    where = allowed(target)
    here = compiled_here(target)
    return {
        "capability": where["sm"][0],
        "exact": True,
        "count": 1,
        "bytes": size,
        "driver_min": DRIVER if here else None,  # JetPack has the driver of its TensorRT
        "cuda": {"min": CUDA} if here else None,
        "tensorrt": where["tensorrt"],
        "jetpack": where["jetpack"],
    }


def to_text(plan: Mapping[str, Any]) -> str:
    """The text of plan.json, with sorted keys."""
    return json.dumps(plan, indent=1, sort_keys=True) + "\n"
