"""GPTQ's and AWQ's packing, and what the two recipes say before they build."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from packager.formats.int4 import awq, gptq
from packager.formats.int4.build import engine_for
from packager.formats.int4.folder import Form, integers, specs, words
from packager.formats.int4.tuning import linear_modules
from packager.planning.catalog import load_recipe, load_target
from tests.unit.sketch import QWEN_1_5B, QWEN_7B, SMOLLM2, sketch

FORMS = [gptq.FORM, awq.FORM]
DESKTOP, CARD = load_target("desktop_linux_x86_64"), load_target("t4")
assert CARD.gpu
T4 = replace(CARD, runtimes=("vllm",), gpu=replace(CARD.gpu, recipes=("gptq_int4", "awq_int4")))
BERT = {
    "architectures": ["BertModel"], "model_type": "bert", "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(params=FORMS, ids=lambda form: form.name)
def form(request: pytest.FixtureRequest) -> Form:
    chosen: Form = request.param
    return chosen


def refusal(form: Form, config: dict[str, Any], target: Any = DESKTOP, **values: Any) -> str | None:
    recipe = load_recipe(f"{form.name}_int4")
    return recipe.why_not(sketch(config), target, replace(recipe.options(), **values))


def test_eight_inputs_make_a_gptq_word_lowest_first() -> None:
    """As every GPTQ kernel reads them: input 8i + k in bits 4k to 4k + 3 of word i, a column for each output."""
    q = np.arange(16, dtype=np.uint8).reshape(1, 16)
    stored = np.frombuffer(gptq.data("qweight", q, np.ones((1, 1), np.float16), 16), "<u4")
    assert [f"{word:08x}" for word in stored] == ["76543210", "fedcba98"]


def test_eight_outputs_make_an_awq_word_in_its_own_order() -> None:
    """As AutoAWQ packs them: outputs 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits up, a row for each input."""
    q = np.arange(8, dtype=np.uint8).reshape(8, 1)
    [word] = np.frombuffer(awq.data("qweight", q, np.ones((8, 1), np.float16), 1), "<u4")
    assert f"{word:08x}" == "75316420"


def test_zero_points_stand_for_eight() -> None:
    """GPTQ stores one less, AWQ the number itself."""
    q, scales = np.zeros((8, 32), np.uint8), np.ones((8, 1), np.float16)
    assert gptq.data("qzeros", q, scales, 32) == bytes([0x77] * 4)
    assert awq.data("qzeros", q, scales, 32) == bytes([0x88] * 4)


@pytest.mark.parametrize("order", [tuple(range(8)), awq.ORDER])
def test_what_is_packed_is_unpacked(order: tuple[int, ...]) -> None:
    """All sixteen values in all eight places."""
    values = np.random.default_rng(1).integers(0, 16, (24, 64), dtype=np.uint8)
    assert np.array_equal(integers(words(values, order), order), values)


def test_a_loader_gets_the_tuned_weights(form: Form) -> None:
    """scale · (q - 8), exact in float32."""
    random = np.random.default_rng(2)
    q = random.integers(0, 16, (16, 64), dtype=np.uint8)
    scales = random.standard_normal((16, 2)).astype(np.float16)
    kinds = {"I32": "<i4", "F16": "<f2"}
    stored = {
        part: np.frombuffer(form.data(part, q, scales, 32), kinds[kind]).reshape(shape)
        for part, (kind, shape) in form.shapes(16, 64, 32).items()
    }
    expected = (q.astype(np.float32) - 8) * np.repeat(scales.astype(np.float32), 32, axis=1)
    assert np.array_equal(form.weight(stored), expected)


@pytest.mark.parametrize(("config", "group"), [(SMOLLM2, 64), (QWEN_1_5B, 128), (QWEN_7B, 32)])
def test_the_tensors_have_the_shapes_that_vllm_loads(config: dict[str, Any], group: int) -> None:
    """vLLM 0.33's parameters for an unsharded layer (auto_gptq.py, auto_awq.py); all else in 16 bits."""
    checkpoint = sketch(config)
    name = "model.layers.0.mlp.down_proj"
    rows, inputs = checkpoint.tensors[f"{name}.weight"].shape
    zeros_and_scales = {"qzeros": (inputs // group, rows // 8), "scales": (inputs // group, rows)}
    expected = {
        "gptq": {"g_idx": (inputs,), "qweight": (inputs // 8, rows), **zeros_and_scales},
        "awq": {"qweight": (inputs, rows // 8), **zeros_and_scales},
    }
    for form in FORMS:
        by_name = {spec.name: spec for spec in specs(form, checkpoint, linear_modules(checkpoint), group)}
        assert {part: by_name[f"{name}.{part}"].shape for part in form.parts} == expected[form.name]
        assert by_name["model.embed_tokens.weight"].dtype == "F16"
        assert f"{name}.weight" not in by_name


def test_config_has_the_keys_that_vllm_asks_for() -> None:
    """from_config of AutoGPTQConfig and AutoAWQConfig in vLLM 0.33 fails without them."""
    assert gptq.config(32, "x").items() >= {"bits": 4, "group_size": 32, "desc_act": False, "sym": True}.items()
    assert awq.config(32, "x").items() >= {"bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}.items()


def test_a_ragged_group_is_refused_with_the_ones_that_fit(form: Form) -> None:
    """gptqmodel writes 576 inputs in groups of 128 without a word, and vLLM cannot load that."""
    sentence = refusal(form, SMOLLM2, group=128)
    assert sentence is not None and "(576 inputs)" in sentence and "set group=64 or 32" in sentence
    assert refusal(form, SMOLLM2, group=64) is None
    assert refusal(form, QWEN_7B, group=128) is None


def test_an_encoder_and_a_long_context_are_refused(form: Form) -> None:
    """One sentence each."""
    assert "decoder" in str(refusal(form, BERT))
    assert "set context=8192" in str(refusal(form, SMOLLM2, context=10000))


def test_the_target_names_the_engine(form: Form) -> None:
    """vLLM where it runs on the target's GPU, else torch; a target with neither is refused."""
    assert (engine_for(form, DESKTOP), engine_for(form, T4)) == ("transformers", "vllm")
    assert "neither vllm" in str(refusal(form, SMOLLM2, replace(DESKTOP, runtimes=("llamacpp",))))


def test_what_only_vllm_can_is_refused_elsewhere(form: Form) -> None:
    """And what it cannot share between GPUs."""
    assert "this target runs no vLLM" in str(refusal(form, SMOLLM2, tensor_parallel=2))
    assert "9 attention heads" in str(refusal(form, SMOLLM2, T4, tensor_parallel=2))
    assert "in groups of 128" in str(refusal(form, QWEN_1_5B, T4, tensor_parallel=4, group=128))
    assert refusal(form, QWEN_1_5B, T4, tensor_parallel=4, group=64) is None
    assert "gpu_share=2.0" in str(refusal(form, SMOLLM2, T4, gpu_share=2.0))


def test_the_estimate_is_the_file(form: Form) -> None:
    """SmolLM2 at group 32: 118 MB with its 16-bit embedding, tied, so all of it is read for a token."""
    recipe = load_recipe(f"{form.name}_int4")
    estimate = recipe.estimate(sketch(SMOLLM2), DESKTOP, recipe.options())
    assert 117e6 < estimate.artifact_bytes < 120e6
    assert estimate.read_per_token_bytes == estimate.artifact_bytes
    on_gpus = recipe.estimate(sketch(QWEN_7B), T4, replace(recipe.options(), tensor_parallel=4))
    assert on_gpus.load_bytes == on_gpus.artifact_bytes // 4
