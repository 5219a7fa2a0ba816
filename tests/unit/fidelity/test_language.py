"""Calibration in a language that the source does not know is refused, without a table of languages."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from packager.core.errors import GateFailed
from packager.core.store import Step
from packager.fidelity.language import measure, require_known, surprise
from packager.fidelity.samples import Samples
from packager.prompts.calibration import Calibration
from tests.unit.tiny import WORDS, spoken_tokenizer, write_json

TEXT = [WORDS.index(letter) for letter in "abcdef"] * 12


def job(folder: Path, *, trust: bool = False) -> Any:
    write_json(folder / "tokenizer.json", spoken_tokenizer(""))
    tokenizer = SimpleNamespace(stop_ids=(1,))
    checkpoint = SimpleNamespace(path=folder, tokenizer=tokenizer, shape=SimpleNamespace(vocab=10))
    data = Calibration((), ("…",), "d", "notes.txt")
    return SimpleNamespace(checkpoint=checkpoint, calibration=data, trust_calibration=trust)


def samples(ids: list[int], kind: str) -> Samples:
    step = Step("samples", "key", Path(), 0.0, 0, reused=False)
    if kind == "text":
        return Samples((), (), (), step, judged=(ids,))
    return Samples(({"ids": ids, "positions": list(range(1, len(ids))), "set": "tuning"},), (), (), step)


def predicted(ids: list[int], share: float) -> list[dict[int, float]]:
    """A source that gives this probability to each token that comes, and the rest to another."""
    return [{token: math.log(share), 0: math.log(1 - share)} for token in ids[1:]]


@pytest.mark.parametrize("kind", ["text", "tuning"])
def test_a_text_that_the_source_predicts_passes(tmp_path: Path, kind: str) -> None:
    """Both plain text and the answers of pairs are measured."""
    rows = predicted(TEXT, 0.9)
    scores = (rows, []) if kind == "tuning" else ([], rows)
    known = require_known(job(tmp_path), samples(TEXT, kind), *scores)[kind]
    assert known.ratio < 0.1


@pytest.mark.parametrize("kind", ["text", "tuning"])
def test_a_text_that_it_predicts_worse_than_counting_stops_the_build(tmp_path: Path, kind: str) -> None:
    """By its name, with both figures and the way to use it all the same."""
    rows = predicted(TEXT, 0.001)
    scores = (rows, []) if kind == "tuning" else ([], rows)
    with pytest.raises(GateFailed, match=r"does not know the language of the calibration file notes\.txt") as caught:
        require_known(job(tmp_path), samples(TEXT, kind), *scores)
    assert "--trust-calibration" in caught.value.fix
    assert require_known(job(tmp_path, trust=True), samples(TEXT, kind), *scores)[kind].ratio > 1


def test_a_short_text_says_nothing(tmp_path: Path) -> None:
    """A model needs some context, and counting needs some characters."""
    few = TEXT[:20]
    assert require_known(job(tmp_path), samples(few, "text"), [], predicted(few, 0.001)) == {}


def test_without_calibration_nothing_is_judged(tmp_path: Path) -> None:
    """The text that the package carries is not judged."""
    plain = job(tmp_path)
    plain.calibration = None
    assert require_known(plain, samples(TEXT, "text"), [], []) == {}


def test_a_token_out_of_sight_gets_an_even_share_of_the_rest() -> None:
    """And never more than the least likely one that is seen."""
    row = {1: math.log(0.5), 2: math.log(0.3)}
    assert surprise(row, 1, 12) == pytest.approx(-math.log(0.5))
    assert surprise(row, 7, 12) == pytest.approx(-math.log(0.2 / 10))
    assert surprise(row, 7, 3) == pytest.approx(-math.log(0.2))
    assert surprise({1: math.log(0.1)}, 7, 2) == pytest.approx(-math.log(0.1))


def test_counting_is_the_entropy_of_the_characters() -> None:
    """Two letters evenly: one bit; one letter alone: nothing to predict."""
    assert measure("abab", [1.0]).counted == pytest.approx(math.log(2))
    assert measure("abab", [1.0]).loss == 0.25
    assert measure("aaaa", [1.0]).ratio == 0
    assert measure("", []).ratio == 0
