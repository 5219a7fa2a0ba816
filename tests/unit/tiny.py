"""A llama checkpoint of some kilobytes, written with numpy: enough for every check of headers and tokenizers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from packager.checkpoint.families import expected_tensors, find_family, read_shape
from packager.tensors.safetensors import Spec, from_float32, plan_shards, shard_names, write_file, write_index

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 12,
    "max_position_embeddings": 64, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
WORDS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "a", "b", "c", "d", "e", "f"]
CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def tokenizer_json(words: list[str], *, bos: bool = False) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}] if bos else []
    return {
        "version": "1.0",
        "added_tokens": [{"id": number, "content": word, **flags} for number, word in enumerate(words) if "<" in word],
        "post_processor": {"type": "TemplateProcessing", "single": [*single, {"Sequence": {"id": "A", "type_id": 0}}]},
        "model": {"type": "WordLevel", "vocab": {word: n for n, word in enumerate(words)}, "unk_token": "</s>"},
    }


def spoken_tokenizer(words: str) -> dict[str, Any]:
    """One that the tokenizers library reads: WORDS and these, split at white space, unknown words as </s>."""
    tokenizer = tokenizer_json([*WORDS, *words.split()])
    return {**tokenizer, "post_processor": None, "pre_tokenizer": {"type": "WhitespaceSplit"}}


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def edit_json(path: Path, **changes: Any) -> None:
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **changes})


def write_tensors(
    folder: Path, values: Mapping[str, np.ndarray[Any, Any]], *, dtype: str = "BF16", shard_bytes: int = 1 << 30
) -> None:
    specs = [Spec(name, dtype, array.shape) for name, array in values.items()]
    shards = plan_shards(specs, shard_bytes)
    for name, shard in zip(shard_names(len(shards)), shards, strict=True):
        stored = (from_float32(values[spec.name], dtype).tobytes() for spec in shard)
        write_file(folder / name, shard, (iter([data]) for data in stored))
    write_index(folder, shards)


def tiny_values(config: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    family = find_family(config)
    random = np.random.default_rng(seed)
    shapes = expected_tensors(config, family, read_shape(config, family))
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def tiny_checkpoint(folder: Path, *, shard_bytes: int = 1 << 30, dtype: str = "BF16", **changes: Any) -> Path:
    """Write the folder; changes override keys of config.json."""
    folder.mkdir(parents=True)
    config = {**CONFIG, **changes}
    write_tensors(folder, tiny_values(config), dtype=dtype, shard_bytes=shard_bytes)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"eos_token_id": 1, "do_sample": True, "temperature": 0.6})
    write_json(folder / "tokenizer.json", tokenizer_json(WORDS))
    write_json(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
    return folder
