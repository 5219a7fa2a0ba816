"""A GPTQ or AWQ folder as a model of transformers, with four-bit linear layers in memory.

The model is made without weights; then each layer of the file replaces its layer. So loading needs the memory of the
packed weights and of one layer. Nothing is downloaded, and no code from the folder runs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache, DynamicLayer

from runtimes.engines.transformers.int4 import PARTS, HalfEmbedding, HalfHead, Int4Linear, UnknownForm, integers

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ROOM = 256  # positions by which a cache grows at least


class Growing(DynamicLayer):  # type: ignore[misc]
    """A KV cache layer that grows by ROOM: transformers' own layer copies all keys and values for every token."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.room = (keys[..., :0, :], values[..., :0, :])
        length = self.get_seq_length()
        end = length + keys.shape[-2]
        if end > self.room[0].shape[-2]:
            size = (max(end, length + length // 2) + ROOM - 1) // ROOM * ROOM
            self.room = (self._grown(self.room[0], length, size, keys), self._grown(self.room[1], length, size, values))
        for room, new in zip(self.room, (keys, values), strict=True):
            room[..., length:end, :] = new
        self.keys, self.values = self.room[0][..., :end, :], self.room[1][..., :end, :]
        return self.keys, self.values

    @staticmethod
    def _grown(old: torch.Tensor, length: int, size: int, like: torch.Tensor) -> torch.Tensor:
        buffer = like.new_empty((*like.shape[:-2], size, like.shape[-1]))
        buffer[..., :length, :] = old[..., :length, :]
        return buffer


class Model:
    """A loaded folder on one device. dtype: of the computation. Raises UnknownForm, KeyError, OSError or ValueError."""

    def __init__(self, folder: Path, *, device: str, dtype: torch.dtype) -> None:
        self.device = torch.device(device)
        form = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
        if form.get("bits") != 4:
            raise UnknownForm(f"its config.json has {form.get('bits')} bits; this engine computes with 4")
        self.config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        del self.config.quantization_config  # the packed layers below take its place
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(self.config, dtype=dtype, trust_remote_code=False).eval()
        self.files = {name: file for file in sorted(folder.glob("*.safetensors")) for name in _names(file)}
        self._fill(str(form.get("quant_method")), dtype)
        tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        left = [name for name, tensor in tensors if tensor.is_meta]
        if left:
            raise UnknownForm(f"{left[0]} is in no file of the folder")
        self.vocabulary = int(self.model.get_output_embeddings().weight.shape[0])

    def _fill(self, form: str, dtype: torch.dtype) -> None:
        embedding = self.model.get_input_embeddings()
        scale = float(getattr(embedding, "scalar_embed_scale", 1.0))  # Gemma's
        for name, module in list(self.model.named_modules()):
            if module is embedding:
                self._put(name, HalfEmbedding(self._read(f"{name}.weight"), dtype, scale))
            elif f"{name}.{PARTS[0]}" in self.files:
                self._put(name, self._packed(name, form))
            elif isinstance(module, nn.Linear) and name != "lm_head":
                raise UnknownForm(f"{name} is not packed")
            elif not list(module.children()):
                self._plain(name, module, dtype)
        table = self._read("lm_head.weight") if "lm_head.weight" in self.files else None
        shared = self.model.get_input_embeddings().weight if table is None else table
        bias = self._read("lm_head.bias") if "lm_head.bias" in self.files else None  # Phi's
        self._put("lm_head", HalfHead(shared, bias))

    def _packed(self, name: str, form: str) -> nn.Module:
        tensors = {part: self._read(f"{name}.{part}") for part in PARTS}
        if f"{name}.g_idx" in self.files:
            tensors["g_idx"] = self._read(f"{name}.g_idx")
        bias = self._read(f"{name}.bias") if f"{name}.bias" in self.files else None
        try:
            return Int4Linear(*integers(form, tensors), bias)
        except UnknownForm as error:
            raise UnknownForm(f"{name}: {error}") from None

    def _plain(self, name: str, module: nn.Module, dtype: torch.dtype) -> None:
        """A module that keeps its type: norms come from the file; rotary tables, which no file has, are computed."""
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            kind: Any = type(module)
            self._put(name, kind(self.config))
        for own, _ in list(module.named_parameters(recurse=False)):
            if name != "lm_head":
                tensor = self._read(f"{name}.{own}").to(dtype)
                setattr(module, own, nn.Parameter(tensor.to(self.device), requires_grad=False))

    def _put(self, name: str, module: nn.Module) -> None:
        self.model.set_submodule(name, module.to(self.device))

    def _read(self, name: str) -> torch.Tensor:
        if name not in self.files:
            raise UnknownForm(f"{name} is in no file of the folder")
        with safe_open(self.files[name], framework="pt") as stored:
            tensor: torch.Tensor = stored.get_tensor(name)
            return tensor.clone()  # a view of the mapped file would keep its pages resident too

    def cache(self) -> Any:
        """An empty KV cache for one conversation."""
        cache = DynamicCache(config=self.config)
        cache.layers = [Growing() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        return cache

    @torch.inference_mode()
    def read(self, ids: Sequence[int], cache: Any, rows: Sequence[int]) -> NDArray[np.float32]:
        """Append ``ids`` to the cache; the logits after the ids at ``rows``, (rows, vocabulary)."""
        places = torch.tensor(list(rows), dtype=torch.int64, device=self.device)
        tokens = torch.tensor([list(ids)], dtype=torch.int64, device=self.device)
        logits = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=places).logits[0]
        values: NDArray[np.float32] = logits.float().cpu().numpy()
        return values


def _names(file: Path) -> Iterator[str]:
    with safe_open(file, framework="pt") as stored:
        yield from stored.keys()


def use_threads(count: int) -> None:
    """Set the number of compute threads; 0: all cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    torch.set_num_threads(count or (len(affinity(0)) if affinity else os.cpu_count() or 1))


def open_model(folder: Path, device: str, threads: int) -> Model:
    """The model of a folder: in float32 on a CPU, where not every CPU has a faster type and the weights are exact; in
    float16 on a GPU.
    """
    use_threads(threads)
    return Model(folder, device=device, dtype=torch.float32 if device == "cpu" else torch.float16)
