"""Checkpoints that are only headers: shapes of real models without weights, for tests of sizes and plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from packager.checkpoint.checkpoint import Checkpoint, Origin
from packager.checkpoint.families import expected_tensors, find_family, read_shape
from packager.tensors.safetensors import TensorInfo

SMOLLM2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
    "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
QWEN_1_5B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960,
    "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936,
    "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip
QWEN_7B = {
    **QWEN_1_5B, "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
    "vocab_size": 152064,
}  # fmt: skip
QWEN_32B = {
    **QWEN_7B, "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40,
    "num_key_value_heads": 8,
}  # fmt: skip


def sketch(config: dict[str, Any], name: str = "sketch", path: Path = Path("nowhere")) -> Checkpoint:
    """A checkpoint of this config; its folder need not exist, and then sizes of the tokenizer are estimated."""
    family = find_family(config)
    shape = read_shape(config, family)
    tensors, start = {}, 0
    for key, size in expected_tensors(config, family, shape).items():
        elements = 1
        for axis in size:
            elements *= axis
        tensors[key] = TensorInfo(key, "BF16", tuple(size), "model.safetensors", start, 2 * elements)
        start += 2 * elements
    return Checkpoint(
        path=path,
        name=name,
        origin=Origin("folder", name),
        architecture=config["architectures"][0],
        model_type=config["model_type"],
        config=config,
        tensors=tensors,
        identity=lambda: "0" * 64,
        shape=shape,
        parameters=start // 2,
        dtype="BF16",
        weight_bytes=start,
        tokenizer=cast(Any, None),
        family=family,
    )
