"""What tensorrt_engine says of language models before it builds: where, how large, and what serves them elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from packager.formats.tensorrt import decoder
from packager.formats.tensorrt.plan import make_plan, trtexec
from packager.planning.catalog import load_recipe, load_target
from packager.planning.options import parse_options
from packager.planning.plan import make_plan as make_the_plan
from tests.unit.sketch import QWEN_1_5B, QWEN_7B, SMOLLM2, sketch

T4, NANO, XAVIER = (load_target(name) for name in ("t4", "jetson_orin_nano_8gb", "jetson_xavier_nx"))


@dataclass(frozen=True)
class Options:
    context: int = 4096
    slots: int = 4
    precision: str = "fp16"


def refusal(config: dict[str, Any], target: Any = T4, **options: Any) -> str | None:
    return decoder.why_not(sketch(config), target, Options(**options))


def test_a_t4_takes_llama_and_qwen() -> None:
    for config in (SMOLLM2, QWEN_1_5B, QWEN_7B):
        assert refusal(config) is None


@pytest.mark.parametrize(
    ("target", "served"), [(NANO, "gguf or onnx_int8 or edge_llm serves"), (XAVIER, "gguf serves")]
)
def test_a_refusal_for_a_jetson_names_what_serves_the_model(target: Any, served: str) -> None:
    assert served in str(refusal(SMOLLM2, target))


@pytest.mark.parametrize(
    ("changes", "options", "sentence"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, {}, "yarn"),
        ({}, {"context": 10_000}, "context=8192"),
        ({}, {"context": 16}, "context=64"),
    ],
)
def test_what_cannot_be_made_is_refused_in_a_sentence(changes: Any, options: Any, sentence: str) -> None:
    """The refusal of a model without a graph names the recipe that can build it."""
    assert sentence in str(refusal(SMOLLM2 | changes, **options))


def test_sizes_are_those_of_what_was_built() -> None:
    """SmolLM2: 268,959,744 bytes of float16 and an engine of 293,787,876; 163,102,464 with the layers in int8."""
    model = sketch(SMOLLM2)
    assert decoder.weight_bytes(model, 16) == pytest.approx(268_959_744, rel=0.001)
    assert decoder.weight_bytes(model, 8) == pytest.approx(163_102_464, rel=0.001)
    size = decoder.estimate(model, T4, Options())
    assert size.load_bytes == pytest.approx(293_787_876, rel=0.01)
    assert size.kv_bytes == 2 * 30 * 3 * 64 * 2 * 4096 * 4


def test_eight_bits_take_half_and_keep_the_head_whole() -> None:
    model = sketch(QWEN_7B)
    whole, half = (decoder.estimate(model, T4, Options(precision=kind)) for kind in ("fp16", "int8"))
    head = 4 * QWEN_7B["vocab_size"] * QWEN_7B["hidden_size"]
    assert half.load_bytes == pytest.approx((whole.load_bytes - 1.09 * head) / 2 + 1.09 * head, rel=0.01)


@pytest.mark.parametrize(
    ("config", "changes", "settings", "context"),
    [
        (SMOLLM2, {}, (), 4096),
        (SMOLLM2, {"max_position_embeddings": 2048}, (), 2048),
        (QWEN_7B, {}, ("precision=int8",), 4096),
        (QWEN_7B, {}, ("precision=int8", "slots=24"), 2048),  # 4096 for so many rows is more than a T4 has
        (SMOLLM2, {}, ("context=512",), 512),
    ],
)
def test_a_conversation_is_as_long_as_a_user_expects_and_the_gpu_holds(
    config: dict[str, Any], changes: dict[str, Any], settings: tuple[str, ...], context: int
) -> None:
    """The default context: 4096, or the model's own, or less, with a note in the plan."""
    recipe = load_recipe("tensorrt_engine")
    plan = make_the_plan(sketch(config | changes), T4, recipe, parse_options(recipe, T4, settings))
    assert not plan.refusals
    assert plan.estimate.context == plan.options["context"] == context
    short = context == 2048 and "max_position_embeddings" not in changes
    assert any("need more memory" in note for note in plan.notes) == short


def test_the_refusal_of_a_too_large_model_names_what_would_fit() -> None:
    recipe = load_recipe("tensorrt_engine")
    (refusal,) = make_the_plan(sketch(QWEN_7B), T4, recipe, parse_options(recipe, T4, ())).refusals
    assert refusal.endswith("--set precision=int8 would fit.")


def test_the_profile_goes_from_one_row_to_all_and_caches_keep_their_length() -> None:
    shapes = decoder.profile(sketch(SMOLLM2), 4, 2048)
    assert shapes["input_ids"] == {"min": [1, 1], "opt": [4, 1], "max": [4, 128]}
    assert shapes["places"] == {"min": [64], "opt": [512], "max": [2048]}
    assert shapes["past_key_values.29.value"] == {
        "min": [1, 3, 2048, 64],
        "opt": [4, 3, 2048, 64],
        "max": [4, 3, 2048, 64],
    }
    assert len(shapes) == 4 + 2 * 30


def test_the_box_reads_the_plan(tmp_path: Any) -> None:
    """The reader of the box takes what is written here: types, profile, trtexec's arguments."""
    import json

    from runtimes.engines.tensorrt.plan import read_plan

    for name in ("model.onnx", "model.onnx.data"):
        (tmp_path / name).write_bytes(b"x")
    model = sketch({**SMOLLM2, "num_hidden_layers": 1})
    shapes = decoder.profile(model, 2, 256)
    outputs = [{"name": "logits", "dtype": "float32"}]
    kinds = {name: "float16" for name in shapes if name.startswith("past")}
    plain = make_plan(
        T4, tmp_path, precision="fp16", shapes=[shapes], outputs=outputs, engine=None, reference=None, kinds=kinds
    )
    (tmp_path / "plan.json").write_text(json.dumps(plain), encoding="utf-8")
    plan = read_plan(tmp_path / "plan.json")
    assert {one.name: one.dtype for one in plan.inputs}["past_key_values.0.key"] == "float16"
    assert plan.profiles[0]["past_key_values.0.key"].max == (2, 3, 256, 64)
    assert list(plan.builder) == trtexec(shapes, plan.workspace)


def test_a_card_that_the_compiler_does_not_know_is_refused() -> None:
    assert T4.gpu is not None
    other = replace(T4, gpu=replace(T4.gpu, architecture="sm_70"))
    assert "7.0" in str(refusal(SMOLLM2, other))
