"""Parses llama.cpp's output: answers into pieces and errors, and the log of a failed load into its reason."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from runtimes.engine import Emit, EngineError, Logprob, Piece, RequestRefused, Sampling, StopScanner


class StreamedAnswer:
    """Turns llama.cpp's chunks into pieces: finds stop strings and end tokens, keeps the counts for the last piece."""

    def __init__(self, sampling: Sampling, stop_ids: frozenset[int], emit: Emit) -> None:
        self.sampling, self.stop_ids, self.emit = sampling, stop_ids, emit
        self.stops = StopScanner(sampling.stop)
        self.prompt_tokens = self.cached = self.tokens = 0
        self.error: EngineError | None = None

    def take(self, data: bytes) -> bool:
        chunk = json.loads(data)
        if "error" in chunk:
            self.error = refusal(chunk["error"])
            return True
        progress = chunk.get("prompt_progress")
        if progress is not None:
            self.prompt_tokens, self.cached = progress["total"], progress["cache"]
            return self.emit(Piece(""))
        choice = chunk["choices"][0]
        if choice["finish_reason"] is not None:
            usage = chunk["usage"]
            return self._finish(choice["text"], choice["finish_reason"], usage["completion_tokens"])
        extra = chunk["__verbose"]
        ids = tuple(extra["tokens"])
        self.tokens = extra["tokens_predicted"]
        ended = bool(ids) and ids[-1] in self.stop_ids
        text, stopped = self.stops.feed(choice["text"])
        likely = () if choice["logprobs"] is None or ended else logprobs(choice, self.sampling)
        if ended or stopped:
            self.emit(Piece(text, ids, self.tokens, likely))
            self._finish("", "stop", self.tokens, drop_held=stopped)
            return True
        return self.emit(Piece(text, ids, self.tokens, likely))

    def _finish(self, text: str, reason: str, tokens: int, drop_held: bool = False) -> bool:
        text, _ = self.stops.feed(text)
        if not drop_held:
            text += self.stops.rest()
        self.emit(Piece(text, (), tokens, (), reason, prompt_tokens=self.prompt_tokens, cached_tokens=self.cached))
        return True


def logprobs(choice: Mapping[str, Any], sampling: Sampling) -> tuple[Logprob, ...]:
    """The log-probabilities of an answer's tokens, with ``sampling.logprobs`` alternatives each."""
    if sampling.logprobs is None or choice["logprobs"] is None:
        return ()

    def entry(raw: Mapping[str, Any], top: tuple[Logprob, ...] = ()) -> Logprob:
        return Logprob(raw["id"], raw["token"], tuple(raw["bytes"]), raw["logprob"], top)

    return tuple(
        entry(raw, tuple(entry(other) for other in raw["top_logprobs"][: sampling.logprobs]))
        for raw in choice["logprobs"]["content"]
    )


def refusal(error: Mapping[str, Any]) -> EngineError:
    """The error of a server's error object: RequestRefused where the request is at fault, else EngineError."""
    message = str(error.get("message", error))
    if error.get("type") == "exceed_context_size_error":
        return RequestRefused(message, code="context_length_exceeded")
    if error.get("code") == 400:
        return RequestRefused(message)
    return EngineError(f"llama.cpp failed: {message}")


@contextlib.contextmanager
def capture_stderr(wanted: bool) -> Iterator[list[str]]:
    """Collect the lines that the C++ library writes to file descriptor 2 while the model loads."""
    log: list[str] = []
    if not wanted:
        yield log
        return
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), 2)
        try:
            yield log
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            sink.seek(0)
            log += sink.read().decode(errors="replace").splitlines()


def log_reason(log: Sequence[str]) -> str:
    """The first error in llama.cpp's log: "0.00.169.057 E llama_model_load: error loading model: …"."""
    errors = [line.partition(" E ")[2] for line in log if " E " in line]
    return errors[0].partition(": ")[2].strip() if errors else ""
