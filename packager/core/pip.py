"""Runs pip on packages that are pinned by hash, and turns its failures into errors for the user."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from packager.core.errors import NetworkError, ToolError
from packager.core.processes import ChildFailed, last_words, run


def pip(arguments: Sequence[str | Path], *, what: str, wrong: str, by_hand: str) -> None:
    """Run pip with ``--require-hashes``. arguments: pip's command and its arguments.

    what: "TensorRT-RTX 1.7.1", for "… could not be fetched". wrong: the error's first sentence when a hash differs.
    by_hand: the file or files to put into a folder when there is no network.

    Raises ToolError when a hash differs and NetworkError when pip fails for another reason.
    """
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        *arguments[:1],
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
        "--no-deps",
        "--require-hashes",
        *arguments[1:],
    ]
    try:
        run(command, name=f"pip {arguments[0]}")
    except ChildFailed as error:
        if "do not match the hashes" in error.output.lower():
            raise ToolError(
                wrong, why=last_words(error.output), fix="Do not use this index; ask who runs it."
            ) from error
        raise NetworkError(
            f"{what} could not be fetched from the package index.",
            why=last_words(error.output),
            fix=f"Put {by_hand} into a folder and set PIP_FIND_LINKS to it, or connect once: what was fetched is kept "
            "in the cache.",
        ) from error
