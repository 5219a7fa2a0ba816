"""Rotary position tables from a config.json, as transformers computes them (modeling_rope_utils.py, 5.x).

transformers 5 keeps ``rope_parameters`` (one object, or one for each kind of layer), older versions ``rope_theta`` and
``rope_scaling``. Supported kinds: default (Su et al. 2021, arXiv 2104.09864), linear, and llama3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

KINDS = ("default", "linear", "llama3")
LOCAL_THETA = 10000.0  # default of Gemma 3's sliding layers


def parameters(config: Mapping[str, Any], layer_type: str = "full_attention") -> dict[str, Any]:
    """rope_type, rope_theta and the type's own keys, for one kind of layer."""
    rope = config.get("rope_parameters")
    if isinstance(rope, Mapping):
        own = rope.get(layer_type)
        return {"rope_type": "default", **(own if isinstance(own, Mapping) else rope)}
    scaling = dict(config.get("rope_scaling") or {})
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    theta = config.get("rope_theta", 10000.0)
    if layer_type == "sliding_attention" and config.get("model_type") == "gemma3_text":
        return {"rope_type": "default", "rope_theta": config.get("rope_local_base_freq", LOCAL_THETA)}
    return {"rope_type": kind, "rope_theta": theta, **scaling}


def why_not(config: Mapping[str, Any]) -> str | None:
    """None, or the kind of position encoding that is not supported, as the beginning of a sentence."""
    for layer_type in ("full_attention", "sliding_attention"):
        kind = parameters(config, layer_type)["rope_type"]
        if kind not in KINDS:
            return f"its positions are encoded by {kind} scaling"
    return None


def dims(config: Mapping[str, Any], head_dim: int) -> int:
    """The number of a head's dimensions that are rotated."""
    share = parameters(config).get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    return int(head_dim * float(share))


def tables(
    config: Mapping[str, Any], layer_type: str, head_dim: int, length: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines, both (length, rotated dimensions / 2), computed in float32 as transformers does."""
    import numpy as np

    rope = parameters(config, layer_type)
    width = dims(config, head_dim)
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    inverse = (1.0 / np.float32(rope["rope_theta"]) ** exponents).astype(np.float32)
    if rope["rope_type"] == "linear":
        inverse = inverse / np.float32(rope["factor"])
    elif rope["rope_type"] == "llama3":
        inverse = _llama3(inverse, rope)
    angles = np.outer(np.arange(length, dtype=np.float32), inverse.astype(np.float32))
    return np.cos(angles), np.sin(angles)


def _llama3(inverse: NDArray[np.float32], rope: Mapping[str, Any]) -> NDArray[np.float32]:
    """Low frequencies divided by ``factor``, high ones kept, those between interpolated."""
    import numpy as np

    factor, trained = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    lengths = 2 * math.pi / inverse
    blend = (trained / lengths - low) / (high - low)
    between = (1 - blend) * inverse / factor + blend * inverse
    outer = np.where(lengths > trained / low, inverse / factor, inverse)
    middle = (lengths <= trained / low) & (lengths >= trained / high)
    return np.where(middle, between, outer).astype(np.float32)
