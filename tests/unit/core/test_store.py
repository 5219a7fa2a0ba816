"""The store keeps what is done, clears what was cut off, and says in words why it cannot write."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from packager.core import store as store_module
from packager.core.errors import MachineError
from packager.core.progress import Silent
from packager.core.store import (
    RECORD,
    Cost,
    Store,
    cache_root,
    default_root,
    digest_of,
    machine_errors,
    write_atomically,
)
from tests.conftest import ROOT
from tests.system_packages import system_package
from tests.unit.core.half_step import half

QUIET = Silent()
INPUTS: dict[str, object] = {"a": 1, "b": "zwei"}


def writes(text: str) -> Callable[[Path, Cost], None]:
    def make(folder: Path, cost: Cost) -> None:
        (folder / "out.txt").write_text(text, encoding="utf-8")
        cost.saw(123)

    return make


def names(root: Path, step: str) -> list[str]:
    return sorted(path.name for path in (root / step).iterdir())


def test_the_same_inputs_are_made_once(tmp_path: Path) -> None:
    """A second request for a step returns the first one's folder and does no work."""
    store = Store(tmp_path)
    first = store.step("s", INPUTS, writes("x"), progress=QUIET)
    second = Store(tmp_path).step("s", {"b": "zwei", "a": 1}, writes("y"), progress=QUIET)
    assert not first.reused
    assert second.reused
    assert second.path == first.path
    assert (second.seconds, second.peak_rss_bytes) == (0.0, 123)
    assert (second.path / "out.txt").read_text(encoding="utf-8") == "x"


@pytest.mark.parametrize(
    "other", [{"a": 2, "b": "zwei"}, {"a": 1}, {"a": "1", "b": "zwei"}, {"a": 1, "b": "zwei", "c": None}]
)
def test_other_inputs_are_another_step(tmp_path: Path, other: dict[str, object]) -> None:
    """Any difference in the inputs, a type's included, gives another folder."""
    store = Store(tmp_path)
    first = store.step("s", INPUTS, writes("x"), progress=QUIET)
    second = store.step("s", other, writes("y"), progress=QUIET)
    assert second.path != first.path


def test_the_record_says_what_went_in_and_what_came_out(tmp_path: Path) -> None:
    """step.json lists inputs, files with their sizes, and the cost."""
    step = Store(tmp_path).step("s", INPUTS, writes("abc"), progress=QUIET)
    record = step.read_json(RECORD)
    assert record["inputs"] == INPUTS
    assert record["program"]["code"]
    assert record["files"] == {"out.txt": 3}
    assert record["peak_rss_bytes"] == 123


def test_a_make_that_raises_leaves_nothing(tmp_path: Path) -> None:
    """The failure passes through, and neither a step nor a partial folder stays behind."""

    def make(folder: Path, cost: Cost) -> None:
        (folder / "half").write_text("x", encoding="utf-8")
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        Store(tmp_path).step("s", INPUTS, make, progress=QUIET)
    assert names(tmp_path, "s") == []
    assert Store(tmp_path).step("s", INPUTS, writes("x"), progress=QUIET).path.is_dir()


def test_a_resumable_step_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """What a resumable step had written before it failed is there when it runs again."""

    seen: list[str] = []
    cut_off = True

    def make(folder: Path, cost: Cost) -> None:
        seen.extend(path.name for path in folder.iterdir())
        (folder / ("one" if cut_off else "two")).write_text("1", encoding="utf-8")
        if cut_off:
            raise KeyboardInterrupt

    store = Store(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        store.step("s", INPUTS, make, progress=QUIET, resumable=True)
    cut_off = False
    step = store.step("s", INPUTS, make, progress=QUIET, resumable=True)
    assert seen == ["one"]
    assert sorted(step.read_json(RECORD)["files"]) == ["one", "two"]


def wait_for(path: Path, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.01)


@pytest.mark.parametrize("resumable", [False, True])
def test_a_killed_process_leaves_a_partial_that_the_next_run_takes_over(
    tmp_path: Path, child_environment: dict[str, str], resumable: bool
) -> None:
    """SIGKILL in the middle: nothing is published, the lock is free, and the next run clears the rest or goes on
    with it.
    """
    mark = tmp_path / "started"
    root = tmp_path / "store"
    child = subprocess.Popen(
        [sys.executable, ROOT / "tests/unit/core/half_step.py", root, "yes" if resumable else "no"],
        env={**child_environment, "HALF_MARK": str(mark)},
    )
    wait_for(mark)
    child.send_signal(signal.SIGKILL)
    child.wait()
    (left,) = (root / "s").iterdir()
    assert left.name.endswith(".partial")
    assert (left / "half").is_file()

    leftovers: list[str] = []
    step = half(root, resumable=resumable, leftovers=leftovers)
    assert leftovers == (["half"] if resumable else [])
    assert names(root, "s") == [step.key]


TOGETHER = """
import sys, time
from pathlib import Path
from packager.core.progress import Silent
from packager.core.store import Store

class Notes(Silent):
    def note(self, text):
        sys.stdout.write(text + "\\n")

def make(folder, cost):
    with open(sys.argv[2], "a") as log:
        log.write("made\\n")
    time.sleep(0.5)
    (folder / "out").write_text("x")

step = Store(Path(sys.argv[1])).step("s", {"a": 1}, make, progress=Notes())
sys.stdout.write(f"{step.reused} {step.path}\\n")
"""


def test_two_builds_at_once_make_a_step_once(tmp_path: Path, child_environment: dict[str, str]) -> None:
    """Of two processes one makes the step; the other says that it waits, and gets the same folder."""
    log = tmp_path / "log"
    command = [sys.executable, "-c", TOGETHER, tmp_path / "store", log]
    pair = [subprocess.Popen(command, env=child_environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [child.communicate(timeout=60)[0] for child in pair]
    assert [child.returncode for child in pair] == [0, 0]
    assert log.read_text(encoding="utf-8") == "made\n"
    last = [text.splitlines()[-1].split(" ", 1) for text in outputs]
    assert sorted(reused for reused, _ in last) == ["False", "True"]
    assert last[0][1] == last[1][1]
    assert any("waiting" in text for text in outputs)


@pytest.mark.parametrize(
    "damage", ["removed", "shortened", "edited", "record gone", "record broken", "record senseless"]
)
def test_a_damaged_step_is_an_error(tmp_path: Path, damage: str) -> None:
    """A step whose files were changed from outside is not used; the error names the folder to remove."""
    step = Store(tmp_path).step("s", INPUTS, writes("abc"), progress=QUIET)
    if damage == "removed":
        (step.path / "out.txt").unlink()
    elif damage == "shortened":
        (step.path / "out.txt").write_text("", encoding="utf-8")
    elif damage == "edited":
        (step.path / "out.txt").write_text("abd", encoding="utf-8")
    elif damage == "record gone":
        (step.path / RECORD).unlink()
    else:
        (step.path / RECORD).write_text("{" if damage == "record broken" else "[]", encoding="utf-8")
    with pytest.raises(MachineError) as caught:
        Store(tmp_path).step("s", INPUTS, writes("abc"), progress=QUIET)
    assert "damaged" in caught.value.what
    assert str(step.path) in caught.value.fix


def test_a_full_disk_is_the_machines_fault(tmp_path: Path) -> None:
    """ENOSPC while a step is made: exit code 9, the free space named, no partial left."""

    def make(folder: Path, cost: Cost) -> None:
        (folder / "half").write_text("x", encoding="utf-8")
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "model.gguf"))

    with pytest.raises(MachineError, match=r"disk is full.*model\.gguf") as caught:
        Store(tmp_path).step("s", INPUTS, make, progress=QUIET)
    assert caught.value.exit_code == 9
    assert "GB are free" in caught.value.why
    assert names(tmp_path, "s") == []


REALLY_FULL = """
import subprocess, sys
from pathlib import Path
from packager.core.errors import MachineError
from packager.core.progress import Silent
from packager.core.store import Store

place = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], check=True)

def make(folder, cost):
    (folder / "big").write_bytes(b"x" * 1_000_000)

try:
    Store(place / "store").step("s", {"a": 1}, make, progress=Silent())
except MachineError as error:
    sys.stdout.write(f"{error.what}|{[p.name for p in (place / 'store' / 's').iterdir()]}")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a mount namespace")
def test_a_disk_that_is_really_full(tmp_path: Path, child_environment: dict[str, str]) -> None:
    """On a file system of 256 kB a step of a megabyte ends as a MachineError and leaves nothing."""
    probe = subprocess.run([system_package("unshare"), "-rm", "true"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("this machine allows no mount namespaces; the simulated full disk above stands for it")
    ran = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", REALLY_FULL, tmp_path],
        env=child_environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stdout.startswith("the disk is full"), ran.stderr
    assert ran.stdout.endswith("|[]")


FORBIDDEN = """
import os, sys
from pathlib import Path
from packager.core.errors import MachineError
from packager.core.progress import Silent
from packager.core.store import Store
import filelock
if os.getuid() == 0:
    os.setuid(65534)
try:
    Store(Path(sys.argv[1])).step("s", {"a": 1}, lambda folder, cost: None, progress=Silent())
except MachineError as error:
    sys.stdout.write(f"{error.exit_code} {error.what} {error.fix}")
"""


@pytest.mark.skipif(not hasattr(os, "setuid"), reason="POSIX permissions")
def test_a_folder_that_may_not_be_written(child_environment: dict[str, str]) -> None:
    """A store in a folder of somebody else: exit code 9 and what to choose instead."""
    import tempfile

    with tempfile.TemporaryDirectory() as name:  # not pytest's tmp_path: another user may not even enter that
        folder = Path(name) / "locked"
        folder.mkdir(mode=0o555)
        Path(name).chmod(0o755)
        ran = subprocess.run(
            [sys.executable, "-c", FORBIDDEN, folder / "store"],
            env=child_environment,
            capture_output=True,
            text=True,
            check=False,
        )
    assert ran.stdout.startswith("9 "), ran.stderr
    assert "could not be written: Permission denied" in ran.stdout
    assert "PACKAGER_STORE" in ran.stdout


def test_a_store_that_is_a_file(tmp_path: Path) -> None:
    """PACKAGER_STORE that names a file is the user's mistake, not a traceback."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(MachineError, match="file"):
        Store(tmp_path / "file").step("s", INPUTS, writes("x"), progress=QUIET)


def test_other_failures_of_the_system_pass_through(tmp_path: Path) -> None:
    """Only what the user can mend becomes a MachineError: a defect stays a traceback."""
    with pytest.raises(FileNotFoundError), machine_errors(tmp_path):
        (tmp_path / "absent").read_text(encoding="utf-8")


def test_write_atomically_replaces_whole_files(tmp_path: Path) -> None:
    """The new content is there with plain newlines, and no temporary file."""
    place = tmp_path / "a.json"
    write_atomically(place, "one\n")
    write_atomically(place, "zwei ü\n")
    assert place.read_bytes() == "zwei ü\n".encode()
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_write_atomically_keeps_the_old_file_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that fails half-way leaves the old content and no temporary file."""
    place = tmp_path / "a.json"
    write_atomically(place, "old")

    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_module.os, "fsync", full)
    with pytest.raises(MachineError, match="disk is full"):
        write_atomically(place, "new")
    assert place.read_text(encoding="utf-8") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_where_the_store_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PACKAGER_STORE, else XDG_CACHE_HOME, else ~/.cache."""
    monkeypatch.setenv("PACKAGER_STORE", str(tmp_path / "chosen"))
    assert default_root() == tmp_path / "chosen"
    monkeypatch.delenv("PACKAGER_STORE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_root() == tmp_path / "packager" / "store"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_root() == tmp_path / "home" / ".cache" / "packager"


@pytest.mark.parametrize("value", [{"b": 1, "a": [1, 2]}, {"a": [1, 2], "b": 1}])
def test_a_digest_does_not_depend_on_the_order_of_keys(value: dict[str, Any]) -> None:
    """Equal values have equal digests."""
    assert digest_of(value) == digest_of(json.loads('{"a": [1, 2], "b": 1}'))


def test_a_digest_refuses_what_has_no_canonical_form() -> None:
    """NaN is equal to nothing, so nothing may be named by it."""
    with pytest.raises(ValueError, match="JSON"):
        digest_of({"x": float("nan")})
