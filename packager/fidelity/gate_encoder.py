"""The proof of an encoder's artifact, the same for all formats: the exported graph equals the source, and every form
that may ship reaches its thresholds. The token ids of the texts are the same in all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from packager.fidelity.encoders import (
    Encoded,
    Texts,
    compare,
    make_texts,
    require_same_ids,
    shipped_outputs,
    source_outputs,
)
from packager.metrics.encoders import EncoderThresholds, Score, as_dict, require_exact, require_kept

if TYPE_CHECKING:
    from packager.checkpoint.encoder import EncoderFacts
    from packager.core.store import Step
    from packager.recipe import Job, Run


@dataclass(frozen=True)
class EncoderProof:
    """The proof of one encoder. source: its outputs; None with --no-verify, then nothing is compared."""

    job: Job
    facts: EncoderFacts
    steps: list[Step]
    texts: Texts
    source: Encoded | None

    @classmethod
    def begin(cls, job: Job, facts: EncoderFacts, steps: list[Step]) -> EncoderProof:
        """Choose the texts and compute the source's outputs. Raises InputError for an unknown label."""
        texts = make_texts(job.calibration, facts.labels)
        if not job.verify:
            return cls(job, facts, steps, texts, None)
        source, step = source_outputs(job, facts, texts)
        steps.append(step)
        return cls(job, facts, steps, texts, source)

    def exact(self, model: Step, run: Run, what: str) -> dict[str, Any]:
        """Scores of the unquantized graph; {} with --no-verify. Raises GateFailed when it differs from its source.

        model: the step with the file that ``run`` names. what: the graph's name in a sentence.
        """
        if self.source is None:
            return {}
        _, scores = self._scores(self.source, model, run, what)
        for score in scores.values():
            if score is not None:
                require_exact(score, what)
        return {name: asdict(score) for name, score in scores.items() if score is not None}

    def kept(
        self, model: Step, run: Run, what: str, limits: EncoderThresholds, fix: str
    ) -> tuple[Encoded | None, dict[str, Any]]:
        """(outputs of a form that may ship, its scores); (None, {}) with --no-verify. Raises GateFailed when it misses
        a threshold.
        """
        if self.source is None:
            return None, {}
        outputs, scores = self._scores(self.source, model, run, what)
        require_kept(scores, limits, what, fix)
        return outputs, as_dict(scores, limits)

    def _scores(self, source: Encoded, model: Step, run: Run, what: str) -> tuple[Encoded, Mapping[str, Score | None]]:
        outputs, step = shipped_outputs(self.job, run, self.texts, what=what, model=model.key)
        self.steps.append(step)
        require_same_ids(self.texts, source, outputs)
        return outputs, compare(self.facts, self.texts, source, outputs)
