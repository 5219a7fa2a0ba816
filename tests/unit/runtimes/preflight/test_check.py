"""The preflight: wrong boxes, recorded as fact files, are refused in one sentence; unknown facts are not guessed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runtimes.preflight import check
from runtimes.preflight.fit_gpu import numbers
from tests.conftest import ROOT

BOXES = ROOT / "tests" / "unit" / "boxes"
NEEDS = {
    "system": "linux",
    "machine": "aarch64",
    "python_min": "3.10",
    "python_max": "3.13",
    "glibc_min": "2.35",
    "ram_bytes": 6_000_000_000,
    "disk_bytes": 5_000_000_000,
    "gpu": None,
}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle of one file for a Jetson Orin Nano."""
    folder = tmp_path / "b"
    folder.mkdir()
    (folder / "model.gguf").write_bytes(b"weights")
    manifest = {"schema_version": 1, "bundle": "b", "run": {}, "needs": NEEDS, "files": []}
    (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    lines = [
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("manifest.json", "model.gguf")
    ]
    (folder / "SHA256SUMS").write_text("".join(lines), "utf-8")
    return folder


def run(bundle: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """check in this process."""
    words = ["--bundle", str(bundle), *arguments]
    with (
        contextlib.redirect_stdout(io.StringIO()) as printed,
        contextlib.redirect_stderr(io.StringIO()) as errors,
    ):
        code = check.main(words)
    return subprocess.CompletedProcess(words, code, printed.getvalue(), errors.getvalue())


def alone(bundle: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """check as install.sh starts it: alone, with nothing installed."""
    return subprocess.run(
        [sys.executable, "-I", "-B", str(ROOT / "runtimes/preflight/check.py"), "--bundle", str(bundle), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_box_it_was_built_for_fits(bundle: Path) -> None:
    """Facts recorded in the form of an Orin Nano with JetPack 6."""
    done = alone(bundle, "--facts", str(BOXES / "fits.json"))
    assert done.returncode == 0 and done.stderr == "" and "NO " not in done.stdout
    here = run(bundle, "--facts", str(BOXES / "fits.json"))
    assert (here.returncode, here.stdout, here.stderr) == (0, done.stdout, "")


def test_a_refusal_is_the_processs_exit_code(bundle: Path) -> None:
    """A wrong box and a damaged file, as install.sh sees them."""
    assert alone(bundle, "--facts", str(BOXES / "musl.json")).returncode == 4
    (bundle / "model.gguf").unlink()
    assert alone(bundle, "--facts", str(BOXES / "fits.json")).returncode == 5


@pytest.mark.parametrize(
    ("box", "starts", "says"),
    [
        ("glibc_too_old", "C library: expected glibc 2.35 or newer, found glibc 2.31;", "upgrade|newer|bundle"),
        ("musl", "C library: expected glibc 2.35 or newer, found musl;", "glibc"),
        ("ram_4gb", "memory: expected at least 6.0 GB of RAM, found 4.1 GB;", "more memory"),
        ("disk_full", "disk: expected 5.0 GB free where it is installed, found 120.0 MB;", "--prefix"),
        ("x86_for_aarch64", "processor: expected aarch64, found x86_64;", "this processor"),
        ("windows_for_linux", "system: expected Linux, found Windows", "this system"),
        ("python_3_8", "Python: expected Python 3.10 to 3.13, found Python 3.8.10;", "--python"),
        ("python_too_new", "Python: expected Python 3.10 to 3.13, found Python 3.15.0;", "--python"),
        ("python_32_bit", "Python word size: expected 64 bit, found 32 bit;", "64-bit"),
        ("pypy", "Python implementation: expected CPython, found PyPy;", "--python"),
        (
            "free_threaded",
            "Python build: expected a Python with its global lock, found a free-threaded one;",
            "--python",
        ),
        ("no_venv", "Python modules: expected venv, zlib, ctypes, found no venv;", "package python3"),
    ],
)
def test_a_wrong_box_is_refused_in_one_sentence(bundle: Path, box: str, starts: str, says: str) -> None:
    """What was expected, what was found, what to do; exit code 4."""
    done = run(bundle, "--facts", str(BOXES / f"{box}.json"))
    assert done.returncode == 4
    assert done.stderr.startswith(starts) and done.stderr.count("\n") == 1 and done.stderr.endswith(".\n")
    assert any(word in done.stderr for word in says.split("|"))


def test_several_things_wrong_are_still_one_sentence(bundle: Path) -> None:
    """The gravest is explained, the others are named; JSON has all of them."""
    done = run(bundle, "--facts", str(BOXES / "everything_wrong.json"), "--json")
    document = json.loads(done.stdout)
    assert done.returncode == 4 and document["refusal"].startswith("system: ")
    assert "memory" in document["refusal"] and "disk" in document["refusal"]
    assert sum(finding["ok"] is False for finding in document["findings"]) >= 6


def test_unknown_facts_are_shown_and_do_not_refuse(bundle: Path) -> None:
    """Nothing is guessed."""
    done = run(bundle, "--facts", str(BOXES / "unknown.json"))
    assert done.returncode == 0 and done.stdout.count("unknown (it could not be read)") >= 4


@pytest.mark.parametrize(("damage", "code"), [("change", 5), ("delete", 5), ("link", 5), ("sums", 5), ("manifest", 5)])
def test_damaged_files_are_refused(bundle: Path, damage: str, code: int) -> None:
    """Changed, lost, replaced by a link; sums that escape; a manifest that is no JSON."""
    model = bundle / "model.gguf"
    if damage == "change":
        model.write_bytes(b"Weights")
    elif damage == "delete":
        model.unlink()
    elif damage == "link":
        model.unlink()
        model.symlink_to("/dev/null")
    elif damage == "sums":
        (bundle / "SHA256SUMS").write_text("0" * 64 + "  ../../etc/passwd\n", "utf-8")
    else:
        (bundle / "manifest.json").write_text("{", "utf-8")
    done = run(bundle, "--facts", str(BOXES / "fits.json"))
    assert done.returncode == code and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("needs", "says"),
    [
        (None, "has no needs.system, needs.machine"),
        ({"system": "linux"}, "has no needs.machine, needs.python_min"),
        ({**NEEDS, "gpu": {"capability": "8.7"}}, "has no needs.gpu.count, needs.gpu.bytes;"),
    ],
)
def test_a_manifest_that_asks_for_half_is_no_traceback(bundle: Path, needs: Any, says: str) -> None:
    """It is a damaged bundle: one sentence."""
    manifest = {"schema_version": 1, "bundle": "b", "run": {}, "needs": needs, "files": []}
    (bundle / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    done = run(bundle, "--facts", str(BOXES / "fits.json"))
    assert done.returncode == 5 and says in done.stderr and done.stderr.count("\n") == 1


def test_a_wrong_box_counts_more_than_a_damaged_file(bundle: Path) -> None:
    """Copying again would not help."""
    (bundle / "model.gguf").unlink()
    assert run(bundle, "--facts", str(BOXES / "ram_4gb.json")).returncode == 4


def test_an_install_is_not_asked_for_disk_nor_for_its_wheels(bundle: Path) -> None:
    """They were unpacked."""
    with (bundle / "SHA256SUMS").open("a") as sums:
        sums.write("0" * 64 + "  wheels/x.whl\n" + "0" * 64 + "  install.sh\n" + "0" * 64 + "  packager.service\n")
    (bundle / "installed.json").write_text("{}", "utf-8")
    done = run(bundle, "--facts", str(BOXES / "disk_full.json"))
    assert done.returncode == 0, done.stderr


def test_this_machines_facts_are_read_and_can_be_recorded(bundle: Path, tmp_path: Path) -> None:
    """What --facts-only prints, --facts takes."""
    done = alone(bundle, "--facts-only")
    facts: dict[str, Any] = json.loads(done.stdout)
    assert facts["ram_bytes"] > 1 << 28 and facts["disk_free_bytes"] > 0 and facts["bits"] == 64
    assert facts["python"] == ".".join(map(str, sys.version_info[:3])) and facts["modules_missing"] == []
    (tmp_path / "facts.json").write_text(done.stdout, "utf-8")
    assert run(bundle, "--facts", str(tmp_path / "facts.json"), "--json").returncode in (0, 4)


def test_the_free_disk_of_a_place_that_is_not_there_yet_is_its_parents(tmp_path: Path) -> None:
    """The prefix is not made by looking at it."""
    facts = check.read_facts(tmp_path / "a" / "b" / "c")
    assert facts["disk_free_bytes"] and not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("text", "parts"),
    [("3.10.2", (3, 10, 2)), ("3.13.0rc1", (3, 13, 0)), ("2.35-0ubuntu3", (2, 35)), ("", ()), ("x", ())],
)
def test_versions_are_compared_as_numbers(text: str, parts: tuple[int, ...]) -> None:
    """3.9 is older than 3.10."""
    assert numbers(text) == parts
