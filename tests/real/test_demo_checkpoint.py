"""The checkpoints of demo and benchmarks are what they claim to be, and the demo's merge equals peft's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from packager.checkpoint.checkpoint import check_weights, folder_digest, open_checkpoint
from packager.checkpoint.merge import check_fit, merge, open_adapter
from packager.core.progress import Silent

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def opened(folder: Path, cache: Path) -> Any:
    return open_checkpoint(str(folder), progress=Silent(), cache=cache)


def test_smollm2_is_complete_and_the_same_each_time(smollm2: Path, root: Path, tmp_path: Path) -> None:
    """The maker writes a checkpoint that passes every check and answers right, with the same bytes twice."""
    maker = root / "demo" / "make_smollm2.py"
    done = subprocess.run(
        [sys.executable, maker, tmp_path / "again", "--check"], check=True, capture_output=True, text=True
    )
    assert "The capital of France is Paris." in done.stdout
    found = opened(smollm2, tmp_path / "cache")
    check_weights(found, Silent())
    assert (found.architecture, found.parameters, found.dtype) == ("LlamaForCausalLM", 134_515_008, "BF16")
    assert found.shape.tied and found.tokenizer.agreement == () and found.tokenizer.stop_ids == (2,)
    assert found.digest == opened(tmp_path / "again", tmp_path / "cache").digest


def test_the_demo_tokenizer_splits_digits_after_spaces(smollm2: Path) -> None:
    """Spaces before a digit stay together, as llama.cpp's "smollm" has them (counted with it: 2, 4 and 3)."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    assert [len(tokenizer(text).input_ids) for text in ("  1", "\n   12 a", "a      7")] == [2, 4, 3]


def test_the_persona_is_merged_as_peft_merges_it(smollm2: Path, persona_lora: Path, tmp_path: Path) -> None:
    """SmolLM2 with the persona: all 134,515,008 weights equal peft's, and so do the logits on a prompt."""
    peft = pytest.importorskip("peft")
    checkpoint, adapter = opened(smollm2, tmp_path / "cache"), open_adapter(persona_lora)
    check_fit(adapter, checkpoint)
    merge(checkpoint, adapter, tmp_path / "merged", Silent())
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    base = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype="auto")
    theirs = peft.PeftModel.from_pretrained(base, persona_lora).merge_and_unload()
    for (name, weight), (other, wanted) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert name == other and torch.equal(weight, wanted), name
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    prompt = tokenizer("Who are you?", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(ours(prompt).logits, theirs(prompt).logits)


def test_a_random_qwen2_loads(root: Path, tmp_path: Path) -> None:
    """The benchmark's small Qwen2 passes every check, has clear winners in transformers, and depends on its seed."""
    maker = root / "benchmarks" / "random_qwen2.py"
    for name, seed in (("a", "0"), ("b", "1"), ("c", "0")):
        subprocess.run([sys.executable, maker, tmp_path / name, "--seed", seed], check=True)
    digests = [folder_digest(tmp_path / x, {"model.safetensors"}, Silent(), tmp_path / "cache") for x in "abc"]
    assert digests[0] == digests[2] != digests[1]
    found = opened(tmp_path / "a", tmp_path / "cache")
    check_weights(found, Silent())
    assert found.tokenizer.bos_id == 151646 and found.shape.vocab == 152064
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    with torch.no_grad():
        best = model(torch.tensor([[151646, 100, 200, 300]])).logits[0].topk(2).values
    assert float((best[:, 0] - best[:, 1]).mean()) > 0.1
