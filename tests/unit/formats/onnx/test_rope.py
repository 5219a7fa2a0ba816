"""Rotary tables from old and new configs, and what is not served."""

from __future__ import annotations

import numpy as np
import pytest

from packager.formats.onnx import rope
from tests.tolerance import FLOAT32

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def test_old_and_new_configs_say_the_same() -> None:
    """rope_theta beside rope_scaling (transformers 4) and rope_parameters (5)."""
    old = {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}}
    for one, other in zip(
        rope.tables(old, "full_attention", 16, 8), rope.tables(new, "full_attention", 16, 8), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_positions_begin_at_nothing_and_turn_by_theta() -> None:
    """Angle of position p in dimension i: p / theta^(2i/d)."""
    cosines, sines = rope.tables({"rope_theta": 100.0}, "full_attention", 4, 3)
    np.testing.assert_allclose(cosines[0], [1, 1])
    np.testing.assert_allclose(sines[2], np.sin([2.0, 0.2]), rtol=8 * FLOAT32)  # angle, sine, and power


def test_llama3_keeps_fast_turns_and_slows_the_slow_ones() -> None:
    plain = rope.tables({"rope_theta": 10000.0}, "full_attention", 64, 2)[1][1]
    scaled = rope.tables({"rope_parameters": {"rope_theta": 10000.0, **LLAMA3}}, "full_attention", 64, 2)[1][1]
    assert scaled[0] == plain[0]
    assert scaled[-1] == pytest.approx(plain[-1] / 8, rel=1e-4)  # so small an angle is its own sine


def test_a_gemma3_has_two_kinds_of_layers() -> None:
    """As transformers 4 and 5 write it."""
    old = {"model_type": "gemma3_text", "rope_theta": 1e6, "rope_local_base_freq": 1e4}
    new = {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    }
    for kind, theta in (("full_attention", 1e6), ("sliding_attention", 1e4)):
        assert rope.parameters(old, kind)["rope_theta"] == rope.parameters(new, kind)["rope_theta"] == theta


def test_what_is_not_served_is_named() -> None:
    assert "yarn" in str(rope.why_not({"rope_scaling": {"type": "yarn", "factor": 4.0}}))
    assert rope.why_not({"rope_theta": 10000.0}) is None


def test_part_of_a_head_may_be_rotated() -> None:
    assert rope.dims({"partial_rotary_factor": 0.5}, 64) == 32
    assert rope.tables({"partial_rotary_factor": 0.5, "rope_theta": 1e4}, "full_attention", 64, 4)[0].shape == (4, 16)
