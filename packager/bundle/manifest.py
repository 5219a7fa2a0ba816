"""manifest.json: a bundle's files, how the box runs it, and what the box needs, as dataclasses.

The schema (packager/bundle/schemas/manifest.schema.json, JSON Schema draft 2020-12) is the reference; a box reads the
JSON with the standard library alone. No times, host names or absolute paths: the same inputs give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from packager.core.errors import PackagerError, VerifyFailed

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"


@dataclass(frozen=True)
class Needs:
    """The requirements on a box. python_min and python_max: minor versions, both included. ram_bytes: memory of the
    machine. disk_bytes: the size of an install at its prefix. gpu: None, or the requirements on one.
    """

    system: str
    machine: str
    python_min: str
    python_max: str
    glibc_min: str | None
    ram_bytes: int
    disk_bytes: int
    gpu: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class FileEntry:
    """One file of the bundle: path relative to it with forward slashes, size in bytes, sha256 in hex."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The whole manifest. run: how the box runs the model; target and recipe: name with digest or options."""

    name: str
    bundle: str
    target: Mapping[str, Any]
    recipe: Mapping[str, Any]
    run: Mapping[str, Any]
    needs: Needs
    files: tuple[FileEntry, ...]
    report: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def as_dict(self) -> dict[str, Any]:
        """The JSON form, files sorted by path."""
        plain = {item.name: getattr(self, item.name) for item in fields(self)}
        plain["needs"] = asdict(self.needs)
        plain["files"] = [asdict(entry) for entry in sorted(self.files, key=lambda entry: entry.path)]
        return plain


def to_json(manifest: Manifest) -> str:
    """Canonical text: sorted keys, two spaces, a newline at the end. Raises PackagerError for a manifest that violates
    its schema (a defect of a recipe, not of the user)."""
    plain = manifest.as_dict()
    text = json.dumps(plain, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    problems = violations(json.loads(text))
    if problems:
        raise PackagerError(
            f"The manifest of {manifest.bundle} violates its schema: {problems[0]}",
            why=f"{len(problems)} violation(s) in the values from the recipe or target.",
            fix="Correct the recipe; the schema is packager/bundle/schemas/manifest.schema.json.",
        )
    return text


def from_dict(plain: Mapping[str, Any]) -> Manifest:
    """A Manifest from parsed JSON that satisfies the schema."""
    return Manifest(
        name=plain["name"],
        bundle=plain["bundle"],
        target=plain["target"],
        recipe=plain["recipe"],
        run=plain["run"],
        needs=Needs(**plain["needs"]),
        files=tuple(FileEntry(**entry) for entry in plain["files"]),
        report=plain["report"],
        provenance=plain["provenance"],
        schema_version=plain["schema_version"],
    )


def load(bundle: Path) -> Manifest:
    """Read a bundle's manifest. Raises VerifyFailed when it is missing, not JSON, of another version or invalid."""
    path = bundle / MANIFEST
    try:
        plain = json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise VerifyFailed(
            f"{bundle} has no readable {MANIFEST}.",
            why=str(error),
            fix="Give the folder that `packager build` printed.",
        ) from error
    except ValueError as error:
        raise VerifyFailed(f"{path} is not JSON.", why=str(error), fix="Copy the bundle again.") from error
    problems = violations(plain)
    if problems:
        raise VerifyFailed(
            f"{path} violates its schema: {problems[0]}",
            why=f"{len(problems)} violation(s).",
            fix="Copy the bundle again, or build it with this version of packager.",
        )
    return from_dict(plain)


@cache
def schema() -> dict[str, Any]:
    """The JSON Schema of the manifest."""
    text = package_files("packager.bundle").joinpath("schemas", "manifest.schema.json").read_text("utf-8")
    parsed: dict[str, Any] = json.loads(text)
    return parsed


def violations(plain: Any) -> list[str]:
    """All violations of the schema, as "where: what", sorted; only the version when it is another one."""
    from jsonschema import Draft202012Validator

    if isinstance(plain, dict) and isinstance(plain.get("schema_version"), int):
        version = plain["schema_version"]
        if version != SCHEMA_VERSION:
            return [f"schema_version: {version} is not {SCHEMA_VERSION}, the version this packager reads."]
    errors = Draft202012Validator(schema()).iter_errors(plain)
    listed = [f"{error.json_path}: {error.message}" for error in errors]
    if not listed:
        listed = [f"$.files: {text}" for text in _file_list_problems(plain["files"])]
    return sorted(text[:500] for text in listed)


def _file_list_problems(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """Problems that a schema cannot express: paths that escape, repeat, or differ only in case (Windows, macOS)."""
    problems = []
    seen: dict[str, str] = {}
    for entry in entries:
        path = entry["path"]
        if not is_inside(path):
            problems.append(f"{path!r} leaves the bundle")
        if (other := seen.setdefault(path.casefold(), path)) != path or path in (MANIFEST, SUMS):
            problems.append(f"{path!r} collides with {other!r}")
    paths = [entry["path"] for entry in entries]
    if len(set(paths)) != len(paths):
        problems.append("a path is listed twice")
    if paths != sorted(paths):
        problems.append("paths are not sorted")
    return problems


def is_inside(path: str) -> bool:
    """Whether a path from a manifest is relative, plain, and stays in its bundle, on every system."""
    parts = path.split("/")
    return (
        bool(path)
        and "\\" not in path
        and ":" not in path
        and "\0" not in path
        and all(part not in ("", ".", "..") for part in parts)
    )
