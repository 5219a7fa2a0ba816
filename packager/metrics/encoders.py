"""The distance between an encoder's vectors or labels and its source's, and the thresholds that stop a build.

Embedders: the cosine between the two vectors of each text, and Spearman's rank correlation between the similarities of
all pairs of texts (a search ranks by them). Classifiers: the agreement of the best labels, and the accuracy on texts
with known labels. Each with a 95 % percentile bootstrap interval over whole texts (Efron & Tibshirani 1993).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, TypedDict

from packager.core.errors import GateFailed, UsageError
from packager.metrics.distributions import DRAWS, interval

if TYPE_CHECKING:
    from numpy.typing import NDArray

TIE = 0.02  # two logits nearer than this are a tie, as for the decoders' best tokens
EXACT_COSINE, EXACT_ERROR = 0.9999, 1e-3  # limits for an unquantized form: float32 sums in another order


@dataclass(frozen=True)
class EncoderThresholds:
    """min_cosine: mean over texts. min_rank: Spearman's correlation. min_agreement: share of texts with the source's
    label. max_accuracy_loss: share of texts, where labels are known.
    """

    min_cosine: float = 0.99
    min_rank: float = 0.97
    min_agreement: float = 0.95
    max_accuracy_loss: float = 0.01

    def changed(self, limits: Mapping[str, float], *, task: str, labelled: bool) -> EncoderThresholds:
        """With the user's own values. labelled: the user's texts have labels. Raises UsageError for a limit that does
        not apply to this model.
        """
        ours = LIMITS[task]
        for name in limits:
            if name not in ours:
                raise UsageError(
                    f"{_flag(name)} does not apply to {'an embedder' if task == 'embed' else 'a classifier'}.",
                    fix=f"Its limits are {' and '.join(map(_flag, ours))}.",
                )
        if "max_accuracy_loss" in limits and not labelled:
            raise UsageError(
                "--max-accuracy-loss needs texts with labels.",
                fix="Give them with --calibration: a .csv with the columns text and label, or JSON records of both.",
            )
        return replace(self, **limits)


LIMITS = {"embed": ("min_cosine", "min_rank"), "classify": ("min_agreement", "max_accuracy_loss")}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def refuse_for_decoders(limits: Mapping[str, float]) -> None:
    """Raise UsageError for a limit that only encoders have."""
    for name in limits:
        if any(name in names for names in LIMITS.values()):
            raise UsageError(
                f"{_flag(name)} is for embedders and classifiers, and this is a language model.",
                fix="Its limits are --max-kl, --min-top1 and --min-behaviour.",
            )


@dataclass(frozen=True)
class VectorScore:
    """cosine_*: over texts. rank: Spearman over all pairs of texts; None below three texts. max_error: largest
    difference of two components.
    """

    texts: int
    cosine_mean: float
    cosine_p5: float
    cosine_min: float
    cosine_mean_ci: tuple[float, float]
    rank: float | None
    rank_ci: tuple[float, float] | None
    max_error: float


@dataclass(frozen=True)
class LabelScore:
    """agreement: share of texts whose best label is the source's (or tied with it within TIE). labelled: texts whose
    label is known; accuracy of the source and of the artifact on them, None without any.
    """

    texts: int
    agreement: float
    agreement_strict: float
    agreement_ci: tuple[float, float]
    max_error: float
    labelled: int
    accuracy_source: float | None
    accuracy: float | None


Score = VectorScore | LabelScore


def compare_vectors(source: Sequence[Sequence[float]], artifact: Sequence[Sequence[float]]) -> VectorScore:
    """Score vectors [texts, dimensions] against the source's. Raises ValueError when the shapes differ."""
    import numpy as np

    first, second = np.asarray(source, np.float64), np.asarray(artifact, np.float64)
    if first.shape != second.shape or first.ndim != 2 or not len(first):
        raise ValueError(f"{first.shape} source and {second.shape} artifact vectors do not match")
    one, other = _unit(first), _unit(second)
    cosines = (one * other).sum(axis=1)
    rank, rank_ci = None, None
    if len(first) > 2:
        rank, rank_ci = _rank_correlation(one @ one.T, other @ other.T)
    low, high = interval([(float(value), 1.0) for value in cosines])
    return VectorScore(
        texts=len(first),
        cosine_mean=round(float(cosines.mean()), 6),
        cosine_p5=round(float(np.percentile(cosines, 5)), 6),
        cosine_min=round(float(cosines.min()), 6),
        cosine_mean_ci=(round(low, 6), round(high, 6)),
        rank=rank,
        rank_ci=rank_ci,
        max_error=round(float(np.abs(first - second).max()), 8),
    )


def _unit(vectors: NDArray[Any]) -> NDArray[Any]:
    import numpy as np

    unit: NDArray[Any] = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return unit


def _rank_correlation(one: NDArray[Any], other: NDArray[Any]) -> tuple[float, tuple[float, float]]:
    """Spearman's correlation of two similarity matrices over pairs of different texts, and its bootstrap interval:
    texts are resampled, not pairs, because pairs that share a text are not independent.
    """
    import numpy as np

    def spearman(texts: NDArray[Any]) -> float:
        rows, columns = np.triu_indices(len(texts), 1)
        left, right = texts[rows], texts[columns]
        different = left != right  # a text drawn twice makes no pair with itself
        return _spearman(one[left, right][different], other[left, right][different])

    draw = np.random.default_rng(0)
    count = len(one)
    correlations = sorted(spearman(draw.integers(0, count, count)) for _ in range(DRAWS))
    ends = correlations[int(0.025 * DRAWS)], correlations[math.ceil(0.975 * DRAWS) - 1]
    return round(spearman(np.arange(count)), 6), (round(ends[0], 6), round(ends[1], 6))


def _spearman(one: NDArray[Any], other: NDArray[Any]) -> float:
    import numpy as np

    if len(one) < 2:
        return 0.0  # one value has no rank order
    ranks = [_ranks(values) for values in (one, other)]
    if any(rank.std() == 0 for rank in ranks):
        return 0.0  # equal values have no rank order
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: NDArray[Any]) -> NDArray[Any]:
    """Ranks from 0; equal values share their mean rank."""
    import numpy as np

    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: NDArray[Any] = (ends - (counts + 1) / 2)[place]
    return ranks


def compare_labels(
    source: Sequence[Sequence[float]],
    artifact: Sequence[Sequence[float]],
    truth: Sequence[int | None],
    *,
    several: bool,
) -> LabelScore:
    """Score logits [texts, labels] against the source's. truth: each text's label id, None where it is not known.
    several: a text may have any number of labels, those with a positive logit (a probability above one half). Raises
    ValueError when shapes differ.
    """
    import numpy as np

    first, second = np.asarray(source, np.float64), np.asarray(artifact, np.float64)
    if first.shape != second.shape or first.ndim != 2 or not len(first) or len(truth) != len(first):
        raise ValueError(f"{first.shape} source and {second.shape} artifact logits do not match")
    best, chosen = first.argmax(axis=1), second.argmax(axis=1)
    rows = np.arange(len(first))
    if several or first.shape[1] == 1:
        strict = ((first > 0) == (second > 0)).all(axis=1)
        loose = (((first > 0) == (second > 0)) | (np.abs(first) < TIE)).all(axis=1)
    else:
        strict = best == chosen
        loose = strict | (first[rows, best] - first[rows, chosen] < TIE)
    known = [(row, label) for row, label in enumerate(truth) if label is not None]
    low, high = interval([(float(value), 1.0) for value in loose])
    return LabelScore(
        texts=len(first),
        agreement=round(float(loose.mean()), 6),
        agreement_strict=round(float(strict.mean()), 6),
        agreement_ci=(round(low, 6), round(high, 6)),
        max_error=round(float(np.abs(first - second).max()), 8),
        labelled=len(known),
        accuracy_source=_share([int(best[row]) == label for row, label in known]),
        accuracy=_share([int(chosen[row]) == label for row, label in known]),
    )


def _share(hits: Sequence[bool]) -> float | None:
    return round(sum(hits) / len(hits), 6) if hits else None


def require_exact(score: Score, what: str) -> None:
    """Raise GateFailed when an unquantized form is not its source: a conversion fault, not a loss of precision."""
    failed = []
    # "not >=" also fails a NaN
    if isinstance(score, VectorScore) and not score.cosine_min >= EXACT_COSINE:
        failed.append(f"the smallest cosine is {score.cosine_min:.6f}, at least {EXACT_COSINE} is needed")
    if not score.max_error <= EXACT_ERROR:
        failed.append(f"an output differs by {score.max_error:.3g}, at most {EXACT_ERROR:g} is allowed")
    if failed:
        raise GateFailed(
            f"{what} does not compute what the checkpoint computes: {'; '.join(failed)}.",
            why="The export changed the model (positions, pooling, a tokenizer or a missing tensor), before any "
            "quantization.",
            fix="Do not ship it. Report the architecture and config.json; --no-verify builds without this check.",
        )


class Shortfall(TypedDict):
    """A score that misses its threshold. measure: the figure and its texts. found: its value."""

    measure: str
    found: float
    allowed: float


def shortfalls(scores: Mapping[str, Score | None], thresholds: EncoderThresholds) -> list[Shortfall]:
    """All scores that miss their threshold. scores: by the name of the texts."""
    lines: list[Shortfall] = []

    def check(measure: str, name: str, value: float | None, allowed: float, *, most: bool = False) -> None:
        if value is not None and not (value <= allowed if most else value >= allowed):
            lines.append({"measure": f"{measure}, {name} texts", "found": value, "allowed": allowed})

    for name, score in scores.items():
        if isinstance(score, VectorScore):
            check("mean cosine", name, score.cosine_mean, thresholds.min_cosine)
            check("rank correlation", name, score.rank, thresholds.min_rank)
        elif isinstance(score, LabelScore):
            check("agreement of labels", name, score.agreement, thresholds.min_agreement)
            if score.accuracy is not None and score.accuracy_source is not None:
                lost = round(score.accuracy_source - score.accuracy, 6)
                check("loss of accuracy", name, lost, thresholds.max_accuracy_loss, most=True)
    return lines


def require_kept(scores: Mapping[str, Score | None], thresholds: EncoderThresholds, what: str, fix: str) -> None:
    """Raise GateFailed, with the whole table, when the artifact misses a threshold."""
    lines = shortfalls(scores, thresholds)
    if not lines:
        return
    table = "; ".join(f"{line['measure']} {line['found']:.4f} ({line['allowed']:.4f} allowed)" for line in lines)
    error = GateFailed(
        f"{what} is too far from its checkpoint: {table}.",
        why="Every figure comes from the runtime that ships, on the same texts.",
        fix=f"{fix} Or allow it: --min-cosine, --min-rank, --min-agreement, --max-accuracy-loss.",
    )
    error.details = {"fidelity": as_dict(scores, thresholds), "shortfalls": lines}
    raise error


def as_dict(scores: Mapping[str, Score | None], thresholds: EncoderThresholds) -> dict[str, Any]:
    """The form stored in the manifest."""
    by_name = {name: asdict(score) if score is not None else None for name, score in scores.items()}
    return {**by_name, "thresholds": asdict(thresholds)}


def lines(fidelity: Mapping[str, Any]) -> list[str]:
    """The lines of text for an encoder's fidelity. fidelity: the manifest's entry (``as_dict``)."""
    texts = []
    for name in ("general", "tuning"):
        score = fidelity.get(name)
        if score and "cosine_mean" in score:
            rank = "" if score["rank"] is None else f", rank correlation {score['rank']:.4f}"
            low, high = score["cosine_mean_ci"]
            texts.append(
                f"fidelity, {name} texts: cosine {score['cosine_mean']:.4f} ({low:.4f} to {high:.4f}), p5 "
                f"{score['cosine_p5']:.4f}, min {score['cosine_min']:.4f}{rank}; {score['texts']} texts"
            )
        elif score:
            accuracy = ""
            if score["accuracy"] is not None:
                accuracy = f", accuracy {score['accuracy']:.1%} (source {score['accuracy_source']:.1%})"
            texts.append(
                f"fidelity, {name} texts: the source's label for {score['agreement']:.1%} of {score['texts']} texts"
                f"{accuracy}"
            )
    return texts
