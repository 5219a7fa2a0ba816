"""Reads plan.json of a TensorRT bundle: how to build an engine from the ONNX beside it, and where the engine may run.

Read strictly, with the standard library only: an unknown key is of another version, and a partly read plan could build
a wrong engine. packager/formats/tensorrt/plan.py writes it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtimes.manifest import ManifestError, inside

VERSION = 1
DTYPES = ("int32", "int64", "float16", "float32")
PRECISIONS = ("fp16", "int8")
LIBRARIES = ("tensorrt", "tensorrt-rtx")
SHAPES = ("min", "opt", "max")
# The arguments of trtexec that a plan may have; the box sets the engine's file and the ONNX file.
FLAGS = {
    "--onnx": r"[A-Za-z0-9][A-Za-z0-9._-]*",
    "--stronglyTyped": None,
    "--minShapes": r"[A-Za-z0-9_.:,x]+",
    "--optShapes": r"[A-Za-z0-9_.:,x]+",
    "--maxShapes": r"[A-Za-z0-9_.:,x]+",
    "--memPoolSize": r"workspace:[0-9.]+[KMG]?(iB|B)?",
    "--builderOptimizationLevel": r"[0-5]",
    "--skipInference": None,
    "--noTF32": None,
}


@dataclass(frozen=True)
class Tensor:
    """An input or output tensor. dtype: numpy's name."""

    name: str
    dtype: str


@dataclass(frozen=True)
class Shapes:
    """The smallest, the most frequent and the largest shape of one input in a profile."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


Profile = Mapping[str, Shapes]


@dataclass(frozen=True)
class Compiled:
    """An engine in the bundle. library: the one that compiled it; only this version of it loads the engine."""

    file: Path
    sha256: str
    bytes: int
    library: str
    version: str
    sm: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """A checked plan. path: plan.json itself. onnx: the model. data: its weights' files with their digests. profiles:
    the first that can be built is used. workspace: the builder's scratch memory in bytes. sm, tensorrt_min,
    tensorrt_below: where the engine may run. builder: arguments of trtexec for the first profile. reference: texts with
    the source's answers. digest: sha256 of plan.json, which holds the digests of everything else.
    """

    path: Path
    onnx: Path
    onnx_sha256: str
    data: tuple[tuple[Path, str], ...]
    precision: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    profiles: tuple[Profile, ...]
    workspace: int
    sm: tuple[str, ...]
    tensorrt_min: str | None
    tensorrt_below: str | None
    builder: tuple[str, ...]
    compiled: Compiled | None
    reference: tuple[Path, str] | None
    digest: str

    @property
    def library(self) -> str:
        """The library that runs the engine: the one that compiled it, else the box's own TensorRT."""
        return self.compiled.library if self.compiled else "tensorrt"


class _Bad(Exception):
    """The plan is invalid; the text is the end of a sentence."""


def read_plan(path: Path) -> Plan:
    """The plan of an unpacked bundle; its files are in the same folder. Raises ManifestError with one sentence."""
    try:
        text = path.read_bytes()
        plain = json.loads(text)
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path} cannot be read ({error}); copy the bundle again.") from None
    try:
        return _plan(plain, path.resolve(), hashlib.sha256(text).hexdigest())
    except _Bad as error:
        raise ManifestError(f"{path.name} cannot be used: {error}; copy the bundle again or build it anew.") from None


def _plan(plain: object, path: Path, digest: str) -> Plan:
    folder = path.parent
    keys = (
        "schema_version",
        "onnx",
        "precision",
        "strongly_typed",
        "inputs",
        "outputs",
        "profiles",
        "workspace_bytes",
        "allowed",
        "builder",
        "engine",
    )
    if isinstance(plain, dict) and plain.get("schema_version") != VERSION:
        raise _Bad(f"its schema_version is {plain.get('schema_version')!r} where this runtime reads {VERSION}")
    given = _object(plain, "the plan", keys, optional=("reference",))
    if given["strongly_typed"] is not True:
        raise _Bad("strongly_typed is not true, and an engine of untyped layers would choose its own precision")
    if given["precision"] not in PRECISIONS:
        raise _Bad(f"its precision is {given['precision']!r} where {' or '.join(PRECISIONS)} is known")
    onnx = _object(given["onnx"], "onnx", ("file", "sha256"), optional=("data",))
    data = [_object(entry, "onnx.data", ("file", "sha256")) for entry in _list(onnx.get("data", []), "onnx.data")]
    inputs = _tensors(given["inputs"], "inputs")
    allowed = _object(given["allowed"], "allowed", ("sm",), optional=("tensorrt", "jetpack"))
    versions = _object(allowed.get("tensorrt") or {}, "allowed.tensorrt", (), optional=("min", "below"))
    for key, value in versions.items():
        if not re.fullmatch(r"\d+(\.\d+)*", str(value)):
            raise _Bad(f"allowed.tensorrt.{key} is {value!r} where a version is expected")
    reference = given.get("reference")
    if reference is not None:
        reference = _object(reference, "reference", ("file", "sha256"))
    profiles = tuple(_profile(entry, inputs) for entry in _list(given["profiles"], "profiles"))
    if not profiles:
        raise _Bad("it has no profile")
    return Plan(
        path=path,
        onnx=_file(folder, onnx["file"], "onnx.file"),
        onnx_sha256=_sha256(onnx["sha256"], "onnx.sha256"),
        data=tuple((_file(folder, one["file"], "onnx.data"), _sha256(one["sha256"], "onnx.data")) for one in data),
        precision=given["precision"],
        inputs=inputs,
        outputs=_tensors(given["outputs"], "outputs"),
        profiles=profiles,
        workspace=_count(given["workspace_bytes"], "workspace_bytes"),
        sm=_architectures(allowed["sm"], "allowed.sm"),
        tensorrt_min=versions.get("min"),
        tensorrt_below=versions.get("below"),
        builder=_arguments(given["builder"]),
        compiled=_compiled(given["engine"], folder),
        reference=(_file(folder, reference["file"], "reference.file"), _sha256(reference["sha256"], "reference.sha256"))
        if reference
        else None,
        digest=digest,
    )


def _object(value: object, name: str, keys: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    """A JSON object with all of ``keys`` and no others than the optional ones. Raises _Bad."""
    if not isinstance(value, dict):
        raise _Bad(f"{name} is no JSON object")
    missing, unknown = sorted(set(keys) - value.keys()), sorted(value.keys() - {*keys, *optional})
    if missing:
        raise _Bad(f"{name} has no {missing[0]}")
    if unknown:
        raise _Bad(f"{name} has {unknown[0]!r}, which this runtime does not know")
    return value


def _list(value: object, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise _Bad(f"{name} is no list")
    return value


def _count(value: object, name: str) -> int:
    if type(value) is not int or value < 1:
        raise _Bad(f"{name} is {value!r} where a whole number above 0 is expected")
    return value


def _sha256(value: object, name: str) -> str:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
        raise _Bad(f"{name} is {value!r} where a sha256 is expected")
    return value


def _file(folder: Path, value: object, name: str) -> Path:
    if not isinstance(value, str) or not value:
        raise _Bad(f"{name} is {value!r} where a file's name is expected")
    try:
        return inside(folder, value)
    except ManifestError:
        raise _Bad(f"{name} names {value!r}, and no such file lies beside the plan") from None


def _architectures(value: object, name: str) -> tuple[str, ...]:
    capabilities = _list(value, name)
    if not capabilities or not all(isinstance(one, str) and re.fullmatch(r"\d+\.\d", one) for one in capabilities):
        raise _Bad(f'{name} is {value!r} where compute capabilities such as ["8.7"] are expected')
    return tuple(capabilities)


def _tensors(value: object, name: str) -> tuple[Tensor, ...]:
    entries = [_object(entry, name, ("name", "dtype")) for entry in _list(value, name)]
    tensors = tuple(Tensor(str(entry["name"]), str(entry["dtype"])) for entry in entries)
    if not tensors or len({one.name for one in tensors}) != len(tensors):
        raise _Bad(f"{name} is empty or names a tensor twice")
    for one in tensors:
        if one.dtype not in DTYPES or not re.fullmatch(r"[A-Za-z0-9_.]+", one.name):
            raise _Bad(f"{name} has {one.name!r} of {one.dtype!r}, which this runtime does not know")
    return tensors


def _profile(value: object, inputs: tuple[Tensor, ...]) -> Profile:
    given = _object(value, "a profile", tuple(one.name for one in inputs))
    return {one.name: _shapes(given[one.name], one.name) for one in inputs}


def _shapes(value: object, name: str) -> Shapes:
    given = _object(value, f"the profile of {name}", SHAPES)
    shapes = [tuple(_list(given[key], f"the profile of {name}")) for key in SHAPES]
    sizes = [size for shape in shapes for size in shape]
    if not shapes[0] or len({len(shape) for shape in shapes}) != 1 or any(type(n) is not int or n < 0 for n in sizes):
        raise _Bad(f"the profile of {name} has shapes of different lengths or sizes that are no whole numbers")
    if any(not low <= likely <= high for low, likely, high in zip(*shapes, strict=True)):
        raise _Bad(f"the profile of {name} does not keep min, opt and max in order")
    return Shapes(*shapes)


def _arguments(value: object) -> tuple[str, ...]:
    """trtexec's arguments, each one known and harmless, because the plan is not trusted. Raises _Bad."""
    arguments = _list(_object(value, "builder", ("trtexec",))["trtexec"], "builder.trtexec")
    for word in arguments:
        flag, equals, rest = str(word).partition("=")
        if flag not in FLAGS:
            raise _Bad(f"builder.trtexec has {flag!r}, which this runtime does not pass on")
        pattern = FLAGS[flag]
        if bool(equals) != (pattern is not None) or (pattern is not None and not re.fullmatch(pattern, rest)):
            raise _Bad(f"builder.trtexec has {word!r}, whose value cannot be used")
    return tuple(str(word) for word in arguments)


def _compiled(value: object, folder: Path) -> Compiled | None:
    if value is None:
        return None
    given = _object(value, "engine", ("file", "sha256", "bytes", "library", "version", "sm"))
    if given["library"] not in LIBRARIES:
        raise _Bad(f"engine.library is {given['library']!r} where {' or '.join(LIBRARIES)} is known")
    return Compiled(
        file=_file(folder, given["file"], "engine.file"),
        sha256=_sha256(given["sha256"], "engine.sha256"),
        bytes=_count(given["bytes"], "engine.bytes"),
        library=given["library"],
        version=str(given["version"]),
        sm=_architectures(given["sm"], "engine.sm"),
    )


def shape_flags(profile: Profile) -> list[str]:
    """trtexec's three flags of a profile, inputs in the plan's order."""

    def flag(key: str) -> str:
        parts = [f"{name}:{'x'.join(map(str, getattr(shapes, key)))}" for name, shapes in profile.items()]
        return f"--{key}Shapes={','.join(parts)}"

    return [flag(key) for key in SHAPES]


def trtexec_arguments(plan: Plan, number: int) -> list[str]:
    """trtexec's arguments for the profile of this number, all but the engine's file."""
    named = [word for word in plan.builder if not re.match(r"--(min|opt|max)Shapes=|--onnx=", word)]
    if not any(word.startswith("--memPoolSize=") for word in named):
        named.append(f"--memPoolSize=workspace:{plan.workspace >> 20}M")
    for needed in ("--stronglyTyped", "--skipInference"):
        if needed not in named:
            named.append(needed)
    return [f"--onnx={plan.onnx.name}", *named, *shape_flags(plan.profiles[number])]
