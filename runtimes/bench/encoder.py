"""The benchmark of an embedder or classifier: latency and texts per second, for one and for several texts per request.

Requests go through HTTP to the bundle's own server, never with the same text twice. Figures are of at least five
repeats. There is no roofline: an encoder computes all tokens of a text at once, so it is bound by compute, not memory.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtimes.bench import machine as box
from runtimes.bench.client import BenchError, Client, percentiles, spread
from runtimes.bench.server import busy, head, load_since, server
from runtimes.files import say
from runtimes.preflight.check import read_manifest, size

PATHS = {"embed": "/v1/embeddings", "classify": "/classify"}
TEXTS = (1, 8)  # texts per request


@dataclass(frozen=True)
class Plan:
    """requests: per repeat. words: lengths of the texts in words (one or two tokens each)."""

    repeats: int
    requests: int
    words: tuple[int, ...]

    @classmethod
    def of(cls, quick: bool, repeats: int, context: int) -> Plan:
        """A plan whose texts are shorter than the model's context."""
        words = (24,) if quick else (24, 96)
        return cls(max(5, repeats), 10 if quick else 40, tuple(max(1, min(count, context // 4)) for count in words))


def ask(client: Client, path: str, texts: Sequence[str]) -> tuple[float, int]:
    """Send one request; its seconds and its tokens. Raises BenchError."""
    connection = http.client.HTTPConnection(client.host, client.port, timeout=client.timeout)
    body = json.dumps({"input": list(texts), "truncate": True})
    try:
        connection.connect()
        begun = time.perf_counter()
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
        seconds = time.perf_counter() - begun
    except (OSError, http.client.HTTPException) as error:
        raise BenchError(f"The server broke off a request: {error!r}") from error
    finally:
        connection.close()
    if response.status != 200:
        raise BenchError(f"The server answered {response.status}: {answer[:300].decode('utf-8', 'replace')}")
    return seconds, int(json.loads(answer)["usage"]["prompt_tokens"])


def engine_details(client: Client) -> dict[str, str] | None:
    """The engine's details in /health; None for an engine that is not built for one device. Raises BenchError."""
    connection = http.client.HTTPConnection(client.host, client.port, timeout=client.timeout)
    try:
        connection.request("GET", "/health")
        details: dict[str, str] | None = json.loads(connection.getresponse().read()).get("engine")
        return details
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise BenchError(f"The server broke off a request: {error!r}") from error
    finally:
        connection.close()


def measure(client: Client, path: str, plan: Plan) -> list[dict[str, Any]]:
    """One row for each number and length of texts, after five requests as warm-up."""
    for _ in range(5):
        ask(client, path, [client.words(plan.words[0])])
    rows = []
    for words in plan.words:
        for texts in TEXTS:
            say(f"{texts} text(s) of {words} words, {plan.repeats} × {plan.requests} requests …")
            every: list[float] = []
            rates, tokens, p99 = [], 0, []
            for _ in range(plan.repeats):
                answers = [ask(client, path, [client.words(words) for _ in range(texts)]) for _ in range(plan.requests)]
                seconds = [one for one, _ in answers]
                every += seconds
                tokens += sum(count for _, count in answers)
                rates.append(texts * len(seconds) / sum(seconds))
                p99.append(percentiles(seconds)["p99"])
            latency = percentiles(every) | {"p99_repeats": spread(p99), "mean": statistics.fmean(every) * 1000}
            rows.append(
                {
                    "texts": texts,
                    "words": words,
                    "tokens_per_text": round(tokens / (len(every) * texts), 1),
                    "latency_ms": latency,
                    "texts_per_second": spread(rates),
                }
            )
    return rows


def run(bundle: Path, plan: Plan, *, url: str | None, wait: float) -> dict[str, Any]:
    """The report. url: measure a server that already runs (without cold start and memory)."""
    manifest = read_manifest(bundle)
    facts = manifest["run"]
    path = PATHS[facts["task"]]
    before = box.load_average()
    report = head(manifest, url, {"repeats": plan.repeats, "requests": plan.requests}) | {"task": facts["task"]}
    if url is None:
        ready, first = [], []
        for index in range(plan.repeats):
            say(f"cold start {index + 1} of {plan.repeats} …")
            with server(bundle, wait) as (_, client, started):
                ready.append(time.perf_counter() - started)
                ask(client, path, [client.words(8)])
                first.append(time.perf_counter() - started)
        report["cold_start"] = {"ready_seconds": spread(ready), "first_answer_seconds": spread(first)}
        with server(bundle, wait) as (child, client, _):
            report["engine_details"] = engine_details(client)
            report["batches"] = measure(client, path, plan)
            report["memory"] = box.process_memory(child.pid) | {
                "method": "VmHWM and Pss of the server's process tree after the last repeat"
            }
    else:
        client = Client(url)
        if not client.ready():
            raise BenchError(f"No server is ready at {url}: its /health does not answer 200.")
        report["engine_details"] = engine_details(client)
        report["batches"] = measure(client, path, plan)
    report["load"] = load_since(before)
    report["notes"] = busy(report["load"])
    return report


def table(report: Mapping[str, Any]) -> str:
    """The figures as a text table."""
    lines: list[tuple[str, ...]] = [("texts", "tokens each", "p50 ms", "p95 ms", "p99 ms", "texts/s")]
    for row in report["batches"]:
        latency, rate = row["latency_ms"], row["texts_per_second"]
        lines.append(
            (
                str(row["texts"]),
                f"{row['tokens_per_text']:.0f}",
                *(f"{latency[name]:.1f}" for name in ("p50", "p95", "p99")),
                f"{rate['mean']:.1f} ± {rate['sd'] or 0:.1f}",
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def summary(report: Mapping[str, Any]) -> str:
    """The table and the lines under it."""
    lines = ["", table(report), "Latency is of a whole request through HTTP."]
    if cold := report["cold_start"]:
        first = cold["first_answer_seconds"]
        lines.append(f"cold start to first answer {first['mean']:.2f} ± {first['sd']:.2f} s")
    if memory := report["memory"]:
        peak, pss = memory["peak_rss_bytes"], memory["pss_bytes"]
        lines.append(
            f"peak memory                {size(peak) if peak else 'unknown'}"
            f" (proportional {size(pss) if pss else 'unknown'})"
        )
    return "\n".join([*lines, *(f"note: {note}" for note in report["notes"])])


def measured(given: argparse.Namespace) -> dict[str, Any]:
    """The report for the options of ``bench``."""
    context = int(read_manifest(given.bundle)["run"].get("context") or 128)
    return run(given.bundle, Plan.of(given.quick, given.repeats, context), url=given.url, wait=given.wait)
