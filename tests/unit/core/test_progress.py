"""The silent Progress is a Progress."""

from __future__ import annotations

from packager.core.progress import Progress, Silent


def test_silent_takes_everything_and_shows_nothing(capsys: object) -> None:
    """Steps with and without a total, notes, and an exception that passes through."""
    progress: Progress = Silent()
    with progress.step("a", 10.0, "B") as task:
        task.advance(3)
    progress.note("b")
    try:
        with progress.step("c"):
            raise ValueError("seen")
    except ValueError as error:
        assert str(error) == "seen"
    else:
        raise AssertionError("a step must not swallow exceptions")
