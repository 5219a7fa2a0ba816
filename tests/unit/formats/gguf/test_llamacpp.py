"""Quantizing a small GGUF file with the child that a build runs: types, file type, and who wrote the blocks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")

from packager.core.errors import ToolError  # noqa: E402 - gguf may be missing
from packager.core.progress import Silent  # noqa: E402
from packager.core.store import Cost  # noqa: E402
from packager.formats.gguf import llamacpp  # noqa: E402
from packager.tensors.gguf_header import read_header  # noqa: E402

needs_library = pytest.mark.skipif(llamacpp.library() is None, reason="this system's xllamacpp exports no C functions")
MATRICES = ("blk.0.attn_q.weight", "blk.0.ffn_down.weight", "output.weight", "token_embd.weight")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Four matrices and a norm, in float32."""
    path = tmp_path / "whole.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(8)
    writer.add_head_count(4)
    writer.add_file_type(0)
    random = np.random.default_rng(5)
    for name in (*MATRICES, "output_norm.weight"):
        shape = (256,) if "norm" in name else (4, 256)
        writer.add_tensor(name, random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def types(path: Path) -> list[str]:
    """Types of MATRICES in a file."""
    found = {tensor.name: tensor.type for tensor in read_header(path).tensors}
    return [found[name] for name in MATRICES]


@needs_library
def test_a_file_has_the_types_of_the_rule_and_says_so(source: Path, tmp_path: Path) -> None:
    """The head by its own rule; the file type last, and once."""
    cost = Cost()
    llamacpp.quantize(source, "Q4_K_S", tmp_path / "out.gguf", Silent(), cost, library=llamacpp.library())
    assert types(tmp_path / "out.gguf") == ["Q4_K", "Q5_K", "Q6_K", "Q4_K"]
    header = read_header(tmp_path / "out.gguf")
    assert header.problems() == []
    assert list(header.values)[-2:] == ["general.quantization_version", "general.file_type"]
    assert header.values["general.file_type"] == 14 and header.values["llama.block_count"] == 8
    assert cost.peak_rss_bytes > 0


@needs_library
def test_types_of_the_users_own_go_into_the_file(source: Path, tmp_path: Path) -> None:
    """Any ggml type by tensor name, whatever the file is called."""
    chosen = {"blk.0.attn_q.weight": "Q6_K", "token_embd.weight": "IQ4_XS"}
    output = tmp_path / "out.gguf"
    llamacpp.quantize(source, "Q4_K_M", output, Silent(), Cost(), library=llamacpp.library(), chosen=chosen)
    assert types(output) == ["Q6_K", "Q6_K", "Q6_K", "IQ4_XS"]


def test_gguf_py_writes_q4_0_with_another_head(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no library: Q8_0 for the head, which gguf-py can write."""
    monkeypatch.setattr(llamacpp, "sources", lambda progress: tmp_path)  # the installed gguf-py does as well here
    llamacpp.quantize(source, "Q4_0", tmp_path / "out.gguf", Silent(), Cost(), library=None)
    assert types(tmp_path / "out.gguf") == ["Q4_0", "Q4_0", "Q8_0", "Q4_0"]
    with pytest.raises(ToolError, match="Q4_K needs the C functions"):
        llamacpp.quantize(source, "Q4_K_M", tmp_path / "out.gguf", Silent(), Cost(), library=None)


def test_a_library_is_a_file_that_exports_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux and macOS have xllamacpp.abi3.so; Windows' xllamacpp.pyd exports its init alone."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "xllamacpp").mkdir()
    (tmp_path / "xllamacpp" / "__init__.py").touch()
    (tmp_path / "xllamacpp" / "xllamacpp.pyd").touch()
    assert llamacpp.library() is None
    (tmp_path / "xllamacpp" / "xllamacpp.abi3.so").touch()
    assert llamacpp.library() == tmp_path / "xllamacpp" / "xllamacpp.abi3.so"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert llamacpp.library() is None


def test_a_file_without_dimensions_is_refused(tmp_path: Path) -> None:
    """The rule goes by layers and heads."""
    writer = gguf.GGUFWriter(tmp_path / "whole.gguf", "llama")
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ToolError, match=r"does not declare llama\.block_count"):
        llamacpp.quantize(tmp_path / "whole.gguf", "Q8_0", tmp_path / "out.gguf", Silent(), Cost(), library=None)
