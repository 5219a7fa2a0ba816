"""Measures an encoder as a TensorRT bundle: python benchmarks/tensorrt_encoder.py CHECKPOINT [--target t4].

Builds it twice in two empty stores (engine: bytes, seconds, digest both times), then with precision=int8 under one or
more thresholds: the cosine with every layer rounded, the layers kept in fp16, and the figures of the shipped file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from packager.build import Built, Request, build  # noqa: E402
from packager.cli.console import Console  # noqa: E402
from packager.core.errors import GateFailed  # noqa: E402
from packager.core.store import Store  # noqa: E402
from packager.formats.tensorrt.compiler import ENGINE  # noqa: E402


def made(store: Path, out: Path, given: argparse.Namespace, **more: Any) -> Built:
    request = Request(given.checkpoint, given.target, recipe="tensorrt_engine", name="model", **more)
    return build(request, out, Console(quiet=True), Store(store))


def report(built: Built) -> Mapping[str, Any]:
    manifest_report: dict[str, Any] = json.loads((built.path / "manifest.json").read_text(encoding="utf-8"))["report"]
    return manifest_report


def fidelity(manifest_report: Mapping[str, Any]) -> str:
    score = manifest_report["fidelity"]["general"]
    if "cosine_mean" in score:
        return f"cosine {score['cosine_mean']:.6f} (least {score['cosine_min']:.6f}), rank {score['rank']:.6f}"
    return f"the source's label for {score['agreement']:.1%} of {score['texts']} texts"


def seconds(built: Built, step: str) -> float:
    return sum(float(cost["seconds"]) for cost in built.record["steps"] if cost["step"] == step)


def shown(built: Built) -> str:
    """Bytes, time and digest of the engine; the ONNX where the box builds its own."""
    names = [name for name in (ENGINE, "model.onnx.data") if (built.path / "model" / name).is_file()]
    file = built.path / "model" / names[0]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return (
        f"{file.name}: {file.stat().st_size} bytes, compiled in {seconds(built, 'tensorrt-engine'):.1f} s of "
        f"{built.record['seconds']:.1f} s, sha256 {digest}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--target", default="t4")
    parser.add_argument("--cosine", type=float, action="append", help="thresholds of INT8 (default: 0.99, 0.995)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        for number in (1, 2):
            built = made(work / f"store{number}", work / f"out{number}", given)
            print(f"fp16, store {number}: {shown(built)}", flush=True)
        print(f"fp16: {fidelity(report(built))}", flush=True)
        for limit in given.cosine or (0.99, 0.995):
            try:
                built = made(
                    work / "store1",
                    work / f"out-{limit}",
                    given,
                    sets=("precision=int8",),
                    limits={"min_cosine": limit},
                )
            except GateFailed as error:
                print(f"int8, at least {limit}: {error}", flush=True)
                continue
            manifest_report = report(built)
            int8 = manifest_report["int8"]
            if limit == (given.cosine or [0.99])[0]:
                print(
                    f"\n{int8['measure']} on {int8['texts']} texts, computed in float32, every layer in 8 bits: "
                    f"{int8['all_layers_without_evening_out']:.6f}; channels evened out: {int8['all_layers']:.6f}"
                )
                print("\n| layer | 1 - measure, alone in 8 bits | clipped at | evened out |\n|---|---|---|---|")
                for layer in int8["layers"]:
                    print(
                        f"| {layer['name']} | {layer['damage']:.6f} | {layer['clipped_at']} | "
                        f"{'yes' if layer['evened_out'] else 'no'} |"
                    )
            kept = ", ".join(layer["name"] for layer in int8["kept_in_fp16"]) or "none"
            print(f"\nint8, at least {limit}: {manifest_report['int8_matrices']} matrices in 8 bits, in fp16: {kept}")
            print(f"  {shown(built)}\n  as shipped: {fidelity(manifest_report)}", flush=True)


if __name__ == "__main__":
    main()
