"""Compares a build with the bare converter and llama.cpp's quantizer: peak resident memory and wall time.

    .venv/bin/python benchmarks/build_cost.py .demo/smollm2 --quant Q8_0 --repeats 3
    .venv/bin/python benchmarks/random_qwen2.py big --size 1.5b && .venv/bin/python benchmarks/build_cost.py big

Three rows: the two tools as bare processes; our build without importance matrix and verification; our build with them.
The store is empty for every run; the llama.cpp sources and the box's wheels are fetched before. Memory is the highest
sum of resident sets over the process tree, sampled every 20 ms, so pages of mapped files count on both sides. The rows
of one repeat run one after the other on the same machine. The first row compiles llama.cpp once
(benchmarks/llama_reference.py), or takes the Python of ``--reference``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.llama_reference import reference_python  # noqa: E402 - after the path

NAMES = {
    "bare": "converter + quantizer alone",
    "plain": "packager build, no imatrix, no verification",
    "full": "packager build with both",
}


def measured(commands: Sequence[Sequence[str]], env: dict[str, str]) -> tuple[float, int]:
    """Wall seconds of the commands one after the other, and the peak memory in bytes of the one that took most."""
    peak = 0
    start = time.monotonic()
    for command in commands:
        log = tempfile.TemporaryFile()  # noqa: SIM115 - closed below, after the child
        child = psutil.Popen(command, env={**os.environ, **env}, stdout=log, stderr=subprocess.STDOUT)
        over = threading.Event()
        seen: list[int] = [0]

        def watch(process: psutil.Popen = child, over: threading.Event = over, seen: list[int] = seen) -> None:
            while not over.wait(0.02):
                try:
                    tree = [process, *process.children(recursive=True)]
                except psutil.Error:
                    return
                total = 0
                for one in tree:
                    try:
                        total += one.memory_info().rss
                    except psutil.Error:
                        continue  # it ended between the listing and the look
                seen[0] = max(seen[0], total)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        code = child.wait()
        over.set()
        watcher.join()
        if code:
            log.seek(0)
            sys.exit(f"{' '.join(command)[:200]} ended with {code}:\n{log.read().decode(errors='replace')[-2000:]}")
        log.close()
        peak = max(peak, seen[0])
    return time.monotonic() - start, peak


def bare(checkpoint: Path, quant: str, work: Path, reference: Path) -> list[list[str]]:
    """The two tools alone, as a user of llama.cpp's scripts would run them."""
    from packager.cli.console import Console
    from packager.formats.gguf.llamacpp import sources
    from packager.formats.gguf.types import QUANTS

    tree = sources(Console())
    job = work / "job.json"
    job.write_text(
        json.dumps(
            {
                "source": str(work / "whole.gguf"),
                "output": str(work / "small.gguf"),
                "file_type": QUANTS[quant].file_type,
                "threads": os.cpu_count(),
                "imatrix": None,
            }
        )
    )
    return [
        [
            sys.executable,
            str(tree / "convert_hf_to_gguf.py"),
            str(checkpoint),
            "--outfile",
            str(work / "whole.gguf"),
            "--outtype",
            "auto",
        ],
        [str(reference), str(ROOT / "benchmarks" / "llama_reference.py"), str(job)],
    ]


def ours(checkpoint: Path, quant: str, work: Path, *extra: str) -> list[list[str]]:
    return [
        [
            sys.executable,
            "-m",
            "packager",
            "build",
            str(checkpoint),
            "--target",
            "desktop_linux_x86_64",
            "--set",
            f"quant={quant}",
            *extra,
            "-o",
            str(work / "out"),
            "--json",
        ]
    ]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("checkpoint", type=Path)
    options.add_argument("--quant", default="Q8_0")
    options.add_argument("--repeats", type=int, default=1)
    options.add_argument("--rows", nargs="+", choices=list(NAMES), default=list(NAMES), help="only these rows")
    options.add_argument("--reference", type=Path, help="a Python with the pinned llama-cpp-python, if there is one")
    options.add_argument("--json", type=Path, help="write the figures here as well")
    given = options.parse_args()
    checkpoint = given.checkpoint.resolve()
    reference = given.reference
    if "bare" in given.rows and not reference:
        reference = reference_python(ROOT / ".demo/quantizers/reference")
    rows: dict[str, list[tuple[float, int]]] = {row: [] for row in given.rows}
    steps: list[tuple[int, str]] = []
    load = os.getloadavg()
    for _ in range(given.repeats):
        for row in rows:
            with tempfile.TemporaryDirectory(prefix="build-cost-", dir=checkpoint.parent) as folder:
                work = Path(folder)
                env = {"PACKAGER_STORE": str(work / "store"), "PYTHONPATH": str(ROOT)}
                commands = {
                    "bare": lambda work=work: bare(checkpoint, given.quant, work, reference),
                    "plain": lambda work=work: ours(
                        checkpoint, given.quant, work, "--no-verify", "--set", "imatrix=off"
                    ),
                    "full": lambda work=work: ours(checkpoint, given.quant, work, "--set", "imatrix=on"),
                }[row]()
                rows[row].append(measured(commands, {} if row == "bare" else env))
                print(f"{row}: {rows[row][-1][0]:.1f} s, {rows[row][-1][1] / 1e6:.0f} MB", file=sys.stderr, flush=True)
                for record in (work / "out").glob("*.build.json"):
                    steps = [(step["peak_rss_bytes"], step["step"]) for step in json.loads(record.read_text())["steps"]]
    wall = {row: statistics.median(seconds for seconds, _ in runs) for row, runs in rows.items()}
    peak = {row: statistics.median(memory for _, memory in runs) for row, runs in rows.items()}
    print(
        f"{checkpoint.name}, {given.quant}, {given.repeats} repeats (median), load before {load[0]:.1f} on "
        f"{os.cpu_count()} cores"
    )
    base = "bare" if "bare" in rows else given.rows[0]
    for row in rows:
        print(
            f"  {NAMES[row]:<46}{wall[row]:8.1f} s ({wall[row] / wall[base]:.2f} ×){peak[row] / 1e6:9.0f} MB "
            f"({peak[row] / peak[base]:.2f} ×)"
        )
    if steps:
        highest = ", ".join(f"{name} {size / 1e6:.0f} MB" for size, name in sorted(steps, reverse=True)[:5])
        print(f"  highest steps of the last build, each alone: {highest}")
    if given.json:
        given.json.write_text(json.dumps({"quant": given.quant, "load": load, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
