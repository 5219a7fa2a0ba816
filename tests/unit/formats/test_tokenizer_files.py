"""The files beside the weights: every token that ends an answer stands where vLLM and transformers look for it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from packager.checkpoint.tokenizer import read_tokenizer
from packager.core.progress import Silent
from packager.core.store import Store
from packager.formats.tokenizer_files import TRANSFORMERS, generation_config, tokenizer_files
from tests.unit.tiny import CHATML, CONFIG, WORDS, tokenizer_json, write_json


@pytest.fixture
def job(tmp_path: Path) -> Any:
    """A checkpoint whose template ends turns with <|im_end|> (3), which no file names as an end."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_json(folder / "tokenizer.json", tokenizer_json(WORDS))
    write_json(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHATML})
    write_json(folder / "generation_config.json", {"eos_token_id": 1, "temperature": 0.6})
    checkpoint = SimpleNamespace(path=folder, digest="d", tokenizer=read_tokenizer(folder, CONFIG))
    return SimpleNamespace(checkpoint=checkpoint, store=Store(tmp_path / "store"), progress=Silent())


def test_an_end_that_only_the_template_knows_is_written(job: Any) -> None:
    """The rest of the file stays; without it vLLM would go on after every answer."""
    files = tokenizer_files(job, TRANSFORMERS)
    generation = json.loads(files["generation_config.json"].read_text(encoding="utf-8"))
    assert generation == {"eos_token_id": [1, 3], "temperature": 0.6}
    assert files["chat_template.jinja"].read_text(encoding="utf-8") == CHATML


def test_a_file_that_names_all_ends_is_copied_as_it_is(job: Any) -> None:
    """Byte for byte."""
    path = job.checkpoint.path / "generation_config.json"
    write_json(path, {"eos_token_id": [3, 1]})
    assert generation_config(job.checkpoint) is None
    assert tokenizer_files(job, TRANSFORMERS)["generation_config.json"].read_bytes() == path.read_bytes()


def test_a_missing_file_is_made_only_where_it_is_needed(job: Any) -> None:
    """The tokenizer's own EOS needs no file."""
    (job.checkpoint.path / "generation_config.json").unlink()
    assert generation_config(job.checkpoint) == {"eos_token_id": [3]}
    facts = job.checkpoint.tokenizer
    job.checkpoint.tokenizer = SimpleNamespace(stop_ids=(1,), eos_id=1, chat_template=facts.chat_template)
    assert generation_config(job.checkpoint) is None
