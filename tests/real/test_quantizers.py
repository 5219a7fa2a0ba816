"""ggml's quantizers in the xllamacpp wheel write what llama.cpp's compiled quantizer wrote, and what gguf-py writes.

The digests are of the compiled llama-cpp-python that the converter comes from; benchmarks/quantizers.py recorded them
and compares whole files. They hold on x86-64: another processor may add in another order.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.quantizers import sample
from packager.core.errors import InputError, PackagerError
from packager.core.progress import Silent
from packager.core.store import Cost
from packager.formats.gguf import llamacpp
from packager.tensors.gguf_header import read_header
from packager.workers import quantize as child
from tests.conftest import ROOT

QUIET = Silent()
LIBRARY = llamacpp.library()
DIGESTS: dict[str, str] = json.loads((ROOT / "tests" / "data" / "ggml_digests.json").read_text(encoding="utf-8"))
needs_library = pytest.mark.skipif(LIBRARY is None, reason="this system's xllamacpp exports no C functions")


@needs_library
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the digests are those of x86-64")
@pytest.mark.parametrize("kind", [name for name in DIGESTS if name != "rows"])
def test_blocks_are_those_of_the_compiled_llama_cpp(kind: str) -> None:
    """Every type that weights can be stored in, without and with an importance matrix."""
    rows, columns = sample()
    assert hashlib.sha256(rows).hexdigest() == DIGESTS["rows"]
    name, _, matrix = kind.partition("+")
    encode = child.ggml_encoder(str(LIBRARY))
    made = child.as_type(name, rows, columns if matrix else None, encode)
    assert hashlib.sha256(np.ascontiguousarray(made)).hexdigest() == DIGESTS[kind]


@pytest.fixture(scope="module", params=["smollm2", "random_qwen2"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The unquantized GGUF of each checkpoint, in the checkpoint's own bf16."""
    folder = tmp_path_factory.mktemp(request.param)
    llamacpp.convert(request.getfixturevalue(request.param), "model", "BF16", folder / "whole.gguf", QUIET, Cost())
    yield request.param, folder / "whole.gguf"
    (folder / "whole.gguf").unlink()


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def both(source: Path, kind: str, folder: Path) -> tuple[Path, Path]:
    """The same file by gguf-py and by ggml."""
    ours, theirs = folder / "numpy.gguf", folder / "ggml.gguf"
    for library, path in ((None, ours), (LIBRARY, theirs)):
        cost = Cost()
        llamacpp.quantize(source, kind, path, QUIET, cost, library=library)
        assert cost.peak_rss_bytes < 100e6  # SmolLM2's embedding alone has 113 MB as float32
    return ours, theirs


@needs_library
@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_the_whole_file_is_the_same(whole: tuple[str, Path], kind: str, tmp_path: Path) -> None:
    """Header, order, padding and every block of F16, BF16 and Q8_0."""
    ours, theirs = both(whole[1], kind, tmp_path)
    assert digest(ours) == digest(theirs)


@needs_library
def test_q4_0_differs_in_the_head_only_and_only_where_llama_cpp_takes_q6_k(
    whole: tuple[str, Path], tmp_path: Path
) -> None:
    """At 576 columns the files are equal; at 256 the head is ggml's Q6_K and gguf-py's Q8_0, and all else is equal."""
    import gguf

    ours, theirs = both(whole[1], "Q4_0", tmp_path)
    if whole[0] == "smollm2":
        assert digest(ours) == digest(theirs)
        return
    a = {tensor.name: tensor for tensor in gguf.GGUFReader(ours).tensors}
    b = {tensor.name: tensor for tensor in gguf.GGUFReader(theirs).tensors}
    assert list(a) == list(b)
    differing = [
        name
        for name in a
        if a[name].tensor_type != b[name].tensor_type or a[name].data.tobytes() != b[name].data.tobytes()
    ]
    assert differing == ["output.weight"]
    assert (a["output.weight"].tensor_type.name, b["output.weight"].tensor_type.name) == ("Q8_0", "Q6_K")
    assert llamacpp.tensor_types(ours) == {"F32": 21, "Q4_0": 29, "Q8_0": 1}


@pytest.mark.parametrize("kind", ["BF16", "F16"])
def test_float32_is_rounded_as_the_converter_does(kind: str, random_qwen2: Path, tmp_path: Path) -> None:
    """By way of a float32 GGUF the tensors are those that the converter writes in that type at once."""
    wide, direct, ours = (tmp_path / f"{name}.gguf" for name in ("wide", "direct", "ours"))
    llamacpp.convert(random_qwen2, "model", "F32", wide, QUIET, Cost())
    llamacpp.convert(random_qwen2, "model", kind, direct, QUIET, Cost())
    llamacpp.quantize(wide, kind, ours, QUIET, Cost(), library=LIBRARY)
    assert tensors(ours) == tensors(direct)


def tensors(path: Path) -> dict[str, tuple[str, str]]:
    """Name -> type and digest."""
    header, data = read_header(path), np.memmap(path, np.uint8, "r")
    found = {}
    for tensor in header.tensors:
        start = header.data_start + tensor.offset
        found[tensor.name] = (tensor.type, hashlib.sha256(data[start : start + tensor.nbytes]).hexdigest())
    return found


def test_types_and_metadata_are_read_from_the_header(whole: tuple[str, Path]) -> None:
    """What the report names comes from the file."""
    types = llamacpp.tensor_types(whole[1])
    assert types["BF16"] == {"smollm2": 211, "random_qwen2": 30}[whole[0]]
    architecture = {"smollm2": "llama", "random_qwen2": "qwen2"}[whole[0]]
    assert llamacpp.architecture(whole[1]) == architecture


def test_the_converted_file_is_the_converters_own(random_qwen2: Path, tmp_path: Path) -> None:
    """Ours, with tensors put in place group by group, and the pinned script by itself: the same bytes."""
    ours, bare = tmp_path / "ours.gguf", tmp_path / "bare.gguf"
    llamacpp.convert(random_qwen2, "model", "BF16", ours, QUIET, Cost())
    script = llamacpp.sources(QUIET) / "convert_hf_to_gguf.py"
    command = [sys.executable, script, random_qwen2, "--outfile", bare, "--outtype", "bf16", "--model-name", "model"]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": ""})
    assert digest(ours) == digest(bare)


def test_an_architecture_that_the_converter_does_not_know(smollm2: Path, tmp_path: Path) -> None:
    """Its refusal becomes one sentence, and no half file has the output's name."""
    folder = tmp_path / "strange"
    folder.mkdir()
    for file in smollm2.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(
        json.dumps(config | {"architectures": ["StrangeForCausalLM"]}), encoding="utf-8"
    )
    with pytest.raises(InputError, match="does not know this architecture"):
        llamacpp.convert(folder, "strange", "BF16", tmp_path / "out.gguf", QUIET, Cost())
    assert not (tmp_path / "out.gguf").exists()


def test_a_source_that_is_no_gguf(tmp_path: Path) -> None:
    """An error of ours, not a crash of the build."""
    (tmp_path / "bad.gguf").write_bytes(b"not a GGUF at all")
    with pytest.raises(PackagerError, match=r"cannot be read: its first bytes are b'not '"):
        llamacpp.quantize(tmp_path / "bad.gguf", "Q8_0", tmp_path / "out.gguf", QUIET, Cost(), library=LIBRARY)
