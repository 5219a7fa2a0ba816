"""How far two runs of one computation may be apart: from the arithmetic, not from what one processor happened to give.

Another processor, another number of threads or another shape of a batch sums in another order, so each partial sum is
rounded elsewhere. One rounding is off by half a spacing at most, to either side and independently of the others; N of
them in a row are therefore off by about the root of N (N itself, the worst case, is never met). The spacing is taken at
the largest value, some three times a typical one: that covers that both runs are rounded.

Where two runs must be equal, as in the same shapes on one processor, they are compared without a tolerance.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

FLOAT32, FLOAT16, BFLOAT16 = 2.0**-23, 2.0**-10, 2.0**-7  # the spacing of the numbers from 1 to 2
# For the worst of thousands of values: most are off by a third of what `apart` says, the worst by as much, and by more
# where attention's scores are several times as large as the logits: a softmax turns what they are off by into shares.
MARGIN = 4
# |value - scale * integer| over the scale: half a step, and what float32 loses of 256 steps while it is worked out
HALF_STEP = 0.5 + 256 * FLOAT32
# a scale that became a float16 after the integers were chosen: off by half a spacing of itself, 127 times at most
ROUNDED_SCALE = 127 * FLOAT16 / 2


def apart(values: Any, spacing: float, roundings: float) -> float:
    """What two runs may differ by in one value. values: what one of them gave. roundings: on the way to a value."""
    return float(spacing * np.abs(np.asarray(values, np.float64)).max() * np.sqrt(roundings))


def require_close(found: Any, expected: Any, spacing: float, roundings: float) -> None:
    """Fail where any of many values differs by more than the arithmetic lets it."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=MARGIN * apart(expected, spacing, roundings))


def divergence(logits: Any, spacing: float, roundings: float) -> float:
    """The most that the mean KL divergence may be: half the mean square of the logits' error, and that is as large as a
    typical logit makes it, not the largest.
    """
    typical = np.sqrt(np.square(np.asarray(logits, np.float64)).mean())
    return float((spacing * typical) ** 2 * roundings / 2)


def sums(config: Mapping[str, Any], length: int) -> int:
    """The length of all sums between a token and a logit in a decoder that attends to ``length`` positions, where every
    partial sum is rounded: in each layer two norms, projections, scores, softmax and values, output, gate and up, down;
    then norm and head.
    """
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    layer = 4 * hidden + head + 2 * length + heads * head + config["intermediate_size"]
    return int(config["num_hidden_layers"] * layer + 2 * hidden)


def results(layers: int) -> int:
    """How many tensors there are between a token and a logit, where sums are wide and only what is stored is rounded:
    in each layer of a decoder two norms, projection, rotation, scores, softmax, values, output, gate, its product with
    up, down and two residuals; then embedding, norm and head.
    """
    return 13 * layers + 3


def half_roundings(config: Mapping[str, Any], length: int) -> int:
    """Of a float16 graph on onnxruntime. It sums in float32 and stores float16, but where the processor has float16
    arithmetic of its own it may sum in that.
    """
    features = Path("/proc/cpuinfo")
    own = "avx512_fp16" in features.read_text(encoding="utf-8") if features.exists() else False
    return (
        sums(config, length)
        if own or platform.machine() in ("aarch64", "arm64")
        else results(config["num_hidden_layers"])
    )


def other_integers(values: Any, length: int) -> float:
    """The most that two runs over INT8 activations may differ by: where float32's last bit decides between two
    integers, each run may take another. One of ``length`` inputs is then off by a step, a 127th of the largest of them.
    """
    return float(np.abs(np.asarray(values, np.float64)).max() / 127 / np.sqrt(length))
