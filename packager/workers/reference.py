"""Runs the source checkpoint in transformers, one decoder layer in memory at a time: ``reference.py JOB.json``.

JOB.json: {"checkpoint", "sequences": [{"ids", "positions"}, …], "top": k, "calibration": [ids, …],
"threads": int, "scores": path or null, "imatrix": path or null}.

Every decoder layer's weights are read from the safetensors files when its forward begins and dropped when it ends
(float32 arithmetic on the stored weights), so memory depends on one layer. Sequences are batched and padded on the
right: with causal attention no real token attends to the padding. The head is applied in slices of the vocabulary.

scores (.npz): ids and logprobs, both (positions, k), natural logarithms, best first. imatrix (.npz): by module name,
the mean squared input of each channel over the calibration tokens (llama.cpp's importance matrix, not in its format).
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB_SLICE = 4096
BATCH_TOKENS = 2048  # tokens of a batch, padding counted: bounds the memory besides a layer's weights


class Weights:
    """Tensors by name from one or many safetensors files.

    A file is mapped only while it is read: pages of a lasting map count as this process's memory, and after the last
    layer that would be the whole checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.files: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as handle:
                self.files.update(dict.fromkeys(handle.keys(), file))

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def read(self, name: str) -> torch.Tensor:
        """One tensor in float32."""
        with safe_open(self.files[name], framework="pt") as handle:
            tensor: torch.Tensor = handle.get_tensor(name)
            return tensor.to(torch.float32, copy=True)

    def rows(self, name: str, picked: Iterable[slice]) -> Iterator[torch.Tensor]:
        """Rows of one tensor, a slice at a time, in float32."""
        with safe_open(self.files[name], framework="pt") as handle:
            tensor = handle.get_slice(name)
            for part in picked:
                yield tensor[part].to(torch.float32, copy=True)

    def height(self, name: str) -> int:
        """The first dimension of one tensor."""
        with safe_open(self.files[name], framework="pt") as handle:
            return int(handle.get_slice(name).get_shape()[0])


class RowEmbedding(nn.Module):
    """An embedding that reads only the rows of the given ids."""

    def __init__(self, weights: Weights, name: str, scale: float) -> None:
        super().__init__()
        self.weights, self.name, self.scale = weights, name, scale

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        unique, inverse = torch.unique(ids, return_inverse=True)
        table = torch.cat(list(self.weights.rows(self.name, (slice(row, row + 1) for row in unique.tolist()))))
        return table[inverse] * self.scale


def free_memory_back() -> None:
    """Return freed memory to the system. Without it glibc keeps every layer's freed memory: 2.8 GB instead of 0.9 GB
    for 1.5 B parameters.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # musl has none
        trim(0)


def place(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    *path, leaf = name.split(".")
    for part in path:
        module = getattr(module, part)
    setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))


class Streamed:
    """The decoder of a checkpoint; a layer is on the meta device except while it runs.

    on_layer: called with the index of every finished layer; None when the caller loads and drops the layers itself.
    """

    def __init__(self, folder: Path, on_layer: Callable[[int], None] | None) -> None:
        self.weights = Weights(folder)
        self.config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)  # with sdpa if the family has it
        self.body = model.model.eval()
        self.head = "lm_head.weight" if "lm_head.weight" in self.weights else "model.embed_tokens.weight"
        embedding = self.body.embed_tokens
        scale = float(getattr(embedding, "scalar_embed_scale", 1.0))
        self.body.embed_tokens = RowEmbedding(self.weights, "model.embed_tokens.weight", scale)
        for name, _ in list(self.body.named_parameters()):
            if not name.startswith("layers."):
                place(self.body, name, self.weights.read(f"model.{name}"))
        for name, module in list(self.body.named_children()):
            if any(buffer.is_meta for buffer in module.buffers()) and name != "layers":
                setattr(self.body, name, type(module)(self.config))  # rotary tables: computed, not stored
        left = [name for name, buffer in self.body.named_buffers() if buffer.is_meta]
        if left:
            raise SystemExit(f"the reference cannot stream this architecture: it keeps state in {left[0]}")
        for index, layer in enumerate(self.body.layers):
            if on_layer:
                layer.register_forward_pre_hook(lambda module, _args, i=index: self.load(module, i))
                layer.register_forward_hook(lambda module, _args, _out, i=index: self._done(module, i, on_layer))
            if hasattr(layer, "mlp"):
                row_by_row(layer.mlp)

    def load(self, layer: nn.Module, index: int) -> None:
        """Read the weights of decoder layer ``index`` into its module, in float32."""
        for name, _ in list(layer.named_parameters()):
            place(layer, name, self.weights.read(f"model.layers.{index}.{name}"))

    def _done(self, layer: nn.Module, index: int, on_layer: Callable[[int], None]) -> None:
        self.drop(layer)
        on_layer(index)

    def drop(self, layer: nn.Module) -> None:
        """Free a layer's weights."""
        for name, parameter in list(layer.named_parameters()):
            place(layer, name, torch.empty_like(parameter, device="meta"))
        free_memory_back()

    def hidden(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Last hidden states, (sequences, tokens, hidden)."""
        result = self.body(input_ids=ids, attention_mask=mask, use_cache=False)
        hidden: torch.Tensor = result.last_hidden_state
        return hidden

    def top(self, hidden: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The k best next tokens of hidden states (positions, hidden): ids and log-probabilities, both (positions,
        k).
        """
        cap = getattr(self.config, "final_logit_softcapping", None)
        best_ids = torch.empty((len(hidden), 0), dtype=torch.int64)
        best = torch.empty((len(hidden), 0))
        total = torch.full((len(hidden),), -torch.inf)
        starts = range(0, self.weights.height(self.head), VOCAB_SLICE)
        parts = self.weights.rows(self.head, (slice(start, start + VOCAB_SLICE) for start in starts))
        for start, rows in zip(starts, parts, strict=True):
            logits = hidden @ rows.T
            if cap:
                logits = torch.tanh(logits / cap) * cap
            total = torch.logaddexp(total, torch.logsumexp(logits, dim=1))
            values, places = torch.topk(logits, min(k, logits.shape[1]), dim=1)
            best, order = torch.topk(torch.cat([best, values], dim=1), min(k, best.shape[1] + values.shape[1]), dim=1)
            best_ids = torch.gather(torch.cat([best_ids, places + start], dim=1), 1, order)
        return best_ids, best - total[:, None]


def row_by_row(mlp: nn.Module) -> None:
    """Make a token-wise module run one sequence at a time: its inner width is several times the hidden size."""
    whole = mlp.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([whole(row) for row in torch.split(x, 1)])

    mlp.forward = forward


class InputSquares:
    """Sums the squared inputs of every linear layer over the real tokens."""

    def __init__(self, body: nn.Module) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}
        self.keep: torch.Tensor | None = None
        self.row: dict[str, int] = {}
        for name, module in body.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(lambda _m, args, n=f"model.{name}": self._saw(n, args[0]))

    def begin(self, keep: torch.Tensor) -> None:
        """Set the mask of the next batch, (sequences, tokens): true where a token is real."""
        self.keep, self.row = keep, {}

    def _saw(self, name: str, x: torch.Tensor) -> None:
        if self.keep is None:
            return
        row = self.row.get(name, 0)
        keep = self.keep[row : row + len(x)]  # the MLP runs one sequence at a time
        self.row[name] = row + len(x)
        real = x[keep]
        squares = real.square().sum(dim=0)
        self.sums[name] = self.sums[name] + squares if name in self.sums else squares
        self.counts[name] = self.counts.get(name, 0) + len(real)

    def means(self) -> dict[str, Any]:
        return {name: (self.sums[name] / self.counts[name]).numpy() for name in sorted(self.sums)}


def pad(sequences: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(ids) for ids in sequences)
    ids = torch.tensor([row + [0] * (width - len(row)) for row in sequences])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in sequences])
    return ids, mask


def batches(lengths: list[int], most: int = BATCH_TOKENS) -> list[list[int]]:
    """Indices of the sequences of each batch, longest first, so that there is little padding and memory is bounded.

    most: tokens of one batch, padding counted.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= most:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


@torch.inference_mode()
def main(job: dict[str, Any]) -> None:
    torch.set_num_threads(job["threads"])
    total = 0
    done = 0

    def layer_done(_index: int) -> None:
        nonlocal done
        done += 1
        print(json.dumps({"done": done, "total": total}), flush=True)

    source = Streamed(Path(job["checkpoint"]), layer_done)
    sequences = [sequence["ids"] for sequence in job["sequences"]] if job["scores"] else []
    calibration = job["calibration"] if job["imatrix"] else []
    groups = batches([len(ids) for ids in sequences]), batches([len(ids) for ids in calibration])
    total = len(source.body.layers) * (len(groups[0]) + len(groups[1]))
    if job["scores"]:
        picked: dict[int, torch.Tensor] = {}
        for group in groups[0]:
            hidden = source.hidden(*pad([sequences[index] for index in group]))
            for row, index in enumerate(group):
                # position p is the distribution of the token after ids[:p]: the hidden state of token p - 1
                picked[index] = hidden[row, torch.tensor(job["sequences"][index]["positions"], dtype=torch.int64) - 1]
        best, logprobs = source.top(torch.cat([picked[index] for index in sorted(picked)]), job["top"])
        np.savez(job["scores"], ids=best.numpy().astype(np.int32), logprobs=logprobs.numpy().astype(np.float32))
    if job["imatrix"]:
        squares = InputSquares(source.body)
        for group in groups[1]:
            ids, mask = pad([calibration[index] for index in group])
            squares.begin(mask.bool())
            source.hidden(ids, mask)
        np.savez(job["imatrix"], **squares.means())


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
