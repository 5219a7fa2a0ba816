"""The ggml type of each tensor of a GGUF file, for every value of ``quant``: our copy of llama.cpp's rule.

Read in ``src/llama-quant.cpp`` of the llama.cpp commit that llama-cpp-python 0.3.36 carries. Its branches for falcon
and for experts are left out: no family of packager/checkpoint/families.py has them. tests/data/gguf_types.json has what
the compiled llama.cpp chose (benchmarks/quantizers.py wrote it).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from packager.tensors.ggml_types import BLOCKS

if TYPE_CHECKING:
    from packager.checkpoint.checkpoint import Checkpoint
    from packager.tensors.gguf_header import Header


class Quant(NamedTuple):
    """file_type: llama_ftype's number (include/llama.h), which is written as general.file_type. base: the type that
    most tensors get.
    """

    file_type: int
    base: str


# What ``quant`` may be, largest file first.
QUANTS: dict[str, Quant] = {
    "BF16": Quant(32, "BF16"),
    "F16": Quant(1, "F16"),
    "Q8_0": Quant(7, "Q8_0"),
    "Q6_K": Quant(18, "Q6_K"),
    "Q5_K_M": Quant(17, "Q5_K"),
    "Q5_K_S": Quant(16, "Q5_K"),
    "Q4_K_M": Quant(15, "Q4_K"),
    "Q4_K_S": Quant(14, "Q4_K"),
    "IQ4_NL": Quant(25, "IQ4_NL"),
    "Q4_0": Quant(2, "Q4_0"),
    "IQ4_XS": Quant(30, "IQ4_XS"),
    "Q3_K_M": Quant(12, "Q3_K"),
    "IQ3_M": Quant(27, "IQ3_S"),
    "IQ3_S": Quant(26, "IQ3_S"),
    "Q2_K": Quant(10, "Q2_K"),
    "IQ2_M": Quant(29, "IQ2_S"),
}
# Below Q6 the rounding is coarse enough for an importance matrix to pay.
IMATRIX_QUANTS = tuple(QUANTS)[tuple(QUANTS).index("Q6_K") + 1 :]
# llama.cpp refuses to write these without an importance matrix, except as embedding or head.
DEMANDING = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"})

# Rows that a block of 256 does not divide get the nearest type with blocks of 32.
_FALLBACK = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    **dict.fromkeys((*DEMANDING, "IQ3_S", "IQ4_XS"), "IQ4_NL"),
}
_ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}  # the others have one name on both sides
_ATTENTION = (".attn_v.weight", ".attn_qkv.weight")


class Unquantized(NamedTuple):
    """A tensor before it is quantized. shape: as in a checkpoint, the last axis is the row. type: its ggml type."""

    name: str
    shape: tuple[int, ...]
    type: str


@dataclass(frozen=True)
class Dimensions:
    """What the rule takes from the model. architecture: llama.cpp's name. layers, heads and kv_heads: counts."""

    architecture: str
    layers: int
    heads: int
    kv_heads: int

    @property
    def queries_per_value(self) -> int:
        """Attention heads that share one key/value head."""
        return self.heads // max(1, self.kv_heads)

    @property
    def seventy_billion(self) -> bool:
        """Whether llama.cpp takes it for a 70B, whose attn_v is small beside the rest: by its 80 layers."""
        grouped = self.architecture == "llama" and self.heads != self.kv_heads
        return self.layers == 80 and (grouped or self.architecture == "qwen2")


def of_checkpoint(checkpoint: Checkpoint) -> Dimensions:
    """The dimensions of a checkpoint, under the name of architecture that llama.cpp's converter gives it."""
    shape = checkpoint.shape
    name = _ARCHITECTURES.get(checkpoint.model_type, checkpoint.model_type)
    return Dimensions(name, shape.layers, shape.heads, shape.kv_heads)


def of_header(header: Header) -> Dimensions:
    """The dimensions that a GGUF file declares. Raises ValueError when it lacks one."""
    name = header.architecture
    keys = ("block_count", "attention.head_count", "attention.head_count_kv")
    counts = [header.values.get(f"{name}.{key}") for key in keys]
    layers, heads, kv_heads = counts[0], counts[1], counts[1] if counts[2] is None else counts[2]
    if not (isinstance(layers, int) and isinstance(heads, int) and isinstance(kv_heads, int)):
        raise ValueError(f"the GGUF file does not declare {name}.{keys[0]} and {name}.{keys[1]}")
    return Dimensions(name, layers, heads, kv_heads)


def wants_imatrix(quant: str, choice: str = "auto") -> bool:
    """Whether an importance matrix is used: ``choice`` is "auto" (below Q6), "on" or "off"."""
    return choice == "on" or (choice == "auto" and quant in IMATRIX_QUANTS)


def demands_imatrix(name: str, kind: str) -> bool:
    """Whether llama.cpp refuses to write this tensor as ``kind`` without an importance matrix."""
    return kind in DEMANDING and name not in ("token_embd.weight", "per_layer_token_embd.weight", "output.weight")


def file_order(name: str) -> tuple[int, str]:
    """The key by which llama.cpp sorts tensors: what belongs to no layer first, then by layer, then by name."""
    block = re.match(r"blk\.(\d+)\.", name)
    return (int(block[1]) if block else -1, name)


def choose_types(
    tensors: Iterable[Unquantized],
    quant: str,
    model: Dimensions,
    *,
    imatrix: bool,
    head: str | None = None,
    chosen: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Tensor name -> ggml type, in the order of the file. imatrix: whether a matrix is used, which changes some types.

    head: the type of the output layer, instead of llama.cpp's. chosen: types by tensor name that go before the rule; a
    type whose block does not divide the rows falls back like any other. Raises KeyError for an unknown quant and for a
    chosen tensor that does not exist.
    """
    ordered = sorted(tensors, key=lambda tensor: file_order(tensor.name))
    if unknown := sorted(set(chosen or ()) - {tensor.name for tensor in ordered}):
        raise KeyError(unknown[0])
    chooser = _Chooser(quant, model, [tensor.name for tensor in ordered], imatrix=imatrix, head=head)
    found = {}
    for tensor in ordered:
        by_rule = chooser.choose(tensor)  # always: it counts the tensors of a role
        wanted = (chosen or {}).get(tensor.name)
        found[tensor.name] = _fitting(wanted, tensor.shape[-1]) if wanted else by_rule
    return found


def _quantizable(tensor: Unquantized) -> bool:
    """Matrices that are no norm. ggml does not count trailing axes of length 1."""
    matrix = len(tensor.shape) >= 2 and max(tensor.shape[:-1]) > 1
    return matrix and tensor.name.endswith("weight") and "_norm.weight" not in tensor.name


def _fitting(kind: str, row: int) -> str:
    """The type itself or what llama.cpp takes instead where its block does not divide ``row``."""
    if row % BLOCKS[kind][0]:
        kind = _FALLBACK.get(kind, kind)
    return kind if row % BLOCKS[kind][0] == 0 else "F16"


class _Chooser:
    """llama.cpp's rule. It counts attention and feed-forward tensors as they come, so the order matters."""

    def __init__(self, quant: str, model: Dimensions, names: list[str], *, imatrix: bool, head: str | None) -> None:
        self.quant = quant
        self.base = QUANTS[quant].base
        self.model = model
        self.imatrix = imatrix
        self.head = head
        self.grouped = model.queries_per_value >= 4  # attn_v is small: more bits for it cost little
        self.tied = "output.weight" not in names
        self.values = sum(name.endswith(_ATTENTION) for name in names)
        self.values_seen = 0
        self.down_seen = 0

    def choose(self, tensor: Unquantized) -> str:
        """The type of the next tensor in file order."""
        if not _quantizable(tensor):
            return tensor.type
        if BLOCKS[self.base][0] == 1:
            return self.base
        row = tensor.shape[-1]
        return _fitting(self._by_role(tensor.name, row), row)

    def _by_role(self, name: str, row: int) -> str:
        embedding = name in ("token_embd.weight", "per_layer_token_embd.weight")
        if name == "output.weight" or (self.tied and embedding):
            return self.head or self._head(row)
        if embedding:
            return "IQ3_S" if self.quant == "IQ2_M" else self.base
        if name.endswith(_ATTENTION):
            index, self.values_seen = self.values_seen, self.values_seen + 1
            return self._attention_value(index)
        if ".ffn_down" in name:
            index, self.down_seen = self.down_seen, self.down_seen + 1
            return self._feed_forward_down(index)
        if name.endswith(".attn_output.weight"):
            return {"IQ2_M": "IQ3_S", "Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "IQ3_M": "Q4_K"}.get(self.quant, self.base)
        return self.base

    def _head(self, row: int) -> str:
        if self.base == "Q8_0" or row % BLOCKS[self.base][0]:
            return "Q8_0"
        return "Q5_K" if self.quant == "IQ2_M" else "Q6_K"

    def _attention_value(self, index: int) -> str:
        """attn_v, or attn_qkv where the three are one. index: how many came before it."""
        quant, kind = self.quant, self.base
        if quant == "IQ2_M":
            return "Q4_K" if self.grouped else "IQ3_S"
        if quant == "Q2_K":
            kind = "Q4_K" if self.grouped else "Q3_K"
        elif quant == "IQ3_M" or (quant == "IQ3_S" and self.grouped):
            kind = "Q4_K"
        elif quant == "Q3_K_M":
            kind = "Q5_K" if index < 2 else "Q4_K"
        elif quant in ("IQ4_NL", "IQ4_XS") and self.grouped:
            kind = "Q5_K"
        elif quant in ("Q4_K_M", "Q5_K_M") and _more_bits(index, self.values):
            kind = "Q6_K"
        elif quant == "Q4_K_S" and index < 4:
            kind = "Q5_K"
        return "Q5_K" if self.model.seventy_billion and kind in ("Q3_K", "Q4_K") else kind

    def _feed_forward_down(self, index: int) -> str:
        quant, layers = self.quant, self.model.layers
        early = index < layers // 8
        if quant == "Q2_K":
            return "Q3_K"
        if quant == "Q3_K_M":
            return "Q5_K" if index < layers // 16 else "Q4_K"
        if quant in ("Q4_K_M", "Q5_K_M") and _more_bits(index, layers):
            return "Q6_K"
        if early:
            by_quant = {"IQ2_M": "IQ3_S", "IQ3_M": "Q4_K", "Q4_K_S": "Q5_K"}
            # coarse blocks of 32 go wrong there: llama.cpp guards them, in one way with a matrix and in one without
            by_quant |= {"Q4_0": "Q4_1"} if self.imatrix else {"IQ4_NL": "Q5_K", "IQ4_XS": "Q5_K"}
            return by_quant.get(quant, self.base)
        return self.base


def _more_bits(index: int, total: int) -> bool:
    """The first and the last eighth, and every third between."""
    return index < total // 8 or index >= 7 * total // 8 or (index - total // 8) % 3 == 2
