"""Measures a language model as a T4 bundle: python benchmarks/tensorrt_decoder.py CHECKPOINT

In float16, and with the layers' weights in int8: mean KL of the graph that ships to the source (onnxruntime, on the
processor); the engine's bytes and digest, seconds and peak memory of its compilation, twice, from two empty stores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from packager.build import Built, Request, build  # noqa: E402
from packager.cli.console import Console  # noqa: E402
from packager.core.store import Store  # noqa: E402
from packager.formats.tensorrt.compiler import ENGINE  # noqa: E402


def shown(built: Built) -> str:
    file = built.path / "model" / ENGINE
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    cost = next(dict(cost) for cost in built.record["steps"] if cost["step"] == "tensorrt-engine")
    peak = int(cost["peak_rss_bytes"]) / 1e6
    return f"{file.stat().st_size} bytes, {float(cost['seconds']):.1f} s, {peak:.0f} MB at most, sha256 {digest}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--slots", type=int, default=8)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        for precision in ("fp16", "int8"):
            sets = (f"context={given.context}", f"slots={given.slots}", f"precision={precision}")
            for number in (1, 2):
                request = Request(
                    given.checkpoint, "t4", recipe="tensorrt_engine", name="model", sets=sets, verify=number == 1
                )
                work = Path(place) / f"{precision}{number}"
                built = build(request, work / "out", Console(quiet=True), Store(work / "store"))
                if number == 1:
                    report = json.loads((built.path / "manifest.json").read_text(encoding="utf-8"))["report"]
                    score = report["fidelity"]["general"]
                    print(f"{precision}: mean KL {score['kl_mean']:.2g}, top-1 {score['top1']:.1%}", flush=True)
                print(f"  engine, store {number}: {shown(built)}", flush=True)


if __name__ == "__main__":
    main()
