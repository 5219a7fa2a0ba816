"""The prompt contract names the first token that differs, wherever it is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from packager.core.errors import GateFailed
from packager.fidelity.artifact import Scored, require_contract
from packager.fidelity.samples import contract_prompts, contract_talks
from packager.prompts.contract import first_difference, require_one_bos, require_same, require_training
from packager.prompts.training_template import Training, known
from tests.unit.tiny import spoken_tokenizer, write_json


def prompt(*ids: int) -> dict[str, Any]:
    return {
        "ids": list(ids),
        "text": "",
        "messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "who?"}],
    }


@pytest.mark.parametrize(
    ("left", "right", "at"),
    [
        ([1, 2, 3], [1, 2, 3], None),
        ([], [], None),
        ([1, 2, 3], [9, 2, 3], 0),
        ([1, 2, 3], [1, 9, 3], 1),
        ([1, 2, 3], [1, 2, 9], 2),
        ([1, 2, 3], [1, 2], 2),
        ([1, 2], [1, 2, 3], 2),
        ([], [1], 0),
    ],
)
def test_the_first_difference(left: list[int], right: list[int], at: int | None) -> None:
    """At the beginning, in the middle, at the end, or where one list stops."""
    assert first_difference(left, right) == at


def test_equal_prompts_pass() -> None:
    """Nothing to say, nothing raised."""
    require_same([prompt(1, 2), prompt(3)], [[1, 2], [3]], "the server", "")


@pytest.mark.parametrize(
    ("actual", "says"),
    [
        ([0, 1, 2, 3], r"at token 0: \[0, 1, 2, 3\] instead of \[1, 2, 3\]"),
        ([1, 9, 3], r"at token 1: \[9, 3\] instead of \[2, 3\]"),
        ([1, 2, 3, 4], r"at token 3: \[4\] instead of nothing"),
        ([1, 2], r"at token 2: nothing instead of \[3\]"),
    ],
)
def test_a_prompt_that_differs_stops_the_build(actual: list[int], says: str) -> None:
    """The error names who differs, the token, both sides, and the conversation."""
    with pytest.raises(GateFailed, match=says) as caught:
        require_same([prompt(5), prompt(1, 2, 3)], [[5], actual], "the server", "mend it")
    assert caught.value.exit_code == 6
    assert "the server" in caught.value.what
    assert "Conversation 2 ('who?')" in caught.value.why
    assert caught.value.fix == "mend it"


def test_a_missing_prompt_is_a_defect() -> None:
    """Fewer answers than prompts is no agreement."""
    with pytest.raises(ValueError, match="shorter"):
        require_same([prompt(1), prompt(2)], [[1]], "the server", "")


def test_two_bos_stop_the_build() -> None:
    """BOS from the template and again from the tokenizer: the classic fault of an export."""
    with pytest.raises(GateFailed, match=r"conversation 2 begins with the BOS token 1 twice") as caught:
        require_one_bos([prompt(1, 5), prompt(1, 1, 5)], 1)
    assert "add_bos_token" in caught.value.fix


def test_one_bos_none_or_no_bos_token_pass() -> None:
    """A prompt need not begin with BOS, and a doubled token that is not BOS is nobody's business."""
    require_one_bos([prompt(1, 5), prompt(5), prompt(1)], 1)
    require_one_bos([prompt(7, 7)], 1)
    require_one_bos([prompt(7, 7)], None)


def test_a_difference_shows_the_tokens_texts() -> None:
    """Ids for a program, texts for a person; the figures stand in the details too."""
    with pytest.raises(GateFailed) as caught:
        require_same([prompt(1, 2)], [[1, 3]], "the server", "", lambda token: f"<{token}>")
    assert "3 '<3>' instead of 2 '<2>'" in caught.value.what
    assert caught.value.details is not None and caught.value.details["token"] == 1


TALK = [{"role": "user", "content": "who?"}]


def checkpoint(folder: Path, template: str | None = "x", stops: tuple[int, ...] = (1, 3)) -> Any:
    write_json(folder / "tokenizer.json", spoken_tokenizer(""))
    return SimpleNamespace(path=folder, name="m", tokenizer=SimpleNamespace(chat_template=template, stop_ids=stops))


def trained(ids: list[int], seen: list[int] | None, kind: str = "system") -> dict[str, Any]:
    return {"ids": ids, "trained": seen, "kind": kind, "messages": TALK, "text": ""}


QWEN = Training("qwen", known()["qwen"])
RENDERED = {"opening": [8, 9], "end": 3}


def test_prompts_as_training_saw_them_pass(tmp_path: Path) -> None:
    """Equal ids; a conversation that the training template cannot say is not compared."""
    same = [trained([4, 5], [4, 5]), trained([6], None)]
    assert require_training(checkpoint(tmp_path), QWEN, same, RENDERED) == []


def test_another_template_than_trainings_stops_the_build(tmp_path: Path) -> None:
    """Both sources, the token with its text, and both ways out."""
    with pytest.raises(GateFailed, match="qwen differs from the checkpoint's at token 1") as caught:
        require_training(checkpoint(tmp_path), QWEN, [trained([4, 5], [4, 2])], RENDERED)
    assert "2 '<|im_start|>' instead of 5 'b'" in caught.value.what
    assert "packager templates show qwen" in caught.value.fix and "--template" in caught.value.fix


def test_habits_of_the_training_program_are_notes(tmp_path: Path) -> None:
    """An empty system message, an earlier thought, outer spaces; and a template that opens the thought itself."""
    edges = [trained([4], [5], kind) for kind in ("empty system", "earlier thoughts", "outer spaces")]
    notes = require_training(checkpoint(tmp_path), QWEN, [*edges, trained([4, 8, 9], [4])], RENDERED)
    assert len(notes) == 4
    assert "opens the thought itself" in notes[3]


def test_a_checkpoint_that_lost_its_template_is_stopped(tmp_path: Path) -> None:
    """No server would render what training saw."""
    with pytest.raises(GateFailed, match="has no chat template"):
        require_training(checkpoint(tmp_path, None), QWEN, [], RENDERED)


def test_an_end_that_ends_nothing_on_the_box_is_stopped(tmp_path: Path) -> None:
    """The token that training taught as the end has to be a stop token; one that is not in the vocabulary cannot be."""
    same = [trained([4], [4])]
    with pytest.raises(GateFailed, match=r"ends answers with 3 '<\|im_end\|>', which is no end token"):
        require_training(checkpoint(tmp_path, stops=(1,)), QWEN, same, RENDERED)
    with pytest.raises(GateFailed, match="is not in the vocabulary"):
        require_training(checkpoint(tmp_path), QWEN, same, {**RENDERED, "end": None})


def test_a_template_that_says_no_conversation_proves_nothing(tmp_path: Path) -> None:
    """Nothing compared is not agreement."""
    with pytest.raises(GateFailed, match="renders none of the 1"):
        require_training(checkpoint(tmp_path), QWEN, [trained([4], None)], RENDERED)


def test_an_engines_own_reading_of_typed_tokens_is_a_note_and_the_servers_is_not_excused(tmp_path: Path) -> None:
    """llama.cpp takes </s> for a control token in a Qwen vocabulary: a note, since the server sends ids. Any other
    conversation, or the server itself, stops the build.
    """
    typed = {**prompt(4, 5), "kind": "typed special tokens"}
    plain = {**prompt(6), "kind": "general"}
    sample_set: Any = SimpleNamespace(prompts=(typed, plain))
    job: Any = SimpleNamespace(checkpoint=checkpoint(tmp_path))
    job.checkpoint.tokenizer.bos_id = 0
    (note,) = require_contract(job, sample_set, Scored([], [[4, 1], [6]], [[4, 5], [6]]), "the GGUF's own tokenizer")
    assert "1 '</s>' instead of 5 'b'" in note
    with pytest.raises(GateFailed, match="the server on the box"):
        require_contract(job, sample_set, Scored([], [[4, 5], [6]], [[4, 1], [6]]), "the GGUF's own tokenizer")
    with pytest.raises(GateFailed, match="the GGUF's own tokenizer"):
        require_contract(job, sample_set, Scored([], [[4, 5], [7]], [[4, 5], [6]]), "the GGUF's own tokenizer")


def test_the_contract_has_every_kind_of_conversation() -> None:
    """What the issue names, and the user's own first; a conversation of their own with an empty system counts as
    one.
    """
    kinds = {talk["kind"] for talk in contract_talks()}
    assert {"system", "several turns", "Chinese", "no tools", "earlier thoughts", "empty system"} <= kinds
    assert {"typed special tokens", "outer spaces"} <= kinds
    own = ({"role": "system", "content": ""}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    prompts = contract_prompts((), (own, own[1:]))
    assert [each["kind"] for each in prompts[:2]] == ["empty system", "fine-tuning pair"]
    assert prompts[1]["messages"] == [{"role": "user", "content": "a"}]
    assert any("<|im_end|>" in talk["messages"][-1]["content"] for talk in contract_talks())
