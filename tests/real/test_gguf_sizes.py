"""Predicted types and sizes against files that llama.cpp itself converted and quantized."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from packager.checkpoint.checkpoint import open_checkpoint
from packager.core.progress import Silent
from packager.core.store import Cost
from packager.formats.gguf import llamacpp
from packager.formats.gguf.sizes import IMATRIX_QUANTS, QUANTS, plan_tensors, predict

needs_compiled = pytest.mark.skipif(not llamacpp.compiled(), reason="the extra packager[llamacpp] is not installed")

# Rows that 256 divides and grouped queries; rows it does not divide and a tied head; the 80 layers of a 70B.
SHAPES = {
    "grouped": {"layers": 28, "hidden": 256, "ffn": 512, "heads": 8, "kv_heads": 2, "vocab": 512, "tied": False},
    "narrow": {"layers": 30, "hidden": 192, "ffn": 512, "heads": 6, "kv_heads": 6, "vocab": 512, "tied": True},
    "seventy": {"layers": 80, "hidden": 256, "ffn": 256, "heads": 8, "kv_heads": 1, "vocab": 256, "tied": False},
}


def hf_shapes(size: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Qwen2 checkpoint."""
    hidden, kv = size["hidden"], size["hidden"] // size["heads"] * size["kv_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (size["vocab"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not size["tied"]:
        shapes["lm_head.weight"] = (size["vocab"], hidden)
    for layer in range(size["layers"]):
        rows = {"q_proj": hidden, "k_proj": kv, "v_proj": kv}
        at = f"model.layers.{layer}."
        shapes |= {f"{at}self_attn.{name}.weight": (count, hidden) for name, count in rows.items()}
        shapes |= {f"{at}self_attn.{name}.bias": (count,) for name, count in rows.items()}
        shapes |= {f"{at}mlp.{name}.weight": (size["ffn"], hidden) for name in ("gate_proj", "up_proj")}
        shapes |= {f"{at}{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes[f"{at}self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"{at}mlp.down_proj.weight"] = (hidden, size["ffn"])
    return shapes


@pytest.fixture(scope="module", params=SHAPES)
def unquantized(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A GGUF of zeros in that shape: llama.cpp chooses types by name, shape and layer, not by value."""
    import gguf

    size = SHAPES[request.param]
    path = tmp_path_factory.mktemp("sizes") / f"{request.param}.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(size["layers"])
    writer.add_context_length(1024)
    writer.add_embedding_length(size["hidden"])
    writer.add_feed_forward_length(size["ffn"])
    writer.add_head_count(size["heads"])
    writer.add_head_count_kv(size["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    for tensor in _plan(size, "F16", imatrix=False):
        writer.add_tensor(tensor.name, np.zeros(tensor.shape, np.float32 if tensor.type == "F32" else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, size


def _plan(size: dict[str, Any], quant: str, *, imatrix: bool) -> Any:
    return plan_tensors(
        hf_shapes(size), quant, imatrix=imatrix, layers=size["layers"], heads=size["heads"], kv_heads=size["kv_heads"]
    )


@needs_compiled
@pytest.mark.parametrize(
    ("quant", "imatrix"), [*((q, False) for q in QUANTS if q != "BF16"), *((q, True) for q in IMATRIX_QUANTS)]
)
def test_every_tensor_gets_the_predicted_type(
    unquantized: tuple[Path, dict[str, Any]], quant: str, imatrix: bool, tmp_path: Path
) -> None:
    """Type and bytes of each tensor are those that llama.cpp wrote."""
    import gguf

    from packager.workers.quantize_llama import main as quantize

    path, size = unquantized
    expected = _plan(size, quant, imatrix=imatrix)
    matrix = None
    if imatrix:
        matrix = tmp_path / "imatrix.npz"
        rows: dict[str, Any] = {t.name: np.ones(t.shape[-1], np.float32) for t in expected if t.name.startswith("blk.")}
        np.savez(matrix, **rows)
    output = tmp_path / "out.gguf"
    job = {"source": str(path), "output": str(output), "file_type": llamacpp.FILE_TYPES[quant], "threads": 2}
    assert quantize({**job, "imatrix": str(matrix) if matrix else None}) == 0
    found = {t.name: (t.tensor_type.name, int(t.n_bytes)) for t in gguf.GGUFReader(output).tensors}
    assert found == {t.name: (t.type, t.nbytes) for t in expected}


def _check_size(folder: Path, quant: str, path: Path, cache: Path, *, imatrix: bool = False) -> None:
    checkpoint = open_checkpoint(str(folder), progress=Silent(), cache=cache)
    predicted = predict(checkpoint, quant, imatrix=imatrix)
    assert math.isclose(predicted.bytes, path.stat().st_size, rel_tol=0.0005), f"{quant}: {predicted.bytes}"
    assert dict(sorted(predicted.types.items())) == llamacpp.tensor_types(path)


def test_the_demo_s_file_is_met(smollm2: Path, q8_bundle: Path, tmp_path: Path) -> None:
    """Header, tokenizer and tensors together within half a permille (the promise is 3 %)."""
    _check_size(smollm2, "Q8_0", q8_bundle / "model" / "model.gguf", tmp_path)


@needs_compiled
def test_a_k_quant_with_imatrix_is_met(smollm2: Path, q4km_bundle: Path, tmp_path: Path) -> None:
    """The same for mixed types."""
    _check_size(smollm2, "Q4_K_M", q4km_bundle / "model" / "model.gguf", tmp_path, imatrix=True)


def test_the_r1_tokenizer_is_counted(random_qwen2: Path, tmp_path: Path) -> None:
    """A small Qwen2 with the real tokenizer of 151 thousand tokens: 6 of its 167 MB are header."""
    whole = tmp_path / "whole.gguf"
    llamacpp.convert(random_qwen2, "random-qwen2", "BF16", whole, Silent(), Cost())
    _check_size(random_qwen2, "BF16", whole, tmp_path / "cache")
