"""The proof of a language model's artifact, the same for all formats; a recipe provides its forms and cannot skip a
part.

samples → the source's scores → the unquantized artifact equals the source → the shipped form's scores → prompt contract
→ thresholds → answers. Every scored form has to satisfy the prompt contract.
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
    """The artifact that a recipe proves.

    tokenizer: the name of the artifact's own tokenizer in a sentence. context: tokens of a conversation on the box.
    thresholds: the recipe's. fix: advice when one is missed. ship: makes the shipped files from the samples (None when
    they are not needed), and returns them with the form to score. exact: makes the unquantized artifact; None when the
    format has none. calibrated: whether ``ship`` reads the samples even with --no-verify. carried: a further check of
    the file itself, which returns notes. scored_by: what computed the scores, when it is not the shipped engine.
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
    """made: the result of ``ship``. report: the artifact's part of the manifest's report; empty with --no-verify."""

    made: Made
    report: Mapping[str, Any] = field(default_factory=dict)


def prove(job: Job, subject: Subject[Made], steps: list[Step]) -> Proof[Made]:
    """Make an artifact and prove it against its source. steps: the list to which the store's steps are added.

    Raises GateFailed when the artifact differs from its source beyond the thresholds or breaks the prompt contract,
    and the errors of making and scoring.
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
    """Score a form and check its prompt contract; adds steps and notes. Raises GateFailed."""
    scored, taken = score(job, form, samples)
    steps += taken
    new = require_contract(job, samples, scored, subject.tokenizer)
    if subject.carried is not None:
        new += subject.carried(samples, scored, form)
    notes += [note for note in new if note not in notes]
    return scored
