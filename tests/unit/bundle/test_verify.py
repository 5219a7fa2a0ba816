"""Verification finds everything that is wrong with a bundle, and a truncated model even under fresh sums."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from packager.bundle.assemble import assemble
from packager.bundle.verify import verify
from packager.core.errors import VerifyFailed
from packager.core.progress import Silent
from packager.tensors.gguf_header import BadHeader, read_header
from tests.unit.bundle.parts import contents, gguf


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A good bundle."""
    return assemble(contents(tmp_path / "in"), tmp_path / "out", Silent()).path


def listed_problems(bundle: Path) -> list[tuple[str, str]]:
    """(kind, path) of every problem."""
    return [(problem.kind, problem.path) for problem in verify(bundle).problems]


def renew(bundle: Path, *changed: str) -> None:
    """New entries in manifest and sums for changed files, as somebody would make who repairs sums by hand."""
    manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
    for entry in manifest["files"]:
        if entry["path"] in changed:
            body = (bundle / entry["path"]).read_bytes()
            entry.update(bytes=len(body), sha256=hashlib.sha256(body).hexdigest())
    text = json.dumps(manifest)
    (bundle / "manifest.json").write_text(text, "utf-8")
    lines = [f"{entry['sha256']}  {entry['path']}\n" for entry in manifest["files"]]
    lines.append(f"{hashlib.sha256(text.encode()).hexdigest()}  manifest.json\n")
    (bundle / "SHA256SUMS").write_text("".join(lines), "utf-8")


def test_a_good_bundle_is_good(bundle: Path) -> None:
    """And the model's facts come from its own header."""
    report = verify(bundle)
    assert report.ok and report.model["tensor_types"] == {"F32": 2} and report.model["architecture"] == "llama"
    report.raise_if_bad()
    assert report.as_dict()["ok"] is True


def test_everything_that_is_wrong_is_reported_at_once(bundle: Path, tmp_path: Path) -> None:
    """Changed, missing, added, linked and escaping files in one report."""
    (bundle / "README.md").write_text("other", "utf-8")
    (bundle / "install.sh").unlink()
    (bundle / "model" / "extra.bin").write_bytes(b"x")
    (bundle / "model" / "tokenizer.json").unlink()
    (bundle / "model" / "tokenizer.json").symlink_to("/etc/passwd")
    (bundle / "runtime" / "loop").symlink_to(bundle)
    os.mkfifo(bundle / "pipe")
    problems = listed_problems(bundle)
    assert set(problems) == {
        ("changed", "README.md"),
        ("missing", "install.sh"),
        ("extra", "model/extra.bin"),
        ("link", "model/tokenizer.json"),
        ("link", "runtime/loop"),
        ("link", "pipe"),
    }
    report = verify(bundle)
    with pytest.raises(VerifyFailed, match="6 problems") as caught:
        report.raise_if_bad()
    assert report.problems[0].path in caught.value.why


def test_one_flipped_bit_is_a_problem(bundle: Path) -> None:
    """Same size, other digest."""
    model = bundle / "model" / "model.gguf"
    body = bytearray(model.read_bytes())
    body[-1] ^= 1
    model.write_bytes(body)
    assert listed_problems(bundle) == [("changed", "model/model.gguf")]


def test_a_truncated_model_with_new_sums_is_a_problem(bundle: Path) -> None:
    """The sums are right, the header knows better."""
    gguf(bundle / "model" / "model.gguf", cut=100)
    renew(bundle, "model/model.gguf")
    report = verify(bundle)
    assert [problem.kind for problem in report.problems] == ["model"] and "cut off" in report.problems[0].detail


def test_a_changed_manifest_differs_from_the_sums(bundle: Path) -> None:
    """A manifest that was edited but still keeps to the schema."""
    manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
    manifest["run"]["context"] = 999
    (bundle / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    assert listed_problems(bundle) == [("changed", "manifest.json")]


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("0" * 64 + "  ../../etc/passwd\n", "unsafe"),
        ("nonsense\n", "unsafe"),
        ("0" * 64 + "  nowhere\n", "sums"),
        ("0" * 64 + "  README.md\n", "sums"),
    ],
)
def test_sums_that_cannot_be_trusted_are_reported(bundle: Path, line: str, kind: str) -> None:
    """Escaping paths, nonsense, unknown and repeated files."""
    with (bundle / "SHA256SUMS").open("a") as stream:
        stream.write(line)
    assert kind in {problem[0] for problem in listed_problems(bundle)}


def test_lost_sums_are_missing(bundle: Path) -> None:
    """The file of the sums itself."""
    (bundle / "SHA256SUMS").unlink()
    assert ("missing", "SHA256SUMS") in listed_problems(bundle)


def test_a_manifest_without_schema_ends_the_verification_with_its_reason(bundle: Path) -> None:
    """There is nothing to compare with."""
    (bundle / "manifest.json").write_text("{}", "utf-8")
    assert listed_problems(bundle) == [("schema", "manifest.json")]


def test_a_run_that_names_a_file_outside_the_list_is_reported(bundle: Path) -> None:
    """The box would not find it."""
    manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
    manifest["run"]["chat_template"] = "model/none.jinja"
    (bundle / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    assert ("missing", "model/none.jinja") in listed_problems(bundle)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(version=9), "version 9"),
        (dict(kind=99), "unknown type 99"),
        (dict(kind=8, row=40), "cannot hold"),
        (dict(cut=10_000), "ends inside its header"),
    ],
)
def test_a_wrong_header_is_named(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    """Version, type, row length, and a file that ends in its header."""
    path = gguf(tmp_path / "x.gguf", **{key: value for key, value in change.items() if key != "cut"})
    if "cut" in change:
        path.write_bytes(path.read_bytes()[:90])
    with pytest.raises(BadHeader, match=says):
        read_header(path)


def test_garbage_and_absurd_counts_are_refused_without_reading_on(tmp_path: Path) -> None:
    """A header that promises terabytes costs nothing."""
    path = tmp_path / "x.gguf"
    for body in (
        b"",
        b"GG",
        b"PK\x03\x04" * 10,
        b"GGUF\x03\0\0\0" + b"\xff" * 40,
        b"GGUF\x03\0\0\0" + (0).to_bytes(8, "little") + (1).to_bytes(8, "little") + b"\xff" * 7 + b"\x7f",
    ):
        path.write_bytes(body)
        with pytest.raises(BadHeader):
            read_header(path)


def test_the_header_of_a_quantized_file_gives_types_and_places(tmp_path: Path) -> None:
    """Q8_0: 34 bytes for 32 weights."""
    header = read_header(gguf(tmp_path / "x.gguf", kind=8, rows=16, row=64))
    assert header.type_counts() == {"Q8_0": 2} and header.tensors[1].offset == 16 * 2 * 34 == header.tensors[0].nbytes
    assert header.problems() == []
