"""The source's side of an encoder's comparison, in transformers and float32: ``encode.py JOB.json``.

JOB.json: {"checkpoint", "texts": [str, …], "classify": bool, "max_length": int, "pooling", "normalize", "lower_case",
"prompt", "threads", "output"}. Writes {"ids": [ids, …], "outputs": [[float, …], …]}: logits of a classifier, vectors
of an embedder pooled as sentence-transformers' Pooling module does. One text at a time, so no padding takes part.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer


def pooled(states: torch.Tensor, mode: str) -> torch.Tensor:
    """One vector from the states [length, hidden] of a text without padding."""
    if mode == "cls":
        return states[0]
    if mode == "max":
        return states.max(dim=0).values
    total = states.sum(dim=0)
    return total / (len(states) ** 0.5 if mode == "mean_sqrt_len" else len(states))


@torch.inference_mode()
def main(job: dict[str, Any]) -> None:
    torch.set_num_threads(job["threads"])
    classify = job["classify"]
    kind = AutoModelForSequenceClassification if classify else AutoModel
    tokenizer = AutoTokenizer.from_pretrained(job["checkpoint"], local_files_only=True)
    model = kind.from_pretrained(
        job["checkpoint"], dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()
    ids, outputs = [], []
    for number, text in enumerate(job["texts"], 1):
        whole = job["prompt"] + text
        batch = tokenizer(
            whole.lower() if job["lower_case"] else whole,
            truncation=True,
            max_length=job["max_length"],
            return_tensors="pt",
        )
        found = model(**batch)
        if classify:
            vector = found.logits[0]
        else:
            vector = pooled(found.last_hidden_state[0], job["pooling"])
            if job["normalize"]:
                vector = torch.nn.functional.normalize(vector, dim=0)
        ids.append(batch["input_ids"][0].tolist())
        outputs.append([float(value) for value in vector])
        if number % 8 == 0:
            print(json.dumps({"done": number, "total": len(job["texts"])}), flush=True)
    Path(job["output"]).write_text(json.dumps({"ids": ids, "outputs": outputs}), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
