"""Compares our server with llama.cpp's own HTTP server in one run: decode tokens/s and time to first token, in turns.

    python benchmarks/serving.py --bundle BUNDLE [--streams 1 8] [--repeats 5] [--tokens 128] [--output report.json]

Both run the same library on the same GGUF with the same slots, threads, batch and flash attention, each in a process of
its own; the client is one loop over raw sockets with minimal parsing, so that it costs both the same.
Every repeat sends both the same fresh prompts in alternating order; ratio and difference are medians of these
pairs, with 95 % bootstrap intervals. The first token needs many short answers (--tokens 8 --repeats 80): one alone
varies by a tenth of a second. On Linux the processor time that each
server spends on a token is shown too: it depends little on the machine's other load.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

GOAL_SPEED, GOAL_FIRST_MS = 0.95, 10.0


@dataclass
class Stream:
    """One request on its own connection. Times in seconds since the clock's start, 0.0 when not yet known."""

    socket: socket.socket
    begun: float = 0.0
    first: float = 0.0
    last: float = 0.0
    tail: bytes = b""
    tokens: int = 0


def measure(port: int, prompts: Sequence[Sequence[int]], tokens: int) -> dict[str, float]:
    """Send all prompts at once and read the streams to their ends.

    Gives tokens_per_second (all streams together, from the first token of any to the last of all), first_ms (mean time
    to the first token) and tokens.
    """
    streams, selector = [], selectors.DefaultSelector()
    bias = {str(token): -100 for token in (0, 1, 2)}
    for prompt in prompts:
        request = {"prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "stream": True, "logit_bias": bias}
        body = json.dumps(request | {"stream_options": {"include_usage": True}}).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        stream = Stream(socket.create_connection(("127.0.0.1", port)))
        streams.append((stream, head.encode() + body))
    for stream, data in streams:
        stream.begun = time.perf_counter()
        stream.socket.sendall(data)
        selector.register(stream.socket, selectors.EVENT_READ, stream)
    while selector.get_map():
        for key, _ in selector.select(600):
            _read(key.data, selector)
    done = [stream for stream, _ in streams]
    for stream in done:
        stream.tokens = _usage(stream.tail)
    span = max(stream.last for stream in done) - min(stream.first for stream in done)
    total = sum(stream.tokens for stream in done)
    return {
        "tokens_per_second": (total - len(done)) / span,
        "first_ms": statistics.fmean(stream.first - stream.begun for stream in done) * 1000,
        "tokens": total,
    }


def _read(stream: Stream, selector: selectors.BaseSelector) -> None:
    data = stream.socket.recv(1 << 16)
    now = time.perf_counter()
    if not data:
        selector.unregister(stream.socket)
        stream.socket.close()
        return
    if b'"text":"' in data and b'"finish_reason":null' in data:
        if not stream.first and b'"text":""' not in data:
            stream.first = now
        stream.last = now
    stream.tail = (stream.tail + data)[-4096:]


def _usage(tail: bytes) -> int:
    at = tail.rindex(b'"completion_tokens":')
    return int(tail[at + 20 :].split(b",")[0].split(b"}")[0])


@contextlib.contextmanager
def started(command: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Run a server that prints its address; wait until it answers /health with 200. Yields port and process id."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        port = int(line.split("http://127.0.0.1:")[1].split()[0])
        while not _healthy(port):
            if process.poll() is not None:
                raise SystemExit(f"the server ended: {' '.join(command)}")
            time.sleep(0.1)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait(60)


def cpu_seconds(process: int) -> float:
    """Processor time of the process and its threads so far; 0.0 where /proc does not report it."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _healthy(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 2) as probe:
        probe.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return b" 200 " in probe.recv(64)
    return False


def llamacpp_child(bundle: Path, slots: int) -> None:
    """llama.cpp's own HTTP server with the same parameters as ours."""
    from runtimes.engines.llamacpp.engine import LlamaCpp
    from runtimes.manifest import Run, read_bundle

    class Listening(LlamaCpp):
        def _parameters(self, xllamacpp: Any, run: Run, *rest: Any) -> Any:
            parameters = super()._parameters(xllamacpp, run, *rest)
            parameters.hostnames, parameters.api_keys, parameters.n_threads_http = ["127.0.0.1"], [], -1
            return parameters

    engine = Listening(replace(read_bundle(bundle), slots=slots))
    print(engine.address, flush=True)
    signal.sigwait([signal.SIGTERM, signal.SIGINT])
    engine.close()


def sized_bundle(bundle: Path, slots: int, threads: int | None, folder: Path) -> Path:
    """The same bundle with another number of slots and threads, its files linked."""
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    manifest["run"]["slots"] = slots
    if threads is not None:
        manifest["run"]["threads"] = threads
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    for key in ("model", "tokenizer", "chat_template"):
        if manifest["run"].get(key):
            target = folder / manifest["run"][key]
            target.parent.mkdir(parents=True, exist_ok=True)
            source = (bundle / manifest["run"][key]).resolve()
            try:
                target.hardlink_to(source)
            except OSError:
                target.write_bytes(source.read_bytes())
    return folder


def compare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run both servers in turns. The report's ratios are ours / theirs, medians over the pairs."""
    slots = max(options.streams)
    bundle = sized_bundle(options.bundle, slots, options.threads, folder)
    ours = [sys.executable, "-m", "runtimes", "serve", "--bundle", str(bundle), "--port", "0"]
    theirs = [sys.executable, __file__, "--bundle", str(bundle), "--llamacpp-child", str(slots)]
    rng, rows = random.Random(0), []
    with started(ours) as our_server, started(theirs) as their_server:
        ports = {"ours": our_server, "llama.cpp": their_server}
        for port, _ in ports.values():
            measure(port, [[rng.randrange(100, 20000) for _ in range(16)] for _ in range(slots)], 16)
        for streams in options.streams:
            samples: dict[str, list[dict[str, float]]] = {name: [] for name in ports}
            load = []
            for repeat in range(options.repeats):
                prompts = [[rng.randrange(100, 20000) for _ in range(options.prompt)] for _ in range(streams)]
                order = list(ports) if repeat % 2 == 0 else list(reversed(ports))
                for name in order:
                    port, process = ports[name]
                    before = cpu_seconds(process)
                    sample = measure(port, prompts, options.tokens)
                    sample["cpu_ms_per_token"] = (cpu_seconds(process) - before) / sample["tokens"] * 1000
                    samples[name].append(sample)
                load.append(os.getloadavg()[0])
            rows.append(_row(streams, samples, load))
    facts = {"cpus": os.cpu_count(), "threads": options.threads, "repeats": options.repeats}
    return {"bundle": options.bundle.name, **facts, "rows": rows}


def interval(values: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """The 95 % bootstrap interval of the median (Efron 1979)."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(draws))
    return medians[draws // 40], medians[-1 - draws // 40]


def _row(streams: int, samples: dict[str, list[dict[str, float]]], load: list[float]) -> dict[str, Any]:
    row: dict[str, Any] = {"streams": streams, "load": round(statistics.fmean(load), 1)}
    for name, measurements in samples.items():
        for key in ("tokens_per_second", "first_ms", "cpu_ms_per_token"):
            values = [sample[key] for sample in measurements]
            row[f"{name} {key}"] = {
                "median": statistics.median(values),
                "mean": statistics.fmean(values),
                "deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
                "values": values,
            }
    pairs = list(zip(samples["ours"], samples["llama.cpp"], strict=True))
    # adjacent runs share the machine's load, so the ratio is computed for each pair
    compared = {
        "speed_ratio": [a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs],
        "first_ms_more": [a["first_ms"] - b["first_ms"] for a, b in pairs],
        "cpu_ratio": [a["cpu_ms_per_token"] / (b["cpu_ms_per_token"] or 1) for a, b in pairs],
    }
    for key, values in compared.items():
        row[key], row[f"{key} interval"] = statistics.median(values), interval(values)
    row["met"] = row["speed_ratio"] >= GOAL_SPEED and row["first_ms_more"] <= GOAL_FIRST_MS
    return row


def show(report: dict[str, Any]) -> None:
    """The report as a table."""
    print(f"{'streams':>7} {'server':>10} {'tokens/s':>16} {'first token, ms':>18} {'CPU ms/token':>15} {'load':>5}")
    for row in report["rows"]:
        for name in ("ours", "llama.cpp"):
            speed, first = row[f"{name} tokens_per_second"], row[f"{name} first_ms"]
            cpu = row[f"{name} cpu_ms_per_token"]
            print(
                f"{row['streams']:>7} {name:>10} {speed['mean']:>8.1f} ± {speed['deviation']:<5.1f}"
                f" {first['mean']:>10.1f} ± {first['deviation']:<5.1f} {cpu['mean']:>8.2f} ± {cpu['deviation']:<4.2f}"
                f" {row['load']:>5}"
            )
        verdict = "met" if row["met"] else "not met"
        low, high = row["speed_ratio interval"]
        soonest, latest = row["first_ms_more interval"]
        print(
            f"{'':>7} {'':>10} ratio {row['speed_ratio']:.3f} [{low:.3f}, {high:.3f}] (goal {GOAL_SPEED}), first token"
            f" {row['first_ms_more']:+.1f} ms [{soonest:+.1f}, {latest:+.1f}] (goal +{GOAL_FIRST_MS:.0f}): {verdict};"
            f" processor time per token × {row['cpu_ratio']:.3f}"
        )


def main() -> int:
    """Exit code 0 when both goals are met at every number of streams, else 1."""
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--threads", type=int, help="instead of the bundle's; 1 is steadier on a busy machine")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--llamacpp-child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.llamacpp_child:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
        llamacpp_child(options.bundle, options.llamacpp_child)
        return 0
    # beside the bundle, so that hard links work
    with tempfile.TemporaryDirectory(dir=options.bundle.resolve().parent) as folder:
        report = compare(options, Path(folder))
    show(report)
    if options.output:
        options.output.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return 0 if all(row["met"] for row in report["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
