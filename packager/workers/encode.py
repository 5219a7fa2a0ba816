"""Computes an encoder's outputs in transformers and float32: ``encode.py JOB.json``.

JOB.json: {"checkpoint", "texts": [str, …], "classify": bool, "max_length": int, "pooling", "normalize", "lower_case",
"prompt", "threads", "output"}. Writes {"ids": [ids, …], "outputs": [[float, …], …]}: logits of a classifier, vectors of
an embedder pooled as sentence-transformers' Pooling module does. One text at a time, so there is no padding.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from packager.workers.source_encoder import Source


@torch.inference_mode()
def main(job: dict[str, Any]) -> None:
    source = Source(job)
    ids, outputs = [], []
    for number, text in enumerate(job["texts"], 1):
        batch = source.read([text])
        vector = source.answers(batch)[0]
        if job["normalize"] and not job["classify"]:
            vector = torch.nn.functional.normalize(vector, dim=0)
        ids.append(batch["input_ids"][0].tolist())
        outputs.append([float(value) for value in vector])
        if number % 8 == 0:
            print(json.dumps({"done": number, "total": len(job["texts"])}), flush=True)
    Path(job["output"]).write_text(json.dumps({"ids": ids, "outputs": outputs}), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
