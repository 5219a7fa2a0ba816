"""A Target: the facts of one device, read strictly from a TOML file.

The file name is the target's name. Every key is a field of a dataclass below, with its unit in its name and its meaning
in its metadata; the reader, the suggestions for misspelt keys and the reference (``target_keys``) use these fields.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from packager.core.errors import UsageError, closest

GIB = 1024**3
GB = 1000**3
NAME = re.compile(r"[a-z0-9][a-z0-9_]*")
_MISSING = dataclasses.MISSING


def _doc(sentence: str) -> dict[str, str]:
    """Field metadata: the sentence that the reference prints for the key."""
    return {"doc": sentence}


@dataclass(frozen=True)
class Platform:
    """The system, processor and Python versions of an offline install."""

    system: Literal["linux", "windows", "macos"] = field(metadata=_doc("operating system"))
    machine: Literal["x86_64", "aarch64", "arm64"] = field(metadata=_doc("processor, as the system itself names it"))
    python: tuple[str, ...] = field(metadata=_doc('Python versions the box may run, as "3.12"'))
    wheel_tag: str = field(
        metadata=_doc('newest wheel platform tag it accepts, as "manylinux_2_35_aarch64"; older ones follow from it')
    )
    glibc: str | None = field(metadata=_doc('version of the C library, as "2.35"; Linux only'), default=None)


@dataclass(frozen=True)
class Memory:
    """Main memory: on a Jetson or a Mac the graphics processor shares it."""

    total_gib: float = field(metadata=_doc("installed memory, GiB"))
    reserved_gib: float = field(metadata=_doc("what firmware, system and desktop keep of it, GiB"))
    bandwidth_gb_s: float = field(metadata=_doc("peak bandwidth, GB/s (10^9 bytes): the ceiling of tokens per second"))
    assumed: bool = field(
        metadata=_doc("the figures are an assumption of this file, not facts of a device"), default=False
    )


@dataclass(frozen=True)
class Gpu:
    """The graphics processor."""

    name: str = field(metadata=_doc("as its maker names it"))
    architecture: str = field(metadata=_doc("NVIDIA's compute capability as \"sm_87\", else the maker's name for it"))
    memory: Literal["unified", "discrete"] = field(metadata=_doc("whether it shares main memory"))
    memory_gib: float | None = field(metadata=_doc("its own memory, GiB; discrete only"), default=None)
    bandwidth_gb_s: float | None = field(
        metadata=_doc("bandwidth of its own memory, GB/s; discrete only"), default=None
    )
    recipes: tuple[str, ...] = field(
        metadata=_doc("recipes whose bundle runs on it; every other recipe runs on the CPU"), default=()
    )


@dataclass(frozen=True)
class Software:
    """One release of the maker's system image (JetPack) and the versions in it."""

    jetpack: str = field(metadata=_doc('release, as "6.2"'))
    linux: str = field(metadata=_doc('Jetson Linux (L4T) release, as "36.4.3"'))
    cuda: str = field(metadata=_doc("CUDA version"))
    python: str = field(metadata=_doc('the system\'s Python, as "3.10"'))
    glibc: str = field(metadata=_doc("version of the C library"))
    tensorrt: str | None = field(metadata=_doc("TensorRT version; engines need exactly this one"), default=None)


@dataclass(frozen=True)
class Recipes:
    """The recipes that can be built for it."""

    default: str = field(metadata=_doc("recipe used when none is named"))
    supported: tuple[str, ...] = field(metadata=_doc("all recipes that work there"))


@dataclass(frozen=True)
class Target:
    """One device, made by ``load_target``. Attributes without ``_gib`` or ``_gb_s`` in the name: bytes, bytes/s."""

    title: str = field(metadata=_doc("name for people"))
    platform: Platform
    memory: Memory
    recipes: Recipes
    runtimes: tuple[str, ...] = field(metadata=_doc("engines of runtimes/ that work there"), default=())
    notes: tuple[str, ...] = field(metadata=_doc("sentences that every plan for this target shows"), default=())
    gpu: Gpu | None = None
    software: tuple[Software, ...] = field(
        metadata=_doc("releases of the system image that were looked at, oldest first"), default=()
    )
    options: Mapping[str, Mapping[str, Any]] = field(
        metadata=_doc("per recipe, options that differ from the recipe's own defaults"), default_factory=dict
    )
    name: str = field(default="", metadata={"computed": True})
    digest: str = field(default="", metadata={"computed": True})

    @property
    def system(self) -> str:
        return self.platform.system

    @property
    def machine(self) -> str:
        return self.platform.machine

    @property
    def python(self) -> tuple[str, ...]:
        return self.platform.python

    @property
    def glibc(self) -> str | None:
        return self.platform.glibc

    @property
    def wheel_platforms(self) -> tuple[str, ...]:
        """All platform tags of wheels that install there, best first (PEP 600, PEP 425)."""
        return wheel_platforms(self.platform.wheel_tag)

    @property
    def recipe(self) -> str:
        return self.recipes.default

    @property
    def memory_bytes(self) -> int:
        return round(self.memory.total_gib * GIB)

    @property
    def reserved_bytes(self) -> int:
        return round(self.memory.reserved_gib * GIB)

    @property
    def bandwidth(self) -> float:
        """Main memory, bytes per second."""
        return self.memory.bandwidth_gb_s * GB

    def on_gpu(self, recipe: str) -> bool:
        return self.gpu is not None and recipe in self.gpu.recipes

    def budget(self, recipe: str, on_gpu: bool | None = None) -> int:
        """Bytes that a model of this recipe may fill: the GPU's own memory, or main memory without the reserved part.
        on_gpu: whether it runs on the GPU, when an option of the recipe decides it; None: gpu.recipes decides.
        """
        on_gpu = self.on_gpu(recipe) if on_gpu is None else on_gpu
        if self.gpu is not None and on_gpu and self.gpu.memory_gib is not None:
            return round(self.gpu.memory_gib * GIB)
        return max(0, self.memory_bytes - self.reserved_bytes)

    def bandwidth_for(self, recipe: str, on_gpu: bool | None = None) -> float:
        """Bytes per second of the memory from which a model of this recipe is read. on_gpu: as for ``budget``."""
        on_gpu = self.on_gpu(recipe) if on_gpu is None else on_gpu
        if self.gpu is not None and on_gpu and self.gpu.bandwidth_gb_s is not None:
            return self.gpu.bandwidth_gb_s * GB
        return self.bandwidth

    def on_release(self, jetpack: str) -> Target:
        """The same device with only the Python and C library of one release of its system image. Raises KeyError for a
        release that the file does not list.
        """
        release = next((entry for entry in self.software if entry.jetpack == jetpack), None)
        if release is None:
            raise KeyError(f"{self.name} has no [[software]] of JetPack {jetpack}")
        tag = f"manylinux_{release.glibc.replace('.', '_')}_{self.platform.machine}"
        place = dataclasses.replace(self.platform, python=(release.python,), glibc=release.glibc, wheel_tag=tag)
        return dataclasses.replace(self, platform=place)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``: the file's keys, and name, digest and wheel_platforms."""
        plain = dataclasses.asdict(dataclasses.replace(self, options={}))
        options = {recipe: dict(values) for recipe, values in self.options.items()}
        return {**plain, "options": options, "wheel_platforms": list(self.wheel_platforms)}


def wheel_platforms(tag: str) -> tuple[str, ...]:
    """All platform tags that a system accepting ``tag`` accepts, best first. Raises ValueError for an unknown form."""
    if linux := re.fullmatch(r"manylinux_2_(\d+)_(\w+)", tag):
        newest, machine = int(linux[1]), linux[2]
        legacy = {17: ["manylinux2014"]} | ({12: ["manylinux2010"], 5: ["manylinux1"]} if machine == "x86_64" else {})
        oldest = 5 if machine == "x86_64" else 17
        return tuple(
            f"{name}_{machine}"
            for minor in range(newest, oldest - 1, -1)
            for name in [f"manylinux_2_{minor}", *legacy.get(minor, [])]
        )
    if mac := re.fullmatch(r"macosx_(\d+)_0_(arm64|x86_64)", tag):
        return tuple(
            f"macosx_{major}_0_{kind}" for major in range(int(mac[1]), 10, -1) for kind in (mac[2], "universal2")
        )
    if tag in ("win_amd64", "win_arm64"):
        return (tag,)
    raise ValueError(f'"{tag}" is not manylinux_2_N_MACHINE, macosx_N_0_MACHINE or win_amd64')


def load_target(path: Path) -> Target:
    """The target in a TOML file. Raises UsageError with the file and the key that is wrong."""
    try:
        raw = path.read_bytes()
        table = tomllib.loads(raw.decode("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"The target file {path} cannot be read.", why=str(error)) from error
    if not NAME.fullmatch(path.stem):
        raise UsageError(
            f'The target file {path} gives its target the name "{path.stem}".',
            why="Names are lower-case letters, digits and underscores, because they become part of folder names.",
            fix="Rename the file.",
        )
    values = _table(Target, table, path, "")
    target = Target(**values, name=path.stem, digest=hashlib.sha256(raw).hexdigest())
    _check(target, path)
    return target


def target_keys() -> list[tuple[str, str, str]]:
    """Every key of a target file: dotted key, type, meaning. ``[]`` marks a list of tables, ``RECIPE`` a free name."""
    return _keys(Target, "")


def _fields(cls: type) -> dict[str, dataclasses.Field[Any]]:
    return {item.name: item for item in dataclasses.fields(cls) if not item.metadata.get("computed")}


def _required(item: dataclasses.Field[Any]) -> bool:
    return item.default is _MISSING and item.default_factory is _MISSING


def _plain(kind: Any) -> Any:
    """``X | None`` as X: TOML has no null, an absent key stands for it."""
    if isinstance(kind, types.UnionType):
        return next(part for part in typing.get_args(kind) if part is not type(None))
    return kind


def _keys(cls: type, prefix: str) -> list[tuple[str, str, str]]:
    rows = []
    hints = typing.get_type_hints(cls)
    for name, item in _fields(cls).items():
        kind = _plain(hints[name])
        inner = typing.get_args(kind)
        if dataclasses.is_dataclass(kind):
            rows += _keys(typing.cast(type, kind), f"{prefix}{name}.")
        elif inner and dataclasses.is_dataclass(inner[0]):
            rows += _keys(typing.cast(type, inner[0]), f"{prefix}{name}[].")
        else:
            key = f"{prefix}{name}.RECIPE.OPTION" if typing.get_origin(kind) is Mapping else f"{prefix}{name}"
            rows.append(
                (key, _describe(kind) + ("" if _required(item) else ", optional"), item.metadata.get("doc", ""))
            )
    return rows


def _describe(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " | ".join(f'"{choice}"' for choice in args)
    if origin is tuple:
        return "list of text"
    if origin is Mapping:
        return "as the recipe's option"
    return {str: "text", float: "number", int: "integer", bool: "true or false"}[kind]


def _table(cls: type, table: Any, path: Path, prefix: str) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise UsageError(f"{path}: {prefix.rstrip('.')} has to be a table.", fix=f"Write [{prefix.rstrip('.')}].")
    known = _fields(cls)
    hints = typing.get_type_hints(cls)
    for key in table:
        if key not in known:
            raise UsageError(
                f'{path}: unknown key "{prefix}{key}".{closest(key, list(known))}',
                fix=f"Known here: {', '.join(known)}.",
            )
    values = {}
    for name, item in known.items():
        if name in table:
            values[name] = _value(_plain(hints[name]), table[name], path, f"{prefix}{name}")
        elif _required(item):
            section = dataclasses.is_dataclass(_plain(hints[name]))
            what = f"the table [{prefix}{name}]" if section else f'the key "{prefix}{name}"'
            raise UsageError(
                f"{path}: {what} is missing.", why=f"It is the {doc}." if (doc := item.metadata.get("doc")) else ""
            )
    return values


def _value(kind: Any, value: Any, path: Path, key: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return typing.cast(type, kind)(**_table(typing.cast(type, kind), value, path, f"{key}."))
    if origin is tuple and dataclasses.is_dataclass(args[0]):
        if not isinstance(value, list):
            raise UsageError(f"{path}: {key} has to be a list of tables.", fix=f"Write [[{key}]].")
        cls = typing.cast(type, args[0])
        return tuple(cls(**_table(cls, entry, path, f"{key}[{i}].")) for i, entry in enumerate(value))
    if origin is tuple:
        if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
            return tuple(value)
    elif origin is Mapping:
        if isinstance(value, dict) and all(isinstance(entry, dict) for entry in value.values()):
            return types.MappingProxyType({name: types.MappingProxyType(dict(entry)) for name, entry in value.items()})
        raise UsageError(
            f"{path}: [{key}] has to hold one table a recipe.", fix=f"Write [{key}.gguf] above the option."
        )
    elif origin is Literal:
        if value in args:
            return value
        near = closest(value, list(args)) if isinstance(value, str) else ""
        raise UsageError(f'{path}: {key} is "{value}".{near}', fix=f"It can be {', '.join(args)}.")
    elif kind is float:
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e6:
            return float(value)
    elif type(value) is kind:
        return value
    raise UsageError(f"{path}: {key} has to be {_describe(kind)}, and is {value!r}.")


def _check(target: Target, path: Path) -> None:
    """Raise UsageError for combinations of values that the types allow and no device has."""
    place = target.platform
    try:
        wheel_platforms(place.wheel_tag)
    except ValueError as error:
        raise UsageError(f"{path}: platform.wheel_tag cannot be used.", why=str(error)) from error
    if not place.python or not all(re.fullmatch(r"3\.\d+", version) for version in place.python):
        raise UsageError(f"{path}: platform.python is {list(place.python)}.", fix='Write versions as ["3.10", "3.12"].')
    if place.system == "linux":
        expected = place.wheel_tag.split("_")[1:3]
        if place.glibc is None or place.glibc.split(".") != expected:
            raise UsageError(
                f"{path}: platform.glibc is {place.glibc} and platform.wheel_tag is {place.wheel_tag}.",
                why="A manylinux tag carries the version of the C library, so both must name the same one.",
                fix=f'Write glibc = "{".".join(expected)}" or correct the tag.',
            )
    elif place.glibc is not None:
        raise UsageError(
            f"{path}: platform.glibc is given for {place.system}.", why="Only Linux has it.", fix="Remove it."
        )
    if target.memory.reserved_gib >= target.memory.total_gib:
        raise UsageError(f"{path}: memory.reserved_gib leaves nothing of memory.total_gib.")
    if target.memory.bandwidth_gb_s <= 0:
        raise UsageError(f"{path}: memory.bandwidth_gb_s has to be above 0.")
    gpu = target.gpu
    if gpu is not None and (gpu.memory == "discrete") != (
        gpu.memory_gib is not None and gpu.bandwidth_gb_s is not None
    ):
        raise UsageError(
            f"{path}: gpu.memory is {gpu.memory}.",
            why="A discrete GPU has gpu.memory_gib and gpu.bandwidth_gb_s of its own, a unified one has neither.",
        )
    if target.recipes.default not in target.recipes.supported:
        raise UsageError(
            f'{path}: recipes.default is "{target.recipes.default}".',
            why="It is not in recipes.supported.",
            fix="Add it there.",
        )
    for recipe in (*target.options, *(gpu.recipes if gpu else ())):
        if recipe not in target.recipes.supported:
            near = closest(recipe, list(target.recipes.supported))
            raise UsageError(f'{path}: the recipe "{recipe}" is not in recipes.supported.{near}')
