"""A load generator for servers with OpenAI's completions API: streamed requests from threads, timed per piece."""

from __future__ import annotations

import http.client
import json
import random
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

# Words of one or two tokens in every tokenizer; a random sequence of them is in no prefix cache.
WORDS = (
    "time",
    "water",
    "people",
    "house",
    "light",
    "river",
    "stone",
    "green",
    "music",
    "paper",
    "story",
    "table",
    "window",
    "garden",
    "market",
    "summer",
    "winter",
    "number",
    "letter",
    "school",
    "animal",
    "bridge",
    "castle",
    "doctor",
    "engine",
    "forest",
    "glass",
    "history",
    "island",
    "jacket",
    "kitchen",
    "ladder",
    "machine",
    "nature",
    "ocean",
    "planet",
    "question",
    "road",
    "silver",
    "travel",
    "uncle",
    "valley",
    "wheel",
    "yellow",
)


class BenchError(Exception):
    """The benchmark cannot go on; the text is one sentence."""


@dataclass
class Answer:
    """One streamed answer. Times are perf_counter seconds; pieces: the arrival of each piece of text."""

    sent: float
    pieces: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    finish: str | None = None

    @property
    def ttft(self) -> float:
        """Seconds from sending the request to the first text."""
        return self.pieces[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between pieces of text (a piece is one token, except for a character of several tokens)."""
        return [after - before for before, after in zip(self.pieces, self.pieces[1:], strict=False)]

    @property
    def seconds(self) -> float:
        """Seconds from sending to the last text."""
        return self.pieces[-1] - self.sent


class Client:
    """Requests to one server. avoid: token ids that would end an answer early; a logit bias prevents them, so that
    every run decodes the same number of tokens. Raises BenchError for a url of another form.
    """

    def __init__(self, url: str, *, avoid: Sequence[int] = (), timeout: float = 600.0) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise BenchError(f"{url} is not an address of the form http://HOST:PORT.")
        self.host, self.port, self.timeout = parts.hostname, parts.port or 80, timeout
        self.bias = {str(token): -100 for token in avoid}
        self.random = random.Random(time.time_ns())  # noqa: S311 - only has to differ from the run before

    def words(self, count: int) -> str:
        """A prompt of ``count`` words that is in no prefix cache."""
        return " ".join(self.random.choice(WORDS) for _ in range(count))

    def ready(self) -> bool:
        """Whether /health reports that the model is loaded."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def ask(self, prompt: str, max_tokens: int) -> Answer:
        """Stream one completion. Raises BenchError when the server does not send a complete stream."""
        body: dict[str, Any] = {
            "prompt": prompt,
            "max_tokens": max_tokens,
            "stream": True,
            "temperature": 0,
            "stream_options": {"include_usage": True},
        }
        if self.bias:
            body["logit_bias"] = self.bias
        connection = http.client.HTTPConnection(self.host, self.port, timeout=self.timeout)
        try:
            connection.connect()
            answer = Answer(time.perf_counter())
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                text = response.read(2000).decode("utf-8", "replace")
                raise BenchError(f"The server answered {response.status} to a completion: {text[:300]}")
            while line := response.readline():
                if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                    _read(answer, line, time.perf_counter())
        except (OSError, http.client.HTTPException) as error:
            raise BenchError(f"The server broke off a completion: {error!r}") from error
        finally:
            connection.close()
        if not answer.pieces:
            raise BenchError("The server ended a completion without any text.")
        answer.tokens = answer.tokens or len(answer.pieces)
        return answer

    def together(self, prompts: Sequence[str], max_tokens: int) -> list[Answer]:
        """One stream for each prompt, all started at the same moment. Raises BenchError."""
        answers: list[Answer | None] = [None] * len(prompts)
        failures: list[BaseException] = []
        start = threading.Barrier(len(prompts))

        def one(index: int) -> None:
            try:
                start.wait()
                answers[index] = self.ask(prompts[index], max_tokens)
            except (BenchError, threading.BrokenBarrierError) as error:
                failures.append(error)

        threads = [threading.Thread(target=one, args=(index,), daemon=True) for index in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise BenchError(str(failures[0]))
        return [answer for answer in answers if answer is not None]


def _read(answer: Answer, line: bytes, now: float) -> None:
    event = json.loads(line[6:])
    if error := event.get("error"):
        raise BenchError(f"The server failed in the middle of a completion: {error.get('message', error)}")
    for choice in event.get("choices") or ():
        if choice.get("text"):
            answer.pieces.append(now)
        answer.finish = choice.get("finish_reason") or answer.finish
    if usage := event.get("usage"):
        answer.prompt_tokens, answer.tokens = usage["prompt_tokens"], usage["completion_tokens"]
        answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation (of the sample), minimum, maximum and all values."""
    return {
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "min": min(values),
        "max": max(values),
        "values": [round(value, 6) for value in values],
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """The percentile, with linear interpolation. percent: 0 to 100."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def percentiles(values: Sequence[float], scale: float = 1000.0) -> dict[str, float]:
    """p50, p95 and p99 (in milliseconds when the values are seconds), and the number of values."""
    return {**{f"p{p}": percentile(values, p) * scale for p in (50, 95, 99)}, "count": len(values)}


def measure(
    client: Client, streams: int, *, repeats: int, prompt_words: int, prefill_words: int, tokens: int
) -> dict[str, Any]:
    """One row of the report: ``streams`` concurrent answers, ``repeats`` times, each with a new prompt."""
    short: list[list[Answer]] = []
    long: list[list[Answer]] = []
    for _ in range(repeats):
        short.append(client.together([client.words(prompt_words) for _ in range(streams)], tokens))
        long.append(client.together([client.words(prefill_words) for _ in range(streams)], 1))
    every = [answer for row in short for answer in row]
    row: dict[str, Any] = {
        "streams": streams,
        "repeats": repeats,
        "tokens_per_answer": tokens,
        "prompt_tokens": round(statistics.fmean(answer.prompt_tokens for answer in every)),
        "prefill_prompt_tokens": round(statistics.fmean(answer.prompt_tokens for row in long for answer in row)),
        "cached_prompt_tokens": max(answer.cached_tokens for rows in (short, long) for row in rows for answer in row),
        "ttft_ms": spread([statistics.fmean(answer.ttft for answer in row) * 1000 for row in short])
        | percentiles([answer.ttft for answer in every]),
        "inter_token_ms": percentiles([gap for answer in every for gap in answer.gaps]),
        "request_ms": percentiles([answer.seconds for answer in every]),
        "decode_tokens_per_second": spread([decode_rate(row) for row in short]),
        "prefill_tokens_per_second": spread([prefill_rate(row) for row in long]),
    }
    per_repeat = [percentiles([gap for answer in row for gap in answer.gaps]) for row in short]
    row["inter_token_ms"] |= {
        f"{name}_repeats": spread([one[name] for one in per_repeat]) for name in ("p50", "p95", "p99")
    }
    return row


def decode_rate(answers: Sequence[Answer]) -> float:
    """Decoded tokens per second of all streams together, without each first token, which belongs to the prefill."""
    begin = min(answer.pieces[0] for answer in answers)
    end = max(answer.pieces[-1] for answer in answers)
    return sum(answer.tokens - 1 for answer in answers) / max(end - begin, 1e-9)


def prefill_rate(answers: Sequence[Answer]) -> float:
    """Prefilled tokens per second of all streams together, without cached ones, until the last first token."""
    begin = min(answer.sent for answer in answers)
    end = max(answer.pieces[0] for answer in answers)
    return sum(answer.prompt_tokens - answer.cached_tokens for answer in answers) / max(end - begin, 1e-9)


def roofline(decode: float, read_per_token: int, bytes_per_second: float, *, gpu: bool = False) -> dict[str, Any]:
    """One stream's decode speed as a percentage of the memory's bandwidth.

    decode: tokens/s of one stream (several streams share each read of the weights, so the bound is for one). Above
    100 % the figures contradict each other; below 30 % something other than memory is the limit. gpu: a GPU reads the
    weights, while bytes_per_second is the CPU's.
    """
    if gpu:
        return {
            "percent": None,
            "verdict": "unknown",
            "note": "The GPU reads the weights, and its memory's speed is not measured here: `packager plan` has "
            "the ceiling by the data sheet.",
        }
    if read_per_token <= 0 or bytes_per_second <= 0:
        return {"percent": None, "verdict": "unknown", "note": "The manifest does not say what a token reads."}
    percent = decode * read_per_token / bytes_per_second * 100
    verdict, note = "plausible", ""
    if percent > 100:
        verdict, note = (
            "invalid",
            (
                "Faster than the memory that was measured: the weights fit the processor's cache, "
                "the bandwidth was measured under load, or the bytes per token are wrong."
            ),
        )
    elif percent < 30:
        verdict, note = (
            "suspicious",
            (
                "Far below the memory's speed: too few threads, a busy or throttled machine, "
                "or a slow code path for this processor."
            ),
        )
    return {
        "percent": percent,
        "ceiling_tokens_per_second": bytes_per_second / read_per_token,
        "verdict": verdict,
        "note": note,
    }


def table(report: Mapping[str, Any]) -> str:
    """The figures as a text table."""
    head = ("streams", "TTFT ms", "p50 ms", "p95 ms", "p99 ms", "decode tok/s", "prefill tok/s")
    lines = [head]
    for row in report["streams"]:
        gap = row["inter_token_ms"]
        lines.append(
            (
                str(row["streams"]),
                _pm(row["ttft_ms"]),
                f"{gap['p50']:.1f}",
                f"{gap['p95']:.1f}",
                f"{gap['p99']:.1f}",
                _pm(row["decode_tokens_per_second"]),
                _pm(row["prefill_tokens_per_second"]),
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _pm(stat: Mapping[str, Any]) -> str:
    return f"{stat['mean']:.1f} ± {stat['sd']:.1f}" if stat.get("sd") is not None else f"{stat['mean']:.1f}"
