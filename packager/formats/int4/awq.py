"""AWQ's GEMM format, as vLLM and transformers load it: a container for the same tuned integers as GPTQ's.

A linear module becomes ``qweight`` (int32, (inputs, rows / 8)), ``qzeros`` (int32, (groups, rows / 8)) and ``scales``
(float16, (groups, rows)). Eight adjacent outputs share a word, in the order 0, 2, 4, 6, 1, 3, 5, 7 from its lowest
bits up, as AutoAWQ's ``WQLinear_GEMM`` packs them. Zero points are stored as they are: 8 for our symmetric integers.

The name is that of the container. The method AWQ (Lin et al. 2023, arXiv 2306.00978) searches scales for channels and
rounds to nearest; the manifest and config.json's ``meta`` name the method that made the integers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from packager.formats.int4.folder import WORD, Form, Shapes, integers, words
from packager.formats.int4.tuning import ZERO

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the position in its word of each of eight adjacent outputs


def config(group: int, method: str) -> dict[str, Any]:
    """config.json's entry on the quantization."""
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
        "lm_head": False,
        "modules_to_not_convert": None,
        "meta": {"quantizer": ["packager"], "method": method},
    }


def shapes(rows: int, inputs: int, group: int) -> Shapes:
    """Types and shapes of a module's tensors."""
    return {
        "qweight": ("I32", (inputs, rows // WORD)),
        "qzeros": ("I32", (inputs // group, rows // WORD)),
        "scales": ("F16", (inputs // group, rows)),
    }


def data(part: str, q: NDArray[np.uint8], scales: NDArray[np.float16], group: int) -> bytes:
    """One of a module's tensors; q: (rows, inputs), scales: (rows, groups)."""
    import numpy as np

    rows, inputs = q.shape
    if part == "qzeros":
        return words(np.full((inputs // group, rows), ZERO, np.uint8), ORDER).tobytes()
    if part == "scales":
        return np.ascontiguousarray(scales.T).tobytes()
    return words(np.ascontiguousarray(q.T), ORDER).tobytes()


def weight(stored: Mapping[str, Any]) -> NDArray[np.float32]:
    """(rows, inputs) from a module's tensors, as a loader computes it."""
    import numpy as np

    scales = stored["scales"].astype(np.float32)
    q = integers(stored["qweight"], ORDER).astype(np.float32)
    zeros = integers(stored["qzeros"], ORDER).astype(np.float32)
    group = len(q) // len(scales)
    wide = (q - np.repeat(zeros, group, axis=0)) * np.repeat(scales, group, axis=0)
    values: NDArray[np.float32] = np.ascontiguousarray(wide.T)
    return values


FORM = Form("awq", "AWQ", shapes, data, config, weight)
