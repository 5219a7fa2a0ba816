"""float16 and int8 by row: rounded to nearest, and a value beyond float16 is an error."""

from __future__ import annotations

import numpy as np
import pytest

from packager.tensors.rounding import by_row, half
from tests.tolerance import HALF_STEP


def test_a_value_beyond_float16_is_an_error() -> None:
    assert half(np.array([1.0, 65504.0], np.float32), "w").dtype == np.float16
    for value in (65520.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="w has a value"):
            half(np.array([value], np.float32), "w")


def test_eight_bits_by_row_are_within_half_a_step() -> None:
    values = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    values[3] = 0
    integers, scales = by_row(values)
    wide = scales.astype(np.float32)[:, None]
    assert integers.dtype == np.int8
    assert np.abs(integers).max() == 127
    assert (np.abs(integers * wide - values) <= HALF_STEP * wide).all()
    assert not integers[3].any()
    with pytest.raises(ValueError, match="too large"):
        by_row(np.full((1, 32), np.inf, np.float32))
