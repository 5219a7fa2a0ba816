"""Chooses the fine-tuning pairs that are scored: all, or as many as the time budget allows, evenly spaced.

A pair is used twice. Its answer is scored at every token, which shows whether the artifact would give it word for word;
and the artifact generates an answer, which shows whether it ends. Plan and build choose by the same rule, from
characters and parameters alone, so that the plan can give the numbers before any weights are read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from packager.checkpoint.checkpoint import Checkpoint
    from packager.prompts.calibration import Calibration, Conversation

Item = TypeVar("Item")
SCORE_SECONDS = 300.0  # to score the pairs' answers, source and artifact together
ANSWER_SECONDS = 60.0  # to generate answers with the artifact
AT_LEAST = 8  # pairs that are scored even above the budget
# Two cores with AVX2, SmolLM2 and 1867 tokens, load 2: 26 s for the source with 8 s of imports, 13 s for the artifact
# (the steps "reference" and "score" in a build's record).
SCORE_FLOPS = 30e9
BYTES_A_TOKEN = 3.0  # of UTF-8: English has 4, Chinese in a small vocabulary 2
TEMPLATE_TOKENS = 16  # tokens that a chat template adds to a pair
CALIBRATION_KEEPS = 80  # from this number of pairs on, every tenth is kept out of the calibration
EVERY = 10


@dataclass(frozen=True)
class Choice:
    """calibrated, scored: conversations. given: number of pairs that end with an answer. held: how many of ``scored``
    are kept out of the calibration; they come first. why: the reason for scoring fewer than given, "" when all are.
    """

    calibrated: tuple[Conversation, ...]
    scored: tuple[Conversation, ...]
    given: int
    held: int
    why: str

    def __str__(self) -> str:
        return f"{len(self.scored)} asked of {self.given} given" + (f" ({self.why})" if self.why else "")


def even(items: Sequence[Item], count: int) -> list[Item]:
    """``count`` of the items, evenly spaced and deterministic."""
    return [items[place * len(items) // count] for place in range(count)] if count < len(items) else list(items)


def seconds(talks: Sequence[Conversation], parameters: int) -> float:
    """The rough time to score conversations, source and artifact together, on two cores."""
    size = sum(len(message["content"].encode()) for talk in talks for message in talk)
    tokens = size / BYTES_A_TOKEN + TEMPLATE_TOKENS * len(talks)
    return 2 * 2 * parameters * tokens / SCORE_FLOPS


def choose(talks: Sequence[Conversation], checkpoint: Checkpoint, ask: int | None) -> Choice:
    """The pairs for the calibration and those to score. ask: at most so many; None: as many as SCORE_SECONDS allow.

    With CALIBRATION_KEEPS pairs or more, every tenth is kept out of the calibration and is scored before all others.
    """
    answered = [talk for talk in talks if talk[-1]["role"] == "assistant" and len(talk) > 1]
    held = answered[::EVERY] if len(answered) >= CALIBRATION_KEEPS else []
    away = {id(talk) for talk in held}
    rest = [talk for talk in answered if id(talk) not in away]
    why, most = "", len(answered)
    if ask is not None:
        most = min(most, ask)
        why = f"--ask {ask}" if most < len(answered) else ""
    elif (needed := seconds(answered, checkpoint.parameters)) > SCORE_SECONDS:
        most = min(most, max(AT_LEAST, math.floor(len(answered) * SCORE_SECONDS / needed)))
        if most < len(answered):
            why = (
                f"all would take about {needed / 60:.0f} minutes and the budget is {SCORE_SECONDS / 60:.0f}; "
                "--ask all asks every one"
            )
    first = even(held, min(most, len(held)))
    scored = [*first, *even(rest, most - len(first))] if most > len(first) else first
    return Choice(tuple(talk for talk in talks if id(talk) not in away), tuple(scored), len(answered), len(first), why)


def note(calibration: Calibration | None, checkpoint: Checkpoint, ask: int | None) -> list[str]:
    """The plan's note on the pairs; [] without pairs."""
    if calibration is None or not calibration.conversations:
        return []
    choice = choose(calibration.conversations, checkpoint, ask)
    return [f"Fine-tuning pairs: {choice}."] if choice.given else []


def answered_within(tokens: Sequence[int], seconds_a_token: float, ask: int | None) -> int:
    """The number of pairs for which the artifact generates answers within ANSWER_SECONDS. tokens: the limit of each
    answer. ask: at most so many; it replaces the budget.
    """
    if ask is not None:
        return min(ask, len(tokens))
    spent, count = 0.0, 0
    for limit in tokens:
        spent += limit * seconds_a_token
        if spent > ANSWER_SECONDS:
            break
        count += 1
    return count
