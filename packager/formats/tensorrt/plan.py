"""plan.json: how a box makes an engine of the ONNX file, and where that engine may run. Written here, read by
runtimes/engines/tensorrt/plan.py.

An engine is compiled here where TensorRT-RTX knows the GPU; a Jetson builds its own with its own TensorRT, because a
default engine runs with the very version and architecture it was built with alone (TensorRT documentation, "Version
Compatibility"). The plan holds no time and no path: equal builds give equal plans.
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
# Strongly typed networks, without which the ONNX file's types would be hints: "TensorRT 10.0 Release Notes". 11 is not
# known to read these plans.
LEAST, BELOW = (10, 0), "11"
# TensorRT-RTX is built for CUDA 12, which runs from this driver on ("CUDA Toolkit Release Notes", drivers for Linux).
DRIVER, CUDA = "525.60.13", "12.0"
MIB = 1 << 20
REFERENCES = 6  # texts that travel with the bundle, with the source's answers
SLACK = 0.005  # of the cosine, for another machine's order of sums
Profile = dict[str, dict[str, list[int]]]


def capability(target: Target) -> str | None:
    """The GPU's compute capability as "8.7"; None for a target without one."""
    found = re.fullmatch(r"sm_(\d+)(\d)", target.gpu.architecture) if target.gpu is not None else None
    return f"{found[1]}.{found[2]}" if found else None


def compiled_here(target: Target) -> bool:
    """Whether the bundle carries an engine: TensorRT-RTX knows the GPU, and no system image brings its own TensorRT."""
    return not target.software and capability(target) in CAPABILITIES


def numbers(version: str) -> tuple[int, ...]:
    """ "10.16.2" as (10, 16, 2)."""
    return tuple(int(part) for part in version.split("."))


def releases(target: Target) -> list[tuple[str, str]]:
    """(JetPack, TensorRT) of the target's system images whose TensorRT has strongly typed networks."""
    known = [(entry.jetpack, entry.tensorrt) for entry in target.software if entry.tensorrt is not None]
    return [(jetpack, version) for jetpack, version in known if LEAST <= numbers(version) < numbers(BELOW)]


def why_not(target: Target) -> str | None:
    """None, or why no engine for this target can come about, as one sentence."""
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
    """The shapes an engine takes, [texts, tokens] of every input: the first for ``texts`` at once, then half as many
    and so on down to one, for a box that runs out of memory. The longest text is the same in all.
    """
    found = []
    batch = texts
    while True:
        shape = {"min": [1, 1], "opt": [max(1, batch // 2), max(1, min(64, length // 2))], "max": [batch, length]}
        found.append({name: {key: list(value) for key, value in shape.items()} for name in inputs})
        if batch == 1:
            return found
        batch //= 2


def workspace(target: Target) -> int:
    """Bytes that the builder may take for its trials: a sixteenth of the machine's memory, at most 1 GiB."""
    return min(1024, target.memory_bytes // 16 // MIB) * MIB


def allowed(target: Target) -> dict[str, Any]:
    """Where the plan, and an engine of it, may be used."""
    known = releases(target) if target.software else []
    return {
        "sm": [capability(target)],
        "tensorrt": {"min": min((version for _, version in known), key=numbers), "below": BELOW} if known else None,
        "jetpack": [jetpack for jetpack, _ in known] or None,
    }


def trtexec(profile: Profile, workspace_bytes: int) -> list[str]:
    """The arguments for the box's own trtexec; it adds the engine's place itself."""

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
    """The plan. folder: holds the ONNX file and its data. engine: compiled here, or None. reference: what the source
    answers to some texts, or None when nothing was compared. kinds: types of inputs that are not int64.
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


def references(places: Sequence[int], source: Encoded, found: Encoded) -> dict[str, Any]:
    """Some texts of different lengths as token ids, with the source's answers, for the engine that a box builds or
    loads. cosine_min: what the file that ships reaches on them here (``found``), less a little.
    """
    import numpy as np

    order = sorted(places, key=lambda place: (len(source.ids[place]), place))
    chosen = [order[number * (len(order) - 1) // (REFERENCES - 1)] for number in range(REFERENCES)]
    cosines = []
    for place in chosen:
        one, other = (np.asarray(side.outputs[place], np.float64) for side in (source, found))
        size = float(np.linalg.norm(one)) * float(np.linalg.norm(other))
        cosines.append(float(one @ other) / max(size, 1e-12))
    return {
        "schema_version": 1,
        "cosine_min": round(min(cosines) - SLACK, 4),
        "ids": [source.ids[place] for place in chosen],
        "outputs": [source.outputs[place] for place in chosen],
    }


def gpu_needs(target: Target, size: int) -> dict[str, Any]:
    """What the box's GPU has to be, for the manifest: exactly the plan's architecture, and ``size`` bytes of memory."""
    where = allowed(target)
    here = compiled_here(target)
    return {
        "capability": where["sm"][0],
        "exact": True,
        "count": 1,
        "bytes": size,
        "driver_min": DRIVER if here else None,  # JetPack's own TensorRT brings what it needs
        "cuda": {"min": CUDA} if here else None,
        "tensorrt": where["tensorrt"],
        "jetpack": where["jetpack"],
    }


def to_text(plan: Mapping[str, Any]) -> str:
    """As it stands in the file: sorted keys."""
    return json.dumps(plan, indent=1, sort_keys=True) + "\n"
