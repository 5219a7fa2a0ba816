"""The benchmark: start the bundle's own server, put load on it, and compare its speed with the memory's bandwidth.

``bin/bench [--quick] [--output report.json] [--json]``. Progress and the table go to standard error; the report is
JSON, written in one step. Figures are means of at least five repeats with their standard deviation.
"""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtimes.bench import machine as box
from runtimes.bench.client import BenchError, Client, measure, roofline, spread, table
from runtimes.bench.server import busy, head, load_since, server
from runtimes.files import say, write_atomically
from runtimes.preflight.check import read_manifest, size

FAILED = 9
STREAMS = (1, 4, 8)


@dataclass(frozen=True)
class Plan:
    """How much is measured. tokens: decoded per answer. prompt, prefill: words of the short and the long prompt."""

    repeats: int
    tokens: int
    prompt: int
    prefill: int
    streams: tuple[int, ...] = STREAMS

    @classmethod
    def of(cls, quick: bool, repeats: int, context: int, streams: tuple[int, ...] = STREAMS) -> Plan:
        """A plan whose long prompt fits the context: a word is at most about two tokens."""
        tokens, prefill = (24, 64) if quick else (96, 384)
        return cls(max(5, repeats), tokens, 24, max(16, min(prefill, context // 4)), streams)


def cold_start(bundle: Path, wait: float) -> tuple[float, float]:
    """Seconds from the start of the process until it is ready, and until the first token of the first answer."""
    with server(bundle, wait) as (_, client, started):
        ready = time.perf_counter() - started
        answer = client.ask(client.words(8), 1)
        return ready, answer.pieces[0] - started


def run(bundle: Path, plan: Plan, *, url: str | None, wait: float) -> dict[str, Any]:
    """The report as a dictionary. url: measure a server that already runs (without cold start and memory)."""
    manifest = read_manifest(bundle)
    run_facts = manifest["run"]
    used = int(run_facts.get("threads") or 0) or box.physical_cores()
    before = box.load_average()
    say(f"memory bandwidth with {used} thread(s) …")
    speed = box.bandwidth(used)
    settings = {"repeats": plan.repeats, "tokens_per_answer": plan.tokens, "temperature": 0, "threads": used}
    report = head(manifest, url, settings) | {
        "read_per_token_bytes": int(run_facts.get("read_per_token_bytes") or 0),
        "bandwidth": speed,
    }
    if url is None:
        starts = []
        for index in range(plan.repeats):
            say(f"cold start {index + 1} of {plan.repeats} …")
            starts.append(cold_start(bundle, wait))
        report["cold_start"] = {
            "ready_seconds": spread([ready for ready, _ in starts]),
            "first_token_seconds": spread([first for _, first in starts]),
            "page_cache": "as it was: the model file was not evicted, so all but maybe the first start find it cached",
        }
        with server(bundle, wait) as (child, client, _):
            report["streams"] = rows(client, plan)
            report["memory"] = box.process_memory(child.pid) | {
                "method": "VmHWM and Pss of the server's process tree after the last repeat; Pss counts mapped weights "
                "that are in use, VmHWM the most it ever held"
            }
    else:
        client = Client(url, avoid=run_facts.get("stop_ids") or ())
        if not client.ready():
            raise BenchError(f"No server is ready at {url}: its /health does not answer 200.")
        report["streams"] = rows(client, plan)
    again = box.bandwidth(used)  # other load during the first measurement must not lower the ceiling
    speed |= max(speed, again, key=lambda one: float(one["bytes_per_second"]))
    report["load"] = load_since(before)
    one = report["streams"][0]["decode_tokens_per_second"]["mean"]  # with 1 stream, which is always the first row
    gpu = bool(manifest["needs"].get("gpu"))  # read_manifest requires needs
    bound = roofline(one, report["read_per_token_bytes"], speed["bytes_per_second"], gpu=gpu)
    report["roofline"] = bound | {"streams": 1}
    report["notes"] = notes(report)
    return report


def rows(client: Client, plan: Plan) -> list[dict[str, Any]]:
    """One row of figures for each number of streams, after one answer as warm-up."""
    client.ask(client.words(plan.prompt), 8)
    table_rows = []
    for streams in plan.streams:
        say(f"{streams} stream(s), {plan.repeats} repeats …")
        table_rows.append(
            measure(
                client,
                streams,
                repeats=plan.repeats,
                prompt_words=plan.prompt,
                prefill_words=plan.prefill,
                tokens=plan.tokens,
            )
        )
    return table_rows


def notes(report: dict[str, Any]) -> list[str]:
    """Notes on the figures."""
    lines = []
    if report["roofline"]["note"]:
        lines.append(f"Roofline {report['roofline']['verdict']}: {report['roofline']['note']}")
    lines += busy(report["load"])
    slots = report["settings"]["slots"] or 0
    waiting = [row["streams"] for row in report["streams"] if slots and row["streams"] > slots]
    if waiting:
        lines.append(
            f"With {slots} slots, {', '.join(map(str, waiting))} streams wait for each other: their TTFT "
            "includes the wait."
        )
    if any(row["cached_prompt_tokens"] > 4 for row in report["streams"]):
        lines.append("Some prompt tokens came from a cache; they are not counted as prefilled.")
    return lines


def write(path: Path, report: dict[str, Any]) -> None:
    """Write the report atomically. Raises OSError."""
    write_atomically(path, (json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def summary(report: dict[str, Any]) -> str:
    """The table and the lines under it."""
    lines = ["", table(report), "Figures: mean ± standard deviation; p50, p95 and p99 are of the time between tokens."]
    if cold := report["cold_start"]:
        first = cold["first_token_seconds"]
        lines.append(f"cold start to first token  {first['mean']:.2f} ± {first['sd']:.2f} s")
    if memory := report["memory"]:
        peak, pss = memory["peak_rss_bytes"], memory["pss_bytes"]
        lines.append(
            f"peak memory                {size(peak) if peak else 'unknown'}"
            f" (proportional {size(pss) if pss else 'unknown'})"
        )
    speed, roof = report["bandwidth"], report["roofline"]
    lines.append(
        f"memory bandwidth           {size(speed['bytes_per_second'])}/s ({speed['threads']} threads, reading)"
    )
    if roof["percent"] is not None:
        lines.append(
            f"roofline                   {roof['percent']:.0f} % of {roof['ceiling_tokens_per_second']:.0f} "
            f"tok/s at {size(report['read_per_token_bytes'])} a token: {roof['verdict']}"
        )
    return "\n".join([*lines, *(f"note: {note}" for note in report["notes"])])


def stream_counts(text: str) -> tuple[int, ...]:
    """The text "4,8" as (1, 4, 8): 1 is always included, because the roofline is for one stream. Raises ValueError."""
    counts = {int(part) for part in text.split(",")}
    if min(counts) < 1 or max(counts) > 64:
        raise ValueError
    return tuple(sorted({1, *counts}))


def measured(given: argparse.Namespace) -> dict[str, Any]:
    """The report for the options of ``bench``."""
    context = int(read_manifest(given.bundle)["run"].get("context") or 2048)
    plan = Plan.of(given.quick, given.repeats, context, given.streams)
    return run(given.bundle, plan, url=given.url, wait=given.wait)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; the exit code: 0 measured, 2 usage, 9 the server or the machine failed, 130 interrupted."""
    options = argparse.ArgumentParser(
        prog="bench",
        description="Latency, throughput and memory of this bundle's server on this box.",
        epilog="Example: bin/bench --quick --output report.json",
    )
    options.add_argument("--bundle", type=Path, required=True, help="the bundle's folder, or an install of it")
    options.add_argument("--url", help="measure a server that already runs, for example http://127.0.0.1:8000")
    options.add_argument("--output", type=Path, default=Path("report.json"), help="where the report goes")
    options.add_argument("--json", action="store_true", help="print the report on standard output, write no file")
    options.add_argument("--quick", action="store_true", help="short answers and prompts (five repeats all the same)")
    options.add_argument("--repeats", type=int, default=5, help="repeats of everything, at least 5")
    options.add_argument(
        "--streams",
        type=stream_counts,
        default=STREAMS,
        metavar="N,N",
        help="answers at a time, always beginning with 1 (default: 1,4,8)",
    )
    options.add_argument("--wait", type=float, default=600.0, help="seconds the server may take to load the model")
    given = options.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: end the server, write no report
    try:
        if read_manifest(given.bundle)["run"].get("task", "generate") != "generate":
            encoders = importlib.import_module("runtimes.bench.encoder")
            report, summarize = encoders.measured(given), encoders.summary
        else:
            report, summarize = measured(given), summary
        if not given.json:
            write(given.output, report)
    except (BenchError, ValueError, OSError) as error:
        say(str(error))
        return FAILED
    except KeyboardInterrupt:
        say("interrupted; no report was written")
        return 130
    say(summarize(report))
    sys.stdout.write(json.dumps(report, indent=2, ensure_ascii=False) + "\n" if given.json else f"{given.output}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
