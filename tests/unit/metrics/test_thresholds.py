"""Thresholds: each score covers the pairs it names, a shortfall has its figures, and a NaN does not pass."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from packager.core.errors import GateFailed
from packager.core.store import Step
from packager.fidelity.artifact import measure
from packager.fidelity.samples import Samples
from packager.metrics.distributions import compare, interval
from packager.metrics.thresholds import Thresholds, require_kept, shortfalls

STEP = Step("samples", "key", Path(), 0.0, 0, reused=False)
STOP = 2


def row(best: int, share: float = 0.9) -> dict[int, float]:
    """A distribution over two tokens."""
    return {best: math.log(share), 99: math.log(1 - share)}


def samples(*sequences: Mapping[str, Any]) -> Samples:
    return Samples(tuple(sequences), (), (), STEP)


GENERAL = {"ids": [1, 5, 6], "positions": [1, 2], "set": "general"}
FIRST = {"ids": [1, 10, 11, STOP], "positions": [2, 3], "set": "tuning"}
SECOND = {"ids": [1, 20, 21, STOP], "positions": [2, 3], "set": "tuning"}
TRAINED = [row(5), row(6), row(11), row(STOP), row(21), row(STOP)]


def test_behaviour_counts_whole_answers_that_the_source_gives() -> None:
    """One wrong token, the end token included, loses an answer; an answer the source does not give cannot be lost."""
    sample_set = samples(GENERAL, FIRST, SECOND)
    same = measure(sample_set, TRAINED, TRAINED)
    assert same.behaviour is not None
    assert (same.behaviour.source, same.behaviour.kept, same.behaviour.share) == (2, 2, 1)
    runs_on = [*TRAINED[:3], row(7), *TRAINED[4:]]
    lost = measure(sample_set, TRAINED, runs_on)
    assert lost.behaviour is not None and (lost.behaviour.pairs, lost.behaviour.kept) == (2, 1)
    untaught = measure(sample_set, runs_on, runs_on)
    assert untaught.behaviour is not None and (untaught.behaviour.source, untaught.behaviour.kept) == (1, 1)
    nothing = [*TRAINED[:2], row(7), row(7), row(7), row(7)]
    none = measure(sample_set, nothing, TRAINED)
    assert none.behaviour is not None and none.behaviour.share is None


def test_the_score_is_of_the_pairs_kept_out_of_the_calibration() -> None:
    """Behaviour covers every scored pair; the tuning score only the pairs kept out of the calibration."""
    sample_set = samples(GENERAL, {**FIRST, "held": True}, {**SECOND, "held": False})
    damaged = [*TRAINED[:4], row(77), row(77)]
    fidelity = measure(sample_set, TRAINED, damaged)
    assert fidelity.held_out and fidelity.tuning is not None and fidelity.tuning.kl_mean == 0
    assert fidelity.behaviour is not None and (fidelity.behaviour.pairs, fidelity.behaviour.kept) == (2, 1)


def test_the_two_texts_are_scored_apart() -> None:
    """Damage on the pairs does not touch the general score."""
    damaged = [*TRAINED[:2], *(row(77) for _ in range(4))]
    fidelity = measure(samples(GENERAL, FIRST, SECOND), TRAINED, damaged)
    assert fidelity.general.kl_mean == 0 and fidelity.general.top1 == 1
    assert fidelity.tuning is not None and fidelity.tuning.kl_mean > 1 and fidelity.tuning.top1 == 0


def test_without_pairs_there_is_no_behaviour() -> None:
    """And nothing fails for the lack of it."""
    fidelity = measure(samples(GENERAL), TRAINED[:2], TRAINED[:2])
    assert fidelity.tuning is None and fidelity.behaviour is None
    assert shortfalls(fidelity, Thresholds(min_behaviour=1.0)) == []


def test_every_shortfall_stands_in_the_one_error() -> None:
    """With the value and its threshold, as text and as data."""
    damaged = [*TRAINED[:2], *(row(77) for _ in range(4))]
    fidelity = measure(samples(GENERAL, FIRST, SECOND), TRAINED, damaged)
    with pytest.raises(GateFailed) as caught:
        require_kept(fidelity, Thresholds(0.05, 0.9, 0.8), "the Q4_0 GGUF", "Choose a larger quant.")
    assert "behaviour kept: 0.0% (at least 80.0%)" in caught.value.what
    assert "tuning text" in caught.value.what and "general" not in caught.value.what
    details = caught.value.as_dict()["details"]
    assert len(details["shortfalls"]) == 3 and details["fidelity"]["behaviour"]["kept"] == 0
    require_kept(fidelity, Thresholds(math.inf, 0, 0), "the Q4_0 GGUF", "")


def test_a_score_that_is_no_number_fails() -> None:
    """NaN is not under any threshold."""
    broken = [{5: math.nan, 99: math.nan}, row(6)]
    fidelity = measure(samples(GENERAL), TRAINED[:2], broken)
    assert shortfalls(fidelity, Thresholds(math.inf, 0, 0))


def test_the_users_limits_replace_only_what_they_name() -> None:
    assert Thresholds(0.1, 0.9, 0.8).changed({"min_top1": 0.5}) == Thresholds(0.1, 0.5, 0.8)


def test_the_interval_holds_the_value_and_narrows_with_more_texts() -> None:
    """A percentile bootstrap over whole texts, the same on every run."""
    few = [(float(i % 5), 10.0) for i in range(10)]
    many = few * 20
    low, high = interval(few)
    assert low <= sum(a for a, _ in few) / 100 <= high
    assert interval(many)[1] - interval(many)[0] < high - low
    assert interval(few) == (low, high)


def test_positions_of_one_text_are_resampled_together() -> None:
    """Five texts that are each all good or all bad: the interval is as wide as five coins, not as a hundred."""
    rows = [row(5)] * 100
    other = [row(5) if number // 20 % 2 else row(6) for number in range(100)]
    by_text = compare(rows, other, [5] * 100, [number // 20 for number in range(100)])
    alone = compare(rows, other, [5] * 100)
    assert by_text.top1 == alone.top1
    assert by_text.top1_ci[1] - by_text.top1_ci[0] > 2 * (alone.top1_ci[1] - alone.top1_ci[0])
