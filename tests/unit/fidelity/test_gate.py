"""The proof's order and completeness: whatever a recipe hands in, no part is left out. The engines are stand-ins here;
tests/real runs the proof on real ones.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from packager.core.errors import GateFailed
from packager.core.store import Step
from packager.fidelity import gate
from packager.fidelity.artifact import Candidate, Scored
from packager.fidelity.gate import Exact, Subject, prove
from packager.fidelity.samples import Samples
from packager.metrics.thresholds import Thresholds

PROMPT = {"ids": [1, 5], "text": "<s>q", "messages": [{"role": "user", "content": "q"}], "kind": "general"}
SEQUENCES = (
    {"ids": [1, 5, 6], "positions": [1, 2], "set": "general"},
    {"ids": [1, 10, 2], "positions": [2], "set": "tuning"},
)


def row(best: int) -> dict[int, float]:
    return {best: math.log(0.9), 99: math.log(0.1)}


SOURCE = [row(5), row(6), row(2)]
WRONG = [row(7), row(7), row(2)]


def step(name: str) -> Step:
    return Step(name, name, Path(), 0.0, 0, reused=False)


class Bench:
    """A job and the stand-ins for what computes; ``done`` has the order of what happened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, verify: bool = True) -> None:
        self.done: list[str] = []
        self.scores = {"exact": SOURCE, "shipped": SOURCE}
        self.rendered = {"exact": [[1, 5]], "shipped": [[1, 5]]}
        tokenizer = SimpleNamespace(bos_id=1)
        self.job: Any = SimpleNamespace(
            verify=verify, limits={}, ask=None, checkpoint=SimpleNamespace(tokenizer=tokenizer, path=Path())
        )
        samples = Samples(SEQUENCES, (PROMPT,), (), step("samples"), pairs={"given": 1, "asked": 1, "left_out": {}})
        monkeypatch.setattr(gate, "make_samples", lambda job, context: self.noted("samples", samples))
        monkeypatch.setattr(gate, "source_scores", lambda job, s: self.noted("source", (SOURCE, step("reference"))))
        monkeypatch.setattr(gate, "score", self.score)
        monkeypatch.setattr(gate.answers, "report", lambda *_: self.noted("answers", {"asked": 1, "of": 1}))

    def noted(self, name: str, value: Any) -> Any:
        self.done.append(name)
        return value

    def score(self, job: Any, form: Candidate, samples: Samples) -> tuple[Scored, list[Step]]:
        name = form.what
        self.done.append(f"score {name}")
        return Scored(self.scores[name], [[1, 5]], self.rendered[name]), [step(f"score {name}")]

    def subject(self, **others: Any) -> Subject[str]:
        def candidate(what: str) -> Candidate:
            return Candidate(what, SimpleNamespace(), {}, seconds_a_token=0.0)  # type: ignore[arg-type]

        usual: dict[str, Any] = {
            "tokenizer": "its tokenizer",
            "context": 64,
            "thresholds": Thresholds(max_kl=0.1),
            "fix": "Choose another.",
            "exact": lambda: self.noted("exact", Exact(candidate("exact"), "F16")),
            "ship": lambda samples: self.noted("ship" if samples else "ship blind", ("made", candidate("shipped"))),
        }
        return Subject(**(usual | others))


def test_every_part_happens_in_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """And stands in the report, with every step that was taken."""
    bench, steps = Bench(monkeypatch), list[Step]()
    proof = prove(bench.job, bench.subject(scored_by="a stand-in"), steps)
    assert bench.done == ["samples", "source", "exact", "score exact", "ship", "score shipped", "answers"]
    assert proof.made == "made"
    assert set(proof.report) == {"unquantized", "fidelity", "contract", "prompts_equal"}
    fidelity = proof.report["fidelity"]
    assert (fidelity["scored"], fidelity["answers"]["asked"], fidelity["pairs"]["given"]) == ("a stand-in", 1, 1)
    assert [one.name for one in steps] == ["samples", "reference", "score exact", "score shipped"]


def test_a_format_without_an_unquantized_form_keeps_all_other_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    proof = prove(bench.job, bench.subject(exact=None), [])
    assert bench.done == ["samples", "source", "ship", "score shipped", "answers"]
    assert "unquantized" not in proof.report and "contract" in proof.report


@pytest.mark.parametrize("form", ["exact", "shipped"])
def test_the_prompt_contract_holds_for_each_form(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """A server that renders another prompt stops the build, whichever form shows it."""
    bench = Bench(monkeypatch)
    bench.rendered[form] = [[1, 6]]
    monkeypatch.setattr("packager.prompts.contract.token_names", lambda _checkpoint: None)
    with pytest.raises(GateFailed, match="differs from the checkpoint's at token 1"):
        prove(bench.job, bench.subject(), [])


@pytest.mark.parametrize(
    ("form", "says"), [("exact", "does not compute what the checkpoint computes"), ("shipped", "too far")]
)
def test_a_wrong_form_is_refused(monkeypatch: pytest.MonkeyPatch, form: str, says: str) -> None:
    """The unquantized one as a fault of the conversion, before anything ships; the other by its thresholds."""
    bench = Bench(monkeypatch)
    bench.scores[form] = WRONG
    with pytest.raises(GateFailed, match=says):
        prove(bench.job, bench.subject(), [])
    assert ("ship" in bench.done) is (form == "shipped")
    assert "answers" not in bench.done


@pytest.mark.parametrize(("calibrated", "done"), [(False, ["ship blind"]), (True, ["samples", "ship"])])
def test_without_verification_nothing_is_scored(
    monkeypatch: pytest.MonkeyPatch, calibrated: bool, done: list[str]
) -> None:
    """A recipe that calibrates still gets its samples."""
    bench = Bench(monkeypatch, verify=False)
    assert prove(bench.job, bench.subject(calibrated=calibrated), []).report == {}
    assert bench.done == done


def test_notes_of_two_forms_stand_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file's own contract is asked of both forms."""
    bench = Bench(monkeypatch)
    asked: list[str] = []

    def carried(samples: Samples, scored: Scored, form: Candidate) -> list[str]:
        asked.append(form.what)
        return ["llama.cpp by itself puts BOS before plain text"]

    report = prove(bench.job, bench.subject(carried=carried), []).report
    assert asked == ["exact", "shipped"] and len(report["contract"]["notes"]) == 1
