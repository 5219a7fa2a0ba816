"""The benchmark's arithmetic, and its client against a real HTTP server whose timing is known."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from runtimes.bench import llm, machine
from runtimes.bench import server as bench_server
from runtimes.bench.client import (
    Answer,
    BenchError,
    Client,
    decode_rate,
    measure,
    percentile,
    prefill_rate,
    roofline,
    spread,
)

FIRST, GAP = 0.04, 0.01


class Model(http.server.BaseHTTPRequestHandler):
    """Streams one word every GAP seconds after FIRST, as the real server does; records its requests."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    requests: ClassVar[list[dict[str, Any]]]
    mode = "good"

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" and self.mode != "loading" else 503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append(body)
        if self.mode == "refuse":
            self.send_error(400, "no")
            return
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        if self.mode == "error":
            self.event({"error": {"message": "out of memory"}})
            return
        time.sleep(FIRST)
        for index in range(0 if self.mode == "silent" else body["max_tokens"]):
            if index:
                time.sleep(GAP)
            self.event({"choices": [{"index": 0, "text": "x", "finish_reason": None}], "usage": None})
        self.event(
            {
                "choices": [],
                "usage": {
                    "prompt_tokens": 20,
                    "completion_tokens": body["max_tokens"],
                    "prompt_tokens_details": {"cached_tokens": 0},
                },
            }
        )
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, value: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")
        self.wfile.flush()

    def log_message(self, *args: Any) -> None:
        return None


@pytest.fixture
def model() -> Iterator[tuple[type[Model], str]]:
    """The handler class (to look into and to change) and its address."""

    class Mine(Model):
        requests: ClassVar[list[dict[str, Any]]] = []

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mine)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield Mine, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_figures_agree_with_a_server_of_known_timing(model: tuple[type[Model], str]) -> None:
    """TTFT at least FIRST, gaps about GAP, every repeat counted, no prompt used twice, no answer ended early."""
    handler, url = model
    row = measure(Client(url, avoid=[2, 7]), 4, repeats=5, prompt_words=8, prefill_words=16, tokens=6)
    assert row["ttft_ms"]["mean"] >= FIRST * 1000 and len(row["ttft_ms"]["values"]) == 5
    assert GAP * 900 <= row["inter_token_ms"]["p50"] <= row["inter_token_ms"]["p95"] <= row["inter_token_ms"]["p99"]
    assert row["inter_token_ms"]["count"] == 4 * 5 * 5
    assert row["decode_tokens_per_second"]["mean"] <= 4 / GAP * 1.1
    assert row["prefill_tokens_per_second"]["mean"] <= 4 * 20 / FIRST and row["prompt_tokens"] == 20
    prompts = [request["prompt"] for request in handler.requests]
    assert len(set(prompts)) == len(prompts) == 40
    assert all(
        request["logit_bias"] == {"2": -100, "7": -100} and request["temperature"] == 0 for request in handler.requests
    )


@pytest.mark.parametrize(
    ("mode", "says"), [("refuse", "answered 400"), ("error", "out of memory"), ("silent", "without any text")]
)
def test_a_failing_server_ends_the_benchmark_with_a_sentence(
    model: tuple[type[Model], str], mode: str, says: str
) -> None:
    """In one stream and in several."""
    model[0].mode = mode
    client = Client(model[1])
    with pytest.raises(BenchError, match=says):
        client.ask("x", 3)
    with pytest.raises(BenchError):
        client.together(["x", "y"], 3)


def test_a_server_that_is_not_there_or_not_ready_is_named(model: tuple[type[Model], str], tmp_path: Path) -> None:
    """No traceback."""
    with pytest.raises(BenchError, match="http://HOST:PORT"):
        Client("ftp://x")
    with pytest.raises(BenchError, match="broke off"):
        Client(f"http://127.0.0.1:{bench_server.free_port()}").ask("x", 1)
    model[0].mode = "loading"
    assert not Client(model[1]).ready()
    with pytest.raises(BenchError, match="No server is ready"):
        llm.run(bundle(tmp_path), llm.Plan(5, 4, 4, 8), url=model[1], wait=1)


def bundle(folder: Path, **run: Any) -> Path:
    """As much of a bundle as the benchmark reads."""
    manifest = {
        "schema_version": 1,
        "bundle": "b",
        "name": "m",
        "needs": {},
        "files": [],
        "run": {
            "engine": "llamacpp",
            "stop_ids": [2],
            "context": 256,
            "slots": 4,
            "threads": 1,
            "read_per_token_bytes": 1_000_000,
            "model_bytes": 1_000_000,
            **run,
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    return folder


@pytest.mark.real  # it measures for seconds
def test_a_report_of_a_running_server_has_every_figure(
    model: tuple[type[Model], str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """report.json through the command line, written in one step."""
    quick = machine.bandwidth
    monkeypatch.setattr(machine, "bandwidth", lambda threads: quick(threads, total_bytes=8 << 20, passes=2))
    monkeypatch.setattr(llm.Plan, "of", classmethod(lambda cls, *_: cls(5, 3, 4, 8)))
    place = tmp_path / "report.json"
    code = llm.main(["--bundle", str(bundle(tmp_path)), "--url", model[1], "--quick", "--output", str(place)])
    assert code == 0, capsys.readouterr().err
    report = json.loads(place.read_text("utf-8"))
    assert [row["streams"] for row in report["streams"]] == [1, 4, 8] and report["schema_version"] == 1
    assert report["roofline"]["verdict"] == "suspicious" and report["bandwidth"]["bytes_per_second"] > 0
    assert any("8 streams wait" in note for note in report["notes"])
    shown = capsys.readouterr()
    assert shown.out.strip() == str(place) and "decode tok/s" in shown.err
    assert [path.name for path in tmp_path.glob(".report*")] == []


def test_a_server_that_cannot_start_is_quoted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its last words are the reason; exit code 9 and no report."""
    code = llm.main(["--bundle", str(bundle(tmp_path, engine="abacus")), "--output", str(tmp_path / "r.json")])
    errors = capsys.readouterr().err
    assert (
        code == 9
        and "The server ended: " in errors
        and "Traceback" not in errors
        and not (tmp_path / "r.json").exists()
    )


@pytest.mark.parametrize(("decode", "verdict"), [(50.0, "plausible"), (101.0, "invalid"), (29.0, "suspicious")])
def test_the_impossible_and_the_slow_are_flagged(decode: float, verdict: str) -> None:
    """Above 100 % of what memory allows, and below 30 %."""
    bound = roofline(decode, 1_000_000, 100_000_000.0)
    assert bound["verdict"] == verdict and bound["percent"] == pytest.approx(decode)
    assert bool(bound["note"]) is (verdict != "plausible")
    assert roofline(1.0, 0, 1.0)["verdict"] == "unknown"


def test_a_gpu_is_not_held_against_the_processors_memory(
    model: tuple[type[Model], str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A card of 320 GB/s beside main memory of 40 would be called impossible; the report says what it does not know."""
    place = bundle(tmp_path)
    manifest = json.loads((place / "manifest.json").read_text("utf-8"))
    (place / "manifest.json").write_text(json.dumps(manifest | {"needs": {"gpu": {"count": 1}}}), "utf-8")
    monkeypatch.setattr(machine, "bandwidth", lambda threads: {"bytes_per_second": 1e3, "threads": threads})
    report = llm.run(place, llm.Plan(5, 3, 4, 8, (1,)), url=model[1], wait=1)
    assert (report["roofline"]["percent"], report["roofline"]["verdict"]) == (None, "unknown")
    assert "packager plan" in report["roofline"]["note"] and report["roofline"]["note"] in " ".join(report["notes"])


def test_rates_leave_out_what_belongs_elsewhere() -> None:
    """The first token is the prefill's; cached prompt tokens were not prefilled."""
    one = Answer(0.0, [1.0, 1.5, 2.0], prompt_tokens=30, cached_tokens=10, tokens=3)
    two = Answer(0.0, [1.0, 2.0, 3.0], prompt_tokens=30, cached_tokens=10, tokens=3)
    assert decode_rate([one, two]) == pytest.approx(2.0) and prefill_rate([one, two]) == pytest.approx(40.0)


def test_statistics() -> None:
    """Sample deviation and linear percentiles."""
    assert spread([1.0, 2.0, 3.0])["sd"] == pytest.approx(1.0) and spread([1.0])["sd"] is None
    assert percentile([1.0, 2.0, 3.0, 4.0], 50) == 2.5 and percentile([5.0], 99) == 5.0
    assert llm.Plan.of(True, 2, 4096).repeats == 5 and llm.stream_counts("8,2") == (1, 2, 8)


def test_memory_and_bandwidth_of_this_machine_are_read() -> None:
    """More bytes per second than a disk, and a peak that holds what was touched."""
    assert machine.bandwidth(2, total_bytes=16 << 20, passes=3)["bytes_per_second"] > 1e8
    import os

    memory = machine.process_memory(os.getpid())
    assert memory["peak_rss_bytes"] is None or memory["peak_rss_bytes"] > 5 << 20
    assert machine.physical_cores() >= 1 and machine.machine()["logical_cores"] >= 1
