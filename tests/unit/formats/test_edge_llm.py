"""What edge_llm says before it builds: where TensorRT Edge-LLM runs, which models and group sizes it takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from packager.formats.edge_llm import releases
from packager.planning.catalog import load_recipe, load_target
from packager.planning.plan import make_plan
from tests.unit.sketch import QWEN_1_5B, QWEN_7B, SMOLLM2, sketch

RECIPE = load_recipe("edge_llm")
Options = RECIPE.options
NANO, AGX, THOR = (load_target(name) for name in ("jetson_orin_nano_8gb", "jetson_agx_orin_64gb", "jetson_thor"))
BERT = {
    "architectures": ["BertModel"], "model_type": "bert", "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100, "max_position_embeddings": 64,
}  # fmt: skip


def refusal(config: dict[str, Any], target: Any = AGX, **options: Any) -> str | None:
    return RECIPE.why_not(sketch(config), target, Options(**options))


@pytest.mark.parametrize("target", ["orin_nano_8gb", "orin_nx_16gb", "agx_orin_64gb", "thor"])
def test_orin_and_thor_are_served_by_jetpack_7(target: str) -> None:
    device = load_target(f"jetson_{target}")
    assert refusal(SMOLLM2, device) is None
    assert releases(device)[0].jetpack == ("7.0" if target == "thor" else "7.2")


@pytest.mark.parametrize("target", ["jetson_xavier_nx", "t4", "desktop_linux_x86_64"])
def test_a_refusal_names_where_it_runs_and_what_serves_the_model(target: str) -> None:
    sentence = str(refusal(SMOLLM2, load_target(target)))
    assert "JetPack 7.2" in sentence
    assert "gguf" in sentence


def test_an_orin_that_stays_on_jetpack_6_is_none() -> None:
    old = replace(NANO, software=tuple(entry for entry in NANO.software if entry.jetpack < "7"))
    assert "JetPack 7.2" in str(refusal(SMOLLM2, old))


@pytest.mark.parametrize(
    ("changes", "options", "sentence"),
    [
        (BERT, {}, "tensorrt_engine"),
        ({**SMOLLM2, "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "head_dim": 64}, {}, "not gemma2"),
        ({**SMOLLM2, "head_dim": 96}, {}, "not 96"),
        (SMOLLM2, {"context": 10_000}, "context=8192"),
        (SMOLLM2, {"quant": "int4"}, "set quant=fp16"),  # 576 inputs are no multiple of 128
    ],
)
def test_what_it_cannot_do_is_refused_in_a_sentence(changes: dict[str, Any], options: Any, sentence: str) -> None:
    assert sentence in str(refusal(changes, **options))


def test_int4_takes_groups_of_128() -> None:
    for config in (QWEN_1_5B, QWEN_7B):
        assert refusal(config, quant="int4") is None


def test_a_7b_fits_a_nano_in_int4_alone() -> None:
    """16 bits are 15 GB; int4 with float16 embedding and head, 2 GiB for the engine and a short context fit 6.4 GiB."""
    model = sketch(QWEN_7B)
    whole = make_plan(model, NANO, RECIPE, Options())
    assert any("GiB" in line for line in whole.refusals)
    assert make_plan(model, AGX, RECIPE, Options()).refusals == ()
    small = make_plan(sketch(QWEN_1_5B), NANO, RECIPE, Options(quant="int4"))
    assert small.refusals == ()
    assert small.tokens_per_second_ceiling == pytest.approx(68e9 / small.estimate.read_per_token_bytes, rel=0.01)


def test_wheels_are_taken_for_jetpack_7_2_alone() -> None:
    """Its wheel wants glibc 2.39 and Python 3.12; the target also runs JetPack 6, which has neither."""
    place = NANO.on_release("7.2")
    assert (place.python, place.glibc) == (("3.12",), "2.39")
    assert place.wheel_platforms[0] == "manylinux_2_39_aarch64"
    assert NANO.python == ("3.10", "3.12")
    with pytest.raises(KeyError, match=r"9\.9"):
        NANO.on_release("9.9")
