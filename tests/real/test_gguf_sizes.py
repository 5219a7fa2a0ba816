"""Predicted types and sizes against files that were really built."""

from __future__ import annotations

import math
from pathlib import Path

from packager.checkpoint.checkpoint import open_checkpoint
from packager.core.progress import Silent
from packager.core.store import Cost
from packager.formats.gguf import llamacpp
from packager.formats.gguf.sizes import predict


def _check_size(folder: Path, quant: str, path: Path, cache: Path, *, imatrix: bool = False) -> None:
    checkpoint = open_checkpoint(str(folder), progress=Silent(), cache=cache)
    predicted = predict(checkpoint, quant, imatrix=imatrix)
    assert math.isclose(predicted.bytes, path.stat().st_size, rel_tol=0.0005), f"{quant}: {predicted.bytes}"
    assert dict(sorted(predicted.types.items())) == llamacpp.tensor_types(path)


def test_a_q8_0_file_has_its_predicted_size(smollm2: Path, q8_bundle: Path, tmp_path: Path) -> None:
    """Header, tokenizer and tensors together within half a permille (the promise is 3 %)."""
    _check_size(smollm2, "Q8_0", q8_bundle / "model" / "model.gguf", tmp_path)


def test_a_k_quant_with_imatrix_is_met(smollm2: Path, q4km_bundle: Path, tmp_path: Path) -> None:
    """The same for mixed types: what the demo builds."""
    _check_size(smollm2, "Q4_K_M", q4km_bundle / "model" / "model.gguf", tmp_path, imatrix=True)


def test_the_r1_tokenizer_is_counted(random_qwen2: Path, tmp_path: Path) -> None:
    """A small Qwen2 with the real tokenizer of 151 thousand tokens: 6 of its 167 MB are header."""
    whole = tmp_path / "whole.gguf"
    llamacpp.convert(random_qwen2, "random-qwen2", "BF16", whole, Silent(), Cost())
    _check_size(random_qwen2, "BF16", whole, tmp_path / "cache")
