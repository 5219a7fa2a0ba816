"""The interface of every engine: requests, pieces of an answer, errors. ``run.engine`` names the engine."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


class EngineError(Exception):
    """The engine could not do its work: the model file does not load, or the library failed."""


class RequestRefused(EngineError):
    """The request cannot be served. ``code``: a word that a program can branch on. ``param``: the field at fault."""

    def __init__(self, message: str, *, code: str = "invalid_value", param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


class Busy(Exception):
    """The queue is full."""


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 are off.

    max_tokens: None means until the context is full. seed: None means a fresh one. stop: strings that end the answer
    and are not part of it. logprobs: None for none, else how many alternatives beside the chosen token (0 to 20).
    schema: a JSON Schema as JSON text that the answer must follow. exact_ids: report the ids of all tokens, also of
    those that hold part of a character; then nothing arrives before the end, and cancelling waits for it.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    schema: str | None = None
    exact_ids: bool = False


@dataclass(frozen=True)
class Logprob:
    """One token and the natural logarithm of its probability in the model's own distribution, before any sampling."""

    id: int
    text: str
    bytes: tuple[int, ...]
    logprob: float
    top: tuple[Logprob, ...] = ()


@dataclass(slots=True)
class Piece:
    """The result of one step. ``text`` holds whole characters only and may be empty.

    ids: the tokens of this piece. tokens: how many were sampled so far, the end token included. finish: None until the
    end, then "stop" or "length". prompt_tokens and cached_tokens are set on the last piece.
    """

    text: str
    ids: tuple[int, ...] = ()
    tokens: int = 0
    logprobs: tuple[Logprob, ...] = ()
    finish: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0


Emit = Callable[[Piece], bool]
"""Receives every piece, on the engine's thread. Returns True to cancel the generation."""


class Engine(Protocol):
    """A loaded model. All methods may be called from several threads at once."""

    context: int
    slots: int
    version: str

    def stream(self, prompt: Sequence[int], sampling: Sampling, emit: Emit) -> None:
        """Generate in the calling thread. Raises RequestRefused or EngineError; cancelling is no error."""
        ...

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[Piece]:
        """The pieces as an iterator; closing it cancels."""
        ...

    def score(self, tokens: Sequence[int], top: int) -> Iterator[Mapping[int, float]]:
        """For each prefix tokens[:1], tokens[:2], …: the ``top`` likeliest next tokens with their log-probabilities."""
        ...

    def memory(self) -> int:
        """Bytes resident now, device memory included where the library reports it."""
        ...

    def close(self) -> None: ...


def iterate(stream: Callable[[Emit], None]) -> Iterator[Piece]:
    """Turn a callback-style generation into an iterator. Closing the iterator cancels and waits for the end."""
    pieces: queue.SimpleQueue[Piece | BaseException | None] = queue.SimpleQueue()
    cancelled = threading.Event()

    def emit(piece: Piece) -> bool:
        pieces.put(piece)
        return cancelled.is_set()

    def work() -> None:
        try:
            stream(emit)
            pieces.put(None)
        except BaseException as error:  # passed to the reader, which raises it in its own thread
            pieces.put(error)

    thread = threading.Thread(target=work, name="generate", daemon=True)
    thread.start()
    try:
        while (item := pieces.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        cancelled.set()
        thread.join()


def check_length(prompt: Sequence[int], context: int) -> None:
    """Raise RequestRefused for an empty prompt and for one that leaves no room for an answer."""
    if not prompt:
        raise RequestRefused("The prompt is empty.", code="empty_prompt")
    if len(prompt) >= context:
        raise RequestRefused(
            f"The prompt has {len(prompt)} tokens, but this model is served with a context of {context} tokens, the "
            "answer included. Shorten the prompt.",
            code="context_length_exceeded",
        )


class StopScanner:
    """Finds stop strings in a growing text; holds back only an end that may become a stop string.

    feed(text) returns the text that is safe to send, and whether a stop string was hit; rest() the held text.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stop for stop in stops if stop)
        self.held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        if not self.stops:
            return text, False
        self.held += text
        hits = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if hits:
            out, self.held = self.held[: min(hits)], ""
            return out, True
        keep = max((self._overlap(stop) for stop in self.stops), default=0)
        cut = len(self.held) - keep
        out, self.held = self.held[:cut], self.held[cut:]
        return out, False

    def rest(self) -> str:
        out, self.held = self.held, ""
        return out

    def _overlap(self, stop: str) -> int:
        """How many characters at the end of the held text begin the stop string."""
        for size in range(min(len(stop) - 1, len(self.held)), 0, -1):
            if self.held.endswith(stop[:size]):
                return size
        return 0
