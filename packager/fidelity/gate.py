"""The proof of a language model's artifact, once for all formats: a recipe hands in what it makes, and cannot leave a
part out.

samples → the source's scores → the unquantized artifact equals the source → what ships is scored → prompt contract →
thresholds → answers. The prompt contract holds for every form that is scored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from packager.fidelity import answers
from packager.fidelity.artifact import Candidate, Scored, measure, require_contract, score
from packager.fidelity.samples import Samples, make_samples
from packager.fidelity.source import source_scores
from packager.metrics.distributions import compare, require_equal
from packager.metrics.thresholds import Thresholds, require_kept

if TYPE_CHECKING:
    from packager.core.store import Step
    from packager.recipe import Job

Made = TypeVar("Made")


@dataclass(frozen=True)
class Exact:
    """The unquantized artifact. run_as: the number type in which it is run, for the report."""

    form: Candidate
    run_as: str


@dataclass(frozen=True)
class Subject(Generic[Made]):
    """What a recipe proves.

    tokenizer: the artifact's own tokenizer, as it stands in a sentence. context: tokens of a conversation on the box.
    thresholds: what must be kept. fix: advice where it is not. ship: makes what ships, of the samples (None where
    nothing needs them), and gives it with the form that is scored. exact: makes the unquantized artifact; None where
    the format has none. calibrated: whether ``ship`` reads the samples even when nothing is verified. carried: a
    further contract of the file itself. scored_by: who computed the scores, where it is not the engine that ships.
    """

    tokenizer: str
    context: int
    thresholds: Thresholds
    fix: str
    ship: Callable[[Samples | None], tuple[Made, Candidate]]
    exact: Callable[[], Exact] | None = None
    calibrated: bool = False
    carried: Callable[[Samples, Scored, Candidate], list[str]] | None = None
    scored_by: str = ""


@dataclass(frozen=True)
class Proof(Generic[Made]):
    """made: what ``ship`` made. report: the artifact's part of the manifest's report; empty with --no-verify."""

    made: Made
    report: Mapping[str, Any] = field(default_factory=dict)


def prove(job: Job, subject: Subject[Made], steps: list[Step]) -> Proof[Made]:
    """Make an artifact and prove it against its source. steps: where every step that was taken is added.

    Raises GateFailed where the artifact is not its source, and what making and scoring raise.
    """
    samples = make_samples(job, subject.context) if job.verify or subject.calibrated else None
    if samples:
        steps.append(samples.step)
    if not job.verify or samples is None:
        made, _ = subject.ship(samples)
        return Proof(made)
    source, step = source_scores(job, samples)
    steps.append(step)
    report: dict[str, Any] = {}
    notes = list(samples.notes)
    if subject.exact is not None:
        exact = subject.exact()
        scored = _scored(job, subject, exact.form, samples, steps, notes)
        equal = compare(source, scored.distributions, samples.targets)
        require_equal(equal, exact.form.what)
        report["unquantized"] = {"run_as": exact.run_as, **equal.as_dict()}
    made, form = subject.ship(samples)
    scored = _scored(job, subject, form, samples, steps, notes)
    fidelity = measure(samples, source, scored.distributions)
    limits = subject.thresholds.changed(job.limits)
    require_kept(fidelity, limits, form.what, subject.fix)
    report["fidelity"] = fidelity.as_dict(limits)
    if subject.scored_by:
        report["fidelity"]["scored"] = subject.scored_by
    if samples.pairs:
        report["fidelity"]["pairs"] = dict(samples.pairs)
    report["fidelity"]["answers"] = answers.report(job, form, samples, steps)
    report["contract"] = {**samples.contract(), "notes": notes}
    report["prompts_equal"] = len(samples.prompts)
    return Proof(made, report)


def _scored(
    job: Job, subject: Subject[Made], form: Candidate, samples: Samples, steps: list[Step], notes: list[str]
) -> Scored:
    """Score a form and hold it to the prompt contract. Raises GateFailed."""
    scored, taken = score(job, form, samples)
    steps += taken
    told = require_contract(job, samples, scored, subject.tokenizer)
    if subject.carried is not None:
        told += subject.carried(samples, scored, form)
    notes += [note for note in told if note not in notes]
    return scored
