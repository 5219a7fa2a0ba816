"""Training templates: LLaMA-Factory's formats by name, from a run's file, as pieces, and as the Jinja to carry."""

from __future__ import annotations

from pathlib import Path

import pytest

from packager.checkpoint.chat_template import renderer
from packager.core.errors import InputError, UsageError
from packager.prompts.training_template import Slots, Training, as_jinja, encode, from_job, known, load, pieces

HELLO = [{"role": "user", "content": "Hello"}]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 6 times 7?"},
    {"role": "assistant", "content": "<think>\nsix sevens\n</think>\n\n42."},
    {"role": "user", "content": "Thanks {content} {bos}"},
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def text(parts: list[tuple[str, str]] | None) -> str:
    """The pieces as one text, BOS and EOS written out."""
    assert parts is not None
    return "".join({"bos": "<s>", "eos": "</s>"}.get(kind, part) for kind, part in parts)


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("qwen3", "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"),
        ("deepseekr1", "<s><｜User｜>Hello<｜Assistant｜>"),
        ("llama3", "<s><|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
                   "<|start_header_id|>assistant<|end_header_id|>\n\n"),
        ("phi", "<|user|>\nHello<|end|>\n<|assistant|>\n"),
        ("gemma", "<s><start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n"),
        ("mistral", "<s>[INST] Hello[/INST]"),
        ("default", "Human: Hello</s>\nAssistant:"),
    ],
)  # fmt: skip
def test_a_question_is_framed_as_training_framed_it(name: str, prompt: str) -> None:
    """Each supported family's own marks, and the opening of the answer."""
    assert text(known()[name].prompt(HELLO)) == prompt


def test_a_default_system_prompt_stands_where_there_is_none_or_an_empty_one() -> None:
    """LLaMA-Factory takes an empty system message for none."""
    slots = known()["qwen"]
    empty = [{"role": "system", "content": ""}, *HELLO]
    assert "You are Qwen" in text(slots.prompt(HELLO))
    assert slots.prompt(empty) == slots.prompt(HELLO)
    assert "You are Qwen" not in text(slots.prompt([{"role": "system", "content": "Be brief."}, *HELLO]))


def test_a_merged_system_prompt_goes_into_the_first_question() -> None:
    """Gemma and Mistral know no system turn."""
    assert text(known()["gemma"].prompt(TALK)).startswith("<s><start_of_turn>user\nBe brief.\n\nWhat is 6")


def test_thoughts_leave_earlier_answers_and_an_answer_without_one_gets_an_empty_one() -> None:
    """As a reasoning template trains: the thought belongs to the answer, unless thinking is off."""
    slots = known()["deepseekr1"]
    assert "<｜Assistant｜>42.</s><｜User｜>Thanks" in text(slots.prompt(TALK))
    assert text(slots.answer("Yes.")) == "<think>\n\n</think>\n\nYes.</s>"
    assert text(slots.answer("<think>\nhm\n</think>\n\nYes.")) == "<think>\nhm\n</think>\n\nYes.</s>"
    off = Slots(user="{content}", reasoning=True, thinking=False)
    assert text(off.prompt(HELLO)) == "Hello<think>\n\n</think>\n\n"
    assert text(off.answer("<think>\nhm\n</think>\n\nYes.")) == "Yes.</s>"
    whole = slots.conversation([*TALK[:-1]])
    assert "<think>\nsix sevens\n</think>\n\n42." in text(whole)


def test_what_a_user_types_stays_as_it_is() -> None:
    """Marks of our own form in a message are text, never a BOS or another message."""
    parts = known()["qwen3"].prompt(TALK)
    assert parts is not None and "Thanks {content} {bos}" in text(parts)
    assert all(kind == "text" for kind, _ in parts)


def test_roles_that_do_not_alternate_cannot_be_rendered() -> None:
    """LLaMA-Factory drops such a sample, so there is nothing to compare."""
    assert known()["qwen3"].prompt([*HELLO, *HELLO]) is None
    assert known()["qwen3"].conversation(HELLO) is None


def test_texts_are_encoded_apart() -> None:
    """Two texts beside each other are two calls of the tokenizer, and a BOS that it has not is left out."""
    calls: list[str] = []

    def tokenize(part: str) -> list[int]:
        calls.append(part)
        return [len(part)]

    parts = [*pieces("{bos}ab{eos}cd"), *pieces("{content}", "efg")]
    assert encode(parts, tokenize, None, 9) == [2, 9, 2, 3]
    assert calls == ["ab", "cd", "efg"]


@pytest.mark.parametrize("name", sorted(known()))
def test_the_jinja_renders_what_the_slots_say(name: str) -> None:
    """For every name: with and without a system prompt, several turns; this is what `packager templates show` gives."""
    slots = known()[name]
    render = renderer(as_jinja(slots), SPECIAL)
    for talk in (HELLO, TALK, TALK[1:]):
        assert render(talk, True) == text(slots.prompt(talk))


def test_a_name_that_is_not_known_is_refused_with_the_nearest() -> None:
    """And says where the names are listed."""
    with pytest.raises(UsageError, match='Did you mean "deepseekr1"') as caught:
        load("deepseek-r1")
    assert "packager templates" in caught.value.fix


def test_a_run_of_llama_factory_names_its_template(tmp_path: Path) -> None:
    """Its own system prompt and its thinking count too."""
    file = tmp_path / "train.yaml"
    file.write_text("stage: sft\ntemplate: qwen3\ndefault_system: Be kind.\nenable_thinking: false\n", encoding="utf-8")
    training = load(str(file))
    assert training.name == "qwen3" and training.slots is not None
    assert text(training.slots.prompt(HELLO)).startswith("<|im_start|>system\nBe kind.")
    assert text(training.slots.prompt(HELLO)).endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("name", "content", "kind", "says"),
    [
        ("run.yaml", "stage: sft\n", InputError, "names no template"),
        ("run.yaml", "template: qwenn\n", UsageError, 'Did you mean "qwen"'),
        ("run.yaml", "a: [1\n", InputError, "is not YAML"),
        ("chat.jinja", "hello\n", InputError, "is no chat template"),
    ],
)
def test_a_file_that_says_nothing_is_refused(
    tmp_path: Path, name: str, content: str, kind: type[Exception], says: str
) -> None:
    """One sentence with the file in it."""
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(kind, match=says):
        load(str(tmp_path / name))


def test_a_missing_file_is_not_taken_for_a_name(tmp_path: Path) -> None:
    """A path is a path, also where nothing is there."""
    with pytest.raises(InputError, match="is not there"):
        load(str(tmp_path / "nothing.jinja"))


def test_what_a_child_reads_back_is_the_same() -> None:
    """The job's JSON form, for both kinds; the digest follows what decides the ids."""
    for training in (Training("qwen", known()["qwen"]), Training("x.jinja", jinja="{{ messages }}")):
        assert from_job(training.as_job()) == training
        assert from_job(training.as_job()).digest == training.digest
    assert Training("qwen", known()["qwen"]).digest != Training("qwen", known()["qwen3"]).digest
