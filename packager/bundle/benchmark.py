"""Benchmarks on the build machine: the bundle's own bench, the FP32 baseline, and the tables of both."""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from packager.bundle import benchmark_encoder
from packager.core.errors import InputError, UsageError
from packager.core.processes import WORKERS, follow, run_python
from packager.core.progress import Progress
from packager.core.store import Cost
from packager.core.units import size

BASELINE_TOKENS = 32
BASELINE_REPEATS = 5


def bench(
    bundle: Path, *, quick: bool, baseline: Path | None, with_baseline: bool, progress: Progress
) -> dict[str, Any]:
    """The bundle's report (see runtimes/bench/llm.py) with a ``baseline`` object from transformers FP32, or null.

    Raises UsageError when the folder is no bundle, InputError when the baseline's checkpoint is not there.
    """
    _require_bundle(bundle)
    with tempfile.TemporaryDirectory(prefix="packager-bench-") as work:
        place = Path(work) / "report.json"
        with progress.step("benchmark of the bundle"):
            run_python(
                "runtimes",
                ["bench", "--bundle", bundle.resolve(), "--output", place, *(["--quick"] if quick else [])],
                name="the bundle's benchmark",
                path=[bundle.resolve() / "runtime"],
                env={"PYTHONDONTWRITEBYTECODE": "1"},  # a .pyc would be a file that the manifest does not list
            )
        document: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
        source = baseline or _built_from(bundle)
        if with_baseline and source is None:
            progress.note("no FP32 row: the source checkpoint is not known here; name it with --baseline FOLDER")
        document["baseline"] = None
        if with_baseline and source:
            _require_checkpoint(source)
            encoder = document.get("task", "generate") != "generate"
            document["baseline"] = (
                benchmark_encoder.baseline(source, document, Path(work), progress)
                if encoder
                else _baseline(source, bundle, Path(work), progress)
            )
    return document


def serve(bundle: Path, host: str, port: int) -> None:
    """Replace this process by the bundle's server; does not return. Raises UsageError when the folder is no bundle."""
    _require_bundle(bundle)
    folder = str(bundle.resolve() / "runtime")
    environment = {**os.environ, "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
    arguments = ["-m", "runtimes", "serve", "--bundle", str(bundle.resolve()), "--host", host, "--port", str(port)]
    os.execve(sys.executable, [sys.executable, *arguments], environment)  # noqa: S606 - the bundle's own server, no shell


def _require_bundle(bundle: Path) -> None:
    if not (bundle / "manifest.json").is_file():
        raise UsageError(
            f"{bundle} is not a bundle: it has no manifest.json.", fix="Give the folder that `packager build` printed."
        )


def _built_from(bundle: Path) -> Path | None:
    """The checkpoint's folder from the build record beside the bundle; None when either is missing."""
    record = bundle.parent / f"{bundle.resolve().name}.build.json"
    if not record.is_file():
        return None
    place = Path(json.loads(record.read_text(encoding="utf-8"))["checkpoint_path"])
    return place if (place / "config.json").is_file() else None


def _require_checkpoint(source: Path) -> None:
    if not (source / "config.json").is_file():
        raise InputError(f"the baseline {source} is not a Hugging Face folder: it has no config.json.")


def _baseline(source: Path, bundle: Path, work: Path, progress: Progress) -> dict[str, Any]:
    import numpy as np
    from tokenizers import Tokenizer

    text = "The service manual of the machine, read from its first page. " * 8
    prompt = Tokenizer.from_file(str(bundle / "model" / "tokenizer.json")).encode(text).ids[:64]
    output = work / "baseline.json"
    follow(
        WORKERS / "baseline.py",
        {
            "checkpoint": str(source),
            "prompt": prompt,
            "new_tokens": BASELINE_TOKENS,
            "repeats": BASELINE_REPEATS,
            "threads": os.cpu_count() or 1,
            "output": str(output),
        },
        "baseline: transformers FP32",
        progress,
        Cost(),
        work=work,
        total=float(BASELINE_REPEATS),
        unit="repeats",
    )
    measured = json.loads(output.read_text(encoding="utf-8"))
    gaps = sorted(gap for repeat in measured["inter_token"] for gap in repeat)
    return {
        "mode": "transformers FP32",
        "memory_bytes": measured["memory"],
        "prompt_tokens": len(prompt),
        "new_tokens": BASELINE_TOKENS,
        "repeats": BASELINE_REPEATS,
        "ttft_ms": {"mean": _ms(statistics.mean(measured["ttft"])), "stdev": _ms(statistics.stdev(measured["ttft"]))},
        "inter_token_ms": {f"p{p}": _ms(float(np.percentile(gaps, p))) for p in (50, 95, 99)},
        "decode_tokens_per_second": {
            "mean": round(statistics.mean(len(r) / sum(r) for r in measured["inter_token"]), 2),
            "stdev": round(statistics.stdev(len(r) / sum(r) for r in measured["inter_token"]), 2),
        },
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def mode_rows(document: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows of (mode, memory, p99 inter-token latency, TTFT, decode tokens/s) at one stream, the baseline first."""
    rows: list[tuple[str, ...]] = []
    if base := document.get("baseline"):
        rows.append(
            (
                base["mode"],
                size(base["memory_bytes"]),
                f"{base['inter_token_ms']['p99']:.1f} ms",
                f"{base['ttft_ms']['mean']:.0f} ms",
                f"{base['decode_tokens_per_second']['mean']:.1f}",
            )
        )
    one = document["streams"][0]
    memory = (document.get("memory") or {}).get("peak_rss_bytes")
    rows.append(
        (
            f"{document['engine']} {(document.get('recipe') or {}).get('options', {}).get('quant', '')}".strip(),
            size(memory) if memory else "unknown",
            f"{one['inter_token_ms']['p99']:.1f} ms",
            f"{one['ttft_ms']['mean']:.0f} ms",
            f"{one['decode_tokens_per_second']['mean']:.1f}",
        )
    )
    return rows


def stream_rows(document: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row for each number of streams: TTFT, inter-token p50/p95/p99 (ms), decode and prefill tokens/s."""
    return [
        (
            str(row["streams"]),
            f"{row['ttft_ms']['mean']:.0f} ± {row['ttft_ms']['sd'] or 0:.0f}",
            *(f"{row['inter_token_ms'][p]:.1f}" for p in ("p50", "p95", "p99")),
            f"{row['decode_tokens_per_second']['mean']:.1f} ± {row['decode_tokens_per_second']['sd'] or 0:.1f}",
            f"{row['prefill_tokens_per_second']['mean']:.0f}",
        )
        for row in document["streams"]
    ]


def remarks(document: Mapping[str, Any]) -> list[str]:
    """The lines under the tables: cold start, bandwidth and roofline, load, and the report's own notes."""
    lines = []
    if cold := document.get("cold_start"):
        lines.append(f"cold start to first token: {cold['first_token_seconds']['mean']:.2f} s")
    roof, speed = document["roofline"], document["bandwidth"]
    if roof["percent"] is not None:
        lines.append(
            f"roofline: {roof['percent']:.0f} % of {roof['ceiling_tokens_per_second']:.0f} tokens/s "
            f"({size(speed['bytes_per_second'])}/s measured, {size(document['read_per_token_bytes'])} read per token): "
            f"{roof['verdict']}"
        )
    before = document["load"]["before"]
    if before:
        lines.append(f"load before the run: {before[0]} on {document['load']['logical_cores']} cores")
    return [*lines, *(f"note: {note}" for note in document["notes"])]
