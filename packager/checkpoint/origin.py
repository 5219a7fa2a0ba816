"""Where a checkpoint came from, and the files that define its model beside the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from packager.checkpoint.tokenizer import TOKENIZER_FILES

# The configs that change what a model computes (the last three: sentence-transformers).
CONFIG_FILES = (
    "config.json",
    "generation_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
)
MODEL_FILES = (*CONFIG_FILES, *TOKENIZER_FILES)


@dataclass(frozen=True)
class Origin:
    """id: the folder's name or the hub id. revision: the commit, None for folders."""

    kind: Literal["folder", "hub", "modelscope", "state_dict"]
    id: str
    revision: str | None = None
