"""Wheels for another machine: markers, hashes, cache, and the error when there is no wheel. Real pip, no index."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from packager.bundle.wheels import environments, fetch_wheels, read_lock, run_pip, select
from packager.core.errors import InputError, PackagerError, PlanRefused, ToolError
from packager.core.progress import Silent
from tests.unit.bundle.parts import ROOT, Box, digest, wheel

pytestmark = pytest.mark.real  # pip itself runs, a second each time; `make unit` leaves it out, `make test` does not


class Pip:
    """The real pip, counting its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, command: Sequence[str]) -> None:
        self.calls += 1
        run_pip(command)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that pip is configured to look in, and a lock of them."""
    folder = tmp_path / "index"
    folder.mkdir()
    pure = wheel(folder, "pure", "py3-none-any")
    windows_only = wheel(folder, "winonly", "py3-none-any")
    backport = wheel(folder, "backport", "py3-none-any")
    binaries = [
        wheel(folder, "binary", f"{python}-{python}-{platform}")
        for python in ("cp310", "cp313")
        for platform in ("manylinux_2_17_x86_64", "win_amd64")
    ]
    stable = [wheel(folder, "stable", f"cp310-abi3-{platform}") for platform in ("manylinux_2_28_x86_64", "win_amd64")]

    def entry(requirement: str, files: list[Path]) -> str:
        return " \\\n    ".join([requirement, *(f"--hash=sha256:{digest(file)}" for file in files)]) + "\n    # via x\n"

    (tmp_path / "box.lock").write_text(
        "# a lock\n"
        + entry("pure==1.0", [pure])
        + entry("winonly==1.0 ; sys_platform == 'win32'", [windows_only])
        + entry("backport==1.0 ; python_full_version < '3.11'", [backport])
        + entry("binary==1.0", binaries)
        + entry("stable==1.0", stable),
        "utf-8",
    )
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return folder


def names(files: Sequence[Path]) -> list[str]:
    return [file.name for file in files]


def test_a_linux_box_gets_wheels_for_each_of_its_pythons_and_nothing_twice(index: Path, tmp_path: Path) -> None:
    """Pure and stable-ABI wheels are fetched once, binary ones for each Python, and markers are kept for the box."""
    pip = Pip()
    wheels = fetch_wheels(tmp_path / "box.lock", Box(), tmp_path / "cache", Silent(), run=pip)
    assert names(wheels.files) == [
        "backport-1.0-py3-none-any.whl",
        "binary-1.0-cp310-cp310-manylinux_2_17_x86_64.whl",
        "binary-1.0-cp313-cp313-manylinux_2_17_x86_64.whl",
        "pure-1.0-py3-none-any.whl",
        "stable-1.0-cp310-abi3-manylinux_2_28_x86_64.whl",
    ]
    assert 'backport==1.0 ; python_full_version < "3.11"' in wheels.requirements
    assert "winonly" not in wheels.requirements
    assert wheels.requirements.count("--hash") == len(wheels.files)  # only what is bundled, not Windows' files
    again = fetch_wheels(tmp_path / "box.lock", Box(), tmp_path / "cache", Silent(), run=pip)
    assert again == wheels and pip.calls == 2


def test_markers_are_those_of_the_target_and_not_of_this_machine(index: Path, tmp_path: Path) -> None:
    """A Windows box gets the package that only Windows needs."""
    box = Box(system="windows", python=("3.13",), wheel_platforms=("win_amd64",))
    wheels = names(fetch_wheels(tmp_path / "box.lock", box, tmp_path / "cache", Silent()).files)
    assert "winonly-1.0-py3-none-any.whl" in wheels and "backport-1.0-py3-none-any.whl" not in wheels
    assert "binary-1.0-cp313-cp313-win_amd64.whl" in wheels


def test_a_missing_wheel_is_named_with_platform_and_python(index: Path, tmp_path: Path) -> None:
    """Both packages without a wheel are named, not only the first."""
    box = Box(machine="aarch64", python=("3.12",), wheel_platforms=("manylinux_2_28_aarch64",))
    with pytest.raises(PlanRefused) as caught:
        fetch_wheels(tmp_path / "box.lock", box, tmp_path / "cache", Silent())
    assert "binary 1.0, stable 1.0" in caught.value.what
    assert "manylinux_2_28_aarch64" in caught.value.what and "Python 3.12" in caught.value.what
    assert not list((tmp_path / "cache").iterdir())  # nothing half-fetched stays


def test_a_wheel_that_is_not_the_locked_one_is_refused(index: Path, tmp_path: Path) -> None:
    """The index offers other bytes under the same name: pip's hash check stops the build."""
    pure = index / "pure-1.0-py3-none-any.whl"
    pure.write_bytes(pure.read_bytes() + b"x")
    with pytest.raises(PackagerError):
        fetch_wheels(tmp_path / "box.lock", Box(), tmp_path / "cache", Silent())


@pytest.mark.parametrize("damage", ["change", "delete"])
def test_the_cache_is_not_trusted(index: Path, tmp_path: Path, damage: str) -> None:
    """A wheel changed or deleted in the cache is noticed, and the folder to delete is named."""
    wheels = fetch_wheels(tmp_path / "box.lock", Box(), tmp_path / "cache", Silent())
    if damage == "change":
        wheels.files[0].write_bytes(b"other")
    else:
        wheels.files[0].unlink()
    with pytest.raises(ToolError) as caught:
        fetch_wheels(tmp_path / "box.lock", Box(), tmp_path / "cache", Silent())
    assert "backport" in caught.value.what and str(wheels.files[0].parent) in caught.value.fix


@pytest.mark.parametrize(
    "line",
    [
        "pure>=1.0 --hash=sha256:aa",
        "pure==1.0",
        "pure==1.0,<2 --hash=sha256:aa",
        "pure @ file:///x.whl --hash=sha256:aa",
        "???  --hash=sha256:aa",
    ],
)
def test_a_lock_must_pin_exactly_and_with_hashes(tmp_path: Path, line: str) -> None:
    """A lock that leaves a choice is refused with its line."""
    (tmp_path / "bad.lock").write_text(line + "\n", "utf-8")
    with pytest.raises(InputError):
        read_lock(tmp_path / "bad.lock")


def test_an_unknown_system_and_an_empty_target_are_refused(index: Path, tmp_path: Path) -> None:
    """Neither is guessed."""
    with pytest.raises(InputError):
        environments(Box(system="haiku"), "3.11")
    with pytest.raises(InputError):
        fetch_wheels(tmp_path / "box.lock", Box(python=()), tmp_path / "cache", Silent())


def test_the_real_lock_holds_for_every_platform() -> None:
    """The bundle's own lock: pinned, hashed, without the package that only downloads, and with pip itself."""
    lock = read_lock(ROOT / "locks" / "box-llamacpp.lock")
    listed = {entry.name for entry in lock}
    assert {"xllamacpp", "tokenizers", "fastapi", "uvicorn", "pip"} <= listed
    assert not {"huggingface-hub", "httpx", "hf-xet", "torch"} & listed
    assert "exceptiongroup" in {entry.name for entry in select(lock, Box(), "3.10")}
    assert "exceptiongroup" not in {entry.name for entry in select(lock, Box(), "3.12")}


def test_a_scarce_package_narrows_the_pythons_and_says_so(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch's CPU build, which an index may have for one Python only; where it has none, that is a refusal."""
    rare = wheel(index, "rare", "cp313-cp313-manylinux_2_17_x86_64")
    more = tmp_path / "more.lock"
    more.write_text(f"rare==1.0 --hash=sha256:{digest(rare)}\n", "utf-8")
    notes: list[str] = []
    progress = Silent()
    monkeypatch.setattr(progress, "note", notes.append)
    for _ in range(2):  # the second time from the cache
        wheels = fetch_wheels(tmp_path / "box.lock", Box(), tmp_path / "cache", progress, more=[more], scarce=["rare"])
        assert wheels.python == ("3.13",)
        assert [name.partition("-")[0] for name in names(wheels.files)] == ["binary", "pure", "rare", "stable"]
        assert "no wheel of rare for 3.10" in notes.pop() and not notes
    rare.unlink()
    with pytest.raises(PlanRefused, match="no wheel of rare"):
        fetch_wheels(tmp_path / "box.lock", Box(), tmp_path / "other", progress, more=[more], scarce=["rare"])
