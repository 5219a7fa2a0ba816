"""Which fine-tuning pairs are asked again: all of them, or as many as a stated budget of time allows, drawn evenly.

A pair is asked twice over. Its answer is scored at every token, which tells whether the artifact would give it word for
word; and the artifact is left to answer, which tells whether it ends. The plan and the build choose by the same rule,
from characters and parameters alone, so that the plan can say how many of how many before anything is read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from packager.checkpoint.checkpoint import Checkpoint
    from packager.prompts.calibration import Calibration, Conversation

SCORE_SECONDS = 300.0  # for scoring the pairs' answers, source and artifact together
ANSWER_SECONDS = 60.0  # for answers that the artifact generates
AT_LEAST = 8  # pairs, whatever they take
# Two cores with AVX2, SmolLM2 and Qwen2 1.5B: the source (float32, a layer at a time) and the artifact together.
SCORE_FLOPS = 12e9
BYTES_A_TOKEN = 3.0  # of UTF-8: English has 4, Chinese in a small vocabulary 2
TEMPLATE_TOKENS = 16  # that a chat template puts around a pair
CALIBRATION_KEEPS = 80  # pairs, from which on every tenth is kept out of the calibration
EVERY = 10


@dataclass(frozen=True)
class Choice:
    """calibrated, asked: conversations. given: pairs that end with an answer. held: how many of ``asked`` are kept out
    of the calibration; they come first. why: why not all of those given are asked, "" where all are.
    """

    calibrated: tuple[Conversation, ...]
    asked: tuple[Conversation, ...]
    given: int
    held: int
    why: str

    def __str__(self) -> str:
        return f"{len(self.asked)} asked of {self.given} given" + (f" ({self.why})" if self.why else "")


def even(items: Sequence[Any], count: int) -> list[Any]:
    """``count`` of the items, evenly spaced; the same ones every time."""
    return [items[place * len(items) // count] for place in range(count)] if count < len(items) else list(items)


def seconds(talks: Sequence[Conversation], parameters: int) -> float:
    """What scoring conversations takes, roughly: source and artifact on two cores."""
    size = sum(len(message["content"].encode()) for talk in talks for message in talk)
    tokens = size / BYTES_A_TOKEN + TEMPLATE_TOKENS * len(talks)
    return 2 * 2 * parameters * tokens / SCORE_FLOPS


def choose(talks: Sequence[Conversation], checkpoint: Checkpoint, ask: int | None) -> Choice:
    """Which pairs calibrate and which are asked. ask: at most so many; None: what SCORE_SECONDS allow.

    With CALIBRATION_KEEPS pairs or more every tenth stays out of the calibration and is asked before all others.
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
    asked = [*first, *even(rest, most - len(first))] if most > len(first) else first
    return Choice(tuple(talk for talk in talks if id(talk) not in away), tuple(asked), len(answered), len(first), why)


def note(calibration: Calibration | None, checkpoint: Checkpoint, ask: int | None) -> list[str]:
    """What the plan says of the pairs; nothing without pairs."""
    if calibration is None or not calibration.conversations:
        return []
    choice = choose(calibration.conversations, checkpoint, ask)
    return [f"Fine-tuning pairs: {choice}."] if choice.given else []


def answered_within(tokens: Sequence[int], seconds_a_token: float, ask: int | None) -> int:
    """How many pairs the artifact is left to answer. tokens: the limit of each. ask: as for ``choose``."""
    if ask is not None:
        return min(ask, len(tokens))
    spent, count = 0.0, 0
    for limit in tokens:
        spent += limit * seconds_a_token
        if spent > ANSWER_SECONDS:
            break
        count += 1
    return count
