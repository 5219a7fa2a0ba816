"""Runs pip on packages that are pinned by hash, and turns its failures into errors for the user."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from packager.core.errors import NetworkError, PackagerError, ToolError
from packager.core.processes import ChildFailed, last_words, run

Run = Callable[[Sequence[str]], object]

# On Linux the package index has only torch's CUDA builds. scripts/packages.py has the same address, because it runs
# without this package.
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
# For that index only, which a closed network may block: pip's defaults wait for minutes.
IMPATIENT = ("--retries", "1", "--timeout", "15")
_UNREACHED: dict[str, PackagerError] = {}  # index -> error: one attempt in a process, not one for every Python


def torch_index() -> str:
    """PyTorch's own CPU index, or PACKAGER_TORCH_INDEX in its place; "" when that is set and empty."""
    return os.environ.get("PACKAGER_TORCH_INDEX", TORCH_INDEX)


def command(verb: str) -> list[str]:
    """A pip command that installs or downloads only what a lock pins."""
    pip = [sys.executable, "-m", "pip", verb, "--quiet", "--disable-pip-version-check", "--no-input"]
    return [*pip, "--no-deps", "--require-hashes"]


def output(error: PackagerError) -> str:
    """pip's output before it failed."""
    return str(getattr(error, "output", "")) or str(error)


def wrong_hash(error: PackagerError) -> bool:
    return "do not match the hashes" in output(error).lower()


def unreachable(text: str) -> bool:
    """Whether pip's output shows a failed connection."""
    signs = ("Temporary failure", "Connection", "Retrying", "Max retries", "timed out", "Name or service")
    return any(sign in text for sign in signs)


def fetch(line: Sequence[str], names: Collection[str], run: Run) -> None:
    """Run a pip command that fetches these packages: from pip's configured indexes and then, with torch among them,
    from PyTorch's own CPU index too. The hashes are pinned, so both are equally safe.

    Raises the error of the first attempt, with that of the second as its cause; the second's when that index has other
    bytes than the pinned ones.
    """
    try:
        run(line)
    except PackagerError as first:
        index = torch_index()
        if "torch" not in names or not index:
            raise
        if index in _UNREACHED:
            raise first from _UNREACHED[index]
        try:
            run([*line, "--extra-index-url", index, *IMPATIENT])
        except PackagerError as second:
            if wrong_hash(second):
                raise
            if unreachable(output(second)):
                _UNREACHED[index] = second
            raise first from second


def pip(arguments: Sequence[str | Path], *, what: str, wrong: str, by_hand: str) -> None:
    """Run pip with ``--require-hashes``. arguments: pip's command and its arguments.

    what: "TensorRT-RTX 1.7.1", for "… could not be fetched". wrong: the error's first sentence when a hash differs.
    by_hand: the file or files to put into a folder when there is no network.

    Raises ToolError when a hash differs or pip is missing, and NetworkError when pip fails otherwise.
    """
    try:
        run([*command(str(arguments[0])), *arguments[1:]], name=f"pip {arguments[0]}")
    except ChildFailed as error:
        if lacking := without_pip(error):
            raise lacking from error
        if wrong_hash(error):
            raise ToolError(
                wrong, why=last_words(error.output), fix="Do not use this index; ask who runs it."
            ) from error
        raise NetworkError(
            f"{what} could not be fetched from the package index.",
            why=last_words(error.output),
            fix=f"Put {by_hand} into a folder and set PIP_FIND_LINKS to it, or connect once: what was fetched is kept "
            "in the cache.",
        ) from error


def without_pip(error: PackagerError) -> ToolError | None:
    """The error for an environment without pip, as uv makes them; None when pip itself failed."""
    if "No module named pip" not in output(error):
        return None
    return ToolError(
        "pip is missing from the environment that packager runs in.",
        why=str(error.why),
        fix=f"Run `{sys.executable} -m ensurepip`.",
    )
