"""The source's next-token distributions and input statistics, the same for every artifact format.

torch runs in a child (workers/reference.py), so that its memory is freed when the step ends.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from packager.core.processes import WORKERS, follow
from packager.core.store import Cost, Step
from packager.fidelity.language import Known, require_known
from packager.fidelity.samples import Samples as Samples
from packager.fidelity.samples import make_samples as make_samples
from packager.recipe import Job

TOP = 64  # tokens compared at a position; the rest of the vocabulary is one bucket


def _run(
    job: Job,
    samples: Samples,
    folder: Path,
    cost: Cost,
    name: str,
    extra: Sequence[Mapping[str, object]] = (),
    **outputs: str | None,
) -> None:
    layers = float(job.checkpoint.shape.layers)
    follow(
        WORKERS / "reference.py",
        {
            "checkpoint": str(job.checkpoint.path),
            "sequences": [*samples.sequences, *extra],
            "top": TOP,
            "calibration": list(samples.calibration),
            "threads": os.cpu_count() or 1,
            **outputs,
        },
        name,
        job.progress,
        cost,
        work=folder,
        total=layers,
        unit="layers",
    )


def _inputs(job: Job, samples: Samples) -> dict[str, object]:
    return {
        "checkpoint": job.checkpoint.digest,
        "samples": samples.key,
        "threads": os.cpu_count() or 1,
    }


def source_scores(job: Job, samples: Samples) -> tuple[list[dict[int, float]], Step]:
    """The source's best TOP tokens at every scored position: token -> log-probability (natural), best first.

    Raises GateFailed when the source does not know the language of the user's calibration (language.py).
    """
    rows, judged, step = _scored(job, samples)
    require_known(job, samples, rows, judged)
    return rows, step


def known_calibration(job: Job, samples: Samples) -> dict[str, Known]:
    """How well the source predicts the calibration: plain text and the pairs' answers separately. Raises GateFailed."""
    rows, judged, _ = _scored(job, samples)
    return require_known(job, samples, rows, judged)


def _scored(job: Job, samples: Samples) -> tuple[list[dict[int, float]], list[dict[int, float]], Step]:
    """(distributions at samples.sequences' positions, those at samples.judged's, the step with both)."""
    extra = [{"ids": ids, "positions": list(range(1, len(ids)))} for ids in samples.judged]

    def make(folder: Path, cost: Cost) -> None:
        scores = str(folder / "scores.npz")
        _run(job, samples, folder, cost, "scoring the source", extra=extra, scores=scores, imatrix=None)

    step = job.store.step("reference", {**_inputs(job, samples), "top": TOP}, make, progress=job.progress)
    rows = _distributions(step)
    count = sum(len(sequence["positions"]) for sequence in samples.sequences)
    return rows[:count], rows[count:], step


def _distributions(step: Step) -> list[dict[int, float]]:
    import numpy as np

    with np.load(step.path / "scores.npz", allow_pickle=False) as stored:
        ids, logprobs = stored["ids"].tolist(), stored["logprobs"].tolist()
    return [dict(zip(row, values, strict=True)) for row, values in zip(ids, logprobs, strict=True)]


def input_squares(job: Job, samples: Samples) -> tuple[Path, Step]:
    """A .npz with the mean squared input of each channel, for every linear layer by its Hugging Face module name."""

    def make(folder: Path, cost: Cost) -> None:
        _run(
            job,
            samples,
            folder,
            cost,
            "gathering the importance matrix",
            scores=None,
            imatrix=str(folder / "squares.npz"),
        )

    step = job.store.step("input-squares", _inputs(job, samples), make, progress=job.progress)
    return step.path / "squares.npz", step
