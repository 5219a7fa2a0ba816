"""gguf-py's side of quantization: which type each tensor gets, in which order, and what cannot be held is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

gguf = pytest.importorskip("gguf")

from packager.workers import quantize_numpy as child  # noqa: E402 - it imports gguf at once, as scripts may

TYPES = gguf.GGMLQuantizationType


def tensor(name: str, *shape: int, kind: str = "BF16") -> dict[str, Any]:
    return {"name": name, "shape": list(shape), "type": kind}


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("blk.0.attn_q.weight", (576, 576), "Q4_0"),
        ("blk.0.ffn_down.weight", (1536, 576), "Q4_0"),
        ("token_embd.weight", (576, 49152), "Q4_0"),
        ("output.weight", (576, 49152), "Q8_0"),
        ("blk.0.attn_norm.weight", (576,), "F32"),
        ("blk.0.attn_q_norm.weight", (64, 2), "F32"),
        ("blk.0.attn_q.bias", (576,), "F32"),
        ("blk.0.attn_k.weight", (40, 576), "F16"),
    ],
)
def test_each_tensor_gets_llama_cpps_type(name: str, shape: tuple[int, ...], expected: str) -> None:
    """Matrices are quantized, norms and biases stay, the head has its own type, rows no block divides stay F16."""
    kind = "F32" if "norm" in name or "bias" in name else "BF16"
    assert child.wanted_type(tensor(name, *shape, kind=kind), "Q4_0", "Q8_0", tied=False).name == expected


def test_a_tied_embedding_is_the_head() -> None:
    """Where there is no output tensor the embedding does its work, and is given the head's type."""
    assert child.wanted_type(tensor("token_embd.weight", 576, 100), "Q4_0", "Q8_0", tied=True).name == "Q8_0"


def test_the_order_is_by_layer_then_name() -> None:
    """Layer 10 comes after layer 2, and what belongs to no layer comes first."""
    names = ["blk.10.a.weight", "blk.2.b.weight", "token_embd.weight", "blk.2.a.weight", "output_norm.weight"]
    assert sorted(names, key=child.order) == [
        "output_norm.weight",
        "token_embd.weight",
        "blk.2.a.weight",
        "blk.2.b.weight",
        "blk.10.a.weight",
    ]


def test_bf16_is_read_as_float32() -> None:
    """The sixteen bits are the upper half of a float32."""
    values = np.array([1.0, -2.5, 3.140625, 0.0], dtype=np.float32)
    halves = (values.view(np.uint32) >> 16).astype(np.uint16)
    floats = child.as_float(halves.view(np.uint8), TYPES.BF16, 1, 3)
    assert floats.tolist() == [-2.5, 3.140625]


@pytest.mark.parametrize(("kind", "size"), [("Q8_0", 34), ("Q4_0", 18)])
def test_blocks_have_their_size_and_stay_near(kind: str, size: int) -> None:
    """32 values a block; what comes back differs by at most half a step."""
    values = np.random.default_rng(1).standard_normal(64).astype(np.float32)
    data = child.convert(TYPES[kind], values)
    assert len(data) == 2 * size
    back = gguf.quants.dequantize(np.frombuffer(data, np.uint8).reshape(1, -1), TYPES[kind])
    assert np.abs(back.reshape(-1) - values).max() < np.abs(values).max() / (127 if kind == "Q8_0" else 7)


def test_a_weight_that_f16_cannot_hold_is_refused() -> None:
    """Infinity would be written without a word; it is an error that names the weight."""
    with pytest.raises(SystemExit, match="70000"):
        child.convert(TYPES.F16, np.array([1.0, 70000.0], dtype=np.float32))


HEADS, HEAD, INPUTS = 4, 6, 64


def tuned(folder: Path, group: int) -> tuple[dict[str, Any], np.ndarray[Any, Any]]:
    """A tuned module of q's shape as workers/tune.py stores it, and the weights that it stands for."""
    random = np.random.default_rng(3)
    integers = random.integers(0, 16, (HEADS * HEAD, INPUTS), dtype=np.uint8)
    scales = (random.standard_normal((HEADS * HEAD, INPUTS // group)) / 50).astype(np.float16)
    save_file({"m.q": integers[:, 0::2] | (integers[:, 1::2] << 4), "m.scales": scales}, folder / "layer.safetensors")
    weights = (integers.astype(np.float32) - 8) * np.repeat(scales.astype(np.float32), group, axis=1)
    return {"file": str(folder / "layer.safetensors"), "module": "m", "group": group, "heads": HEADS}, weights


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("interleaved", [False, True])
def test_tuned_integers_are_packed_as_they_are(group: int, interleaved: bool, tmp_path: Path) -> None:
    """gguf-py reads back the very numbers, in the row order of the GGUF, from a source that is only near them."""
    spec, weights = tuned(tmp_path, group)
    if interleaved:
        weights = weights.reshape(HEADS, 2, HEAD // 2, INPUTS).swapaxes(1, 2).reshape(weights.shape)
    source = weights * np.random.default_rng(4).uniform(0.9, 1.1, weights.shape).astype(np.float32)
    data = child.tuned_blocks(spec, source, "blk.0.attn_q.weight")
    back = gguf.quants.dequantize(np.frombuffer(data, np.uint8).reshape(len(weights), -1), TYPES.Q4_0)
    assert np.array_equal(back, weights)


def test_tuned_integers_of_another_model_are_refused(tmp_path: Path) -> None:
    """Weights that are near the source's in no order of rows, and a shape that is not the tensor's."""
    spec, weights = tuned(tmp_path, 32)
    with pytest.raises(SystemExit, match="not those of the GGUF"):
        child.tuned_blocks(spec, weights[::-1], "blk.0.attn_q.weight")
    with pytest.raises(SystemExit, match=r"blk\.0\.attn_q\.weight is"):
        child.tuned_blocks(spec, weights[1:], "blk.0.attn_q.weight")
