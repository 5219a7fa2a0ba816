"""GPTQ's packing, and what the recipe says before it builds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from packager import gptq
from packager.catalog import load_recipe, load_target
from tests.unit.sketch import QWEN_1_5B, QWEN_7B, SMOLLM2, sketch

RECIPE = load_recipe("gptq_int4")
TARGET = load_target("t4")


def options(**values: Any) -> Any:
    return replace(RECIPE.options(), **values)


def test_eight_rows_make_a_word_lowest_first() -> None:
    """As every GPTQ kernel reads them: row 8i + k in bits 4k to 4k + 3."""
    values = np.arange(16, dtype=np.uint8).reshape(16, 1)
    assert [f"{word:08x}" for word in gptq.pack(values).view(np.uint32)[:, 0]] == ["76543210", "fedcba98"]


def test_what_is_packed_is_unpacked() -> None:
    """All sixteen values in all eight places."""
    values = np.random.default_rng(1).integers(0, 16, (64, 24), dtype=np.uint8)
    assert np.array_equal(gptq.unpack(gptq.pack(values)), values)


@pytest.mark.parametrize(("config", "group"), [(SMOLLM2, 64), (QWEN_1_5B, 128), (QWEN_7B, 32)])
def test_the_tensors_have_the_shapes_that_vllm_loads(config: dict[str, Any], group: int) -> None:
    """Words of eight inputs, a scale for a group, zero points of eight outputs; all else in 16 bits."""
    checkpoint = sketch(config)
    from packager.tuning import linear_modules

    found = {spec.name: spec for spec in gptq.specs(checkpoint, linear_modules(checkpoint), group)}
    rows, inputs = checkpoint.tensors["model.layers.0.mlp.down_proj.weight"].shape
    shapes = {part: found[f"model.layers.0.mlp.down_proj.{part}"].shape for part in gptq.PARTS}
    assert shapes == {
        "g_idx": (inputs,), "qweight": (inputs // 8, rows), "qzeros": (inputs // group, rows // 8),
        "scales": (inputs // group, rows),
    }  # fmt: skip
    assert found["model.embed_tokens.weight"].dtype == "F16"
    assert "model.layers.0.mlp.down_proj.weight" not in found


def test_a_ragged_group_is_refused_with_the_ones_that_fit() -> None:
    """gptqmodel writes 576 inputs in groups of 128 without a word, and vLLM cannot load that."""
    refusal = RECIPE.why_not(sketch(SMOLLM2), TARGET, options(group=128))
    assert refusal is not None and "(576 inputs)" in refusal and "set group=64 or 32" in refusal
    assert RECIPE.why_not(sketch(SMOLLM2), TARGET, options(group=64)) is None
    assert RECIPE.why_not(sketch(QWEN_7B), TARGET, options(group=128)) is None


def test_an_encoder_and_a_long_context_are_refused() -> None:
    """One sentence each."""
    assert "decoder" in str(RECIPE.why_not(sketch(BERT), TARGET, options()))
    assert "set context=8192" in str(RECIPE.why_not(sketch(SMOLLM2), TARGET, options(context=10000)))


BERT = {
    "architectures": ["BertModel"], "model_type": "bert", "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100, "max_position_embeddings": 64,
}  # fmt: skip


def test_the_estimate_is_the_file() -> None:
    """SmolLM2 at group 32: 118 MB with its 16-bit embedding, tied, so all of it is read for a token."""
    found = RECIPE.estimate(sketch(SMOLLM2), TARGET, options())
    assert 117e6 < found.artifact_bytes < 120e6
    assert found.read_per_token_bytes == found.artifact_bytes
