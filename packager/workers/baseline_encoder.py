"""The benchmark's baseline: the source encoder in transformers, float32: ``baseline_encoder.py JOB.json``.

JOB.json: {"checkpoint", "classify": bool, "cases": [{"texts", "tokens"}, …], "requests": int, "threads", "output"}.
Writes memory (peak resident bytes) and for each case the seconds of every call. Only the model's call is timed, without
tokenizer and HTTP, which the served figures include.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForSequenceClassification


@torch.inference_mode()
def main(job: dict[str, Any]) -> None:
    torch.set_num_threads(job["threads"])
    kind = AutoModelForSequenceClassification if job["classify"] else AutoModel
    model = kind.from_pretrained(job["checkpoint"], dtype=torch.float32, local_files_only=True).eval()
    draw = torch.Generator().manual_seed(0)
    measured = []
    for number, case in enumerate(job["cases"], 1):
        shape = (case["texts"], case["tokens"])
        seconds = []
        for call in range(job["requests"] + 3):
            ids = torch.randint(min(100, model.config.vocab_size - 1), model.config.vocab_size, shape, generator=draw)
            begun = time.perf_counter()
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
            if call >= 3:  # the first three warm up, as the server's do
                seconds.append(time.perf_counter() - begun)
        measured.append({**case, "seconds": seconds})
        print(json.dumps({"done": number, "total": len(job["cases"])}), flush=True)
    unit = 1 if sys.platform == "darwin" else 1024
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    Path(job["output"]).write_text(json.dumps({"memory": memory, "cases": measured}), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
