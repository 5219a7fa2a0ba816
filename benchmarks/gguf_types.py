"""What every ``quant`` of the gguf recipe costs a fine-tune, by the product's own score.

    .venv/bin/python benchmarks/gguf_types.py .demo/smollm2 --adapter demo/persona-lora --pairs demo/persona.json

Each row is a build whose thresholds are switched off: bytes and bits a weight of the model file, seconds and peak
memory of the quantizing step when it was made, then the figures of the manifest (report.fidelity). "with" is an
importance matrix from the pairs, as ``imatrix=auto`` takes one below Q6_K; "without" is ``imatrix=off``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from packager.formats.gguf.build import KEPT  # noqa: E402 - after the path
from packager.formats.gguf.types import QUANTS, wants_imatrix  # noqa: E402
from packager.tensors.gguf_header import read_header  # noqa: E402

HEAD = [
    *("quant", "importance matrix", "MB", "bits a weight", "quantizing s", "peak MB", "general: mean KL (95 %)"),
    *("top-1", "tuning: mean KL", "behaviour kept", "its limits: KL, top-1"),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--pairs", type=Path, required=True, help="fine-tuning pairs, alpaca form")
    parser.add_argument("--quants", nargs="+", choices=list(QUANTS), default=list(QUANTS))
    parser.add_argument("--output", type=Path, default=Path(".demo/gguf-types"), help="where the bundles go")
    given = parser.parse_args()
    print(f"load before the run {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}", flush=True)
    for quant in given.quants:
        for matrix in ("auto", "off") if wants_imatrix(quant) else ("off",):
            print(f"| {' | '.join(measure(given, quant, matrix))} |", flush=True)
    return 0


def measure(given: argparse.Namespace, quant: str, matrix: str) -> list[str]:
    """One line of the table; "refused" where the plan does not take the combination."""
    from packager.build import Request, build
    from packager.cli.console import Console
    from packager.core.errors import PlanRefused
    from packager.core.store import Store, default_root

    store = Store(default_root())
    label = [quant, "with" if matrix == "auto" else "without"]
    request = Request(
        given.checkpoint,
        "desktop_linux_x86_64",
        adapter=given.adapter,
        name=f"{quant.lower()}-{label[1]}",
        sets=(f"quant={quant}", f"imatrix={matrix}", "tune=none"),
        calibration=given.pairs,
        limits={"max_kl": 99.0, "min_top1": 0.0, "min_behaviour": 0.0},
    )
    try:
        built = build(request, given.output, Console(quiet=True), store)
    except PlanRefused:
        return [*label, "refused", *[""] * (len(HEAD) - 3)]
    report, key = built.artifact.report["fidelity"], built.artifact.provenance["steps"].get("gguf-quantize")
    step = json.loads((store.root / "gguf-quantize" / key / "step.json").read_text(encoding="utf-8")) if key else {}
    size = built.artifact.run.model_bytes
    weights = sum(math.prod(tensor.shape) for tensor in read_header(built.path / "model/model.gguf").tensors)
    general, tuning, kept = report["general"], report["tuning"], report["behaviour"]
    low, high = general["kl_mean_ci"]
    return [
        *label,
        f"{size / 1e6:.1f}",
        f"{8 * size / weights:.2f}",
        f"{step.get('seconds', 0):.1f}",
        f"{step.get('peak_rss_bytes', 0) / 1e6:.0f}",
        f"{general['kl_mean']:.4f} ({low:.4f} to {high:.4f})",
        f"{general['top1']:.1%}",
        f"{tuning['kl_mean']:.4f}",
        f"{kept['kept']} of {kept['pairs']}",
        ", ".join(f"{limit:g}" for limit in KEPT[quant]),
    ]


if __name__ == "__main__":
    sys.exit(main())
