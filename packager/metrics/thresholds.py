"""The thresholds that an artifact must reach to be shipped, and the table of those that it misses.

Every format is measured in its own runtime: distributions on conversations included in the package ("general") and on
the fine-tuning pairs' answers ("tuning"), and behaviour kept, the share of the pairs answered word for word by the
source that the artifact also answers so. Greedy decoding gives a text exactly when each of its tokens is the most
likely after those before it, so behaviour is read from the same distributions and no answer is sampled.
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
        """With the user's own values (--max-kl, --min-top1, --min-behaviour) in place of the defaults."""
        return replace(self, **limits)


@dataclass(frozen=True)
class Behaviour:
    """given: pairs in the user's file. pairs: the number of them that were scored. source: the number of those that the
    source answers word for word. kept: the number of these that the artifact answers so too.
    """

    given: int
    pairs: int
    source: int
    kept: int

    @property
    def share(self) -> float | None:
        """kept / source; None when the source answers no pair word for word, so none can be lost."""
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
        """The form stored in the manifest."""
        return {
            "general": self.general.as_dict(),
            "tuning": self.tuning.as_dict() if self.tuning else None,
            "behaviour": asdict(self.behaviour) if self.behaviour else None,
            "held_out": self.held_out,
            "thresholds": asdict(thresholds),
        }


@dataclass(frozen=True)
class Shortfall:
    """One line of the table. measure: the figure and its texts. found: its value. allowed: its threshold."""

    measure: str
    found: float
    allowed: float

    def __str__(self) -> str:
        if "KL" in self.measure:
            return f"{self.measure} {self.found:.4g} (at most {self.allowed:.4g})"
        return f"{self.measure} {self.found:.1%} (at least {self.allowed:.1%})"


def shortfalls(fidelity: Fidelity, thresholds: Thresholds) -> list[Shortfall]:
    """All scores that miss their threshold; a NaN misses it."""
    lines: list[Shortfall] = []
    for name, score in (("general", fidelity.general), ("tuning", fidelity.tuning)):
        if score is None:
            continue
        if not score.kl_mean <= thresholds.max_kl:
            lines.append(Shortfall(f"mean KL divergence, {name} text:", score.kl_mean, thresholds.max_kl))
        if not score.top1 >= thresholds.min_top1:
            lines.append(Shortfall(f"top-1 agreement, {name} text:", score.top1, thresholds.min_top1))
    share = fidelity.behaviour.share if fidelity.behaviour else None
    if share is not None and not share >= thresholds.min_behaviour:
        lines.append(Shortfall("behaviour kept:", share, thresholds.min_behaviour))
    return lines


def require_kept(fidelity: Fidelity, thresholds: Thresholds, what: str, fix: str) -> None:
    """Raise GateFailed, with the whole table, when the artifact misses a threshold."""
    lines = shortfalls(fidelity, thresholds)
    if not lines:
        return
    error = GateFailed(
        f"{what} is too far from its checkpoint: {'; '.join(map(str, lines))}.",
        why="Every figure comes from the runtime that ships, at the same positions of the same tokens.",
        fix=f"{fix} Or allow it: --max-kl, --min-top1, --min-behaviour.",
    )
    error.details = {"fidelity": fidelity.as_dict(thresholds), "shortfalls": [asdict(line) for line in lines]}
    raise error
