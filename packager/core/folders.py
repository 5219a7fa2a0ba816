"""The folders recipes, runtimes, targets and locks: beside ``packager/`` in a checkout, inside it in a wheel (setup.cfg
maps them).
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


def folder(kind: str) -> Path:
    """The folder of that name. Raises FileNotFoundError in an incomplete installation."""
    for place in (PACKAGE / kind, PACKAGE.parent / kind):
        if place.is_dir():
            return place
    raise FileNotFoundError(
        f"neither {PACKAGE / kind} nor {PACKAGE.parent / kind} exists: the installation is incomplete"
    )


def lock_file(name: str) -> Path:
    """``NAME.lock`` of the folder locks."""
    return folder("locks") / f"{name}.lock"
