"""The prompt contract on real tokenizers: training's template, a Modelfile left behind, and what users type."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from packager.checkpoint.checkpoint import open_checkpoint
from packager.core.errors import GateFailed
from packager.core.progress import Silent
from packager.core.store import Store
from packager.fidelity.samples import contract_talks, make_samples
from packager.planning.catalog import load_target
from packager.prompts import training_template
from packager.prompts.calibration import load
from packager.prompts.training_template import Training, as_jinja, known
from packager.recipe import Job
from tests.real.conftest import TARGET
from tests.real.serving import rendered

transformers = pytest.importorskip("transformers")


def job(store: Store, folder: Path, cache: Path, **more: Any) -> Job:
    """What a build of this folder would hand to its recipe."""
    checkpoint = open_checkpoint(str(folder), progress=Silent(), cache=cache)
    return Job(checkpoint, load_target(TARGET), store, Silent(), **more)


def test_the_template_that_training_used_is_the_checkpoints(
    store: Store, random_qwen2: Path, persona_file: Path, tmp_path: Path
) -> None:
    """LLaMA-Factory's deepseekr1 and the R1 tokenizer give the same ids; an answer without a thought is asked as it was
    taught, with an empty one; what differs by habit is told.
    """
    pairs = load(persona_file)
    asked = job(store, random_qwen2, tmp_path, calibration=pairs, training=training_template.load("deepseekr1"))
    samples = make_samples(asked)
    same = [prompt for prompt in samples.prompts if prompt["ids"] == prompt["trained"]]
    assert len(same) == len(samples.prompts) - 1  # the earlier thought: the template leaves two newlines, training none
    invented, habit = samples.notes
    assert "transformers adds <|endoftext|> to this tokenizer, whose files do not have it" in invented
    assert "deepseekr1 renders conversations of the kind 'earlier thoughts' differently" in habit
    tokenizer = transformers.AutoTokenizer.from_pretrained(random_qwen2)
    taught = [sequence for sequence in samples.sequences if sequence["set"] == "tuning"]
    answer = tokenizer.decode([taught[0]["ids"][p] for p in taught[0]["positions"]])
    expected = pairs.conversations[0][-1]["content"]
    assert answer == f"<think>\n\n</think>\n\n{expected}<｜end▁of▁sentence｜>"
    plain = make_samples(replace(asked, training=None))
    assert [p["ids"] for p in plain.prompts] == [p["ids"] for p in samples.prompts]
    assert plain.calibration != samples.calibration


def test_a_model_trained_with_another_template_stops_the_build(
    store: Store, smollm2: Path, random_qwen2: Path, tmp_path: Path
) -> None:
    """LLaMA-Factory's smollm2 ends its system prompt with a full stop and the model's own template does not: one token,
    named with its text. A Qwen template on an R1 tokenizer differs from the first token on.
    """
    with pytest.raises(GateFailed, match=r"smollm2 differs from the checkpoint's at token 19: 30 '\.'") as caught:
        make_samples(job(store, smollm2, tmp_path, training=training_template.load("smollm2")))
    assert "2 '<|im_end|>'" in caught.value.what
    assert "packager templates show smollm2" in caught.value.fix
    with pytest.raises(GateFailed, match=r"qwen differs from the checkpoint's at token 0"):
        make_samples(job(store, random_qwen2, tmp_path, training=training_template.load("qwen")))


def test_the_fix_that_is_named_mends_it(store: Store, smollm2: Path, tmp_path: Path) -> None:
    """The template that `packager templates show` prints, saved in the checkpoint, gives training's ids."""
    folder = Path(shutil.copytree(smollm2, tmp_path / "model"))
    (folder / "chat_template.jinja").write_text(as_jinja(known()["smollm2"]) + "\n", encoding="utf-8")
    samples = make_samples(job(store, folder, tmp_path, training=training_template.load("smollm2")))
    assert all(prompt["ids"] == prompt["trained"] for prompt in samples.prompts)


def test_a_jinja_file_is_compared_too(store: Store, smollm2: Path, tmp_path: Path) -> None:
    """The checkpoint's own as a file: equal everywhere; with one sign more: stopped."""
    text = (smollm2 / "chat_template.jinja").read_text(encoding="utf-8")
    samples = make_samples(job(store, smollm2, tmp_path, training=Training("own.jinja", jinja=text)))
    assert samples.notes == () and samples.contract()["training_template"] == "own.jinja"
    other = Training("other.jinja", jinja=text.replace("assistant\n", "bot\n"))
    with pytest.raises(GateFailed, match=r"the training template other\.jinja differs"):
        make_samples(job(store, smollm2, tmp_path, training=other))


def test_a_modelfile_that_contradicts_the_tokenizer_stops_the_build(
    store: Store, random_qwen2: Path, tmp_path: Path
) -> None:
    """An R1 model exported with LLaMA-Factory's qwen template: the Modelfile says one thing, the tokenizer another."""
    folder = Path(shutil.copytree(random_qwen2, tmp_path / "model"))
    (folder / "Modelfile").write_text(
        'FROM .\nTEMPLATE """{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}'
        '{{ range .Messages }}{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        "<|im_start|>assistant\n"
        '{{ else if eq .Role "assistant" }}{{ .Content }}<|im_end|>\n{{ end }}{{ end }}"""\n',
        encoding="utf-8",
    )
    with pytest.raises(GateFailed, match="the checkpoint's own Modelfile differs") as caught:
        make_samples(job(store, folder, tmp_path))
    assert "--template" in caught.value.fix
    samples = make_samples(job(store, folder, tmp_path, training=training_template.load("deepseekr1")))
    assert any("Modelfile renders prompts differently" in note for note in samples.notes)


def test_the_bundle_says_what_was_compared_and_what_users_can_type(q8_bundle: Path) -> None:
    """Every kind of conversation through the GGUF's tokenizer and the server; the control tokens by name."""
    contract = json.loads((q8_bundle / "manifest.json").read_text(encoding="utf-8"))["report"]["contract"]
    assert {talk["kind"] for talk in contract_talks()} <= set(contract["kinds"])
    assert contract["typed_control_tokens"] == ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
    assert contract["notes"] == []


def test_what_a_user_types_is_read_as_transformers_reads_it(q8_bundle: Path, smollm2: Path, tmp_path: Path) -> None:
    """Special tokens in a message become control tokens on both sides alike, and foreign ones stay text on both."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    talk = next(talk["messages"] for talk in contract_talks() if talk["kind"] == "typed special tokens")
    (found,) = rendered(q8_bundle, [talk], tmp_path)
    expected = tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert found == expected
    harmless = [{"role": "user", "content": "a"}]
    bare = tokenizer.apply_chat_template(harmless, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert found.count(tokenizer.eos_token_id) == bare.count(tokenizer.eos_token_id) + 2
    assert "<｜User｜>" in tokenizer.decode(found)
