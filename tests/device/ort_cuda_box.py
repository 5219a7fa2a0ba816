"""Runs an ONNX bundle for onnxruntime's CUDA provider on a box with an NVIDIA GPU and prints one JSON verdict.

    python3 tests/device/ort_cuda_box.py BUNDLE demo/persona.json [--prefix DIR] > verdict.json

BUNDLE: what ``packager build CHECKPOINT --adapter demo/persona-lora --calibration demo/persona.json --target t4
--recipe onnx_int8 --set provider=cuda`` printed. Standard library only. It looks at the box, installs the bundle under
--prefix, lets the installed runtime score the pairs' answers on the GPU and on the box's processor (the same file, so
what differs is the GPU), starts bin/serve, asks the pairs, measures with bin/bench, and ends it. The verdict is "pass"
when GPU and processor agree (mean KL at most 0.01, the likeliest token at 98 % of the positions), the server streams,
and at least eight of ten pairs are answered word for word; "not a device" on a machine without an NVIDIA GPU. Exit code
0 for "pass", else 1. Nobody of this project has run it on a GPU yet.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from chat_box import box, end, install, start
from vllm_bundle import ENOUGH, measure

MOST_KL, LEAST_TOP1 = 0.01, 0.98
PATHS = ("model", "tokenizer", "chat_template")
OUTSIDE = 1e-6  # probability of a token that one side did not list


def asked(prefix: Path, device: str, question: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """What the installed runtime scores on a device. Raises RuntimeError with its last words."""
    run = dict(json.loads((prefix / "manifest.json").read_text(encoding="utf-8"))["run"])
    run |= {key: str(prefix / run[key]) for key in PATHS if run.get(key)}
    run["settings"] = {**(run.get("settings") or {}), "device": device}
    given, made = scratch / f"{device}.json", scratch / f"{device}.scores.json"
    given.write_text(json.dumps({"run": run, "top": 64, **question}), encoding="utf-8")
    python = prefix / "venv" / "bin" / "python"
    command = [python, "-m", "runtimes", "score", "--input", given, "--output", made]
    done = subprocess.run(command, cwd=prefix / "runtime", capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"scoring on {device} failed: {done.stderr.strip().splitlines()[-1:]}")
    return dict(json.loads(made.read_text(encoding="utf-8")))


def agreement(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Mean KL of the first's distributions to the second's over the first's 64 likeliest tokens; equal best ones."""
    found, equal = [], 0
    for one, other in zip(first["sequences"], second["sequences"], strict=True):
        for ids, logs, their_ids, their_logs in zip(
            one["ids"], one["logprobs"], other["ids"], other["logprobs"], strict=True
        ):
            theirs = dict(zip(their_ids, their_logs, strict=True))
            found.append(
                sum(
                    math.exp(log) * (log - theirs.get(token, math.log(OUTSIDE)))
                    for token, log in zip(ids, logs, strict=True)
                )
            )
            equal += ids[0] == their_ids[0]
    return {"positions": len(found), "kl_mean": sum(found) / len(found), "top1": equal / len(found)}


def run(bundle: Path, prefix: Path, pairs: list[dict[str, str]], scratch: Path, verdict: dict[str, Any]) -> None:
    """Fill the verdict. Raises what went wrong."""
    install(bundle, prefix, verdict)
    texts = asked(prefix, "cpu", {"tokenize": [pair["output"] for pair in pairs]}, scratch)["tokenized"]
    sequences = [{"ids": ids, "positions": list(range(1, len(ids)))} for ids in texts if len(ids) > 1]
    gpu, cpu = (asked(prefix, device, {"sequences": sequences}, scratch) for device in ("gpu", "cpu"))
    verdict["gpu_against_processor"] = same = agreement(cpu, gpu)
    child, port, verdict["start_s"] = start(prefix, 600)
    try:
        verdict |= measure(port, pairs, str(verdict["model"]))
    finally:
        verdict["ended_by_sigterm"] = end(child)
    done = subprocess.run(
        [prefix / "bin" / "bench", "--quick", "--json"],
        stdout=subprocess.PIPE,
        stderr=sys.stderr,
        text=True,
        check=False,
    )
    verdict["bench"] = json.loads(done.stdout) if done.returncode == 0 else {"code": done.returncode}
    agree = same["kl_mean"] <= MOST_KL and same["top1"] >= LEAST_TOP1
    if agree and verdict["streams"] and verdict["kept"] >= ENOUGH * verdict["pairs"]:
        verdict["verdict"] = "pass"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--prefix", type=Path, help="where to install to (default: a temporary folder)")
    options = parser.parse_args()
    bundle = options.bundle.resolve()
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    verdict: dict[str, Any] = {"verdict": "fail", "bundle": manifest["bundle"], "model": manifest["name"], "box": box()}
    try:
        if not verdict["box"]["gpus"]:
            verdict["verdict"] = "not a device"
        else:
            with tempfile.TemporaryDirectory() as scratch:
                prefix = (options.prefix or Path(scratch) / "installed").absolute()
                pairs = json.loads(options.pairs.read_text(encoding="utf-8"))
                run(bundle, prefix, pairs, Path(scratch), verdict)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        verdict["error"] = f"{type(error).__name__}: {error}"
    sys.stdout.write(json.dumps(verdict, indent=1, ensure_ascii=False) + "\n")
    return 0 if verdict["verdict"] == "pass" else 1


if __name__ == "__main__":
    sys.exit(main())
