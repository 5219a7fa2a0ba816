"""``answer``: prompts and limits from a file, every token of the greedy answers into another."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runtimes.evaluate import answer
from runtimes.evaluate.render import render
from tests.unit.runtimes.serving import Scripted, make_run


def test_each_prompt_is_answered_greedily_within_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids and finish reason, in the order of the prompts; the engine is closed at the end."""
    engine = Scripted()
    monkeypatch.setattr(answer, "module", lambda name: SimpleNamespace(load=lambda run, verbose: engine))
    prompts = [{"ids": [1, 2], "max_tokens": 2}, {"ids": [3], "max_tokens": 40}]
    result = answer.answer(make_run(tmp_path), {"prompts": prompts})
    assert result["answers"] == [{"ids": [1, 2], "finish": "length"}, {"ids": [1, 2, 3, 4], "finish": "stop"}]
    assert [(prompt, sampling.temperature, sampling.exact_ids) for prompt, sampling in engine.requests] == [
        ([1, 2], 0.0, True),
        ([3], 0.0, True),
    ]
    assert engine.closed


def test_an_engine_that_maps_its_weights_is_kept_within_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is over when the engine is closed, not before."""
    engine, events = Scripted(), []

    @contextlib.contextmanager
    def within(run: Any, ceiling: int | None, *, verbose: bool) -> Iterator[Scripted]:
        events.append(f"within {ceiling}")
        yield engine
        events.append(f"closed {engine.closed}")

    monkeypatch.setattr(answer, "module", lambda name: SimpleNamespace(load_within=within))
    answer.answer(make_run(tmp_path), {"prompts": [{"ids": [1], "max_tokens": 1}], "max_rss_bytes": 7})
    assert events == ["within 7", "closed True"]


NOWHERE = {"engine": "nowhere", "model": "m", "tokenizer": "t"}


@pytest.mark.parametrize("question", [{}, {"run": NOWHERE, "prompts": []}])
def test_a_question_that_makes_no_sense_is_told(
    tmp_path: Path, question: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 3 and one line."""
    job = tmp_path / "job.json"
    job.write_text(json.dumps(question), encoding="utf-8")
    assert answer.main(["--input", str(job), "--output", str(tmp_path / "out.json")]) == 3
    assert capsys.readouterr().err.startswith("answer: ManifestError")
    assert not (tmp_path / "out.json").exists()


def test_what_is_compared_does_not_change_overnight(tmp_path: Path) -> None:
    """A template that writes the date is rendered on one fixed day for the build machine, and today for users."""
    run = make_run(tmp_path)
    assert run.chat_template is not None
    run.chat_template.write_text("{{ strftime_now('%d %b %Y') }}", encoding="utf-8")
    assert render(run, {"conversations": [[]]})["texts"] == ["01 Jan 2026"]
