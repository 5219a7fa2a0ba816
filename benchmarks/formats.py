"""Every format of one checkpoint in one table: bytes, build, memory and speed on this machine, distance, answers kept.

    .venv/bin/python benchmarks/formats.py .demo/smollm2 --adapter demo/persona-lora --pairs demo/persona.json

Build time and memory are those of each form's steps when they were made: steps that forms share (merge, source, tuning)
count for each of them. Memory, time to first token and decode tokens/s come from ``packager bench --quick`` of each
bundle, one after the other in this run; KL, top-1 and perplexity from the manifest (general text, through the runtime
that ships); the bundle's own server answers the pairs at temperature 0.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.int4 import kept  # noqa: E402 - after the path

FORMS: dict[str, tuple[str, ...]] = {  # recipe, then its options
    "GGUF Q8_0": ("gguf", "quant=Q8_0"),
    "GGUF Q4_K_M, imatrix": ("gguf", "quant=Q4_K_M", "imatrix=on"),
    "GGUF Q4_0, tuned": ("gguf", "quant=Q4_0", "tune=quick"),
    "ONNX INT8": ("onnx_int8", "bits=8"),
    "ONNX INT4, tuned": ("onnx_int8", "bits=4", "tune=quick"),
    "GPTQ, tuned": ("gptq_int4", "tune=quick"),
    "AWQ, tuned": ("awq_int4", "tune=quick"),
}
HEAD = (
    "format",
    "MB",
    "build s",
    "build peak MB",
    "memory MB",
    "TTFT ms",
    "decode tokens/s",
    "KL",
    "top-1",
    "PPL ratio",
    "persona",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--pairs", type=Path, required=True, help="fine-tuning pairs, alpaca form")
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--output", type=Path, default=Path(".demo/formats"), help="where the bundles go")
    options = parser.parse_args()
    before = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    print(f"load before the run {before:.1f} on {os.cpu_count()} cores\n")
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}", flush=True)
    for form in options.forms:  # each row as it comes: a form on torch alone takes ten minutes
        print(f"| {' | '.join(measure(options, form))} |", flush=True)
    return 0


def measure(options: argparse.Namespace, form: str) -> list[str]:
    """One line of the table: the form is built (or reused), benchmarked, and answers the pairs."""
    from packager.build import Request, build
    from packager.cli.console import Console
    from packager.core.store import Store, default_root

    store = Store(default_root())
    recipe, *sets = FORMS[form]
    request = Request(
        options.checkpoint,
        "desktop_linux_x86_64",
        recipe=recipe,
        adapter=options.adapter,
        name=form.lower().replace(" ", "-").replace(",", ""),
        sets=sets,
        calibration=options.pairs,
    )
    built = build(request, options.output, Console(), store)
    steps = [
        json.loads((store.root / name / key / "step.json").read_text(encoding="utf-8"))
        for name, key in built.artifact.provenance["steps"].items()
    ]
    kinds = (".gguf", ".onnx", ".data", ".safetensors")
    files = [path for path in (built.path / "model").iterdir() if path.suffix in kinds]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "report.json"
        command = [sys.executable, "-m", "packager", "bench", str(built.path), "--quick", "--no-baseline", "-q"]
        subprocess.run([*command, "--output", str(output)], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        bench: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    one, score = bench["streams"][0], built.artifact.report["fidelity"]["general"]
    return [
        form,
        f"{sum(path.stat().st_size for path in files) / 1e6:.1f}",
        f"{sum(step['seconds'] for step in steps):.0f}",
        f"{max(step['peak_rss_bytes'] for step in steps) / 1e6:.0f}",
        f"{bench['memory']['peak_rss_bytes'] / 1e6:.0f}",
        f"{one['ttft_ms']['mean']:.0f} ± {one['ttft_ms']['sd']:.0f}",
        f"{one['decode_tokens_per_second']['mean']:.1f} ± {one['decode_tokens_per_second']['sd']:.1f}",
        f"{score['kl_mean']:.4f}",
        f"{score['top1']:.1%}",
        f"{score['perplexity_ratio']:.3f}",
        kept(built.path, json.loads(options.pairs.read_text(encoding="utf-8"))),
    ]


if __name__ == "__main__":
    sys.exit(main())
