"""Checks what is made for vLLM against vLLM's own published wheel, which is read and not installed: no GPU is needed.

    pip download vllm==0.33.0 --no-deps -d WHEELS && .venv/bin/python tests/device/check_vllm.py WHEELS/vllm-*.whl

Flags against its argument parser, config keys against its loaders, the packing against its own conversion of AWQ to
GPTQ's layout, and the GPUs its kernels hold code for. Prints one JSON document; exit code 1 when something differs.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from packager.formats.int4 import awq, gptq  # noqa: E402 - after the path
from runtimes.engines.vllm import command  # noqa: E402
from runtimes.manifest import Run  # noqa: E402

LOADERS = "vllm/model_executor/layers/quantization"
SETTINGS = {
    "quantization": "gptq",
    "dtype": "half",
    "tensor_parallel": 2,
    "gpu_share": 0.9,
    "enforce_eager": True,
    "ray": True,
}


def missing_flags(parser: str, frontend: str) -> list[str]:
    """Flags of ours that are neither written in the parser nor fields of the frontend's arguments."""
    known = set(re.findall(r'"(--[a-z0-9-]+)"', parser + frontend))
    for node in ast.walk(ast.parse(frontend)):
        if isinstance(node, ast.ClassDef):
            fields = [
                item.target.id
                for item in node.body
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
            ]
            known |= {f"--{name.replace('_', '-')}" for name in fields}
    run = Run("vllm", Path("m/model.safetensors"), Path("m/tokenizer.json"), Path("m/t.jinja"), settings=SETTINGS)
    return [word for word in command(run, "vllm", "127.0.0.1", 1) if word.startswith("--") and word not in known]


def missing_keys(loader: str, config: dict[str, Any]) -> list[str]:
    """Keys that a loader's from_config cannot do without and our config lacks (of alternatives one is enough)."""
    found = []
    for names in re.findall(r"get_from_keys\(\s*config,\s*(\[[^\]]+\])", loader):
        options = ast.literal_eval(names)
        if not set(options) & config.keys():
            found.append("|".join(options))
    return found


def same_packing(loader: str) -> bool:
    """Whether vLLM's own conversion turns our AWQ tensors into our GPTQ words, and its zero points are eight."""
    import numpy as np
    import torch

    random = np.random.default_rng(1)
    q = random.integers(0, 16, (64, 128), dtype=np.uint8)
    scales = random.standard_normal((64, 4)).astype(np.float16)

    def tensor(form: Any, part: str) -> Any:
        kind, shape = form.shapes(64, 128, 32)[part]
        assert kind == "I32"
        return torch.from_numpy(np.frombuffer(form.data(part, q, scales, 32), "<i4").reshape(shape).copy())

    wanted = ("_REVERSE_AWQ_PACK_ORDER", "_convert_awq_to_standard_format")
    body: list[ast.stmt] = [
        node
        for node in ast.parse(loader).body
        if (isinstance(node, ast.FunctionDef) and node.name == wanted[1])
        or (isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == wanted[0])
    ]
    names: dict[str, Any] = {
        "torch": torch,
        "PackedvLLMParameter": lambda data, **_: SimpleNamespace(data=data),
        "replace_parameter": setattr,
    }
    code = compile(ast.Module(body, []), "auto_awq.py", "exec")
    exec(code, names)  # noqa: S102 - vLLM's own function is what is asked
    ours = {part: tensor(awq.FORM, part) for part in ("qweight", "qzeros")}
    layer = SimpleNamespace(**{part: SimpleNamespace(data=data, device=data.device) for part, data in ours.items()})
    names[wanted[1]](layer, "qweight", "qzeros", 4)
    zeros = layer.qzeros.data.view(torch.uint8)
    return torch.equal(layer.qweight.data, tensor(gptq.FORM, "qweight")) and bool((zeros == 0x88).all())


def kernels(wheel: zipfile.ZipFile) -> list[str]:
    """The GPU architectures that the quantized kernels' library holds code for."""
    names = [name for name in wheel.namelist() if re.fullmatch(r"vllm/_C(_stable_libtorch)?\.abi3\.so", name)]
    return sorted({found.decode() for name in names for found in re.findall(rb"sm_\d+", wheel.read(name))})


def main() -> int:
    if len(sys.argv) != 2:
        sys.stderr.write(f"usage: {sys.argv[0]} VLLM_WHEEL\n")
        return 2
    with zipfile.ZipFile(sys.argv[1]) as wheel:

        def text(name: str) -> str:
            return wheel.read(name).decode()

        forms = (gptq.FORM, awq.FORM)
        loaders = {form.name: text(f"{LOADERS}/auto_{form.name}.py") for form in forms}
        parser, frontend = text("vllm/engine/arg_utils.py"), text("vllm/entrypoints/common/cli_args.py")
        lacking = {form.name: missing_keys(loaders[form.name], form.config(32, "")) for form in forms}
        found = {
            "wheel": Path(sys.argv[1]).name,
            "missing_flags": missing_flags(parser, frontend),
            "missing_keys": lacking,
            "same_packing": same_packing(loaders["awq"]),
            "drops_g_idx": '".g_idx": None' in text(f"{LOADERS}/base_config.py"),
            "kernels": kernels(wheel),
        }
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    fine = not found["missing_flags"] and not any(lacking.values())
    return 0 if fine and found["same_packing"] and found["drops_g_idx"] and "sm_75" in str(found["kernels"]) else 1


if __name__ == "__main__":
    sys.exit(main())
