"""The merge against peft's own, weight by weight and in the logits, for every kind of adapter that is accepted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from packager.checkpoint.checkpoint import open_checkpoint
from packager.checkpoint.merge import merge, open_adapter
from packager.core.errors import InputError
from packager.core.progress import Silent
from tests.tolerance import FLOAT32, MARGIN, apart, sums

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

PROMPT = [[1, 5, 9, 33, 2, 17, 64, 11]]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def small_model(folder: Path, dtype: Any, tied: bool = False) -> Path:
    """A Qwen2 with the shapes of a real one in small, and the R1 tokenizer's place taken by a vocabulary of 300."""
    from tests.unit.tiny import tokenizer_json, write_json

    torch.manual_seed(3)
    config = transformers.Qwen2Config(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    transformers.Qwen2ForCausalLM(config).to(dtype).save_pretrained(folder)
    write_json(folder / "tokenizer.json", tokenizer_json([f"w{number}" for number in range(300)]))
    return folder


def trained(base: Path, folder: Path, dtype: Any, **settings: Any) -> Any:
    """An adapter whose every number moved, saved by peft, and the model that carries it unmerged."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **settings))
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or (".bias" in name and settings.get("bias", "none") != "none"):
            parameter.data += torch.randn_like(parameter, dtype=torch.float32).to(parameter.dtype) * 0.05
    model.save_pretrained(folder)
    return peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype), folder
    ).eval()


def ours(base: Path, adapter: Path, out: Path) -> Any:
    checkpoint = open_checkpoint(str(base), progress=Silent(), cache=out.parent / "cache")
    merge(checkpoint, open_adapter(adapter), out, Silent())
    found = open_checkpoint(str(out), progress=Silent(), cache=out.parent / "cache")
    return transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto"), found


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model.float()(torch.tensor(PROMPT)).logits


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ALL},
        {"target_modules": ALL, "use_rslora": True, "fan_in_fan_out": True},
        {
            "target_modules": ALL,
            "rank_pattern": {"q_proj": 8, "layers.1.mlp.up_proj": 2},
            "alpha_pattern": {"k_proj": 3},
        },
        {"target_modules": ["q_proj"], "bias": "all"},
        {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"},
        {"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "input_layernorm"]},
        {"target_modules": ["embed_tokens", "lm_head", "o_proj"]},
        {"target_modules": ALL, "use_dora": True},
    ],
    ids=["all", "rslora", "patterns", "bias_all", "bias_lora", "lora_bias", "modules", "embedding", "dora"],
)
def test_merged_as_peft_merges(tmp_path: Path, dtype: str, settings: dict[str, Any]) -> None:
    """Every weight is within one rounding step of peft's, all but one in ten thousand equal, and so are the logits."""
    kind = getattr(torch, dtype)
    base = small_model(tmp_path / "base", kind)
    theirs = trained(base, tmp_path / "adapter", kind, **settings).merge_and_unload()
    model, found = ours(base, tmp_path / "adapter", tmp_path / "merged")
    assert found.dtype == {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype]
    wanted, got = theirs.state_dict(), model.state_dict()
    assert wanted.keys() == got.keys()
    step = torch.finfo(kind).eps  # two: the smaller of the weights may be the last before a power of two
    different = 0
    for name, weight in wanted.items():
        cancels = 8 * FLOAT32 * float(weight.abs().max())  # where base and adapter do, what both lost is left
        assert torch.allclose(got[name].float(), weight.float(), rtol=2 * step, atol=cancels), name
        different += int((got[name] != weight).sum())
    total = sum(weight.numel() for weight in wanted.values())
    if dtype != "float32":  # in float32 the last bit is the sum's order, here and there
        # Both work in float32, some 8 roundings a weight, and round once: to another number where the middle between
        # two lies within those 8. DoRA's norm of a row is 64 more.
        near = (64 if "use_dora" in settings else 8) * torch.finfo(torch.float32).eps / step
        assert different <= total * near, f"{different} of {total} weights differ"
    expected, roundings = logits(theirs), sums(model.config.to_dict(), len(PROMPT[0]))
    # the forward passes are float32; a weight that is another by a step is one product rounded in its own type
    others = different if dtype != "float32" else 0
    allowed = MARGIN * apart(expected, FLOAT32, roundings) + apart(expected, step, others)
    assert torch.allclose(logits(model), expected, rtol=0, atol=allowed)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ],
    ids=["lora_embed", "lora_head", "saved_embed", "saved_tied", "lora_tied"],
)
def test_tied_embeddings_answer_as_trained(tmp_path: Path, settings: dict[str, Any]) -> None:
    """On a tied base the merged model answers as the unmerged one did.

    peft's own merge is no measure here: it adds to the shared tensor, so the output layer changes with the embedding.
    """
    base = small_model(tmp_path / "base", torch.float32, tied=True)
    unmerged = trained(base, tmp_path / "adapter", torch.float32, **settings)
    model, _ = ours(base, tmp_path / "adapter", tmp_path / "merged")
    expected = logits(unmerged)  # adds the adapter's product to the base's: twice the sums
    allowed = MARGIN * apart(expected, FLOAT32, 2 * sums(model.config.to_dict(), len(PROMPT[0])))
    assert torch.allclose(logits(model), expected, rtol=0, atol=allowed)


def test_a_pickled_adapter_is_merged(tmp_path: Path) -> None:
    """adapter_model.bin is read without running code and gives the same model as the safetensors form."""
    base = small_model(tmp_path / "base", torch.bfloat16)
    model = trained(base, tmp_path / "adapter", torch.bfloat16, target_modules=ALL)
    merged, _ = ours(base, tmp_path / "adapter", tmp_path / "merged")
    model.save_pretrained(tmp_path / "pickled")
    weights = tmp_path / "pickled" / "adapter_model.safetensors"
    from safetensors.torch import load_file

    torch.save(load_file(weights), tmp_path / "pickled" / "adapter_model.bin")
    weights.unlink()
    with pytest.raises(InputError, match="pickle"):
        open_adapter(tmp_path / "pickled")
    checkpoint = open_checkpoint(str(base), progress=Silent(), cache=tmp_path / "cache")
    adapter = open_adapter(tmp_path / "pickled", cache=tmp_path / "cache")
    merge(checkpoint, adapter, tmp_path / "again", Silent())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), merged.state_dict().values(), strict=True)
    )
