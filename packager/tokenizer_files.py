"""The tokenizer's files as an artifact carries them: one step for every recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from packager.store import RECORD

if TYPE_CHECKING:
    from packager.checkpoint import Checkpoint
    from packager.recipe import Job
    from packager.store import Cost

BOX = ("tokenizer.json", "tokenizer_config.json")  # what our own server and its tools read
TRANSFORMERS = (*BOX, "generation_config.json", "special_tokens_map.json")  # what a transformers folder has beside them
TEMPLATE = "chat_template.jinja"


def tokenizer_files(job: Job, names: tuple[str, ...] = BOX) -> dict[str, Path]:
    """Name -> path of those of ``names`` that the checkpoint has, and of its chat template, wherever it keeps that."""
    checkpoint = job.checkpoint
    template = checkpoint.tokenizer.chat_template

    def make(folder: Path, cost: Cost) -> None:
        import shutil

        for name in TRANSFORMERS:
            if (checkpoint.path / name).is_file():
                shutil.copyfile(checkpoint.path / name, folder / name)
        if template is not None:
            (folder / TEMPLATE).write_text(template, encoding="utf-8", newline="")

    inputs = {"checkpoint": checkpoint.digest, "files": list(TRANSFORMERS)}
    step = job.store.step("tokenizer-files", inputs, make, progress=job.progress)
    found = {path.name: path for path in sorted(step.path.iterdir()) if path.name != RECORD}
    return {name: path for name, path in found.items() if name in (*names, TEMPLATE)}


def tokenizer_paths(checkpoint: Checkpoint) -> dict[str, str | None]:
    """The manifest's ``run.tokenizer`` and ``run.chat_template``."""
    template = None if checkpoint.tokenizer.chat_template is None else f"model/{TEMPLATE}"
    return {"tokenizer": "model/tokenizer.json", "chat_template": template}
