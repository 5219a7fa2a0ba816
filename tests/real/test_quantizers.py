"""gguf-py's quantizers write the files that llama.cpp's writes, byte for byte: without that, two builds of one thing
could differ.

One exception is known and stated: the head of a Q4_0 file is Q6_K in llama.cpp's where rows are divisible by 256, a
type that gguf-py cannot write; there it is Q8_0.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from packager.core.errors import InputError, PackagerError
from packager.core.progress import Silent
from packager.core.store import Cost
from packager.formats.gguf import llamacpp

pytestmark = pytest.mark.skipif(
    not llamacpp.compiled(), reason="llama-cpp-python is not installed: `make test` compiles it"
)
QUIET = Silent()


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
    """The same file by llama.cpp and by gguf-py."""
    ours, theirs = folder / "numpy.gguf", folder / "llama.gguf"
    llamacpp.quantize(source, kind, theirs, QUIET, Cost(), use_compiled=True)
    cost = Cost()
    llamacpp.quantize(source, kind, ours, QUIET, cost, use_compiled=False)
    assert cost.peak_rss_bytes < 1.5e9
    return ours, theirs


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_the_whole_file_is_the_same(whole: tuple[str, Path], kind: str, tmp_path: Path) -> None:
    """Header, order, padding and every block of F16, BF16 and Q8_0."""
    ours, theirs = both(whole[1], kind, tmp_path)
    assert digest(ours) == digest(theirs)


def test_q4_0_differs_in_the_head_only_and_only_where_llama_cpp_takes_q6_k(
    whole: tuple[str, Path], tmp_path: Path
) -> None:
    """At 576 columns the files are equal; at 256 the head is Q6_K there and Q8_0 here, and all else is equal."""
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


def test_bf16_and_float32_sources_round_alike(random_qwen2: Path, tmp_path: Path) -> None:
    """From a float32 GGUF, where BF16 and F16 really have to round, the files are the same too."""
    llamacpp.convert(random_qwen2, "model", "F32", tmp_path / "whole.gguf", QUIET, Cost())
    for kind in ("BF16", "F16"):
        ours, theirs = both(tmp_path / "whole.gguf", kind, tmp_path)
        assert digest(ours) == digest(theirs), kind


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
    import json

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
    """Both quantizers fail with an error of ours, not with a crash of the build."""
    (tmp_path / "bad.gguf").write_bytes(b"not a GGUF at all")
    for use_compiled in (True, False):
        with pytest.raises(PackagerError, match=r"quantizing to Q8_0|cannot be read: its first bytes are b'not '"):
            llamacpp.quantize(
                tmp_path / "bad.gguf", "Q8_0", tmp_path / "out.gguf", QUIET, Cost(), use_compiled=use_compiled
            )
