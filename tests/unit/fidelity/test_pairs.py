"""Every pair is scored, or as many as the time budget allows, evenly spaced, and the report counts the others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from packager.fidelity.pairs import (
    ANSWER_SECONDS,
    AT_LEAST,
    SCORE_SECONDS,
    answered_within,
    choose,
    even,
    note,
    seconds,
)
from packager.fidelity.samples import _pairs
from packager.prompts.calibration import Message

STOP = 2
SMALL: Any = SimpleNamespace(parameters=135_000_000)
LARGE: Any = SimpleNamespace(parameters=7_000_000_000)


def talk(number: int, size: int = 10) -> tuple[Message, ...]:
    return ({"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": "a" * size})


def talks(count: int, size: int = 10) -> tuple[tuple[Message, ...], ...]:
    return tuple(talk(number, size) for number in range(count))


def test_few_pairs_are_all_scored_and_also_calibrate() -> None:
    """Ten of ten pairs calibrate and are scored."""
    few = talks(10)
    choice = choose(few, SMALL, None)
    assert (choice.calibrated, choice.scored, choice.held) == (few, few, 0)
    assert str(choice) == "10 asked of 10 given"


def test_of_many_pairs_a_tenth_stays_out_of_the_calibration_and_comes_first() -> None:
    many = talks(200)
    choice = choose(many, SMALL, None)
    assert (len(choice.calibrated), len(choice.scored), choice.held, choice.given) == (180, 200, 20, 200)
    assert not set(map(id, choice.calibrated)) & set(map(id, choice.scored[: choice.held]))


def test_what_ends_with_a_question_is_not_scored() -> None:
    """It calibrates all the same."""
    open_end = (talk(0)[:1],)
    choice = choose(open_end, SMALL, None)
    assert (choice.calibrated, choice.scored, choice.given) == (open_end, (), 0)


def test_a_large_model_asks_what_the_budget_allows_and_says_why() -> None:
    """Evenly spread, the same ones every time, never fewer than AT_LEAST, and within the time."""
    many = talks(400, size=300)
    choice = choose(many, LARGE, None)
    assert AT_LEAST <= len(choice.scored) < 400
    assert seconds(choice.scored, LARGE.parameters) <= SCORE_SECONDS or len(choice.scored) == AT_LEAST
    assert "the budget is 5; --ask all" in choice.why
    assert str(choice).startswith(f"{len(choice.scored)} asked of 400 given")
    assert choose(many, LARGE, None) == choice


@pytest.mark.parametrize(("ask", "count"), [(3, 3), (50, 50), (1 << 30, 400), (0, 0)])
def test_the_user_says_how_many(ask: int, count: int) -> None:
    """--ask goes before the budget, in both directions."""
    choice = choose(talks(400, size=300), LARGE, ask)
    assert len(choice.scored) == count
    assert bool(choice.why) is (count < 400)


def test_an_even_choice_reaches_from_the_first_to_the_last_part() -> None:
    assert even(range(100), 4) == [0, 25, 50, 75]
    assert even([1, 2], 5) == [1, 2]


def test_the_plan_says_how_many_of_how_many() -> None:
    """And nothing without pairs."""
    calibration: Any = SimpleNamespace(conversations=talks(10))
    assert note(calibration, SMALL, None) == ["Fine-tuning pairs: 10 asked of 10 given."]
    assert note(None, SMALL, None) == note(SimpleNamespace(conversations=()), SMALL, None) == []  # type: ignore[arg-type]


def test_answers_are_generated_within_their_own_budget() -> None:
    """By the engine's time for a token; an engine that cannot generate answers none."""
    assert answered_within([100] * 10, ANSWER_SECONDS / 1000, None) == 10
    assert answered_within([100] * 10, ANSWER_SECONDS / 350, None) == 3
    assert answered_within([100] * 10, float("inf"), None) == 0
    assert answered_within([100] * 10, ANSWER_SECONDS, 4) == 4


def test_an_answer_is_scored_from_its_first_token_to_its_end_token() -> None:
    """Positions are those of the answer, and what follows the end token is left out."""
    pairs, left = _pairs([{"prompt": [1, 10], "whole": [1, 10, 11, STOP, 13]}], {STOP}, 1, 100)
    assert pairs == [{"ids": [1, 10, 11, STOP], "positions": [2, 3], "set": "tuning", "held": True}]
    assert left == {}


def test_a_pair_that_cannot_be_scored_is_counted_by_its_reason() -> None:
    """Nothing is dropped in silence."""
    whole = [1, 10, 11, STOP]
    given = [None, {"prompt": [1, 9], "whole": whole}, {"prompt": whole, "whole": whole}]
    pairs, left = _pairs([*given, {"prompt": [1], "whole": [1] + [5] * 400}], {STOP}, 0, 300)
    assert pairs == [] and list(left.values()) == [1, 1, 1, 1]
    assert any("longer than 300 tokens" in reason for reason in left)
