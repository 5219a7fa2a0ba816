"""The benchmark of an embedder or classifier on the build machine, compared with transformers FP32."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from packager.core.processes import WORKERS, follow
from packager.core.progress import Progress
from packager.core.store import Cost
from packager.core.units import size

REQUESTS = 60


def baseline(source: Path, document: Mapping[str, Any], work: Path, progress: Progress) -> dict[str, Any]:
    """Latency and memory of transformers in float32, with the same numbers and lengths of texts as the bundle."""
    import numpy as np

    output = work / "baseline.json"
    cases = [{"texts": row["texts"], "tokens": round(row["tokens_per_text"])} for row in document["batches"]]
    job = {
        "checkpoint": str(source),
        "classify": document["task"] == "classify",
        "cases": cases,
        "requests": REQUESTS,
        "threads": os.cpu_count() or 1,
        "output": str(output),
    }
    name, child = "baseline: transformers FP32", WORKERS / "baseline_encoder.py"
    follow(child, job, name, progress, Cost(), work=work, total=float(len(cases)), unit="cases")
    measured = json.loads(output.read_text(encoding="utf-8"))
    rows = []
    for case in measured["cases"]:
        ordered = sorted(case["seconds"])
        rows.append(
            {
                "texts": case["texts"],
                "tokens_per_text": case["tokens"],
                "latency_ms": {f"p{p}": round(float(np.percentile(ordered, p)) * 1000, 3) for p in (50, 95, 99)},
                "texts_per_second": round(case["texts"] * len(ordered) / sum(ordered), 1),
            }
        )
    return {"mode": "transformers FP32", "memory_bytes": measured["memory"], "requests": REQUESTS, "batches": rows}


HEAD = ("mode", "memory", "texts × tokens", "p50 ms", "p95 ms", "p99 ms", "texts/s")


def rows(document: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table: the baseline's rows first, then the bundle's."""
    lines: list[tuple[str, ...]] = []
    if base := document.get("baseline"):
        for row in base["batches"]:
            lines.append(_line(base["mode"], size(base["memory_bytes"]), row, row["texts_per_second"]))
    memory = (document.get("memory") or {}).get("peak_rss_bytes")
    options = (document.get("recipe") or {}).get("options", {})
    mode = f"{document['engine']} INT8 {options.get('favour', '')}".strip()
    for row in document["batches"]:
        lines.append(_line(mode, size(memory) if memory else "unknown", row, row["texts_per_second"]["mean"]))
    return lines


def _line(mode: str, memory: str, row: Mapping[str, Any], rate: float) -> tuple[str, ...]:
    latency = (f"{row['latency_ms'][p]:.1f}" for p in ("p50", "p95", "p99"))
    return mode, memory, f"{row['texts']} × {row['tokens_per_text']:.0f}", *latency, f"{rate:.1f}"


def remarks(document: Mapping[str, Any]) -> list[str]:
    """The lines under the table."""
    lines = []
    if document.get("baseline"):
        lines.append("The baseline times the model's call alone; the served figures include tokenizer and HTTP.")
    if cold := document.get("cold_start"):
        lines.append(f"cold start to first answer: {cold['first_answer_seconds']['mean']:.2f} s")
    if before := document["load"]["before"]:
        lines.append(f"load before the run: {before[0]} on {document['load']['logical_cores']} cores")
    return [*lines, *(f"note: {note}" for note in document["notes"])]
