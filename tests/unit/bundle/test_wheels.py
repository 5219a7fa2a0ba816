"""Wheels for another machine: markers, hashes, cache, and the error when there is no wheel. Real pip, no index."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from packager.bundle.wheels import environments, fetch_wheels, read_lock, run_pip, select
from packager.core import pip as core_pip
from packager.core.errors import InputError, PackagerError, PlanRefused, ToolError
from packager.core.progress import Silent
from tests.package_index import Index, index_of
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


@pytest.fixture
def cpu_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Index, Path]]:
    """A stand-in for PyTorch's own index with one wheel, and a lock of it; pip's own place is an index without."""
    for name in ("pips", "pytorchs"):
        (tmp_path / name).mkdir()
    wheel(tmp_path / "pips", "torch", "py3-none-any", "2.13.0")
    file = wheel(tmp_path / "pytorchs", "torch", "cp313-cp313-manylinux_2_28_x86_64", "2.13.0+cpu")
    lock = tmp_path / "torch-cpu.lock"
    lock.write_text(f"torch==2.13.0+cpu --hash=sha256:{digest(file)}\n", "utf-8")
    with index_of(tmp_path / "pips") as pips, index_of(tmp_path / "pytorchs") as index:
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_INDEX_URL", pips.url)
        monkeypatch.setenv("PACKAGER_TORCH_INDEX", index.url)
        yield index, lock


def test_a_box_gets_torch_from_pytorchs_own_index(index: Path, cpu_torch: tuple[Index, Path], tmp_path: Path) -> None:
    """Where pip's own index has the CUDA build only, as the public one; without a setting of the user's."""
    torchs, lock = cpu_torch
    box = Box(python=("3.13",))
    wheels = fetch_wheels(tmp_path / "box.lock", box, tmp_path / "cache", Silent(), more=[lock], scarce=["torch"])
    assert "torch-2.13.0+cpu-cp313-cp313-manylinux_2_28_x86_64.whl" in names(wheels.files)
    assert "/simple/torch/" in torchs.asked


def test_a_torch_that_no_index_has_is_refused_with_both_places(
    index: Path, cpu_torch: tuple[Index, Path], tmp_path: Path
) -> None:
    """The refusal has PyTorch's own index and its error."""
    torchs, lock = cpu_torch
    box = Box(python=("3.10",))
    with pytest.raises(PlanRefused, match="no wheel of torch") as caught:
        fetch_wheels(tmp_path / "box.lock", box, tmp_path / "cache", Silent(), more=[lock], scarce=["torch"])
    assert torchs.url in caught.value.why and "No matching distribution" in caught.value.why
    assert "PACKAGER_TORCH_INDEX" in caught.value.fix


def test_an_index_that_does_not_answer_is_asked_once(
    index: Path, cpu_torch: tuple[Index, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that swallows PyTorch's own index costs one wait, not one for every Python of the box."""
    monkeypatch.setenv("PACKAGER_TORCH_INDEX", "http://127.0.0.1:9/simple")
    monkeypatch.setattr(core_pip, "_UNREACHED", {})
    lines: list[Sequence[str]] = []

    def run(command: Sequence[str]) -> None:
        lines.append(command)
        run_pip(command)

    with pytest.raises(PlanRefused, match="no wheel of torch"):
        fetch_wheels(
            tmp_path / "box.lock",
            Box(python=("3.12", "3.13")),
            tmp_path / "cache",
            Silent(),
            more=[cpu_torch[1]],
            scarce=["torch"],
            run=run,
        )
    assert len([line for line in lines if "--extra-index-url" in line]) == 1


def test_set_up_and_the_packager_name_one_index_of_pytorchs() -> None:
    """It is written twice, because set-up runs before the packager's own packages are there."""
    text = (ROOT / "scripts" / "packages.py").read_text("utf-8")
    assert f'TORCH_INDEX = "{core_pip.TORCH_INDEX}"' in text
