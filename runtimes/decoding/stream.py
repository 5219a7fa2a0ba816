"""What the engines share that choose tokens themselves: refusals, tokens turned into pieces, positions to score."""

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

    def __init__(self, words: Detokenizer, sampling: Sampling, prompt_tokens: int, emit: Emit) -> None:
        self.words, self.emit, self.prompt_tokens = words, emit, prompt_tokens
        self.text, self.stops = words.stream(), StopScanner(sampling.stop)
        self.tokens = 0

    def take(self, token: int, top: tuple[float, Mapping[int, float]] | None) -> bool:
        """One token more, with its log-probability and the likeliest beside it; True when the answer is over or not
        wanted any longer.
        """
        self.tokens += 1
        logprobs: tuple[Logprob, ...] = ()
        if top is not None:
            own, others = top
            near = tuple(self._logprob(other, value) for other, value in others.items())
            logprobs = (self._logprob(token, own, near),)
        text, stopped = self.stops.feed(self.text.step(self.words.tokenizer, token) or "")
        cancelled = self.emit(Piece(text, (token,), self.tokens, logprobs))
        if stopped and not cancelled:
            self.emit(Piece("", (), self.tokens, (), "stop", self.prompt_tokens))
        return stopped or cancelled

    def ended(self, token: int) -> None:
        """The model's own end."""
        self.tokens += 1
        if not self.emit(Piece("", (token,), self.tokens)):
            self.finish("stop")

    def finish(self, reason: str) -> None:
        """The last piece, with what a stop string had held back."""
        self.emit(Piece(self.stops.rest(), (), self.tokens, (), reason, self.prompt_tokens))

    def _logprob(self, token: int, value: float, top: tuple[Logprob, ...] = ()) -> Logprob:
        raw = self.words.bytes_of(token)
        return Logprob(token, raw.decode(errors="replace"), tuple(raw), value, top)


def pieces_to_score(
    ids: Sequence[int], positions: Sequence[int], vocabulary: int, size: int
) -> Iterator[tuple[int, Sequence[int], list[int]]]:
    """Pieces of a sequence as (where it begins, its ids, its rows whose distribution is asked for). A position p asks
    for the token after ids[:p]. Raises ValueError for positions or ids that do not exist.
    """
    wanted = sorted(set(positions))
    if not wanted:
        return
    if wanted[0] < 1 or wanted[-1] > len(ids):
        raise ValueError(f"positions {wanted[0]} to {wanted[-1]} do not lie in a sequence of {len(ids)} tokens")
    if any(not 0 <= token < vocabulary for token in ids):
        raise ValueError(f"a token id lies outside the vocabulary of {vocabulary}")
    asked = set(wanted)
    for begin in range(0, wanted[-1], size):
        part = ids[begin : min(begin + size, wanted[-1])]
        yield begin, part, [at for at in range(len(part)) if begin + at + 1 in asked]
