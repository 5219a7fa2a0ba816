"""Verifies a bundle and lists every problem, not only the first.

Three checks: SHA256SUMS and the manifest (changed, missing or added files), the manifest's schema, and the model's own
header (a truncated file for which new sums were made).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from packager.bundle.manifest import MANIFEST, SUMS, FileEntry, Manifest, is_inside, load
from packager.core.errors import VerifyFailed
from packager.core.hashing import hash_file
from packager.core.progress import Progress, Silent
from packager.tensors.gguf_header import BadHeader, read_header

Kind = Literal["missing", "changed", "extra", "link", "unsafe", "unreadable", "schema", "sums", "model"]


@dataclass(frozen=True)
class Problem:
    """One problem: its kind, the path in the bundle, and a sentence."""

    kind: Kind
    path: str
    detail: str


@dataclass(frozen=True)
class Report:
    """The result of a verification. files: number listed in the manifest. bytes: read. model: facts of its header."""

    bundle: Path
    problems: tuple[Problem, ...]
    files: int
    bytes: int
    model: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """The JSON form that ``--json`` prints."""
        return {
            "bundle": str(self.bundle),
            "ok": self.ok,
            "files": self.files,
            "bytes": self.bytes,
            "model": self.model,
            "problems": [asdict(problem) for problem in self.problems],
        }

    def raise_if_bad(self) -> None:
        """Raise VerifyFailed with the first problem, when there is one."""
        if self.problems:
            first, count = self.problems[0], len(self.problems)
            raise VerifyFailed(
                f"{self.bundle} failed verification: {count} problem{'s' * (count > 1)}.",
                why=f"{first.kind} {first.path}: {first.detail}",
                fix="Copy the bundle again, or build it again; do not install it.",
            )


def verify(bundle: Path, progress: Progress | None = None, *, digest: Callable[[Path], str] = hash_file) -> Report:
    """Compare a bundle with its own manifest, sums, schema and model header; never raises for a damaged bundle."""
    progress = progress or Silent()
    try:
        manifest = load(bundle)
    except VerifyFailed as error:
        return Report(bundle, (Problem("schema", MANIFEST, " ".join(filter(None, (error.what, error.why)))),), 0, 0, {})
    problems: list[Problem] = []
    present = dict(_walk(bundle, problems))
    listed = {entry.path: entry for entry in manifest.files}
    sums = _read_sums(bundle, problems)
    read = 0
    total = sum(entry.bytes for entry in manifest.files)
    with progress.step(f"verify {manifest.bundle}", total=total, unit="B") as task:
        for path, entry in listed.items():
            if path not in present:
                if not any(problem.path == path for problem in problems):
                    problems.append(Problem("missing", path, "the manifest lists it, but the bundle does not have it"))
                continue
            read += present[path]
            problems += _compare(bundle / path, present[path], entry, digest)
            task.advance(entry.bytes)
    problems += [
        Problem("extra", path, "the manifest does not list it")
        for path in present
        if path not in listed and path not in (MANIFEST, SUMS)
    ]
    problems += _compare_sums(bundle, sums, manifest, digest)
    model, model_problems = _model(bundle, manifest, listed)
    problems += model_problems
    if manifest.bundle != bundle.resolve().name:
        progress.note(f"The folder is called {bundle.resolve().name}, the bundle {manifest.bundle}.")
    order = sorted(set(problems), key=lambda problem: (problem.path, problem.kind, problem.detail))
    return Report(bundle, tuple(order), len(listed), read, model)


def _walk(bundle: Path, problems: list[Problem]) -> Iterator[tuple[str, int]]:
    """(path, size) of every plain file; adds links and special files to problems; does not follow links."""
    for folder, folders, files in os.walk(bundle):
        for name in sorted([*folders, *files]):
            file = Path(folder) / name
            path = file.relative_to(bundle).as_posix()
            if file.is_symlink():
                goal = os.readlink(file)  # noqa: PTH115 - only to show it
                inside = file.resolve().is_relative_to(bundle.resolve())
                problems.append(Problem("link", path, f"a link to {goal}" + ("" if inside else ", outside the bundle")))
            elif name in files:
                if file.is_file():
                    yield path, file.stat().st_size
                else:
                    problems.append(Problem("link", path, "neither a file nor a folder"))
        folders[:] = sorted(name for name in folders if not (Path(folder) / name).is_symlink())


def _compare(file: Path, size: int, entry: FileEntry, digest: Callable[[Path], str]) -> list[Problem]:
    if size != entry.bytes:
        return [Problem("changed", entry.path, f"{size} bytes instead of {entry.bytes}")]
    try:
        actual = digest(file)
    except OSError as error:
        return [Problem("unreadable", entry.path, str(error.strerror or error))]
    if actual != entry.sha256:
        return [Problem("changed", entry.path, f"sha256 {actual[:16]}… instead of {entry.sha256[:16]}…")]
    return []


def _read_sums(bundle: Path, problems: list[Problem]) -> dict[str, str]:
    sums: dict[str, str] = {}
    try:
        lines = (bundle / SUMS).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        problems.append(Problem("missing", SUMS, f"it cannot be read: {error}"))
        return sums
    for number, line in enumerate(lines, 1):
        digest, _, path = line.partition("  ")
        if len(digest) != 64 or not is_inside(path):
            problems.append(Problem("unsafe", SUMS, f"line {number} has no digest, or an unsafe path: {line[:120]!r}"))
        elif path in sums:
            problems.append(Problem("sums", SUMS, f"{path} is listed twice"))
        else:
            sums[path] = digest
    return sums


def _compare_sums(
    bundle: Path, sums: dict[str, str], manifest: Manifest, digest: Callable[[Path], str]
) -> list[Problem]:
    """Problems where sums and manifest do not list the same files with the same digests."""
    if not sums:
        return []
    expected = {entry.path: entry.sha256 for entry in manifest.files} | {MANIFEST: digest(bundle / MANIFEST)}
    problems = [Problem("sums", path, f"{SUMS} has no line for it") for path in expected.keys() - sums.keys()]
    problems += [
        Problem("sums", path, f"{SUMS} lists it, the manifest does not") for path in sums.keys() - expected.keys()
    ]
    problems += [
        Problem("changed" if path == MANIFEST else "sums", path, f"{SUMS} has another digest for it")
        for path in expected.keys() & sums.keys()
        if expected[path] != sums[path]
    ]
    return problems


def _model(bundle: Path, manifest: Manifest, listed: dict[str, FileEntry]) -> tuple[dict[str, Any], list[Problem]]:
    """(facts of a GGUF's header, problems). Problems: files of ``run`` that are not listed, and a damaged GGUF."""
    problems = []
    for key in ("model", "tokenizer", "chat_template"):
        path = manifest.run.get(key)
        if path is not None and path not in listed:
            problems.append(Problem("missing", str(path), f"run.{key} names it, the manifest does not list it"))
    model = str(manifest.run["model"])
    file = bundle / model
    if not is_inside(model) or not model.endswith(".gguf") or file.is_symlink() or not file.is_file():
        return {}, problems
    try:
        header = read_header(file)
    except (BadHeader, OSError) as error:
        return {}, [*problems, Problem("model", model, f"not a sound GGUF file: {error}")]
    wrong = header.problems()
    problems += [Problem("model", model, text) for text in wrong[:3]]
    if len(wrong) > 3:
        problems.append(Problem("model", model, f"and {len(wrong) - 3} more tensors"))
    facts = {
        "format": f"GGUF {header.version}",
        "architecture": header.architecture,
        "tensors": len(header.tensors),
        "tensor_types": header.type_counts(),
    }
    return facts, problems
