"""Quantizes a GGUF file with llama.cpp's own quantizer: ``quantize_llama.py JOB.json``.

JOB.json: {"source", "output", "file_type": int, "threads": int, "imatrix": path of an .npz or null}. The .npz holds,
for each GGUF tensor name, the mean squared activation of every input channel (float32, one value a column).
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

BUFFER = 256 << 20  # rows held in memory at once; llama.cpp's own default is 8 GiB


def main(job: dict[str, Any]) -> int:
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = job["file_type"]
    params.nthread = job["threads"]
    params.max_buf_size = BUFFER
    alive = []  # ctypes keeps no reference to what a struct points at
    if job.get("imatrix"):
        import numpy as np

        with np.load(job["imatrix"], allow_pickle=False) as stored:
            rows = {name: np.ascontiguousarray(stored[name], dtype=np.float32) for name in sorted(stored.files)}
        table = (llama_cpp.llama_model_imatrix_data * (len(rows) + 1))()
        for slot, (name, row) in zip(table, rows.items(), strict=False):
            text = name.encode()
            slot.name, slot.size = text, row.size
            slot.data = row.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            alive += [text, row]
        params.imatrix = ctypes.cast(table, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    return int(llama_cpp.llama_model_quantize(job["source"].encode(), job["output"].encode(), ctypes.byref(params)))


if __name__ == "__main__":
    sys.exit(main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
