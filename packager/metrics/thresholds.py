"""What an artifact must keep of its source to be shipped: thresholds, and one table of what fell short.

Every format is measured alike, by what its own runtime answers: distributions on conversations the package carries
("general") and on the fine-tuning pairs' own answers ("tuning"), and behaviour kept: the pairs that the source answers
word for word and the artifact too. Decoding greedily gives a text exactly when each of its tokens is the likeliest
after those before it, so behaviour is read from the same distributions and no answer is sampled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from packager.core.errors import GateFailed
from packager.metrics.distributions import Score


@dataclass(frozen=True)
class Thresholds:
    """max_kl: mean KL divergence in nats. min_top1: share of positions. min_behaviour: share of the pairs that the
    source itself answers as it was trained to.
    """

    max_kl: float = 0.05
    min_top1: float = 0.9
    min_behaviour: float = 0.8

    def changed(self, limits: Mapping[str, float]) -> Thresholds:
        """With the user's own values (--max-kl and its like) where there are any."""
        return replace(self, **limits)


@dataclass(frozen=True)
class Behaviour:
    """given: pairs in the user's file. pairs: how many of them were asked. source: how many of those the source answers
    word for word. kept: how many of these the artifact answers so too.
    """

    given: int
    pairs: int
    source: int
    kept: int

    @property
    def share(self) -> float | None:
        """kept over source; None when the source answers none as it was trained to: then nothing can be lost."""
        return self.kept / self.source if self.source else None


@dataclass(frozen=True)
class Fidelity:
    """One artifact against its source. tuning and behaviour: None without fine-tuning pairs. held_out: whether the
    pairs of ``tuning`` were kept out of the calibration.
    """

    general: Score
    tuning: Score | None
    behaviour: Behaviour | None
    held_out: bool

    def as_dict(self, thresholds: Thresholds) -> dict[str, Any]:
        """The form that stands in the manifest."""
        return {
            "general": self.general.as_dict(),
            "tuning": self.tuning.as_dict() if self.tuning else None,
            "behaviour": asdict(self.behaviour) if self.behaviour else None,
            "held_out": self.held_out,
            "thresholds": asdict(thresholds),
        }


@dataclass(frozen=True)
class Shortfall:
    """One line of the table: what was measured, on what, found and allowed."""

    measure: str
    found: float
    allowed: float

    def __str__(self) -> str:
        if "KL" in self.measure:
            return f"{self.measure} {self.found:.4g} (at most {self.allowed:.4g})"
        return f"{self.measure} {self.found:.1%} (at least {self.allowed:.1%})"


def shortfalls(found: Fidelity, thresholds: Thresholds) -> list[Shortfall]:
    """Everything that misses its threshold. Written so that a score which is not a number misses it."""
    lines: list[Shortfall] = []
    for name, score in (("general", found.general), ("tuning", found.tuning)):
        if score is None:
            continue
        if not score.kl_mean <= thresholds.max_kl:
            lines.append(Shortfall(f"mean KL divergence, {name} text:", score.kl_mean, thresholds.max_kl))
        if not score.top1 >= thresholds.min_top1:
            lines.append(Shortfall(f"top-1 agreement, {name} text:", score.top1, thresholds.min_top1))
    share = found.behaviour.share if found.behaviour else None
    if share is not None and not share >= thresholds.min_behaviour:
        lines.append(Shortfall("behaviour kept:", share, thresholds.min_behaviour))
    return lines


def require_kept(found: Fidelity, thresholds: Thresholds, what: str, fix: str) -> None:
    """Raise GateFailed, with the whole table, when the artifact misses a threshold."""
    lines = shortfalls(found, thresholds)
    if not lines:
        return
    error = GateFailed(
        f"{what} is too far from its checkpoint: {'; '.join(map(str, lines))}.",
        why="Every figure comes from the runtime that ships, at the same positions of the same tokens.",
        fix=f"{fix} Or allow it: --max-kl, --min-top1, --min-behaviour.",
    )
    error.details = {"fidelity": found.as_dict(thresholds), "shortfalls": [asdict(line) for line in lines]}
    raise error
