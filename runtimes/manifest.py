"""Reads the ``run`` object of manifest.json; a path that leaves the bundle is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class ManifestError(Exception):
    """The bundle's manifest cannot be used; the text is one sentence for the person at the box."""


@dataclass(frozen=True)
class Run:
    """How to run the model: paths resolved, everything else as in the manifest. context: tokens per slot. settings:
    the engine's own. task: "generate", "embed" or "classify". device: the value of ``serve --device``, "" for none.
    """

    engine: str
    model: Path
    tokenizer: Path
    chat_template: Path | None
    name: str = "model"
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    bos_id: int | None = None
    add_bos: bool = False
    stop_ids: tuple[int, ...] = ()
    sampling: Mapping[str, float] = field(default_factory=dict)
    context: int = 4096
    slots: int = 4
    threads: int = 0
    flash_attention: bool = True
    kv_type: str = "f16"
    gpu_layers: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    task: str = "generate"
    device: str = ""


def inside(folder: Path, relative: str) -> Path:
    """The file ``relative`` names in ``folder``. Raises ManifestError when it is missing or lies outside."""
    root = folder.resolve()
    path = (root / relative).resolve()
    if Path(relative).is_absolute() or not path.is_relative_to(root):
        raise ManifestError(f"manifest.json names {relative!r}, which lies outside the bundle; it is not read.")
    if not path.is_file():
        raise ManifestError(f"{relative} is missing from {folder}; copy the bundle again and check SHA256SUMS.")
    return path


def read_bundle(folder: Path) -> Run:
    """The run description of an unpacked bundle. Raises ManifestError with one sentence."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ManifestError(f"{folder} is not a bundle: it has no manifest.json.") from None
    except (OSError, ValueError) as error:
        raise ManifestError(f"{folder / 'manifest.json'} cannot be read: {error}.") from None
    if not isinstance(manifest, dict) or manifest.get("schema_version") != 1:
        version = manifest.get("schema_version") if isinstance(manifest, dict) else None
        raise ManifestError(f"This runtime reads manifests of version 1, but {folder} has version {version!r}.")
    return parse_run(manifest.get("run"), name=str(manifest.get("name", "model")), folder=folder)


def parse_run(run: object, *, name: str = "model", folder: Path | None = None) -> Run:
    """Check a manifest's ``run`` object. Without a folder its paths are taken as they are (score and render)."""
    if not isinstance(run, dict):
        raise ManifestError("The manifest has no run object.")

    def path(key: str) -> Path:
        value = run.get(key)
        if not isinstance(value, str):
            raise ManifestError(f"The manifest's run.{key} is {value!r}; a file name is needed.")
        return inside(folder, value) if folder is not None else Path(value)

    try:
        return Run(
            engine=str(run["engine"]),
            model=path("model"),
            tokenizer=path("tokenizer"),
            chat_template=path("chat_template") if run.get("chat_template") else None,
            name=name,
            special_tokens={str(k): str(v) for k, v in (run.get("special_tokens") or {}).items() if v is not None},
            bos_id=None if run.get("bos_id") is None else int(run["bos_id"]),
            add_bos=bool(run.get("add_bos", False)),
            stop_ids=tuple(int(i) for i in run.get("stop_ids") or ()),
            sampling={str(k): float(v) for k, v in (run.get("sampling") or {}).items() if v is not None},
            context=int(run.get("context", 4096)),
            slots=int(run.get("slots", 4)),
            threads=int(run.get("threads", 0)),
            flash_attention=bool(run.get("flash_attention", True)),
            kv_type=str(run.get("kv_type", "f16")),
            gpu_layers=int(run.get("gpu_layers", 0)),
            settings=dict(run.get("settings") or {}),
            task=str(run.get("task", "generate")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ManifestError(f"The manifest's run object cannot be used: {error!r}.") from None
