"""The ollama target: a store that can be copied as it is, and a Modelfile beside the same GGUF."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from packager.build import Request, build
from packager.bundle.verify import verify
from packager.cli.console import Console
from packager.core.progress import Silent
from packager.core.store import Store


@pytest.fixture(scope="module", params=["smollm2", "random_qwen2"])
def bundle(request: pytest.FixtureRequest, store: Store, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """SmolLM2 (a default system prompt) and R1's template (BOS, no newline after a role)."""
    made = build(
        Request(str(request.getfixturevalue(request.param)), "ollama", sets=("quant=Q8_0",), verify=False),
        tmp_path_factory.mktemp("ollama"),
        Console(quiet=True),
        store,
    )
    return request.param, made.path


def layers(bundle: Path) -> tuple[str, dict[str, Any]]:
    (place,) = (bundle / "ollama/models/manifests/registry.ollama.ai/library").glob("*/latest")
    return place.parent.name, json.loads(place.read_text(encoding="utf-8"))


def test_the_bundle_verifies(bundle: tuple[str, Path]) -> None:
    """The store is part of the bundle and of its digests."""
    assert not verify(bundle[1], Silent()).problems


def test_every_blob_is_what_its_name_says(bundle: tuple[str, Path]) -> None:
    """SHA-256 and size of each blob; the model's is the bundle's own GGUF."""
    _, manifest = layers(bundle[1])
    blobs = bundle[1] / "ollama" / "models" / "blobs"
    for layer in [manifest["config"], *manifest["layers"]]:
        blob = blobs / layer["digest"].replace(":", "-")
        assert blob.stat().st_size == layer["size"]
        assert hashlib.sha256(blob.read_bytes()).hexdigest() == layer["digest"].removeprefix("sha256:")
    model = hashlib.sha256((bundle[1] / "model" / "model.gguf").read_bytes()).hexdigest()
    assert manifest["layers"][0]["digest"] == f"sha256:{model}"


def test_the_template_and_its_stops_are_the_checkpoints(bundle: tuple[str, Path]) -> None:
    """Turn marks of the checkpoint's own template, its end of turn as a stop, its context as num_ctx."""
    name, manifest = layers(bundle[1])
    blobs = bundle[1] / "ollama" / "models" / "blobs"
    content = {
        layer["mediaType"].rsplit(".", 1)[1]: (blobs / layer["digest"].replace(":", "-"))
        for layer in manifest["layers"]
    }
    template = content["template"].read_text(encoding="utf-8")
    parameters = json.loads(content["params"].read_text(encoding="utf-8"))
    marks, stop = {
        "smollm2": (["<|im_start|>user\n", "<|im_end|>"], "<|im_end|>"),
        "random_qwen2": (["<｜User｜>", "<｜Assistant｜>"], "<｜end▁of▁sentence｜>"),
    }[bundle[0]]
    assert all(mark in template for mark in marks)
    assert stop in parameters["stop"]
    assert parameters["num_ctx"] == 4096
    modelfile = (bundle[1] / "ollama" / "Modelfile").read_text(encoding="utf-8")
    assert "FROM ../model/model.gguf" in modelfile
    assert template in modelfile
    assert name in (bundle[1] / "ollama" / "README.md").read_text(encoding="utf-8")
