"""Runs llama.cpp's converter with one function of its gguf-py replaced: ``convert.py TREE ARGUMENTS``; TREE is the
folder of the pinned sources.

gguf-py converts a tensor in groups of 16 rows, keeps all groups in a list and joins them: it holds the result twice in
addition to the float32 source, 2.2 GB for the embedding of a 1.5B Qwen2. This function writes every group to its place
directly. The arithmetic is gguf-py's own and works row by row, so the bytes are the same
(tests/real/test_quantizers.py).
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Rows = Callable[[Array], Array]
ELEMENTS = 1 << 18  # of a group: few calls, and small temporary arrays


def apply_by_rows(func: Rows, arr: Array, otype: Any, oshape: tuple[int, ...]) -> Array:
    """gguf.quants._apply_over_grouped_rows: ``func`` over groups of rows, as one array of ``oshape``."""
    rows = arr.reshape((-1, arr.shape[-1]))
    out = np.empty(oshape, dtype=otype).reshape((rows.shape[0], -1))
    step = max(1, ELEMENTS // max(1, rows.shape[1]))
    for begin in range(0, rows.shape[0], step):
        out[begin : begin + step] = func(rows[begin : begin + step])
    return out.reshape(oshape)


def main() -> None:
    tree = Path(sys.argv[1])
    sys.path[0:1] = [str(tree), str(tree / "gguf-py")]
    import gguf.quants

    assert callable(gguf.quants._apply_over_grouped_rows), "the pinned gguf-py has this function"
    gguf.quants._apply_over_grouped_rows = apply_by_rows
    script = tree / "convert_hf_to_gguf.py"
    sys.argv = [str(script), *sys.argv[2:]]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
