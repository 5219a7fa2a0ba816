"""The GPTQ format, as vLLM and transformers load it.

A linear module is stored as ``qweight`` (int32, (inputs / 8, rows): bits 4k … 4k+3 of word i are input 8i + k),
``qzeros`` (int32, (groups, rows / 8), the zero point less one, packed alike), ``scales`` (float16, (groups, rows)) and
``g_idx`` (int32, each input's group). Symmetric, no act-order: the only kind that vLLM loads with groups. The layout is
AutoGPTQ's first version (``checkpoint_format: gptq``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from packager.formats.int4.folder import WORD, Form, Shapes, integers, words
from packager.formats.int4.tuning import ZERO

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def config(group: int, method: str) -> dict[str, Any]:
    """config.json's entry on the quantization."""
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": group,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "meta": {"quantizer": ["packager"], "method": method},
    }


def shapes(rows: int, inputs: int, group: int) -> Shapes:
    """Types and shapes of a module's tensors."""
    return {
        "g_idx": ("I32", (inputs,)),
        "qweight": ("I32", (inputs // WORD, rows)),
        "qzeros": ("I32", (inputs // group, rows // WORD)),
        "scales": ("F16", (inputs // group, rows)),
    }


def data(part: str, q: NDArray[np.uint8], scales: NDArray[np.float16], group: int) -> bytes:
    """One of a module's tensors; q: (rows, inputs), scales: (rows, groups)."""
    import numpy as np

    rows, inputs = q.shape
    if part == "g_idx":
        return (np.arange(inputs, dtype="<i4") // group).astype("<i4").tobytes()
    if part == "qzeros":
        return words(np.full((inputs // group, rows), ZERO - 1, np.uint8)).tobytes()
    if part == "scales":
        return np.ascontiguousarray(scales.T).tobytes()
    return np.ascontiguousarray(words(q).T).tobytes()


def weight(stored: Mapping[str, Any]) -> NDArray[np.float32]:
    """(rows, inputs) from a module's tensors, as a loader computes it."""
    import numpy as np

    group_of, scales = stored["g_idx"], stored["scales"].astype(np.float32)
    q = integers(np.ascontiguousarray(stored["qweight"].T)).T.astype(np.float32)
    zeros = integers(stored["qzeros"]).astype(np.float32) + 1
    values: NDArray[np.float32] = np.ascontiguousarray(((q - zeros[group_of]) * scales[group_of]).T)
    return values


FORM = Form("gptq", "GPTQ", shapes, data, config, weight)
