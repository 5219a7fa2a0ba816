"""A BERT checkpoint of some kilobytes, written with numpy: enough for plans and for what its files say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.unit.tiny import WORDS, tokenizer_json, write_json, write_tensors

CONFIG: dict[str, Any] = {
    "architectures": ["BertModel"], "model_type": "bert", "hidden_size": 16, "intermediate_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 12, "max_position_embeddings": 64,
    "type_vocab_size": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "pad_token_id": 0,
}  # fmt: skip


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a BertModel without its pooler."""
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    tensors: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], hidden),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], hidden),
        "embeddings.token_type_embeddings.weight": (config["type_vocab_size"], hidden),
    }
    layer = {
        "attention.self.query": (hidden, hidden),
        "attention.self.key": (hidden, hidden),
        "attention.self.value": (hidden, hidden),
        "attention.output.dense": (hidden, hidden),
        "intermediate.dense": (wide, hidden),
        "output.dense": (hidden, wide),
    }
    norms = ["embeddings.LayerNorm"]
    for number in range(config["num_hidden_layers"]):
        for name, size in layer.items():
            tensors[f"encoder.layer.{number}.{name}.weight"] = size
            tensors[f"encoder.layer.{number}.{name}.bias"] = size[:1]
        norms += [f"encoder.layer.{number}.{part}.LayerNorm" for part in ("attention.output", "output")]
    return tensors | {f"{norm}.{part}": (hidden,) for norm in norms for part in ("weight", "bias")}


def tiny_encoder(folder: Path, *, files: Mapping[str, Any] | None = None, **changes: Any) -> Path:
    """Write the folder; files: further JSON files; changes override keys of config.json."""
    folder.mkdir(parents=True)
    config = {**CONFIG, **changes}
    random = np.random.default_rng(0)
    values = {name: random.standard_normal(size).astype(np.float32) for name, size in shapes(config).items()}
    write_tensors(folder, values, dtype="F32")
    write_json(folder / "config.json", config)
    write_json(folder / "tokenizer.json", tokenizer_json(WORDS))
    write_json(folder / "tokenizer_config.json", {"pad_token": "<s>", "model_max_length": 1e30})
    for name, value in (files or {}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_json(folder / name, value)
    return folder
