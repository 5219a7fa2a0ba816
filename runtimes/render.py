"""``render``: see score.py, which holds both."""

from __future__ import annotations

from collections.abc import Sequence

from runtimes import score


def main(argv: Sequence[str]) -> int:
    return score.main(argv, verb="render")
