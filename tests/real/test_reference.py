"""The streamed reference is transformers' own model: same distributions, same input statistics, a layer's worth of
memory.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from packager.checkpoint.families import FAMILIES
from packager.core.processes import WORKERS, follow
from packager.core.progress import Silent
from packager.core.store import Cost
from tests.conftest import ROOT
from tests.tolerance import FLOAT32, MARGIN, apart, require_close, sums

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.15,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# what makes each family different must be switched on: a window shorter than the prompts, soft caps, mixed layer types
MORE: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"tie_word_embeddings": False, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}},
    "MistralForCausalLM": {"head_dim": 24, "sliding_window": 8},
    "Qwen2ForCausalLM": {"tie_word_embeddings": True},
    "Qwen3ForCausalLM": {"head_dim": 32, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "SmolLM3ForCausalLM": {"no_rope_layer_interval": 2},
    "Phi3ForCausalLM": {"partial_rotary_factor": 0.5, "sliding_window": 8},
    "GemmaForCausalLM": {"head_dim": 32},
    "Gemma2ForCausalLM": {
        "head_dim": 32, "sliding_window": 8, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0},
    "Gemma3ForCausalLM": {"head_dim": 32, "sliding_window": 8, "sliding_window_pattern": 2},
}  # fmt: skip
CLASSES = {"Gemma3ForCausalLM": "Gemma3TextConfig"}
DECODERS = [name for name, family in FAMILIES.items() if family.gguf]


def random_checkpoint(folder: Path, architecture: str, **changes: Any) -> Path:
    """A tiny checkpoint of a family, its every weight random and its norms away from one; changes: of its config."""
    config_class = getattr(transformers, CLASSES.get(architecture, architecture.replace("ForCausalLM", "Config")))
    torch.manual_seed(7)
    model = getattr(transformers, architecture)(config_class(**SMALL | MORE[architecture] | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def prompts(vocabulary: int, lengths: tuple[int, ...]) -> list[dict[str, Any]]:
    """Sequences of unequal lengths, so that padding has to be invisible, scored at every position."""
    random = np.random.default_rng(5)
    return [
        {"ids": random.integers(3, vocabulary, length).tolist(), "positions": list(range(1, length))}
        for length in lengths
    ]


def whole(folder: Path, job: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Log-probabilities a position, and mean squared inputs of every linear layer, by the plain model, one sequence
    at a time.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sums: dict[str, Any] = {}
    counts: dict[str, int] = {}

    def saw(name: str, x: Any) -> None:
        flat = x.reshape(-1, x.shape[-1])
        sums[name] = sums.get(name, 0) + flat.square().sum(0)
        counts[name] = counts.get(name, 0) + len(flat)

    rows = []
    with torch.inference_mode():
        for sequence in job["sequences"]:
            logits = model(torch.tensor([sequence["ids"]])).logits[0]
            rows += [torch.log_softmax(logits[position - 1], -1) for position in sequence["positions"]]
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head"):
                module.register_forward_pre_hook(lambda _m, args, n=name: saw(n, args[0]))
        for ids in job["calibration"]:
            model(torch.tensor([ids]))
    return rows, {name: (sums[name] / counts[name]).numpy() for name in sums}


def job_for(folder: Path, work: Path, vocabulary: int, lengths: tuple[int, ...] = (5, 31, 64, 2)) -> dict[str, Any]:
    sequences = prompts(vocabulary, lengths)
    return {
        "checkpoint": str(folder),
        "sequences": sequences,
        "top": 16,
        "calibration": [s["ids"] for s in sequences],
        "threads": 2,
        "scores": str(work / "scores.npz"),
        "imatrix": str(work / "squares.npz"),
    }


def require_equal(job: dict[str, Any], folder: Path) -> None:
    """What float32 gives in any order of its sums: log-probabilities, best tokens, and the statistics, which are
    squares and so off by twice as much.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    roundings = sums(config, max(len(sequence["ids"]) for sequence in job["sequences"]))
    rows, squares = whole(folder, job)
    with np.load(job["scores"]) as found:
        ids, logprobs = found["ids"], found["logprobs"]
    assert len(ids) == len(rows)
    for row, best, values in zip(rows, ids, logprobs, strict=True):
        expected = row[torch.tensor(best.astype(np.int64))].numpy()
        require_close(values, expected, FLOAT32, roundings)
        tolerance = MARGIN * apart(expected, FLOAT32, roundings)
        assert best[0] == int(row.argmax()) or float(row.max() - row[int(best[0])]) < tolerance
        assert list(values) == sorted(values, reverse=True)
        assert values[-1] >= float(row.topk(len(best)).values[-1]) - tolerance
    with np.load(job["imatrix"]) as found:
        assert set(found.files) == set(squares)
        for name in found.files:
            require_close(found[name], squares[name], FLOAT32, 2 * roundings)


@pytest.mark.parametrize("architecture", DECODERS)
def test_every_family_is_streamed_as_transformers_runs_it(
    architecture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Random weights, unequal prompts, the family's own oddities on: same log-probabilities, best token, statistics."""
    folder = random_checkpoint(tmp_path / "model", architecture)
    spec = importlib.util.spec_from_file_location("reference_child", WORKERS / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    child = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(child)
    job = job_for(folder, tmp_path, SMALL["vocab_size"])
    child.main(job)
    assert capsys.readouterr().out.count('{"done"') == 2 * SMALL["num_hidden_layers"]
    require_equal(job, folder)


def test_every_family_of_the_recipe_is_tried() -> None:
    """A family that is added to the table must be tried here before the recipe takes it."""
    assert set(DECODERS) == set(MORE)


def test_smollm2_is_streamed_with_a_layers_memory(smollm2: Path, tmp_path: Path) -> None:
    """The real model in its own child: equal to the whole model, with less memory than its float32 weights."""
    job = job_for(smollm2, tmp_path, 49152, (9, 120, 40))
    cost = Cost()
    follow(WORKERS / "reference.py", job, "reference", Silent(), cost, work=tmp_path)
    require_equal(job, smollm2)
    bare = Cost()
    (tmp_path / "bare.py").write_text(
        "import torch, transformers\nfrom transformers import AutoModelForCausalLM\n", encoding="utf-8"
    )
    follow(tmp_path / "bare.py", {}, "bare", Silent(), bare, work=tmp_path)
    float32 = 4 * 134_515_008
    # one layer, activations, a slice of the head: neither the mapped file nor what malloc keeps may pile up
    assert cost.peak_rss_bytes - bare.peak_rss_bytes < 0.5 * float32, (cost, bare)


def test_the_rendered_samples_are_transformers_own(r1_tokenizer_folder: Path, tmp_path: Path) -> None:
    """System, several turns and Chinese through the R1 tokenizer: the ids of apply_chat_template, with one BOS."""
    talks = json.loads((ROOT / "packager/prompts/data/conversations.json").read_text(encoding="utf-8"))
    output = tmp_path / "samples.json"
    job = {
        "checkpoint": str(r1_tokenizer_folder),
        "conversations": talks,
        "prompts": [talk[:-1] for talk in talks],
        "pairs": talks[:1],
        "texts": ["a"],
        "vocabulary": 151665,
        "output": str(output),
    }
    follow(WORKERS / "samples.py", job, "samples", Silent(), Cost(), work=tmp_path, path=[ROOT])
    found = json.loads(output.read_text(encoding="utf-8"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(r1_tokenizer_folder)
    for talk, prompt in zip(talks, found["prompts"], strict=True):
        expected = tokenizer.apply_chat_template(
            talk[:-1], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert prompt["ids"] == expected
        assert prompt["ids"].count(tokenizer.bos_token_id) == 1
    assert found["pairs"] == [{"prompt": found["prompts"][0]["ids"], "whole": found["conversations"][0]}]


def test_a_template_that_refuses_a_role_keeps_the_other_talks(r1_tokenizer_folder: Path, tmp_path: Path) -> None:
    """Gemma 2's refuses a system message: those talks are null, with the template's own words, and the rest stay."""
    folder = tmp_path / "model"
    shutil.copytree(r1_tokenizer_folder, folder)
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(refusal + template, encoding="utf-8")
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    talks = [system, system[1:]]
    output = tmp_path / "samples.json"
    same = {"conversations": talks, "prompts": talks, "pairs": []}
    job = {"checkpoint": str(folder), **same, "texts": [], "vocabulary": 151665, "output": str(output)}
    follow(WORKERS / "samples.py", job, "samples", Silent(), Cost(), work=tmp_path, path=[ROOT])
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["refusal"] == "System role not supported"
    assert [bool(ids) for ids in found["conversations"]] == [False, True]
    assert [bool(prompt) for prompt in found["prompts"]] == [False, True]
