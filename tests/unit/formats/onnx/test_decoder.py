"""What onnx_int8's plan says of language models, from config and headers alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from packager.formats.onnx import decoder, decoder_graph
from packager.planning.catalog import load_recipe, load_target
from packager.tensors.rounding import eight_bits
from tests.tolerance import HALF_STEP
from tests.unit.sketch import SMOLLM2, sketch

CONFIG = SMOLLM2
TARGET = load_target("desktop_linux_x86_64")
OPTIONS = load_recipe("onnx_int8").options


def refusal(**changes: Any) -> str:
    options = OPTIONS(**{key: changes.pop(key) for key in ("context",) if key in changes})
    return str(decoder.why_not(sketch(CONFIG | changes), TARGET, options))


def test_smollm2_is_served_and_its_size_is_known() -> None:
    """Within 1 % of what a build writes: 144,209,158 bytes of INT8, 91,124,985 of INT4."""
    checkpoint = sketch(CONFIG)
    assert decoder.why_not(checkpoint, TARGET, OPTIONS()) is None
    for bits, written in ((8, 144_209_158), (4, 91_124_985)):
        size = decoder.estimate(checkpoint, TARGET, OPTIONS(bits=bits, tune="none"))
        assert size.artifact_bytes == pytest.approx(written, rel=0.01)
        assert size.kv_bytes == 2 * 30 * 3 * 64 * 4 * 4096 * 4


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"hidden_act": "relu"}, "relu"),
        ({"hidden_size": 432, "head_dim": 48, "intermediate_size": 1000}, "blocks of 32"),
        ({"head_dim": 72, "hidden_size": 576}, "not 72"),
        ({"context": 10_000}, "context=8192"),
    ],
)
def test_what_cannot_be_made_is_refused_in_a_sentence(changes: dict[str, Any], sentence: str) -> None:
    assert sentence in refusal(**changes)


def test_a_window_matters_where_the_context_is_longer() -> None:
    """Mistral's sliding window; Gemma 2 alternates; Qwen2 says whether it uses one."""
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 4096}
    assert [layer.window for layer in decoder_graph.layers(sketch(CONFIG | mistral), 4096)][:2] == [0, 0]
    assert [layer.window for layer in decoder_graph.layers(sketch(CONFIG | mistral), 8192)][:2] == [4096, 4096]
    gemma = {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "sliding_window": 1024, "head_dim": 64}
    assert [layer.window for layer in decoder_graph.layers(sketch(CONFIG | gemma), 4096)][:4] == [1024, 0, 1024, 0]
    qwen = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "sliding_window": 1024}
    assert decoder_graph.layers(sketch(CONFIG | qwen), 4096)[0].window == 0


def test_eight_bits_round_to_nearest_and_refuse_what_is_no_number() -> None:
    values = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    integers, scales = eight_bits(values, 32)
    wide = np.repeat(scales.astype(np.float32), 32, axis=1)
    assert integers.min() >= 1
    assert np.abs((integers.astype(np.float32) - 128) * wide - values).max() <= HALF_STEP * wide.max()
    assert not eight_bits(np.zeros((1, 32), np.float32), 32)[1].any()
    with pytest.raises(ValueError, match="too large"):
        eight_bits(np.full((1, 32), np.inf, np.float32), 32)


def test_families_that_have_no_graph_are_named() -> None:
    checkpoint = sketch(CONFIG)
    other = replace(checkpoint, family=replace(checkpoint.family, model_type="mamba"))
    assert "no ONNX graph" in str(decoder.why_not(other, TARGET, OPTIONS()))
