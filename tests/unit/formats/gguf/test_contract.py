"""What a GGUF carries for those who use it without our server: its template, its end token, and what llama.cpp does."""

from __future__ import annotations

import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from packager.checkpoint.chat_template import renderer
from packager.checkpoint.tokenizer import read_tokenizer
from packager.core.errors import GateFailed
from packager.formats.gguf.contract import adds_bos, require_carried
from tests.unit.tiny import CHATML, CONFIG, spoken_tokenizer, write_json

TALK = [{"role": "user", "content": "a b"}]


def gguf(path: Path, **values: str | int | bool) -> Path:
    """A header with these keys (dots written as __) and one tensor."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def typed(value: str | int | bool) -> bytes:
        if isinstance(value, bool):
            return struct.pack("<I?", 7, value)
        return struct.pack("<II", 4, value) if isinstance(value, int) else struct.pack("<I", 8) + text(value)

    pairs = [text(key.replace("__", ".")) + typed(value) for key, value in values.items()]
    tensor = text("t") + struct.pack("<IQIQ", 1, 32, 0, 0)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, len(pairs)) + b"".join(pairs) + tensor + bytes(256))
    return path


@pytest.fixture
def job(tmp_path: Path) -> Any:
    write_json(tmp_path / "tokenizer.json", spoken_tokenizer("user: user"))
    write_json(tmp_path / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHATML})
    tokenizer = read_tokenizer(tmp_path, {**CONFIG, "eos_token_id": 3})
    return SimpleNamespace(checkpoint=SimpleNamespace(path=tmp_path, tokenizer=tokenizer))


@pytest.fixture
def samples(job: Any) -> Any:
    from tokenizers import Tokenizer

    tokenizer = job.checkpoint.tokenizer
    text = renderer(tokenizer.chat_template, tokenizer.special_tokens)(TALK, True)
    ids = Tokenizer.from_file(str(job.checkpoint.path / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    return SimpleNamespace(prompts=({"ids": ids, "text": text, "messages": TALK, "kind": "general"},))


def test_the_checkpoints_own_template_passes(job: Any, samples: Any, tmp_path: Path) -> None:
    """With the end token that the checkpoint has, and an engine that ends where it ends."""
    template = job.checkpoint.tokenizer.chat_template
    model = gguf(tmp_path / "m", tokenizer__chat_template=template, tokenizer__ggml__eos_token_id=3)
    facts = {"adds_bos": False, "ends": list(job.checkpoint.tokenizer.stop_ids)}
    assert require_carried(job, samples, model, facts) == []


def test_another_template_that_renders_alike_passes(job: Any, samples: Any, tmp_path: Path) -> None:
    """What counts is what it renders."""
    template = "{# ours #}" + job.checkpoint.tokenizer.chat_template
    assert require_carried(job, samples, gguf(tmp_path / "m", tokenizer__chat_template=template), None) == []


def test_a_template_that_renders_otherwise_stops_the_build(job: Any, samples: Any, tmp_path: Path) -> None:
    """The first token that differs is named with its text."""
    template = job.checkpoint.tokenizer.chat_template.replace("<|im_start|>", "user: ")
    model = gguf(tmp_path / "m", tokenizer__chat_template=template)
    with pytest.raises(GateFailed, match="the GGUF's own template differs from the checkpoint's at token 0") as caught:
        require_carried(job, samples, model, None)
    assert "'<|im_start|>'" in caught.value.what


@pytest.mark.parametrize("template", [None, "{% for %}"])
def test_no_template_and_a_broken_one_stop_the_build(
    job: Any, samples: Any, tmp_path: Path, template: str | None
) -> None:
    """llama.cpp would guess."""
    model = gguf(tmp_path / "m", **({"tokenizer__chat_template": template} if template else {}))
    with pytest.raises(GateFailed, match=r"no chat template|cannot be rendered"):
        require_carried(job, samples, model, None)


def test_a_wrong_end_token_stops_the_build(job: Any, samples: Any, tmp_path: Path) -> None:
    """An answer would never end."""
    template = job.checkpoint.tokenizer.chat_template
    model = gguf(tmp_path / "m", tokenizer__chat_template=template, tokenizer__ggml__eos_token_id=7)
    with pytest.raises(GateFailed, match="end token is 7"):
        require_carried(job, samples, model, None)


def test_what_only_our_server_does_is_told(job: Any, samples: Any, tmp_path: Path) -> None:
    """An end that llama.cpp does not know, and a BOS that it puts."""
    template = job.checkpoint.tokenizer.chat_template
    model = gguf(tmp_path / "m", tokenizer__chat_template=template)
    notes = require_carried(job, samples, model, {"adds_bos": True, "ends": []})
    assert "puts BOS before plain text" in notes[0]
    assert "does not stop at 1 '</s>', 3 '<|im_end|>'" in notes[1]


def test_whether_bos_is_added_is_the_files_to_say(tmp_path: Path) -> None:
    """Only where it does not say, the checkpoint's tokenizer does."""
    assert adds_bos(gguf(tmp_path / "a", tokenizer__ggml__add_bos_token=True), False)
    assert not adds_bos(gguf(tmp_path / "b", tokenizer__ggml__add_bos_token=False), True)
    assert adds_bos(gguf(tmp_path / "c"), True)
