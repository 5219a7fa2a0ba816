"""The prompts that an artifact answers, and the summary of its answers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from packager.core.store import Step
from packager.fidelity.answers import LONGEST, SLACK, THINKING_LIMIT, Answers, questions, reasons, summarize
from packager.fidelity.samples import Samples
from tests.unit.tiny import WORDS, tokenizer_json, write_json

PAIR = {"ids": [1, 2, 3, 4, 5], "positions": [2, 3, 4], "set": "tuning"}
GENERAL = {"ids": [1, 2], "positions": [1], "set": "general"}
PROMPT = {"ids": [7, 8], "kind": "general", "messages": [], "text": ""}


def samples(*sequences: Any) -> Samples:
    step = Step("samples", "key", Path(), 0.0, 0, reused=False)
    return Samples(sequences, (PROMPT, {**PROMPT, "kind": "system"}), (), step)


def test_pairs_are_prompted_up_to_their_answer_with_room_for_twice_as_much() -> None:
    """A limit that a good answer never meets and a loop does."""
    (prompt,) = questions(samples(GENERAL, PAIR), thinking=True)
    assert prompt == {"ids": [1, 2], "max_tokens": 6 + SLACK, "trained": 3}
    long = {**PAIR, "positions": list(range(2, 2 + LONGEST))}
    assert questions(samples(long), thinking=False)[0]["max_tokens"] == LONGEST


def test_without_pairs_only_a_reasoning_model_answers() -> None:
    """Its thoughts are worth a look; anything else has nothing to be compared with."""
    assert questions(samples(GENERAL), thinking=False) == []
    assert questions(samples(GENERAL), thinking=True) == [
        {"ids": [7, 8], "max_tokens": THINKING_LIMIT, "trained": None}
    ]


def test_answers_are_summed_up_as_they_ended() -> None:
    """Means over all, ends counted, a thought is closed only after it was opened."""
    prompts = [{"max_tokens": 70, "trained": 3}, {"max_tokens": 90, "trained": 5}, {"max_tokens": 70, "trained": 4}]
    answers = [{"ids": [1, 2], "finish": "stop"}, {"ids": [1] * 90, "finish": "length"}, {"ids": [1], "finish": "stop"}]
    texts = ["<think>\na\n</think>\n\nb", "</think> <think> on and on", "no thought"]
    assert summarize(prompts, answers, texts) == Answers(
        asked=3, ended=2, limit=90, tokens_mean=31.0, trained_tokens_mean=4.0, thoughts_opened=2, thoughts_closed=1
    )
    plain = summarize([{"max_tokens": 5, "trained": None}], [{"ids": [1], "finish": "stop"}], [])
    assert (plain.thoughts_opened, plain.thoughts_closed, plain.trained_tokens_mean) == (None, None, None)


@pytest.mark.parametrize(
    ("template", "words", "thinks"), [("x", [], False), ("…</think>…", [], True), (None, ["</think>"], True)]
)
def test_a_reasoning_model_is_known_by_the_end_of_a_thought(
    tmp_path: Path, template: str | None, words: list[str], thinks: bool
) -> None:
    """In its template or in its vocabulary."""
    write_json(tmp_path / "tokenizer.json", tokenizer_json([*WORDS, *words]))
    checkpoint: Any = SimpleNamespace(path=tmp_path, tokenizer=SimpleNamespace(chat_template=template))
    assert reasons(checkpoint) is thinks
