"""The benchmark's baseline: the source checkpoint in transformers, float32, one stream: ``baseline.py JOB.json``.

JOB.json: {"checkpoint", "prompt": ids, "new_tokens": int, "repeats": int, "threads": int, "output"}. Writes memory
(peak resident bytes), ttft and inter_token (seconds, one list for each repeat) of greedy decoding with a KV cache.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


@torch.inference_mode()
def once(model: Any, prompt: list[int], new_tokens: int) -> tuple[float, list[float]]:
    """(seconds to the first token, seconds between each token and the next)."""
    start = time.perf_counter()
    result = model(torch.tensor([prompt]), use_cache=True)
    token = result.logits[:, -1:].argmax(-1)
    last = time.perf_counter()
    first, gaps = last - start, []
    for _ in range(new_tokens - 1):
        result = model(token, past_key_values=result.past_key_values, use_cache=True)
        token = result.logits[:, -1:].argmax(-1)
        now = time.perf_counter()
        gaps.append(now - last)
        last = now
    return first, gaps


def main(job: dict[str, Any]) -> None:
    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["checkpoint"], dtype=torch.float32, local_files_only=True)
    model.eval()
    once(model, job["prompt"], 4)  # warm up, as the server does
    ttft, gaps = [], []
    for number in range(job["repeats"]):
        first, between = once(model, job["prompt"], job["new_tokens"])
        ttft.append(first)
        gaps.append(between)
        print(json.dumps({"done": number + 1, "total": job["repeats"]}), flush=True)
    unit = 1 if sys.platform == "darwin" else 1024
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    Path(job["output"]).write_text(json.dumps({"memory": memory, "ttft": ttft, "inter_token": gaps}), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
