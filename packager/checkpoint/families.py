"""The supported model families, as data: the tensors of each, and the recipes that accept it.

A family is listed when its converter class exists in the pinned llama.cpp (decoders) and transformers can run it as the
reference. A key that is missing in a config takes that family's default in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from packager.core.errors import InputError, closest
from packager.tensors.ggml_types import BLOCKS


@dataclass(frozen=True)
class Family:
    """One value of ``architectures`` in config.json.

    kind: "decoder" or "encoder". gguf: the gguf recipe accepts it. tied: default of tie_word_embeddings. qkv_bias: q, k
    and v always have a bias. qk_norm: per-head norms. fused: qkv_proj and gate_up_proj are one tensor each. norms: the
    layer's norm tensors. head_dim: default when the config has none (0: hidden / heads). prefixes: (encoders) possible
    prefixes of the tensors' names.
    """

    name: str
    model_type: str
    kind: str = "decoder"
    gguf: bool = True
    tied: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    fused: bool = False
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    head_dim: int = 0
    prefixes: tuple[str, ...] = ()


_FOUR_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


def _encoders(stem: str, model_type: str) -> list[Family]:
    tasks = ("Model", "ForSequenceClassification", "ForTokenClassification", "ForMaskedLM")
    prefixes = ("", model_type.replace("xlm-", "") + ".")
    return [Family(stem + task, model_type, "encoder", gguf=False, prefixes=prefixes) for task in tasks]


FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in [
        Family("LlamaForCausalLM", "llama"),
        Family("MistralForCausalLM", "mistral"),
        Family("Qwen2ForCausalLM", "qwen2", qkv_bias=True),
        Family("Qwen3ForCausalLM", "qwen3", qk_norm=True, head_dim=128),
        Family("SmolLM3ForCausalLM", "smollm3", tied=True),
        Family("Phi3ForCausalLM", "phi3", fused=True),
        Family("GemmaForCausalLM", "gemma", tied=True, head_dim=256),
        Family("Gemma2ForCausalLM", "gemma2", tied=True, head_dim=256, norms=_FOUR_NORMS),
        Family("Gemma3ForCausalLM", "gemma3_text", tied=True, head_dim=256, norms=_FOUR_NORMS, qk_norm=True),
        *_encoders("Bert", "bert"),
        *_encoders("Roberta", "roberta"),
        *_encoders("XLMRoberta", "xlm-roberta"),
        *_encoders("DistilBert", "distilbert"),
    ]
}

# Buffers in old checkpoints that every loader ignores.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".attn.bias", ".masked_bias", ".position_ids")
# DistilBERT has other names for the common keys.
_SPELLINGS = {
    "hidden_size": ("hidden_size", "dim"),
    "num_hidden_layers": ("num_hidden_layers", "n_layers"),
    "num_attention_heads": ("num_attention_heads", "n_heads"),
    "intermediate_size": ("intermediate_size", "hidden_dim"),
}


@dataclass(frozen=True)
class ModelShape:
    """The dimensions from which sizes and speeds are computed.

    context: max_position_embeddings, in tokens. tied: the output layer is the embedding.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    context: int
    tied: bool


def find_family(config: Mapping[str, Any]) -> Family:
    """The family that config.json names. Raises InputError with the nearest known one."""
    named = config.get("architectures")
    if not isinstance(named, list) or not named or not isinstance(named[0], str):
        raise InputError(
            'config.json names no architecture (the list "architectures" is missing or empty).',
            why="Without it the model that the tensors belong to is unknown.",
            fix='Save the model again with save_pretrained, or add for example "architectures": ["LlamaForCausalLM"].',
        )
    family = FAMILIES.get(named[0])
    if family is None:
        raise InputError(
            f"The architecture {named[0]} is not supported.{closest(named[0], list(FAMILIES))}",
            why=f"Known are {', '.join(FAMILIES)}.",
            fix="Package a checkpoint of one of these, or add the family to packager/checkpoint/families.py.",
        )
    return family


def read_shape(config: Mapping[str, Any], family: Family) -> ModelShape:
    """The model's shape from config.json. Raises InputError for a missing or invalid key."""
    hidden, heads = _number(config, "hidden_size"), _number(config, "num_attention_heads")
    head_dim = config.get("head_dim") or family.head_dim or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    if not (isinstance(head_dim, int) and isinstance(kv_heads, int)) or head_dim < 1 or kv_heads < 1:
        raise InputError(f"config.json: head_dim {head_dim!r} or num_key_value_heads {kv_heads!r} is not a count.")
    if heads % kv_heads:
        raise InputError(
            f"config.json: {heads} attention heads are not a multiple of {kv_heads} key/value heads.",
            fix="Compare config.json with the one of the base model.",
        )
    return ModelShape(
        layers=_number(config, "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=_number(config, "intermediate_size"),
        vocab=_number(config, "vocab_size"),
        context=_number(config, "max_position_embeddings"),
        tied=bool(config.get("tie_word_embeddings", family.tied)) and family.kind == "decoder",
    )


def _number(config: Mapping[str, Any], key: str) -> int:
    for spelling in _SPELLINGS.get(key, (key,)):
        value = config.get(spelling)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        if value is not None:
            raise InputError(
                f"config.json: {spelling} is {value!r}, not a positive whole number.",
                fix="Compare config.json with the one of the base model.",
            )
    raise InputError(
        f"config.json has no {key}.",
        why="The model's shape cannot be known without it.",
        fix="Copy config.json from the base model, or save the model again with save_pretrained.",
    )


def expected_tensors(config: Mapping[str, Any], family: Family, shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor a decoder of this family has; empty for encoders."""
    if family.kind != "decoder":
        return {}
    query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    linear: dict[str, tuple[int, int]]
    if family.fused:
        linear = {
            "self_attn.qkv_proj": (query + 2 * kv, shape.hidden),
            "mlp.gate_up_proj": (2 * shape.intermediate, shape.hidden),
        }
    else:
        linear = {
            "self_attn.q_proj": (query, shape.hidden),
            "self_attn.k_proj": (kv, shape.hidden),
            "self_attn.v_proj": (kv, shape.hidden),
            "mlp.gate_proj": (shape.intermediate, shape.hidden),
            "mlp.up_proj": (shape.intermediate, shape.hidden),
        }
    linear |= {"self_attn.o_proj": (shape.hidden, query), "mlp.down_proj": (shape.hidden, shape.intermediate)}
    layer: dict[str, tuple[int, ...]] = {f"{norm}.weight": (shape.hidden,) for norm in family.norms}
    if family.qk_norm:
        layer |= {"self_attn.q_norm.weight": (shape.head_dim,), "self_attn.k_norm.weight": (shape.head_dim,)}
    for name, size in linear.items():
        layer[f"{name}.weight"] = size
        attention = name.startswith("self_attn.")
        always = family.qkv_bias and attention and "o_proj" not in name
        configured = not family.qkv_bias and config.get("attention_bias" if attention else "mlp_bias", False)
        if always or configured:
            layer[f"{name}.bias"] = size[:1]
    expected: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab, shape.hidden)}
    for number in range(shape.layers):
        expected |= {f"model.layers.{number}.{name}": size for name, size in layer.items()}
    expected["model.norm.weight"] = (shape.hidden,)
    if not shape.tied:
        expected["lm_head.weight"] = (shape.vocab, shape.hidden)
    return expected


def kv_cache_bytes(layers: int, kv_heads: int, head_dim: int, context: int, slots: int, kv_type: str) -> int:
    """Bytes of the KV cache of ``slots`` conversations; llama.cpp rounds ``context`` up to a multiple of 256."""
    elements, size = BLOCKS[kv_type.upper()]
    cells = -(-context // 256) * 256 * slots
    return 2 * layers * kv_heads * head_dim * cells * size // elements
