"""What a GGUF file will weigh before it is made, and what making it costs.

Pure arithmetic over names and shapes: types.py chooses each tensor's type, the layout was read in llama.cpp's
``gguf-py``. tests/real compares the prediction with files.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from packager.checkpoint.families import kv_cache_bytes
from packager.formats.gguf.types import QUANTS, Dimensions, Unquantized, choose_types, of_checkpoint
from packager.tensors.ggml_types import BLOCKS

if TYPE_CHECKING:
    from packager.checkpoint.checkpoint import Checkpoint
    from packager.recipe import Estimate
    from packager.target import Target

_ALIGNMENT = 32
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_TOP = {"model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm"}
_IN_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor as it will stand in the file; shape as in the checkpoint, so the last axis is the row."""

    name: str
    shape: tuple[int, ...]
    type: str

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.type, self.shape)


@dataclass(frozen=True)
class GgufSize:
    """A predicted file. ``bytes`` is the whole file, ``header_bytes`` what lies before the first tensor."""

    tensors: tuple[GgufTensor, ...]
    header_bytes: int
    bytes: int

    @property
    def types(self) -> dict[str, int]:
        """How many tensors get each type, most frequent first."""
        return dict(Counter(tensor.type for tensor in self.tensors).most_common())

    @property
    def read_per_token_bytes(self) -> int:
        """Weights read to decode one token at batch 1.

        The embedding is a look-up of one row, unless no ``output.weight`` exists: then it is the head too.
        """
        tied = all(tensor.name != "output.weight" for tensor in self.tensors)
        return sum(t.nbytes for t in self.tensors if tied or t.name != "token_embd.weight")


def tensor_bytes(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of one tensor. Raises ValueError when a block does not divide its rows."""
    elements, size = BLOCKS[kind]
    row = shape[-1] if shape else 1
    if row % elements:
        raise ValueError(f"rows of {row} cannot be {kind}, whose blocks hold {elements}")
    return math.prod(shape) // elements * size


def gguf_name(name: str) -> str | None:
    """The name that llama.cpp's converter gives a tensor; unknown ones keep theirs, None for what it leaves out."""
    if name.endswith((".rotary_emb.inv_freq", ".attention.masked_bias")):
        return None
    stem, _, kind = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    if (layer := _LAYER.fullmatch(stem)) and layer[2] in _IN_LAYER:
        return f"blk.{layer[1]}.{_IN_LAYER[layer[2]]}.{kind}"
    return name


def plan_tensors(
    shapes: Mapping[str, tuple[int, ...]],
    quant: str,
    model: Dimensions,
    *,
    imatrix: bool,
    head: str | None = None,
) -> tuple[GgufTensor, ...]:
    """The file's tensors in llama.cpp's order, from the checkpoint's names and shapes. KeyError: an unknown quant."""
    named = {new: shape for old, shape in shapes.items() if (new := gguf_name(old))}
    tensors = [Unquantized(name, shape, _converted(name, shape)) for name, shape in named.items()]
    chosen = choose_types(tensors, quant, model, imatrix=imatrix, head=head)
    return tuple(GgufTensor(name, named[name], kind) for name, kind in chosen.items())


def _converted(name: str, shape: tuple[int, ...]) -> str:
    """The type that the converter gives a tensor which is not quantized afterwards."""
    return "F32" if len(shape) < 2 or name.endswith("_norm.weight") else "F16"


def predict(checkpoint: Checkpoint, quant: str, *, imatrix: bool, head: str | None = None) -> GgufSize:
    """The file that ``quant`` of this checkpoint will be, from config, tensor headers and tokenizer alone."""
    shape = checkpoint.shape
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    tensors = plan_tensors(shapes, quant, of_checkpoint(checkpoint), imatrix=imatrix, head=head)
    rope = checkpoint.config.get("rope_parameters") or checkpoint.config.get("rope_scaling") or {}
    if rope.get("rope_type") == "llama3":  # the converter computes it and adds it
        tensors = (GgufTensor("rope_freqs.weight", (shape.head_dim // 2,), "F32"), *tensors)
    return file_size(tensors, metadata_bytes(checkpoint.path, shape.vocab))


def file_size(tensors: Iterable[GgufTensor], metadata: int) -> GgufSize:
    """Header, tensor table and tensors, each padded to 32 bytes. ``metadata`` is the bytes of the key-value pairs."""
    tensors = tuple(tensors)
    table = sum(8 + len(t.name.encode()) + 4 + 8 * len(t.shape) + 4 + 8 for t in tensors)
    header = _padded(24 + metadata + table)
    return GgufSize(tensors, header, header + sum(_padded(t.nbytes) for t in tensors))


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


# A file's pairs other than the tokenizer's: 22 to 30 keys of about 45 bytes (SmolLM2: 988).
PLAIN_METADATA_BYTES = 1100
# Bytes a token takes when no tokenizer.json can be read: text and length, type, merge (SmolLM2: 36, Qwen2: 39).
UNREAD_TOKEN_BYTES = 36


def metadata_bytes(folder: Path, vocab: int) -> int:
    """Bytes of all key-value pairs: the tokenizer's tokens and merges exactly, the few others as a constant."""
    file = folder / "tokenizer.json"
    template = folder / "chat_template.jinja"
    extra = template.stat().st_size if template.is_file() else 0
    if not file.is_file():
        return PLAIN_METADATA_BYTES + extra + vocab * UNREAD_TOKEN_BYTES
    return PLAIN_METADATA_BYTES + extra + _tokenizer_bytes(file, file.stat().st_mtime_ns, vocab)


@lru_cache(maxsize=8)
def _tokenizer_bytes(file: Path, _mtime: int, vocab: int) -> int:
    try:
        data = json.loads(file.read_bytes())
        words = data["model"]["vocab"]
        words = list(words) if isinstance(words, dict) else [entry[0] for entry in words]
        tokens = {*words, *(entry["content"] for entry in data.get("added_tokens", ()))}
        merges = data["model"].get("merges") or ()
        text = sum(8 + len(token.encode("utf-8", "surrogatepass")) for token in tokens)
        # Rows of the embedding that no token owns are named [PAD123].
        text += max(0, vocab - len(tokens)) * (8 + len("[PAD]") + len(str(vocab)))
        pairs = (merge if isinstance(merge, str) else " ".join(merge) for merge in merges)
        text += sum(8 + len(pair.encode("utf-8", "surrogatepass")) for pair in pairs)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return vocab * UNREAD_TOKEN_BYTES
    return text + 4 * max(vocab, len(tokens))


# -- what a build of it costs and what the box needs ------------------------------------------------------------------

MIB = 1024**2
# The runtime on the box, measured: Python 3.11, FastAPI, tokenizers, xllamacpp 2026.10, after 1500-token prompts.
RUNTIME_BASE_BYTES = 70 * MIB
# The vocabulary, in tokenizers and in llama.cpp: 59 MiB for SmolLM2's 49152 tokens, 152 MiB for Qwen2's 152064.
RUNTIME_BYTES_PER_TOKEN = 1050
# Prompts are read 512 tokens at a time (runtimes/engines/llamacpp/engine.py); llama.cpp then holds about this many
# float32 rows.
PROMPT_BATCH = 512
ROWS_OF_HIDDEN, ROWS_OF_INTERMEDIATE = 4, 3

# The converter's peak: Python with torch, and the largest tensor in 16 bits, in float32 and once more on its way out
# (measured: 2.2 GB for 1.5B, whose embedding has 234 million elements).
BUILD_BASE_BYTES = 400 * MIB
BUILD_BYTES_PER_ELEMENT = 8
# Source model, a layer at a time, with the activations of its samples: for the importance matrix and for verification.
BUILD_SAMPLES_BYTES = 300 * MIB
WHEELS_BYTES = 70 * MIB  # wheels, server and documents of one bundle
CONVERT_RATE = 20e6  # elements a second: bound by the disk
# Elements a second on two cores by ggml type, without and with an importance matrix (benchmarks/quantizers.py --speed).
QUANTIZE_RATE: dict[bool, dict[str, float]] = {
    False: {
        "Q8_0": 60e6,
        "Q6_K": 50e6,
        "Q5_K": 20e6,
        "Q4_K": 16e6,
        "Q3_K": 60e6,
        "Q2_K": 20e6,
        "Q5_1": 60e6,
        "Q5_0": 60e6,
        "Q4_1": 60e6,
        "Q4_0": 60e6,
        "IQ4_NL": 4.7e6,
        "IQ4_XS": 3.9e6,
        "IQ3_S": 2.9e6,
        "IQ3_XXS": 2.4e6,
        "IQ2_S": 3.9e6,
        "IQ2_XS": 3.9e6,
    },
    True: {
        "Q8_0": 60e6,
        "Q6_K": 50e6,
        "Q5_K": 9.2e6,
        "Q4_K": 9.6e6,
        "Q3_K": 35e6,
        "Q2_K": 8.5e6,
        "Q5_1": 9.7e6,
        "Q5_0": 48e6,
        "Q4_1": 9.7e6,
        "Q4_0": 49e6,
        "IQ4_NL": 4e6,
        "IQ4_XS": 3.8e6,
        "IQ3_S": 3.7e6,
        "IQ3_XXS": 2.7e6,
        "IQ2_S": 5.3e6,
        "IQ2_XS": 5.3e6,
    },
}
SECONDS_BESIDE = 20.0  # starting the tools, wheels, digests


def runtime_overhead_bytes(vocab: int, hidden: int, intermediate: int) -> int:
    """What the server holds on the box beside weights and KV cache."""
    rows = ROWS_OF_HIDDEN * hidden + ROWS_OF_INTERMEDIATE * intermediate
    return RUNTIME_BASE_BYTES + RUNTIME_BYTES_PER_TOKEN * vocab + PROMPT_BATCH * 4 * rows


def estimate_gguf(
    checkpoint: Checkpoint,
    target: Target,
    *,
    quant: str,
    context: int,
    slots: int,
    kv_type: str = "f16",
    imatrix: bool = False,
    head: str | None = None,
) -> Estimate:
    """What a gguf build costs and what its model needs on the box. imatrix: whether one is used.

    head: the type of the output layer when it is not llama.cpp's choice. Raises KeyError for an unknown quant.
    """
    from packager.recipe import Estimate

    shape = checkpoint.shape
    size = predict(checkpoint, quant, imatrix=imatrix, head=head)
    whole = predict(checkpoint, "BF16", imatrix=False)
    elements = sum(math.prod(tensor.shape) for tensor in size.tensors)
    largest = max(math.prod(tensor.shape) for tensor in size.tensors)
    seconds = SECONDS_BESIDE + elements / CONVERT_RATE
    rates = QUANTIZE_RATE[imatrix]
    seconds += sum(math.prod(tensor.shape) / rates[tensor.type] for tensor in size.tensors if tensor.type in rates)
    return Estimate(
        artifact_bytes=size.bytes,
        build_ram_bytes=BUILD_BASE_BYTES + BUILD_BYTES_PER_ELEMENT * largest + (BUILD_SAMPLES_BYTES if imatrix else 0),
        build_disk_bytes=whole.bytes + 2 * size.bytes + WHEELS_BYTES,
        load_bytes=size.bytes,
        kv_bytes=kv_cache_bytes(shape.layers, shape.kv_heads, shape.head_dim, context, slots, kv_type),
        overhead_bytes=runtime_overhead_bytes(shape.vocab, shape.hidden, shape.intermediate),
        read_per_token_bytes=size.read_per_token_bytes,
        context=context,
        slots=slots,
        seconds=round(seconds, 1),
        notes=tuple(_type_notes(quant, size, shape.hidden)),
    )


def _type_notes(quant: str, size: GgufSize, hidden: int) -> Iterable[str]:
    """Says so when the rows of the model do not take the type that was asked for."""
    block = BLOCKS[QUANTS[quant].base][0]
    quantized = [t for t in size.tensors if t.type not in ("F32", "F16", "BF16")]
    fallen = Counter(t.type for t in quantized if t.shape[-1] % block)
    if fallen.total() * 2 > len(quantized):
        [(kind, count)] = fallen.most_common(1)
        yield (
            f"{quant} is in name only here: {count} of {len(quantized)} quantized tensors become {kind}, because "
            f"rows of {hidden} are not divisible by {block}."
        )
