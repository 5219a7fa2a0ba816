"""Shared by the engines that sample in Python: prompt checks, pieces from tokens, positions to score."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from runtimes.decoding.detokenize import Detokenizer
from runtimes.engine import Emit, Logprob, Piece, RequestRefused, Sampling, StopScanner, check_length


def check_prompt(prompt: Sequence[int], context: int, vocabulary: int) -> None:
    """Raise RequestRefused for an empty prompt, one that leaves no room for an answer, and ids that do not exist."""
    check_length(prompt, context)
    if any(not 0 <= token < vocabulary for token in prompt):
        raise RequestRefused(f"A token id of the prompt lies outside the vocabulary of {vocabulary}.")


class Stream:
    """Turns one answer's tokens into pieces: whole characters, stop strings, the last piece's counts."""

    def __init__(self, detokenizer: Detokenizer, sampling: Sampling, prompt_tokens: int, emit: Emit) -> None:
        self.detokenizer, self.emit, self.prompt_tokens = detokenizer, emit, prompt_tokens
        self.text, self.stops = detokenizer.stream(), StopScanner(sampling.stop)
        self.tokens = 0

    def take(self, token: int, top: tuple[float, Mapping[int, float]] | None) -> bool:
        """Add one token. top: its log-probability and the likeliest alternatives. True when the answer ended or was
        cancelled.
        """
        self.tokens += 1
        logprobs: tuple[Logprob, ...] = ()
        if top is not None:
            own, others = top
            near = tuple(self._logprob(other, value) for other, value in others.items())
            logprobs = (self._logprob(token, own, near),)
        text, stopped = self.stops.feed(self.text.step(self.detokenizer.tokenizer, token) or "")
        cancelled = self.emit(Piece(text, (token,), self.tokens, logprobs))
        if stopped and not cancelled:
            self.emit(Piece("", (), self.tokens, (), "stop", self.prompt_tokens))
        return stopped or cancelled

    def ended(self, token: int) -> None:
        """End the answer with the model's end token."""
        self.tokens += 1
        if not self.emit(Piece("", (token,), self.tokens)):
            self.finish("stop")

    def finish(self, reason: str) -> None:
        """Emit the last piece, with the text that was held back for a stop string."""
        self.emit(Piece(self.stops.rest(), (), self.tokens, (), reason, self.prompt_tokens))

    def _logprob(self, token: int, value: float, top: tuple[Logprob, ...] = ()) -> Logprob:
        raw = self.detokenizer.bytes_of(token)
        return Logprob(token, raw.decode(errors="replace"), tuple(raw), value, top)


def chunks_to_score(
    ids: Sequence[int], positions: Sequence[int], vocabulary: int, size: int
) -> Iterator[tuple[int, Sequence[int], list[int]]]:
    """Chunks of a sequence: (start, ids, rows whose distribution is wanted). Position p means the token after ids[:p].
    Raises ValueError for positions or ids that do not exist.
    """
    ordered = sorted(set(positions))
    if not ordered:
        return
    if ordered[0] < 1 or ordered[-1] > len(ids):
        raise ValueError(f"positions {ordered[0]} to {ordered[-1]} do not lie in a sequence of {len(ids)} tokens")
    if any(not 0 <= token < vocabulary for token in ids):
        raise ValueError(f"a token id lies outside the vocabulary of {vocabulary}")
    wanted = set(ordered)
    for begin in range(0, ordered[-1], size):
        chunk = ids[begin : min(begin + size, ordered[-1])]
        yield begin, chunk, [at for at in range(len(chunk)) if begin + at + 1 in wanted]
