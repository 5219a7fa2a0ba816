"""A step that is killed half-way in one process and taken over in another: both must run the same function, because
its source is part of the key.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from packager.core.progress import Silent
from packager.core.store import Cost, Step, Store


def half(root: Path, *, resumable: bool, leftovers: list[str]) -> Step:
    """With HALF_MARK set it writes one file, touches that mark and waits to be killed; else it lists the folder."""

    def make(folder: Path, cost: Cost) -> None:
        leftovers.extend(path.name for path in folder.iterdir())
        if mark := os.environ.get("HALF_MARK"):
            (folder / "half").write_text("half", encoding="utf-8")
            Path(mark).touch()
            time.sleep(60)

    return Store(root).step("s", {"a": 1}, make, progress=Silent(), resumable=resumable)


if __name__ == "__main__":
    half(Path(sys.argv[1]), resumable=sys.argv[2] == "yes", leftovers=[])
