"""A TensorRT bundle for the stand-ins of gpu_double/: its "model" echoes token ids, so that vectors can be foretold."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from tests.unit.runtimes.serving import write_tokenizer

DOUBLE = ROOT / "tests" / "unit" / "runtimes" / "gpu_double"
ORIN = {"name": "Orin", "sm": "8.7", "bytes": 7_990_000_000, "cuda": "12.6", "tensorrt": "10.3.0.30"}
INPUTS = ("input_ids", "attention_mask")


def profile(batch: int, length: int, least: int = 1) -> dict[str, Any]:
    """All inputs from [least, 1] to [batch, length]."""
    return {name: {"min": [least, 1], "opt": [batch, length // 2], "max": [batch, length]} for name in INPUTS}


def plan(model: bytes, **changes: Any) -> dict[str, Any]:
    """A plan for an Orin, with two profiles."""
    return {
        "schema_version": 1,
        "onnx": {"file": "model.onnx", "sha256": hashlib.sha256(model).hexdigest(), "data": []},
        "precision": "fp16",
        "strongly_typed": True,
        "inputs": [{"name": name, "dtype": "int64"} for name in INPUTS],
        "outputs": [{"name": "states", "dtype": "float16"}],
        "profiles": [profile(4, 64), profile(2, 32)],
        "workspace_bytes": 256 << 20,
        "allowed": {"sm": ["8.7"], "tensorrt": {"min": "10.3", "below": "11"}, "jetpack": ["6.2"]},
        "builder": {
            "trtexec": ["--onnx=model.onnx", "--stronglyTyped", "--maxShapes=input_ids:4x64,attention_mask:4x64"]
        },
        "engine": None,
        **changes,
    }


def make_bundle(folder: Path, *, run: Mapping[str, Any] | None = None, **changes: Any) -> Path:
    """Write a bundle; changes: of its plan."""
    model = folder / "model"
    model.mkdir(parents=True)
    write_tokenizer(model)
    (model / "model.onnx").write_bytes(b"echo")
    write_plan(folder, **changes)
    facts = {
        "engine": "tensorrt",
        "task": "embed",
        "model": "model/plan.json",
        "tokenizer": "model/tokenizer.json",
        "context": 64,
        "slots": 8,
        "settings": {"pooling": "mean", "normalize": False},
    }
    needs = {
        "system": "linux",
        "machine": "x86_64",
        "python_min": "3.10",
        "python_max": "3.14",
        "glibc_min": None,
        "ram_bytes": 1,
        "disk_bytes": 1,
    }
    manifest = {
        "schema_version": 1,
        "bundle": "tiny-orin-tensorrt_engine",
        "name": "tiny",
        "needs": needs,
        "files": [],
        "run": {**facts, **(run or {})},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def write_plan(folder: Path, **changes: Any) -> Path:
    path = folder / "model" / "plan.json"
    path.write_text(json.dumps(plan((folder / "model" / "model.onnx").read_bytes(), **changes)), encoding="utf-8")
    return path


def environment(
    home: Path, *, device: Mapping[str, Any] | None = None, trtexec: Mapping[str, Any] | None = None, **more: str
) -> dict[str, str]:
    """A box with the stand-ins instead of a GPU. device: changes of its facts; trtexec: how the builder behaves."""
    kept = {key: value for key, value in os.environ.items() if key not in ("XDG_CACHE_HOME", "CACHE_DIRECTORY")}
    return {
        **kept,
        "HOME": str(home),
        "PATH": f"{DOUBLE}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{DOUBLE}",
        "GPU_DOUBLE": json.dumps({**ORIN, **(device or {})}),
        "TRTEXEC_DOUBLE": json.dumps(dict(trtexec or {})),
        **more,
    }
