"""Assembling: same inputs, same bytes; whole or not at all; nothing of the user's is replaced."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from packager.bundle.assemble import assemble
from packager.bundle.engines import ENGINES, runtime_files
from packager.core.errors import InputError, MachineError, PackagerError
from packager.core.hashing import hash_file
from packager.core.progress import Silent
from tests.unit.bundle.parts import ROOT, contents, gguf


def tree(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Path -> mode, time and digest of every file."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mode, int(path.stat().st_mtime), hash_file(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_same_inputs_give_the_same_bytes_modes_and_times(tmp_path: Path) -> None:
    """Built twice in two folders, under different umasks."""
    one = assemble(contents(tmp_path / "in"), tmp_path / "a", Silent())
    old = os.umask(0o077)
    try:
        two = assemble(contents(tmp_path / "in"), tmp_path / "b", Silent())
    finally:
        os.umask(old)
    assert tree(one.path) == tree(two.path)
    assert {path.stat().st_mode & 0o777 for path in two.path.rglob("*") if path.is_dir()} == {0o755}


def test_only_the_stores_own_files_are_linked(tmp_path: Path) -> None:
    """No second copy of a model; a file outside the store, or a link in it, is copied; a linked bundle is equal."""
    given = contents(tmp_path / "in")
    copied = assemble(given, tmp_path / "a", Silent()).path
    linked = assemble(replace(given, store=tmp_path / "in"), tmp_path / "b", Silent()).path
    assert tree(copied) == tree(linked)
    source = given.files["model.gguf"]
    assert (linked / "model" / "model.gguf").samefile(source)
    assert not (copied / "model" / "model.gguf").samefile(source)
    assert (linked / "model" / "model.gguf").stat().st_mode & 0o777 == 0o444
    engine = next(iter((linked / "runtime").rglob("*.py")))
    assert engine.stat().st_nlink == 1


def test_sums_are_in_the_form_that_sha256sum_reads(tmp_path: Path) -> None:
    """Every file but SHA256SUMS itself, sorted."""
    bundle = assemble(contents(tmp_path / "in"), tmp_path / "out", Silent()).path
    done = subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=bundle, check=False)
    assert done.returncode == 0
    listed = [line.split("  ", 1)[1] for line in (bundle / "SHA256SUMS").read_text("utf-8").splitlines()]
    assert listed == sorted(listed) and set(listed) == set(tree(bundle)) - {"SHA256SUMS"}


def test_nothing_in_a_bundle_tells_where_or_when_it_was_made(tmp_path: Path) -> None:
    """No path of this machine in any text file."""
    bundle = assemble(contents(tmp_path / "in"), tmp_path / "out", Silent()).path
    for path in bundle.rglob("*"):
        if path.is_file():
            assert str(tmp_path).encode() not in path.read_bytes(), path


def test_the_same_bundle_is_left_as_it_is(tmp_path: Path) -> None:
    """Not even its inode changes."""
    first = assemble(contents(tmp_path / "in"), tmp_path / "out", Silent())
    inode = (first.path / "manifest.json").stat().st_ino
    second = assemble(contents(tmp_path / "in"), tmp_path / "out", Silent())
    assert first.fresh and not second.fresh and (second.path / "manifest.json").stat().st_ino == inode


@pytest.mark.parametrize(
    "damage",
    [
        lambda bundle: (bundle / "model" / "model.gguf").write_bytes(b"x"),
        lambda bundle: (bundle / "README.md").unlink(),
        lambda bundle: (bundle / "extra").write_bytes(b""),
        lambda bundle: (bundle / "manifest.json").write_text('{"schema_version": 0, "bundle": "", "files": []}'),
    ],
)
def test_a_damaged_bundle_is_replaced_by_a_whole_one(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    """And nothing temporary is left beside it."""
    good = tree(assemble(contents(tmp_path / "in"), tmp_path / "out", Silent()).path)
    damage(tmp_path / "out" / "tiny-test_box-gguf")
    again = assemble(contents(tmp_path / "in"), tmp_path / "out", Silent())
    assert again.fresh and tree(again.path) == good
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tiny-test_box-gguf"]


def test_a_different_model_replaces_the_bundle(tmp_path: Path) -> None:
    """The old one is there until the new one is whole."""
    assemble(contents(tmp_path / "in"), tmp_path / "out", Silent())
    other = gguf(tmp_path / "other.gguf", rows=8)
    given = contents(tmp_path / "in")
    built = assemble(replace(given, files={**given.files, "model.gguf": other}), tmp_path / "out", Silent())
    assert built.fresh and hash_file(built.path / "model" / "model.gguf") == hash_file(other)


def test_two_renames_do_where_the_system_cannot_swap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Filesystems without RENAME_EXCHANGE (a failure that cannot be produced here)."""
    monkeypatch.setattr("ctypes.CDLL", lambda *args, **kwargs: object())
    assemble(contents(tmp_path / "in"), tmp_path / "out", Silent())
    (tmp_path / "out" / "tiny-test_box-gguf" / "README.md").unlink()
    built = assemble(contents(tmp_path / "in"), tmp_path / "out", Silent())
    assert built.fresh and [path.name for path in (tmp_path / "out").iterdir()] == [built.path.name]


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_is_no_bundle_is_not_replaced(tmp_path: Path, kind: str) -> None:
    """A folder of the user's that happens to have the name."""
    goal = tmp_path / "out" / "tiny-test_box-gguf"
    goal.parent.mkdir()
    if kind == "folder":
        goal.mkdir()
        (goal / "diary.txt").write_text("mine", "utf-8")
    elif kind == "file":
        goal.write_text("mine", "utf-8")
    else:
        goal.symlink_to(tmp_path)
    with pytest.raises(InputError):
        assemble(contents(tmp_path / "in"), tmp_path / "out", Silent())
    assert goal.is_symlink() or "mine" in (goal / "diary.txt" if kind == "folder" else goal).read_text("utf-8")


def test_an_unwritable_place_is_the_machines_fault(tmp_path: Path) -> None:
    """Named, with the size that is needed."""
    (tmp_path / "out").write_text("a file", "utf-8")
    with pytest.raises(MachineError):
        assemble(contents(tmp_path / "in"), tmp_path / "out", Silent())


def test_a_file_that_changes_while_it_is_copied_stops_the_build(tmp_path: Path) -> None:
    """The digest was taken before: the copy must have the same."""
    given = contents(tmp_path / "in")

    def digest(path: Path) -> str:
        return hashlib.sha256(b"before").hexdigest() if path.name == "tokenizer.json" else hash_file(path)

    with pytest.raises(PackagerError, match="changed while it was copied"):
        assemble(given, tmp_path / "out", Silent(), digest=digest)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", ["../x", "manifest.json", "README.md", "wheels/requirements.txt"])
def test_a_recipe_cannot_write_over_the_bundles_own_files(tmp_path: Path, name: str) -> None:
    """Nor outside of it."""
    given = contents(tmp_path / "in")
    with pytest.raises(PackagerError):
        assemble(replace(given, extra={name: tmp_path / "in" / "tokenizer.json"}), tmp_path / "out", Silent())


def test_extra_folders_keep_their_layout(tmp_path: Path) -> None:
    """As an Ollama store does."""
    blobs = tmp_path / "store" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "sha256-00").write_bytes(b"blob")
    bundle = assemble(
        replace(contents(tmp_path / "in"), extra={"ollama": tmp_path / "store"}), tmp_path / "out", Silent()
    ).path
    assert (bundle / "ollama" / "blobs" / "sha256-00").read_bytes() == b"blob"


def test_every_runtime_file_is_listed_by_name() -> None:
    """A new file in runtimes/ reaches a box only when somebody lists it."""
    present = {path.relative_to(ROOT / "runtimes").as_posix() for path in (ROOT / "runtimes").rglob("*.py")}
    listed = {file for engine in ENGINES for file in runtime_files(engine)}
    assert present == listed
    with pytest.raises(PackagerError):
        runtime_files("abacus")


KILLED = """
import sys, time
from pathlib import Path
from packager.bundle import assemble as module
from packager.core.progress import Silent
from tests.unit.bundle.parts import contents
real = module._copy
def slow(source, goal, task):
    print("copying", flush=True)
    time.sleep(30)
    return real(source, goal, task)
module._copy = slow
module.assemble(contents(Path(sys.argv[1])), Path(sys.argv[2]), Silent())
"""


def test_a_killed_build_leaves_no_half_bundle_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    """SIGKILL in the middle of copying; a living build's folder is left alone."""
    out = tmp_path / "out"
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "in"), str(out)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert child.stdout is not None and child.stdout.readline() == b"copying\n"
    name = "tiny-test_box-gguf"
    assert not (out / name).exists()
    assemble(contents(tmp_path / "in2"), out, Silent())
    assert len(list(out.glob(f".{name}.building-*"))) == 1  # the other build is alive
    child.send_signal(signal.SIGKILL)
    child.wait()
    time.sleep(0.05)
    (out / name / "README.md").unlink()
    assemble(contents(tmp_path / "in2"), out, Silent())
    assert [path.name for path in out.iterdir()] == [name]
    assert json.loads((out / name / "manifest.json").read_text("utf-8"))["bundle"] == name
