"""The distance between an artifact's and its source's next-token distributions, the same for every format.

Both sides give their k most likely tokens with log-probabilities, at the same positions of the same token ids. KL
divergence is computed over the source's best k tokens and one bucket for all the rest (Kullback & Leibler 1951; merging
outcomes makes it a lower bound of the full divergence).
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from packager.core.errors import GateFailed

DRAWS = 1000
FEW_GROUPS = 5  # texts; with fewer, positions are resampled instead of texts
TIE = 0.02  # nats: when the source's two best tokens are nearer than this, float32 rounding decides between them


@dataclass(frozen=True)
class Score:
    """kl_*: nats. top1: share of positions whose best token is the source's best (or tied with it within TIE).

    k: tokens compared at a position, the rest is one bucket. positions: their number. *_ci: 95 % bootstrap interval.
    """

    positions: int
    k: int
    kl_mean: float
    kl_p95: float
    kl_max: float
    top1: float
    top1_strict: float
    perplexity_ratio: float
    kl_mean_ci: tuple[float, float]
    top1_ci: tuple[float, float]
    perplexity_ratio_ci: tuple[float, float]

    def as_dict(self) -> dict[str, Any]:
        """The form stored in the manifest."""
        return asdict(self)


def divergence(source: Mapping[int, float], artifact: Mapping[int, float]) -> float:
    """KL(source ‖ artifact) in nats over the source's tokens and one bucket for the rest; inputs are log-probabilities.

    A source token that is missing from the artifact's best k is at most as likely there as the k-th. It gets that
    probability, or an equal share of the artifact's remaining mass if that is less: the result stays a lower bound, and
    an artifact that lost the token still has a large divergence.
    """
    absent = sum(token not in artifact for token in source)
    leftover = max(1.0 - math.fsum(math.exp(value) for value in artifact.values()), 1e-12)
    fill = min(min(artifact.values()), math.log(leftover / absent) if absent else 0.0)
    total, source_mass, artifact_mass = 0.0, 0.0, 0.0
    for token, logp in source.items():
        logq = artifact.get(token, fill)
        total += math.exp(logp) * (logp - logq)
        source_mass += math.exp(logp)
        artifact_mass += math.exp(logq)
    rest_p, rest_q = max(1.0 - source_mass, 0.0), max(1.0 - artifact_mass, 1e-12)
    if rest_p > 1e-9:
        total += rest_p * math.log(rest_p / rest_q)
    return max(total, 0.0)


def interval(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """95 % percentile bootstrap interval of sum(a) / sum(b) over (a, b) parts (Efron & Tibshirani 1993), fixed seed."""
    draw, ratios = random.Random(0), []  # noqa: S311 - a fixed seed, nothing secret
    for _ in range(DRAWS):
        picked = draw.choices(parts, k=len(parts))
        weight = math.fsum(b for _, b in picked)
        if weight:
            ratios.append(math.fsum(a for a, _ in picked) / weight)
    ratios.sort()
    return (ratios[int(0.025 * len(ratios))], ratios[math.ceil(0.975 * len(ratios)) - 1]) if ratios else (0.0, 0.0)


def compare(
    source: Sequence[Mapping[int, float]],
    artifact: Sequence[Mapping[int, float]],
    targets: Sequence[int | None],
    groups: Sequence[int] | None = None,
) -> Score:
    """Score an artifact against its source at the same positions.

    source, artifact: for each position a mapping token -> log-probability, best first. targets: the token that follows
    in the text (None where there is none), for the perplexity ratio over positions where both sides list it. groups:
    the text that each position belongs to; whole texts are resampled, because positions of one are not independent.
    Raises ValueError when the lengths differ or are 0.
    """
    if not source or len(source) != len(artifact) or len(source) != len(targets):
        raise ValueError(
            f"{len(source)} source, {len(artifact)} artifact and {len(targets)} target positions do not match"
        )
    divergences = [divergence(p, q) for p, q in zip(source, artifact, strict=True)]
    strict: list[bool] = []
    loose: list[bool] = []
    excess: list[float | None] = []
    for p, q, target in zip(source, artifact, targets, strict=True):
        best, chosen = max(p, key=lambda token: p[token]), max(q, key=lambda token: q[token])
        strict.append(best == chosen)
        loose.append(best == chosen or p[best] - p.get(chosen, -math.inf) < TIE)
        excess.append(p[target] - q[target] if target is not None and target in p and target in q else None)
    known = [value for value in excess if value is not None]
    count = len(divergences)
    if groups is None or len(set(groups)) < FEW_GROUPS:
        groups = range(count)
    ratio_ci = interval(_summed(excess, groups))
    ordered = sorted(divergences)
    return Score(
        positions=count,
        k=max(len(p) for p in source),
        kl_mean=round(math.fsum(divergences) / count, 6),
        kl_p95=round(ordered[min(count - 1, math.ceil(0.95 * count) - 1)], 6),
        kl_max=round(ordered[-1], 6),
        top1=round(sum(loose) / count, 4),
        top1_strict=round(sum(strict) / count, 4),
        perplexity_ratio=round(math.exp(math.fsum(known) / len(known)) if known else 1.0, 4),
        kl_mean_ci=_rounded(interval(_summed(divergences, groups)), 6),
        top1_ci=_rounded(interval(_summed(loose, groups)), 4),
        perplexity_ratio_ci=_rounded((math.exp(ratio_ci[0]), math.exp(ratio_ci[1])), 4),
    )


def _summed(values: Sequence[float | None], groups: Sequence[int]) -> list[tuple[float, float]]:
    """(sum, count) of the known values of each group."""
    sums: dict[int, tuple[float, float]] = {}
    for value, group in zip(values, groups, strict=True):
        total, count = sums.get(group, (0.0, 0.0))
        sums[group] = (total, count) if value is None else (total + value, count + 1)
    return list(sums.values())


def _rounded(pair: tuple[float, float], digits: int) -> tuple[float, float]:
    return round(pair[0], digits), round(pair[1], digits)


def require_equal(score: Score, what: str, max_kl: float = 0.001, min_top1: float = 0.995) -> None:
    """Raise GateFailed when an unquantized form differs from its source: a conversion fault, not rounding."""
    failed = []
    # "not <=" also fails a NaN
    if not score.kl_mean <= max_kl:
        failed.append(f"mean KL divergence is {score.kl_mean:.4g}, at most {max_kl} is allowed")
    if not score.top1 >= min_top1:
        failed.append(f"top-1 agreement is {score.top1:.2%}, at least {min_top1:.1%} is needed")
    if failed:
        raise GateFailed(
            f"{what} does not compute what the checkpoint computes: {'; '.join(failed)}.",
            why="The conversion changed the model (rope, norms, a tokenizer or a missing tensor), before any "
            "quantization.",
            fix="Do not ship it. Report the architecture and config.json; --no-verify builds without this check.",
        )


def positions_of(scored: Mapping[str, Any]) -> list[dict[int, float]]:
    """The distributions in a runtime's ``score`` output: a mapping token -> log-probability for each position."""
    return [
        dict(zip(ids, logprobs, strict=True))
        for sequence in scored["sequences"]
        for ids, logprobs in zip(sequence["ids"], sequence["logprobs"], strict=True)
    ]
