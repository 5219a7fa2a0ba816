"""Write a Qwen2-shaped checkpoint with random weights and the real DeepSeek-R1 tokenizer.

python benchmarks/random_qwen2.py OUT [--size small|1.5b|7b] [--seed 0] [--headers]

No hub is needed: the tokenizer, template and small configuration come from tests/data/r1-distill-qwen; the 1.5B and 7B
shapes are those of DeepSeek-R1-Distill-Qwen. With --headers the weights are holes in their files: enough for plans, and
no room on the disk. The values are scaled so that activations stay near 1 and the logits have a
spread of about 3, so a comparison of two engines sees clear winners and not ties. Same seed, same bytes.
"""

from __future__ import annotations

import argparse
import json
import lzma
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a checkout without an install

from packager.tensors.safetensors import (  # noqa: E402
    CHUNK_ELEMENTS,
    Spec,
    from_float32,
    header_bytes,
    plan_shards,
    shard_names,
    write_file,
    write_index,
)

SOURCE = ROOT / "tests" / "data" / "r1-distill-qwen"
SIZES: dict[str, dict[str, int | float | None]] = {
    "small": {},
    "1.5b": {
        "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
        "intermediate_size": 8960, "vocab_size": 151936, "max_window_layers": 21,
    },
    "7b": {
        "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "intermediate_size": 18944, "vocab_size": 152064, "max_window_layers": 28,
    },
}  # fmt: skip
SHARD_BYTES = 1 << 30


def specs(config: dict[str, int]) -> list[Spec]:
    """The tensors of a Qwen2ForCausalLM with untied embeddings, in layer order, bf16."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = hidden // config["num_attention_heads"]
    kv = head * config["num_key_value_heads"]
    tensors = [Spec("model.embed_tokens.weight", "BF16", (vocab, hidden))]
    for layer in range(config["num_hidden_layers"]):
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (hidden, hidden),
            "self_attn.q_proj.bias": (hidden,),
            "self_attn.k_proj.weight": (kv, hidden),
            "self_attn.k_proj.bias": (kv,),
            "self_attn.v_proj.weight": (kv, hidden),
            "self_attn.v_proj.bias": (kv,),
            "self_attn.o_proj.weight": (hidden, hidden),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
        }
        tensors += [Spec(f"model.layers.{layer}.{name}", "BF16", shape) for name, shape in shapes.items()]
    tensors += [Spec("model.norm.weight", "BF16", (hidden,)), Spec("lm_head.weight", "BF16", (vocab, hidden))]
    return tensors


def values(spec: Spec, layers: int, seed: int) -> Iterator[memoryview]:
    """Random bf16 bytes of one tensor, chunk by chunk; the stream depends on the seed and the tensor's name only."""
    random = np.random.Generator(np.random.SFC64([seed, zlib.crc32(spec.name.encode())]))
    mean, spread = 0.0, 1.0
    if "norm" in spec.name:
        mean, spread = 1.0, 0.05
    elif spec.name.endswith("bias"):
        spread = 0.1
    elif spec.name == "lm_head.weight":
        spread = 3.0 / spec.shape[1] ** 0.5
    elif "embed" not in spec.name:
        spread = spec.shape[1] ** -0.5
        if "o_proj" in spec.name or "down_proj" in spec.name:
            spread /= (2 * layers) ** 0.5  # keeps the residual stream from growing with depth
    left = int(np.prod(spec.shape))
    while left:
        chunk = random.standard_normal(min(left, CHUNK_ELEMENTS), dtype=np.float32)
        left -= chunk.size
        chunk *= np.float32(spread)
        chunk += np.float32(mean)
        yield from_float32(chunk, "BF16").view("u1").data


def hollow(path: Path, shard: list[Spec]) -> None:
    """Write a safetensors file whose tensors are a hole: all zeros, and no blocks on the disk."""
    with path.open("wb") as file:
        file.write(header_bytes(shard))
        file.truncate(file.tell() + sum(spec.nbytes for spec in shard))


def make(out: Path, size: str, seed: int = 0, *, headers: bool = False) -> None:
    """Write the checkpoint folder; a folder that exists already is refused, a cut-off one never takes its name."""
    if out.exists():
        raise SystemExit(f"{out} exists already: remove it or choose another folder")
    config = json.loads((SOURCE / "config.json").read_text(encoding="utf-8")) | SIZES[size]
    layers = config["num_hidden_layers"]
    config["layer_types"] = ["full_attention"] * layers
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    shards = plan_shards(specs(config), SHARD_BYTES)
    for name, shard in zip(shard_names(len(shards)), shards, strict=True):
        if headers:
            hollow(part / name, shard)
        else:
            write_file(part / name, shard, (values(spec, layers, seed) for spec in shard))
    write_index(part, shards)
    (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generation = {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": config["eos_token_id"],
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.95,
    }
    (part / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(SOURCE / name, part / name)
    (part / "tokenizer.json").write_bytes(lzma.decompress((SOURCE / "tokenizer.json.xz").read_bytes()))
    part.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--headers", action="store_true")
    arguments = parser.parse_args()
    make(arguments.out, arguments.size, arguments.seed, headers=arguments.headers)


if __name__ == "__main__":
    main()
