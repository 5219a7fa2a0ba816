"""Checks what is made for TensorRT Edge-LLM against its published wheel, which is read and not installed.

    pip download tensorrt-edgellm==0.11.0 --no-deps --only-binary=:all: --platform manylinux_2_39_aarch64 \\
        --python-version 3.12 -d WHEELS
    .venv/bin/python tests/device/check_edgellm.py WHEELS/tensorrt_edgellm-*.whl [BUNDLE/model …]

Our command line through the wheel's own argument parser, the devices that it has native code for, the models of its
builder, and for each folder what its builder reads of config.json and the weights' headers. Prints one JSON document;
exit code 1 when something differs.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from packager.formats.edge_llm import ARCHITECTURES, GROUP, MODELS, VERSION  # noqa: E402 - after the path
from runtimes.engines.edge_llm import START, command  # noqa: E402
from runtimes.manifest import Run  # noqa: E402


def parsed() -> dict[str, Any]:
    """What the wheel's server understands of our command line."""
    run = Run(
        "edgellm",
        Path("m/model.safetensors"),
        Path("m/tokenizer.json"),
        None,
        name="tiny",
        context=2048,
        slots=4,
        settings={"reasoning": "deepseek_r1"},
    )
    words = command(run, "python", "127.0.0.1", 8000, Path("/cache"))
    config = importlib.import_module("experimental.server.config").parse_server_config(words[words.index(START) + 1 :])
    return {
        "model": config.model.model,
        "host": config.api.host,
        "port": config.api.port,
        "name": config.api.served_model_name,
        "input": config.model.max_input_len,
        "capacity": config.model.max_kv_cache_capacity,
        "batch": config.model.max_batch_size,
        "together": config.model.enable_in_flight_batching,
        "cache": config.model.cache_dir,
        "reasoning": config.api.reasoning_parser,
    }


EXPECTED = {
    "model": "m",
    "host": "127.0.0.1",
    "port": 8000,
    "name": "tiny",
    "input": 2048,
    "capacity": 2048,
    "batch": 4,
    "together": True,
    "cache": "/cache",
    "reasoning": "deepseek_r1",
}


def read(folder: Path) -> dict[str, Any]:
    """What the wheel's builder reads of a folder, beside what config.json says."""
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = importlib.import_module("experimental.builder.core.config")
    found = config.DeviceConfig.from_pretrained(str(folder))
    rope = written.get("rope_parameters") or written
    ours = written.get("quantization_config") or {}
    expected = ("int4_gptq", GROUP) if ours else ("fp16", 1)
    theta = float(rope.get("rope_theta", 10000.0))
    same = (found.quant.quant_type, found.quant.group_size) == expected and found.rope_theta == theta
    return {
        "folder": folder.name,
        "quantization": found.quant.quant_type,
        "group": found.quant.group_size,
        "zero_point_offset": found.quant.gptq_zero_point_offset,
        "rope_theta": found.rope_theta,
        "fine": same,
    }


def main() -> int:
    wheel, folders = Path(sys.argv[1]).resolve(), [Path(name) for name in sys.argv[2:]]
    sys.path.insert(0, str(wheel))  # imported out of the archive: its Python files alone
    with zipfile.ZipFile(wheel) as archive:
        payloads = sorted(
            {found[1] for name in archive.namelist() if (found := re.search(r"_native/payloads/([^/]+)/", name))}
        )
    families = importlib.import_module("experimental.builder.models.registry").FAMILIES
    known = {variant for family in families for variant in family.variants}
    native = {name.rsplit("-", 1)[1] for name in payloads if name.startswith("jetson-")}
    report = {
        "wheel": wheel.name,
        "version": VERSION in wheel.name,
        "command": parsed() == EXPECTED,
        "payloads": payloads,
        "devices": {name.replace("_", "") for name in ARCHITECTURES} == native,
        "models": sorted(set(MODELS) - known),
        "folders": [read(folder) for folder in folders],
    }
    fine = report["version"] and report["command"] and report["devices"] and not report["models"]
    fine = bool(fine) and all(entry["fine"] for entry in report["folders"])
    sys.stdout.write(json.dumps(report, indent=1) + "\n")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
