"""The tokenizer's files of an artifact, in one step for every recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packager.checkpoint.tokenizer import read_json
from packager.core.store import RECORD
from packager.recipe import TEMPLATE

if TYPE_CHECKING:
    from packager.checkpoint.checkpoint import Checkpoint
    from packager.core.store import Cost
    from packager.recipe import Job

BOX = ("tokenizer.json", "tokenizer_config.json")  # the files that our server and its tools read
GENERATION = "generation_config.json"
TRANSFORMERS = (*BOX, GENERATION, "special_tokens_map.json")  # those of a transformers folder


def tokenizer_files(job: Job, names: tuple[str, ...] = BOX) -> dict[str, Path]:
    """Name -> path of those of ``names`` that the checkpoint has, and of its chat template."""
    checkpoint = job.checkpoint
    template = checkpoint.tokenizer.chat_template

    def make(folder: Path, cost: Cost) -> None:
        import shutil

        for name in TRANSFORMERS:
            if (checkpoint.path / name).is_file():
                shutil.copyfile(checkpoint.path / name, folder / name)
        if (ends := generation_config(checkpoint)) is not None:
            (folder / GENERATION).write_text(json.dumps(ends, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if template is not None:
            (folder / TEMPLATE).write_text(template, encoding="utf-8", newline="")

    inputs = {
        "checkpoint": checkpoint.digest,
        "files": list(TRANSFORMERS),
        "ends": list(checkpoint.tokenizer.stop_ids),
    }
    step = job.store.step("tokenizer-files", inputs, make, progress=job.progress)
    files = {path.name: path for path in sorted(step.path.iterdir()) if path.name != RECORD}
    return {name: path for name, path in files.items() if name in (*names, TEMPLATE)}


def generation_config(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The checkpoint's generation_config.json with every token that ends an answer; None when it has them already.

    vLLM and transformers stop only at the EOS of this file and of the tokenizer. Without the template's own end token
    they would generate past the end of every answer.
    """
    path = checkpoint.path / GENERATION
    generation = read_json(path) if path.is_file() else {}
    eos = generation.get("eos_token_id", [])
    named = [eos] if isinstance(eos, int) else list(eos or [])
    missing = [token for token in checkpoint.tokenizer.stop_ids if token not in (*named, checkpoint.tokenizer.eos_id)]
    return {**generation, "eos_token_id": [*named, *missing]} if missing else None
