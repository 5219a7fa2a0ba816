"""The pinned compiler: its place in the cache, the notes and errors about fetching it, and its failures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from packager.bundle.wheels import read_lock
from packager.cli.console import Console
from packager.core import pip
from packager.core.errors import NetworkError, ToolError
from packager.core.processes import ChildFailed
from packager.core.progress import Progress
from packager.formats.gguf import llamacpp
from packager.formats.tensorrt import compiler


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def failing(output: str) -> Any:
    """A stand-in for pip that ends with these words."""

    def run(*_arguments: Any, **_words: Any) -> None:
        raise ChildFailed("pip install", 1, output)

    return run


def test_the_lock_pins_what_the_code_names() -> None:
    """Bindings and libraries, in one version, each with hashes; the version is the one that plans tell."""
    entries = read_lock(compiler.lock())
    assert {entry.name for entry in entries} == {"tensorrt-rtx-cu12-bindings", "tensorrt-rtx-cu12-libs"}
    assert {str(entry.requirement.specifier) for entry in entries} == {f"=={compiler.BUILD}"}
    assert compiler.BUILD.startswith(f"{compiler.VERSION}.") and all(entry.hashes for entry in entries)


def test_the_plan_says_what_is_fetched_only_while_it_is_missing() -> None:
    """Its size and where it stays; nothing once it is there."""
    assert f"{compiler.DOWNLOAD_MB} MB" in str(compiler.to_fetch())
    compiler.folder().mkdir(parents=True)
    assert compiler.to_fetch() is None
    assert compiler.compiler(Console(quiet=True)) == compiler.folder()


@pytest.mark.parametrize(
    ("fetch", "wrong"),
    [(compiler.compiler, "wheels .* are not the pinned ones"), (llamacpp.sources, "sdist .* is not the pinned one")],
    ids=["tensorrt", "llama.cpp"],
)
@pytest.mark.parametrize(
    ("output", "kind", "says"),
    [
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE", ToolError, None),
        ("ERROR: Could not find a version that satisfies the requirement", NetworkError, "PIP_FIND_LINKS"),
    ],
)
def test_a_failed_fetch_leaves_nothing(
    output: str, kind: type[Exception], says: str | None, fetch: Callable[[Progress], Path], wrong: str, cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A wrong hash is an index not to be used; anything else is the network's; no half folder stays either way."""
    monkeypatch.setattr(pip, "run", failing(output))
    with pytest.raises(kind, match=says or wrong):
        fetch(Console(quiet=True))
    assert not list((cache / "packager" / "tools").iterdir())


@pytest.mark.parametrize(
    ("code", "output", "says", "why"),
    [
        (1, "Traceback\nImportError: libcuda.so.9: no such file", "cannot be loaded", "libcuda.so.9"),
        (-11, "", "cannot be loaded", "printed nothing"),
        (1, "[TRT] [E] 4: no GEMM in float32 for SM 7.5\nthe compiler gave no engine", "does not compile", "SM 7.5"),
        (1, "the parser refuses node Foo:1: no such operator", "does not compile", "Foo:1"),
    ],
)
def test_what_a_failed_compilation_means(code: int, output: str, says: str, why: str, tmp_path: Path) -> None:
    """A library that does not load, even by crashing, is fetched again; a refused graph gives the compiler's reason."""
    error = compiler._explained(ChildFailed("compiling", code, output), tmp_path)
    assert says in error.what and why in error.why
    assert (str(tmp_path) in error.fix) == (says == "cannot be loaded")


def test_jetsons_are_not_among_the_capabilities() -> None:
    """8.7, 7.2 and 11.0 build their own."""
    assert not {"7.2", "8.7", "11.0"} & set(compiler.CAPABILITIES)
