"""A LoRA is merged as W + scale·B·A in float32, and fits its base or is refused by the first tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from packager.checkpoint.checkpoint import Checkpoint, check_weights, open_checkpoint
from packager.checkpoint.merge import check_fit, merge, merged_name, open_adapter
from packager.cli.inspect import inspect
from packager.core.errors import InputError
from packager.core.progress import Silent
from packager.tensors.safetensors import Spec, read_rows, to_float32, write_file
from tests.tolerance import BFLOAT16
from tests.unit.tiny import CHATML, WORDS, edit_json, tiny_checkpoint, tokenizer_json, write_json

Array = np.ndarray[Any, Any]
Q = "base_model.model.model.layers.0.self_attn.q_proj"
EMBED = "base_model.model.model.embed_tokens"
HEAD = "base_model.model.lm_head"
random = np.random.default_rng(7)


def base(folder: Path, **options: Any) -> Checkpoint:
    if not folder.exists():
        tiny_checkpoint(folder, **options)
    return open_checkpoint(str(folder), progress=Silent(), cache=folder.parent / "cache")


def values(checkpoint: Checkpoint, name: str) -> Array:
    tensor = checkpoint.tensors[name]
    return to_float32(read_rows(checkpoint.path, tensor), tensor.dtype)


def bf16(array: Array) -> Array:
    """Rounded to bf16 by doubling precision arithmetic, independent of the bit trick under test."""
    scale = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(array), 1e-30))) - 7)
    return np.asarray(np.round(array / scale) * scale, np.float32)  # numpy rounds halves to even


def lora(module: str = Q, rows: int = 16, columns: int = 16, rank: int = 2) -> dict[str, Array]:
    return {
        f"{module}.lora_A.weight": random.standard_normal((rank, columns)).astype(np.float32),
        f"{module}.lora_B.weight": random.standard_normal((rows, rank)).astype(np.float32),
    }


def adapter_folder(folder: Path, tensors: dict[str, Array], **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "base_model_name_or_path": "org/Tiny", **changes}
    write_json(folder / "adapter_config.json", config)
    specs = [Spec(name, "F32", array.shape) for name, array in tensors.items()]
    data = (iter([np.ascontiguousarray(array).tobytes()]) for array in tensors.values())
    write_file(folder / "adapter_model.safetensors", specs, data)
    return folder


def merged(tmp_path: Path, checkpoint: Checkpoint, tensors: dict[str, Array], **changes: Any) -> Checkpoint:
    adapter = open_adapter(adapter_folder(tmp_path / "adapter", tensors, **changes))
    merge(checkpoint, adapter, tmp_path / "merged", Silent())
    result = open_checkpoint(str(tmp_path / "merged"), progress=Silent(), cache=tmp_path / "cache")
    check_weights(result, Silent())
    return result


def refused(tmp_path: Path, tensors: dict[str, Array], **changes: Any) -> InputError:
    checkpoint = base(tmp_path / "tiny")
    with pytest.raises(InputError) as caught:
        check_fit(open_adapter(adapter_folder(tmp_path / "adapter", tensors, **changes)), checkpoint)
    return caught.value


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({}, 3.0),
        ({"use_rslora": True}, 6 / 2**0.5),
        ({"alpha_pattern": {"q_proj": 1}}, 0.5),
        ({"alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 1}}, 3.0),
        ({"rank_pattern": {r".*layers\.0\.self_attn\.q_proj": 4}}, 1.5),
        ({"fan_in_fan_out": True}, 3.0),  # peft takes it back for linear layers
    ],
)
def test_the_sum_is_right(tmp_path: Path, changes: dict[str, Any], scale: float) -> None:
    """W + scale·B·A, rounded once; patterns and rsLoRA set the scale as in peft; other tensors stay."""
    checkpoint = base(tmp_path / "tiny")
    tensors = lora(rank=4 if "rank_pattern" in changes else 2)
    result = merged(tmp_path, checkpoint, tensors, **changes)
    a, b = tensors.values()
    name = "model.layers.0.self_attn.q_proj.weight"
    wanted = bf16(values(checkpoint, name).astype(np.float64) + scale * (b.astype(np.float64) @ a))
    assert np.array_equal(values(result, name), wanted)
    for other in checkpoint.tensors:
        if other != name:
            assert np.array_equal(values(result, other), values(checkpoint, other)), other


def test_shards_and_bytes_are_kept(tmp_path: Path) -> None:
    """The merged folder has the base's shards, configs and tokenizer, and the same bytes when merged again."""
    checkpoint = base(tmp_path / "tiny", shard_bytes=2000)
    result = merged(tmp_path, checkpoint, lora())
    again = merged(tmp_path / "again", checkpoint, _saved(tmp_path / "adapter"))
    assert {t.file for t in result.tensors.values()} == {t.file for t in checkpoint.tensors.values()}
    assert result.digest == again.digest != checkpoint.digest
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (result.path / name).read_bytes() == (checkpoint.path / name).read_bytes()
    assert not list(tmp_path.glob(".merged*"))


def _saved(folder: Path) -> dict[str, Array]:
    adapter = open_adapter(folder)
    return {name: read_rows(folder, tensor) for name, tensor in adapter.tensors.items()}


def test_biases_are_merged(tmp_path: Path) -> None:
    """A trained base bias replaces the base's (bias=all), and lora_bias adds scale times its vector."""
    checkpoint = base(tmp_path / "tiny", attention_bias=True)
    trained, added = random.standard_normal((2, 16)).astype(np.float32)
    tensors = {**lora(), f"{Q}.base_layer.bias": trained, f"{Q}.lora_B.bias": added}
    result = merged(tmp_path, checkpoint, tensors, bias="all", lora_bias=True)
    name = "model.layers.0.self_attn.q_proj.bias"
    assert np.array_equal(values(result, name), bf16(bf16(trained) + np.float32(3) * added))


def test_dora_rescales_rows(tmp_path: Path) -> None:
    """DoRA gives every row of W + delta the trained length."""
    checkpoint = base(tmp_path / "tiny")
    length = np.abs(random.standard_normal(16)).astype(np.float32) + 1
    result = merged(tmp_path, checkpoint, {**lora(), f"{Q}.lora_magnitude_vector": length}, use_dora=True)
    rows = values(result, "model.layers.0.self_attn.q_proj.weight")
    assert np.allclose(np.linalg.norm(rows, axis=1), length, rtol=BFLOAT16 / 2)  # one rounding a weight
    assert "no lora_magnitude_vector" in refused(tmp_path, lora(), use_dora=True).what


def test_modules_to_save_replace(tmp_path: Path) -> None:
    """Fully trained modules replace the base's tensors; under either spelling that peft has used."""
    norm = np.full(16, 2, np.float32)
    for number, name in enumerate(("input_layernorm.weight", "input_layernorm.modules_to_save.default.weight")):
        place = tmp_path / str(number)
        result = merged(place, base(place / "tiny"), {**lora(), f"base_model.model.model.layers.0.{name}": norm})
        assert np.array_equal(values(result, "model.layers.0.input_layernorm.weight"), norm)


def test_a_changed_tied_embedding_is_untied(tmp_path: Path) -> None:
    """LoRA on a tied embedding: the model was trained with the old output layer, so the merged one keeps it apart."""
    checkpoint = base(tmp_path / "tiny", tie_word_embeddings=True)
    a, b = random.standard_normal((2, 12)).astype(np.float32), random.standard_normal((16, 2)).astype(np.float32)
    tensors = {f"{EMBED}.lora_embedding_A": a, f"{EMBED}.lora_embedding_B": b}
    result = merged(tmp_path, checkpoint, tensors)
    old = values(checkpoint, "model.embed_tokens.weight")
    assert not result.shape.tied
    assert np.array_equal(values(result, "lm_head.weight"), old)
    wanted = bf16(old.astype(np.float64) + bf16(3.0 * (b.astype(np.float64) @ a).T))
    assert np.array_equal(values(result, "model.embed_tokens.weight"), wanted)


def test_a_resized_vocabulary_is_kept(tmp_path: Path) -> None:
    """Embedding and output layer with more rows, and the tokenizer that needs them, come from the adapter."""
    checkpoint = base(tmp_path / "tiny")
    rows = np.ones((14, 16), np.float32)
    folder = adapter_folder(tmp_path / "adapter", {**lora(), f"{EMBED}.weight": rows, f"{HEAD}.weight": rows})
    write_json(folder / "tokenizer.json", tokenizer_json([*WORDS, "g", "h", "<t>", "<u>"]))
    write_json(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
    (folder / "chat_template.jinja").write_text(CHATML)
    merge(checkpoint, open_adapter(folder), tmp_path / "merged", Silent())
    result = open_checkpoint(str(tmp_path / "merged"), progress=Silent(), cache=tmp_path / "cache")
    assert result.shape.vocab == result.tokenizer.vocab_size == 14
    assert result.tokenizer.chat_template == CHATML
    assert any("from 12 to 14" in note for note in check_fit(open_adapter(folder), checkpoint))


def test_the_training_template_wins(tmp_path: Path) -> None:
    """A chat template beside the adapter is the one it was trained with; it replaces the base's."""
    checkpoint = base(tmp_path / "tiny")
    (checkpoint.path / "chat_template.jinja").write_text("base")
    folder = adapter_folder(tmp_path / "adapter", lora())
    (folder / "chat_template.jinja").write_text(CHATML)
    merge(checkpoint, open_adapter(folder), tmp_path / "merged", Silent())
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == CHATML


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    """A token with another id, and an added token without an embedding row, are refused by name; nothing is left."""
    checkpoint = base(tmp_path / "tiny")
    folder = adapter_folder(tmp_path / "adapter", lora())
    for words, message in (
        ([*WORDS[:8], "f", "e"], "'e' the id 9"),
        ([*WORDS, "g", "h", "<t>"], "'<t>' with the id 12"),
    ):
        write_json(folder / "tokenizer.json", tokenizer_json(words))
        with pytest.raises(InputError, match=message):
            merge(checkpoint, open_adapter(folder), tmp_path / "merged", Silent())
    assert not (tmp_path / "merged").exists()


def test_a_misfit_names_the_first_tensor(tmp_path: Path) -> None:
    """An adapter of another base is refused with tensor, expected and actual shape, or with the missing module."""
    error = refused(tmp_path, lora(columns=20))
    assert "q_proj.lora_A.weight has the shape [2, 20], expected [2, 16]" in error.what
    assert "org/Tiny" in error.why
    assert (
        "lora_B.weight has the shape [16, 3], expected [16, 2]"
        in refused(tmp_path, {**lora(), f"{Q}.lora_B.weight": np.ones((16, 3), np.float32)}).what
    )
    assert (
        "no model.layers.9.mlp.up_proj.weight"
        in refused(tmp_path, lora("base_model.model.model.layers.9.mlp.up_proj", rows=24)).what
    )
    a, _ = lora()
    assert "no partner" in refused(tmp_path, {a: np.ones((2, 16), np.float32)}).what
    assert (
        "no model.layers.0.self_attn.q_proj.bias"
        in refused(tmp_path, {**lora(), f"{Q}.lora_B.bias": np.ones(16, np.float32)}).what
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "type IA3"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"r": 0}, "r is 0"),
        ({"rank_pattern": {"(": 2}}, "pattern"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    """Other methods, and settings under which a sum would be another model than the trained one, are named."""
    assert words in refused(tmp_path, lora(), **changes).what


def test_an_adapter_that_changes_nothing_is_refused(tmp_path: Path) -> None:
    """An untrained adapter (B is zero) is an error, not a silent copy; NaN in it is one as well."""
    checkpoint = base(tmp_path / "tiny")
    for number, words in ((0.0, "changes nothing"), (np.nan, "NaN or infinity in model.layers.0.self_attn.q_proj")):
        tensors = {**lora(), f"{Q}.lora_B.weight": np.full((16, 2), number, np.float32)}
        adapter = open_adapter(adapter_folder(tmp_path / "adapter", tensors))
        with pytest.raises(InputError, match=words):
            merge(checkpoint, adapter, tmp_path / "merged", Silent())
        assert not (tmp_path / "merged").exists()


def test_a_folder_that_is_no_adapter_is_refused(tmp_path: Path) -> None:
    """A missing folder, one without a config, and one without weights are told apart."""
    with pytest.raises(InputError, match="no folder"):
        open_adapter(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no adapter_config\.json"):
        open_adapter(tmp_path)
    folder = adapter_folder(tmp_path / "adapter", lora())
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no adapter_model\.safetensors"):
        open_adapter(folder)


def test_inspect_is_json(tmp_path: Path) -> None:
    """What inspect gives is JSON and names checkpoint and adapter facts, with a note where the base's name differs."""
    checkpoint = base(tmp_path / "tiny")
    adapter = open_adapter(adapter_folder(tmp_path / "my_lora-persona", lora()), cache=tmp_path / "cache")
    facts: dict[str, Any] = json.loads(json.dumps(inspect(checkpoint, adapter)))
    assert facts["parameters"] == checkpoint.parameters and facts["tokenizer"]["agrees"]
    assert facts["adapter"]["targets"] == ["q_proj"] and facts["adapter"]["kind"] == "LoRA"
    assert facts["adapter"]["notes"] == []
    edit_json(adapter.path / "adapter_config.json", base_model_name_or_path="org/Other-7B")
    assert "org/Other-7B" in check_fit(open_adapter(adapter.path), checkpoint)[0]
    assert merged_name(checkpoint, adapter) == "tiny-my-persona"
    assert adapter.digest == open_adapter(adapter_folder(tmp_path / "my_lora-persona", _saved(adapter.path))).digest
