"""The manifest's run object: what recipes write, what the schema allows and what the box reads are the same fields."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from packager.recipe import Run
from runtimes import manifest as box
from tests.conftest import ROOT

SCHEMA = json.loads((ROOT / "packager/bundle/schemas/manifest.schema.json").read_text(encoding="utf-8"))
FIELDS = {field.name for field in dataclasses.fields(Run)}
# The box knows these two from elsewhere: the manifest's name, and serve --device.
OF_THE_BOX = {"name", "device"}
# Sizes are for the roofline of bin/bench, which reads the manifest itself.
OF_THE_BENCHMARK = {"read_per_token_bytes", "model_bytes"}


def written(**others: Any) -> Run:
    tokenizer = SimpleNamespace(
        chat_template="x", special_tokens={"bos_token": "<s>"}, bos_id=1, add_bos=True, stop_ids=(3, 2), sampling={}
    )
    checkpoint: Any = SimpleNamespace(tokenizer=tokenizer)
    serving: Any = SimpleNamespace(context=64, slots=2)
    return Run.of(checkpoint, "llamacpp", "model/m", serving, read_per_token_bytes=5, model_bytes=7, **others)


def test_the_schema_has_every_field_and_no_other() -> None:
    """What only one engine reads stands in settings."""
    run = SCHEMA["properties"]["run"]
    assert set(run["properties"]) == FIELDS
    assert run["additionalProperties"] is False
    assert set(run["required"]) <= set(written().as_dict())


def test_the_box_reads_every_field() -> None:
    read = {field.name for field in dataclasses.fields(box.Run)} - OF_THE_BOX
    assert read == FIELDS - OF_THE_BENCHMARK


def test_what_a_recipe_writes_comes_out_on_the_box(tmp_path: Path) -> None:
    """Field by field, with paths inside the bundle and with those of the build machine."""
    for name in ("m", "tokenizer.json", "chat_template.jinja"):
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / name).touch()
    run = written(kv_type="q8_0", flash_attention=True, gpu_layers=3, settings={"a": 1}, task="generate")
    beside = {name: tmp_path / "model" / name for name in ("tokenizer.json", "chat_template.jinja")}
    here = run.here(tmp_path / "model/m", beside)
    for plain, folder in ((run.as_dict(), tmp_path), (here.as_dict(), None)):
        read = box.parse_run(json.loads(json.dumps(plain)), folder=folder)
        assert read.model == (tmp_path / "model/m").resolve()
        assert read.chat_template == (tmp_path / "model/chat_template.jinja").resolve()
        for name in sorted(FIELDS - OF_THE_BENCHMARK - {"model", "tokenizer", "chat_template"}):
            assert getattr(read, name) == getattr(run, name), name


def test_what_an_engine_does_not_read_is_absent() -> None:
    """An encoder has no cache type; a model without a template has none, and the manifest says so."""
    plain = written(chat_template=None).as_dict()
    assert plain["chat_template"] is None
    assert not {"kv_type", "flash_attention", "gpu_layers"} & set(plain)
    assert plain["stop_ids"] == [2, 3]


@pytest.mark.parametrize("field", ["context", "slots"])
def test_serving_fields_can_be_replaced(field: str) -> None:
    """An encoder's longest text is not the option's."""
    assert getattr(written(**{field: 9}), field) == 9
