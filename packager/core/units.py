"""Quantities in units that people read."""

from __future__ import annotations


def size(amount: float) -> str:
    """Bytes as text in decimal units: 144.8 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(amount) < 1000 or unit == "GB":
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    raise AssertionError("unreachable")
