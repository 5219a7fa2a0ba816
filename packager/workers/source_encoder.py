"""An encoder's source model in transformers and float32, for encode.py and tensorrt_layers.py.

It reads of a child's job {"checkpoint", "classify": bool, "max_length", "pooling", "lower_case", "prompt", "threads"}.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer


class Source:
    """The model and its tokenizer."""

    def __init__(self, job: dict[str, Any]) -> None:
        torch.set_num_threads(job["threads"])
        self.job = job
        kind = AutoModelForSequenceClassification if job["classify"] else AutoModel
        self.tokenizer = AutoTokenizer.from_pretrained(job["checkpoint"], local_files_only=True)
        self.model: torch.nn.Module = kind.from_pretrained(
            job["checkpoint"], dtype=torch.float32, attn_implementation="eager", local_files_only=True
        ).eval()

    def read(self, texts: Sequence[str], most: int | None = None) -> Any:
        """Texts as one batch, padded to its longest, truncated to ``most`` tokens and the job's max_length."""
        whole = [self.job["prompt"] + text for text in texts]
        return self.tokenizer(
            [text.lower() if self.job["lower_case"] else text for text in whole],
            truncation=True,
            max_length=min(self.job["max_length"], most or self.job["max_length"]),
            padding=len(texts) > 1,
            return_tensors="pt",
        )

    def answers(self, batch: Any) -> torch.Tensor:
        """A classifier's logits [texts, labels], or vectors [texts, hidden] with the job's pooling."""
        output = self.model(**batch)
        if self.job["classify"]:
            logits: torch.Tensor = output.logits
            return logits
        return pooled(output.last_hidden_state, batch["attention_mask"], self.job["pooling"])


def pooled(states: torch.Tensor, mask: torch.Tensor, mode: str) -> torch.Tensor:
    """Vectors [texts, hidden] from states [texts, tokens, hidden], without padding, as sentence-transformers' Pooling
    module does.
    """
    kept = mask.unsqueeze(-1).float()
    if mode == "cls":
        return states[:, 0]
    if mode == "max":
        return states.masked_fill(kept == 0, float("-inf")).amax(dim=1)
    count = kept.sum(dim=1)
    return (states * kept).sum(dim=1) / (count.sqrt() if mode == "mean_sqrt_len" else count)
