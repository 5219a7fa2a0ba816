"""Small real pieces for bundle tests: a GGUF file, wheels, a target, and a whole bundle of a few kilobytes."""

from __future__ import annotations

import base64
import hashlib
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packager.bundle.assemble import Contents
from packager.bundle.manifest import Needs
from packager.bundle.wheels import WheelSet
from tests.conftest import ROOT


@dataclass(frozen=True)
class Box:
    """A target as wheels.py asks for one."""

    name: str = "test_box"
    system: str = "linux"
    machine: str = "x86_64"
    python: tuple[str, ...] = ("3.10", "3.13")
    wheel_platforms: tuple[str, ...] = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64")


def gguf(path: Path, *, rows: int = 4, kind: int = 0, row: int = 32, version: int = 3, cut: int = 0) -> Path:
    """A GGUF file of two tensors with every kind of value in its header; ``cut`` bytes are left off its end."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    nbytes = rows * row * 4 if kind == 0 else rows * row // 32 * 34
    pairs = [
        text("general.architecture") + struct.pack("<I", 8) + text("llama"),
        text("general.alignment") + struct.pack("<II", 4, 32),
        text("some.floats") + struct.pack("<IIQ", 9, 6, 3) + struct.pack("<3f", 1, 2, 3),
        text("some.words") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("bc"),
        text("some.flag") + struct.pack("<I?", 7, True),
    ]
    infos = [
        text(f"blk.{index}.weight") + struct.pack("<IQQIQ", 2, row, rows, kind, index * nbytes) for index in range(2)
    ]
    head = b"GGUF" + struct.pack("<IQQ", version, len(infos), len(pairs)) + b"".join(pairs) + b"".join(infos)
    body = head + b"\0" * (-len(head) % 32) + bytes(range(256)) * (2 * nbytes // 256 + 1)
    path.write_bytes(body[: len(head) + (-len(head) % 32) + 2 * nbytes - cut])
    return path


def wheel(folder: Path, name: str, tag: str, version: str = "1.0") -> Path:
    """A wheel that pip takes, with one module."""
    path = folder / f"{name}-{version}-{tag}.whl"
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}/__init__.py": f"VERSION = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\n"
        + "".join(f"Tag: {one}\n" for one in [tag]),
    }
    rows = []
    with zipfile.ZipFile(path, "w") as archive:
        for file, body in files.items():
            archive.writestr(zipfile.ZipInfo(file, (1980, 1, 1, 0, 0, 0)), body)
            digest = base64.urlsafe_b64encode(hashlib.sha256(body.encode()).digest()).rstrip(b"=").decode()
            rows.append(f"{file},sha256={digest},{len(body)}")
        record = "\n".join([*rows, f"{info}/RECORD,,"])
        archive.writestr(zipfile.ZipInfo(f"{info}/RECORD", (1980, 1, 1, 0, 0, 0)), record)
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def needs(**changes: Any) -> Needs:
    return Needs(
        **{
            "system": "linux",
            "machine": "x86_64",
            "python_min": "3.10",
            "python_max": "3.14",
            "glibc_min": "2.28",
            "ram_bytes": 2_000_000_000,
            "disk_bytes": 1_000_000,
            **changes,
        }
    )


RUN: Mapping[str, Any] = {
    "engine": "llamacpp",
    "model": "model/model.gguf",
    "tokenizer": "model/tokenizer.json",
    "chat_template": None,
    "special_tokens": {"eos_token": "</s>"},
    "bos_id": None,
    "add_bos": False,
    "stop_ids": [2],
    "sampling": {"temperature": 0.6},
    "context": 512,
    "slots": 2,
    "threads": 0,
    "flash_attention": True,
    "kv_type": "f16",
    "gpu_layers": 0,
    "read_per_token_bytes": 1024,
    "model_bytes": 1024,
}


def contents(folder: Path, **changes: Any) -> Contents:
    """What a small bundle is made of, written to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    model = gguf(folder / "made.gguf")
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text('{"version": "1.0"}', "utf-8")
    one = wheel(folder, "one", "py3-none-any")
    values: dict[str, Any] = {
        "name": "tiny",
        "target": {"name": "test_box", "digest": "0" * 64},
        "recipe": {"name": "gguf", "options": {"quant": "Q8_0"}},
        "needs": needs(),
        "run": RUN,
        "files": {"model.gguf": model, "tokenizer.json": tokenizer},
        "runtimes": ROOT / "runtimes",
        "wheels": WheelSet((one,), f"one==1.0 \\\n    --hash=sha256:{digest(one)}\n"),
        **changes,
    }
    return Contents(**values)
