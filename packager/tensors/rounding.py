"""Float matrices rounded to float16 and to 8-bit integers with float16 scales."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def half(values: NDArray[np.float32], name: str) -> NDArray[np.float16]:
    """float16, rounded to nearest. Raises ValueError for a value beyond float16's range."""
    import numpy as np

    with np.errstate(over="ignore"):
        rounded = values.astype(np.float16)
    if not np.isfinite(rounded).all():
        raise ValueError(f"{name} has a value that float16 cannot hold (65504 is its largest)")
    return rounded


def by_row(values: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """int8 (rows, inputs) and a float16 scale for each row (rows,): its largest magnitude / 127, rounded to float16
    before the integers are computed from it. Raises ValueError when a scale is beyond float16's range.
    """
    import numpy as np

    scales: NDArray[Any] = (np.abs(values).max(axis=1) / 127).astype(np.float16)
    if not np.isfinite(scales).all():
        raise ValueError("a weight is too large for a float16 scale")
    wide = scales.astype(np.float32)
    wide[wide == 0] = 1  # all weights are zero or vanish in float16
    return np.clip(np.rint(values / wide[:, None]), -127, 127).astype(np.int8), scales


def eight_bits(values: NDArray[np.float32], block: int) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """Rows rounded to nearest: integers 1…255 around 128, (rows, inputs), and scales (rows, inputs / block).

    The scale is a block's largest magnitude / 127, rounded to float16 before the integers are computed from it. Raises
    ValueError for a weight that is not finite or too large for a float16 scale.
    """
    import numpy as np

    rows, inputs = values.shape
    blocks = values.reshape(rows, inputs // block, block)
    scales = (np.abs(blocks).max(axis=2) / 127).astype(np.float16)
    if not np.isfinite(scales).all():
        raise ValueError("a weight is too large for a float16 scale")
    wide = scales.astype(np.float32)
    wide[wide == 0] = 1  # all weights are zero or vanish in float16
    integers = np.clip(np.rint(blocks / wide[:, :, None]), -127, 127) + 128
    return integers.astype(np.uint8).reshape(rows, inputs), scales
