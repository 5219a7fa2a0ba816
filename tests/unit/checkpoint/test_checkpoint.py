"""A checkpoint folder is described without reading weights; what would break a build is refused by name."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from packager.checkpoint import checkpoint
from packager.checkpoint.checkpoint import Checkpoint, check_weights, open_checkpoint, slug
from packager.core.errors import InputError, UsageError
from packager.core.progress import Silent
from tests.tolerance import BFLOAT16
from tests.unit.tiny import (
    CONFIG,
    WORDS,
    edit_json,
    tiny_checkpoint,
    tiny_values,
    tokenizer_json,
    write_json,
    write_tensors,
)

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "Tiny Llama")


def opened(folder: Path, **options: Any) -> Checkpoint:
    return open_checkpoint(str(folder), progress=Silent(), cache=folder.parent / "cache", **options)


def refusal(folder: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        opened(folder)
    return caught.value


def test_a_folder_is_described(folder: Path) -> None:
    """Architecture, shape, sizes, data type and name of a small llama are right."""
    tiny = opened(folder)
    assert (tiny.name, tiny.origin.kind, tiny.origin.revision) == ("tiny-llama", "folder", None)
    assert (tiny.architecture, tiny.model_type, tiny.dtype) == ("LlamaForCausalLM", "llama", "BF16")
    assert (tiny.shape.layers, tiny.shape.kv_heads, tiny.shape.head_dim, tiny.shape.vocab) == (2, 2, 4, 12)
    assert tiny.parameters * 2 == tiny.weight_bytes == sum(t.nbytes for t in tiny.tensors.values())
    data = (folder / "model.safetensors").read_bytes()
    norm = tiny.tensors["model.norm.weight"]
    stored = np.frombuffer(data[norm.start : norm.start + norm.nbytes], "<u2")
    wanted = tiny_values(CONFIG)["model.norm.weight"]
    assert (np.abs((stored.astype("u4") << 16).view("f4") - wanted) <= BFLOAT16 * np.abs(wanted)).all()


def test_shards_give_the_same_tensors(tmp_path: Path) -> None:
    """The same weights in one file and in many shards have the same names, shapes and bytes."""
    one, many = tiny_checkpoint(tmp_path / "one"), tiny_checkpoint(tmp_path / "many", shard_bytes=2000)
    single, split = opened(one), opened(many)
    assert len({tensor.file for tensor in split.tensors.values()}) > 2
    assert {n: t.shape for n, t in single.tensors.items()} == {n: t.shape for n, t in split.tensors.items()}


def test_the_digest_follows_the_model_only(folder: Path, tmp_path: Path) -> None:
    """The digest is the same elsewhere and beside other files; it changes with one byte of a weight or template."""
    digest = opened(folder).digest
    copy = tmp_path / "elsewhere" / "x"
    shutil.copytree(folder, copy)
    (copy / "README.md").write_text("hello")
    (copy / "onnx").mkdir()
    (copy / "onnx" / "model.onnx").write_bytes(b"1")
    assert opened(copy).digest == digest
    (copy / "chat_template.jinja").write_text("x")
    changed = opened(copy).digest
    assert changed != digest
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert opened(copy).digest not in (digest, changed)


def test_weights_are_not_read_before_the_digest_is_needed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening, which is all that a plan needs, hashes nothing; the digest is made once, for renamed copies too."""
    read: list[str] = []

    def hashed(path: Path, *_more: Any) -> str:
        read.append(path.name)
        return "0" * 64

    monkeypatch.setattr(checkpoint, "file_digest", hashed)
    tiny = opened(folder)
    assert not read
    assert replace(tiny, name="other").digest == tiny.digest
    assert read.count("model.safetensors") == 1


def test_the_digest_is_remembered(folder: Path) -> None:
    """A second opening reads no weights: with the remembered digest in place, it is taken as it is."""
    assert opened(folder).digest
    for remembered in (folder.parent / "cache" / "digests").iterdir():
        remembered.write_text("0" * 64)
    again = opened(folder).digest
    shutil.rmtree(folder.parent / "cache")
    assert opened(folder).digest != again


def test_names_are_safe(folder: Path) -> None:
    """Names are slugs; a given name that is none is refused with one that would do."""
    assert slug("HuggingFaceTB/SmolLM2 135M–Instruct!") == "huggingfacetb-smollm2-135m-instruct"
    assert slug("../..") == "model"
    assert slug("小焰") == "model"
    assert opened(folder, name="mine-1.5b").name == "mine-1.5b"
    with pytest.raises(UsageError, match="my-model"):
        opened(folder, name="My Model")


def test_a_path_that_is_neither_folder_nor_id_is_refused(tmp_path: Path) -> None:
    """A path that does not exist names both readings; a file names its folder; a revision of a folder is refused."""
    error = refusal(tmp_path / "nothing" / "here")
    assert "no folder" in error.what and "hub id" in error.what
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert "is a file" in refusal(file).what
    with pytest.raises(UsageError, match="revision"):
        opened(tiny_checkpoint(tmp_path / "m"), revision="main")


def test_a_missing_or_broken_config_is_refused(folder: Path) -> None:
    """No config, a config that is not JSON, and one without a needed key are three errors."""
    edit_json(folder / "config.json", hidden_size="many")
    assert "hidden_size is 'many'" in refusal(folder).what
    (folder / "config.json").write_text("{")
    assert "config.json is not valid JSON" in refusal(folder).what
    (folder / "config.json").unlink()
    assert "no config.json" in refusal(folder).what
    write_json(folder / "adapter_config.json", {})
    assert "--adapter" in refusal(folder).fix


def test_an_unknown_architecture_names_the_nearest(folder: Path) -> None:
    """A misspelt architecture is refused with the one that was probably meant."""
    edit_json(folder / "config.json", architectures=["LlamaForCausalLLM"])
    assert 'Did you mean "LlamaForCausalLM"?' in refusal(folder).what
    edit_json(folder / "config.json", architectures=[])
    assert "names no architecture" in refusal(folder).what


def test_a_quantized_checkpoint_is_refused(folder: Path) -> None:
    """A checkpoint with a quantization config is named by its method."""
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq"})
    assert "already quantized (gptq)" in refusal(folder).what


def test_a_cut_off_file_names_the_first_tensor_cut(folder: Path) -> None:
    """A truncated safetensors file is refused with both sizes and the tensor where it stops; so is a cut header."""
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    last = max(opened(folder).tensors.values(), key=lambda tensor: tensor.start)
    path.write_bytes(whole[:-1])
    error = refusal(folder)
    assert f"{len(whole)} bytes, the file has {len(whole) - 1}" in error.what
    assert last.name in error.why
    path.write_bytes(whole[:100])
    assert "inside its header" in refusal(folder).why
    path.write_bytes(whole[:5])
    assert "5 bytes" in refusal(folder).why
    path.write_bytes(b"<html><body>not found")
    assert "another kind of file" in refusal(folder).why
    path.write_bytes(whole + b"x")
    assert "unaccounted" in refusal(folder).why


def test_a_header_that_lies_is_refused(folder: Path) -> None:
    """Offsets that overlap or disagree with shape and type are refused before anything is read."""
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    for change in ({"shape": [13, 16]}, {"data_offsets": [0, 1]}, {"dtype": "Q4"}, {"shape": "x"}):
        header = json.loads(whole[8 : 8 + size])
        header["model.embed_tokens.weight"].update(change)
        raw = json.dumps(header).encode()
        path.write_bytes(len(raw).to_bytes(8, "little") + raw + whole[8 + size :])
        assert "model.embed_tokens.weight" in refusal(folder).why


def test_shards_and_index_must_agree(tmp_path: Path) -> None:
    """A missing shard, a superfluous one, a misplaced, an unnamed and an invented tensor are each refused by name."""
    source = tiny_checkpoint(tmp_path / "source", shard_bytes=4000)
    index = json.loads((source / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))

    def variant(name: str) -> Path:
        return Path(shutil.copytree(source, tmp_path / name))

    missing = variant("missing")
    (missing / shards[0]).unlink()
    assert shards[0] in refusal(missing).what
    extra = variant("extra")
    shutil.copyfile(extra / shards[0], extra / "model-00009-of-00009.safetensors")
    assert "model-00009-of-00009.safetensors is not named" in refusal(extra).what
    no_index = variant("no_index")
    (no_index / INDEX).unlink()
    assert INDEX in refusal(no_index).what
    for name, change, word in (
        ("moved", {"model.norm.weight": shards[0]}, "places it in"),
        ("unnamed", {"model.norm.weight": None}, "does not name it"),
        ("invented", {"model.more.weight": shards[0]}, "does not have it"),
        ("outside", {"model.norm.weight": "../x.safetensors"}, "not in the folder"),
    ):
        folder = variant(name)
        weight_map = {key: value for key, value in {**index["weight_map"], **change}.items() if value is not None}
        edit_json(folder / INDEX, weight_map=weight_map)
        assert word in refusal(folder).what


def test_a_file_beside_the_weights_is_refused(folder: Path) -> None:
    """model.safetensors together with a left-over shard is ambiguous: two tools would read two models."""
    shutil.copyfile(folder / "model.safetensors", folder / "model-00001-of-00002.safetensors")
    assert "and also model-00001-of-00002.safetensors" in refusal(folder).what


def test_a_vocabulary_that_disagrees_is_refused(folder: Path) -> None:
    """Embedding rows against vocab_size, and the tokenizer's highest id against the rows."""
    edit_json(folder / "config.json", vocab_size=13)
    assert "12 rows, config.json says vocab_size 13" in refusal(folder).what
    edit_json(folder / "config.json", vocab_size=12)
    write_json(folder / "tokenizer.json", tokenizer_json([*WORDS, "g", "h", "<new>"]))
    assert "highest id is 12, the embedding has only 12 rows" in refusal(folder).what


def test_missing_foreign_and_misshapen_tensors_are_refused(folder: Path) -> None:
    """Weights that are not what config.json describes are refused with the first tensor."""
    edit_json(folder / "config.json", num_hidden_layers=3)
    assert "model.layers.2.input_layernorm.weight" in refusal(folder).what
    edit_json(folder / "config.json", num_hidden_layers=1)
    assert "model.layers.1.input_layernorm.weight is not part of" in refusal(folder).what
    edit_json(folder / "config.json", num_hidden_layers=2, intermediate_size=25)
    error = refusal(folder)
    assert "[24, 16]" in error.what and "[25, 16]" in error.what
    edit_json(folder / "config.json", intermediate_size=24, attention_bias=True)
    assert "self_attn.k_proj.bias" in refusal(folder).what or "self_attn.q_proj.bias" in refusal(folder).what


def test_nan_and_infinity_are_refused(tmp_path: Path) -> None:
    """NaN and infinity are refused with tensor and place, in each data type; the largest finite value passes."""
    for dtype, largest in (("BF16", 3.3e38), ("F16", 65504.0), ("F32", 3.4e38)):
        for bad in (largest, np.nan, np.inf, -np.inf):
            folder = tmp_path / f"{dtype}{bad}"
            tiny_checkpoint(folder, dtype=dtype)
            values = tiny_values(CONFIG)
            values["model.layers.1.mlp.up_proj.weight"][3, 5] = bad
            write_tensors(folder, values, dtype=dtype)
            tiny = opened(folder)
            if bad == largest:
                check_weights(tiny, Silent())
                continue
            with pytest.raises(InputError, match=r"model.layers.1.mlp.up_proj.weight .* \[3, 5\]"):
                check_weights(tiny, Silent())


def test_tied_weights_that_differ_are_refused(tmp_path: Path) -> None:
    """Tied in the config, but with an lm_head of its own that differs: refused, as programs would disagree."""
    folder = tiny_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    config = {**CONFIG, "tie_word_embeddings": True}
    values = tiny_values(config)
    assert opened(folder).shape.tied
    write_tensors(folder, {**values, "lm_head.weight": values["model.embed_tokens.weight"]})
    same = opened(folder)
    assert same.parameters == sum(array.size for array in values.values())
    check_weights(same, Silent())
    write_tensors(folder, {**values, "lm_head.weight": values["model.embed_tokens.weight"] + 1})
    with pytest.raises(InputError, match="ties lm_head"):
        check_weights(opened(folder), Silent())


def test_a_tokenizer_is_required(folder: Path) -> None:
    """Without tokenizer.json the error says how to make one from what is there."""
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    error = refusal(folder)
    assert "no tokenizer.json" in error.what and "save_pretrained" in error.fix
    (folder / "tokenizer.model").unlink()
    assert "no tokenizer at all" in refusal(folder).why
