"""ONNX decoders through onnxruntime, without torch: all slots are decoded together, prompts are read between.

One thread runs the model. In turn it reads a piece of one waiting prompt and decodes a token for every slot that is
answering, so a long prompt holds the others up for no longer than its piece takes.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from runtimes.detokenize import Detokenizer
from runtimes.engine import Emit, EngineError, Logprob, Piece, RequestRefused, Sampling, StopScanner, iterate
from runtimes.manifest import Run
from runtimes.memory import give_back, resident_bytes

if TYPE_CHECKING:
    from runtimes.guidance import Guide
    from runtimes.ort_model import Model
    from runtimes.sampling import Sampler

PIECE = 128  # prompt tokens read at once: between two chances to cancel, and between two tokens of the others
SCORE_PIECE = 64  # logits take tokens x vocabulary x 4 bytes: 39 MB for 152,000 entries


@dataclass
class _Request:
    """One answer under way. read: tokens whose keys and values are in the slot's cache."""

    prompt: Sequence[int]
    sampling: Sampling
    emit: Emit
    most: int
    sampler: Sampler
    text: Any
    stops: StopScanner
    guide: Guide | None
    ends: frozenset[int]
    slot: int = -1
    read: int = 0
    last: int = -1
    tokens: int = 0
    error: EngineError | None = None
    over: threading.Event = field(default_factory=threading.Event)


class _Kept:
    """Collects an answer's pieces."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []

    def take(self, piece: Piece) -> bool:
        self.pieces.append(piece)
        return False


class Ort:
    """One loaded model. Each of ``slots`` requests has ``context`` tokens of its own. Raises EngineError."""

    def __init__(self, run: Run, *, verbose: bool = False) -> None:
        from runtimes.guidance import Guides

        self.context, self.slots = run.context, run.slots
        self._model = _open(run, context=run.context, slots=run.slots, verbose=verbose)
        self.version = self._model.version
        self._words = Detokenizer(run.tokenizer)
        self._stop_ids = frozenset(run.stop_ids)
        self._guides = Guides(run.tokenizer, self._model.vocabulary, run.stop_ids)
        self._wake = threading.Condition()
        self._waiting: deque[_Request] = deque()
        self._slots: list[_Request | None] = [None] * run.slots
        self._closing = False
        give_back()
        self._thread = threading.Thread(target=self._work, name="onnxruntime", daemon=True)
        self._thread.start()

    # -- the Engine protocol ------------------------------------------------------------------------------------

    def stream(self, prompt: Sequence[int], sampling: Sampling, emit: Emit) -> None:
        """Generate; ``emit`` is called on the model's thread for every piece and cancels by returning True."""
        from runtimes.sampling import Sampler

        self._check(prompt)
        room = self.context - len(prompt)
        most = room if sampling.max_tokens is None else min(room, sampling.max_tokens)
        if most < 1:
            emit(Piece("", (), 0, (), "length", len(prompt)))
            return
        guide = self._guides.make(sampling.schema) if sampling.schema is not None else None
        request = _Request(
            prompt, sampling, emit, most, Sampler(sampling, prompt), self._words.stream(), StopScanner(sampling.stop),
            guide, self._stop_ids,
        )
        self._run(request)

    def _run(self, request: _Request) -> None:
        """Hand a request to the model's thread and wait for its end. Raises EngineError."""
        with self._wake:
            if self._closing:
                raise EngineError("the engine is closed")
            self._waiting.append(request)
            self._wake.notify()
        request.over.wait()
        if request.error is not None:
            raise request.error

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[Piece]:
        """The pieces of one answer; closing the iterator cancels and frees the slot."""
        return iterate(lambda emit: self.stream(prompt, sampling, emit))

    def score(self, tokens: Sequence[int], top: int) -> Iterator[Mapping[int, float]]:
        """The distribution after every prefix of ``tokens``, cut to the ``top`` likeliest tokens. Each takes a slot
        as a request does.
        """
        from runtimes.sampling import Sampler

        greedy = Sampling(max_tokens=1, temperature=0.0, logprobs=top)
        for end in range(1, len(tokens) + 1):
            prompt = tokens[:end]
            self._check(prompt)
            kept = _Kept()
            self._run(_Request(prompt, greedy, kept.take, 1, Sampler(greedy, prompt), self._words.stream(),
                               StopScanner(()), None, frozenset()))
            found = next(piece.logprobs[0] for piece in kept.pieces if piece.logprobs)
            yield {entry.id: entry.logprob for entry in found.top}

    def memory(self) -> int:
        """Resident bytes of this process; the model runs in it."""
        return resident_bytes()

    def close(self) -> None:
        """End what still runs and free the model."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _check(self, prompt: Sequence[int]) -> None:
        if not prompt:
            raise RequestRefused("The prompt is empty.", code="empty_prompt")
        if len(prompt) >= self.context:
            raise RequestRefused(
                f"The prompt has {len(prompt)} tokens, but this model is served with a context of {self.context} "
                "tokens, the answer included. Shorten the prompt.",
                code="context_length_exceeded",
            )
        if any(not 0 <= token < self._model.vocabulary for token in prompt):
            raise RequestRefused(f"A token id of the prompt lies outside the vocabulary of {self._model.vocabulary}.")

    # -- on the model's thread ----------------------------------------------------------------------------------

    def _work(self) -> None:
        while self._admit():
            try:
                reading = next((one for one in self._slots if one and one.read < len(one.prompt)), None)
                if reading:
                    self._read(reading)
                self._decode()
            except Exception as error:  # of the library: whoever waits must hear of it, and the next may be served
                failure = error if isinstance(error, EngineError) else EngineError(f"the engine failed: {error!r}")
                for request in filter(None, list(self._slots)):
                    request.error = failure
                    self._end(request)

    def _admit(self) -> bool:
        """Give free slots, the lowest first; wait while there is nothing to do. False when the engine closes."""
        with self._wake:
            while not self._closing and not self._waiting and not any(self._slots):
                self._wake.wait()
            if self._closing:
                for request in [*self._waiting, *filter(None, self._slots)]:
                    request.error = EngineError("the engine was closed")
                    request.over.set()
                return False
            for slot, holder in enumerate(self._slots):
                if holder is None and self._waiting:
                    request = self._waiting.popleft()
                    request.slot, self._slots[slot] = slot, request
            return True

    def _read(self, request: _Request) -> None:
        """One piece of a prompt; after the last one the first token is chosen."""
        import numpy as np

        begin, end = request.read, min(request.read + PIECE, len(request.prompt))
        ids = np.array([request.prompt[begin:end]], np.int64)
        logits = self._model.run(ids, [begin], slot=request.slot)
        request.read = end
        if end == len(request.prompt):
            self._take(request, logits[0, -1])
        elif request.emit(Piece("")):
            self._end(request)

    def _decode(self) -> None:
        """A token for every slot that answers. Rows between them are computed too, at a place that is written again."""
        import numpy as np

        ready = [one for one in self._slots if one and one.last >= 0]
        if not ready:
            return
        first, count = ready[0].slot, ready[-1].slot - ready[0].slot + 1
        ids, lengths = np.zeros((count, 1), np.int64), [0] * count
        for request in filter(None, self._slots[first : first + count]):
            lengths[request.slot - first] = request.read
            ids[request.slot - first, 0] = max(0, request.last)
        logits = self._model.run(ids, lengths, slot=first)
        for request in ready:
            request.read += 1
            self._take(request, logits[request.slot - first, -1])

    def _take(self, request: _Request, logits: Any) -> None:
        """Choose the next token and tell of it; the answer may be over with it."""
        from runtimes.sampling import top_logprobs

        chosen = logits
        if request.guide is not None:
            import numpy as np

            chosen = np.where(request.guide.forbidden(), -np.inf, logits)
        token = request.sampler.choose(chosen)
        request.tokens += 1
        request.last = token
        if token in request.ends:
            if not request.emit(Piece("", (token,), request.tokens)):
                self._finish(request, "stop")
            self._end(request)
            return
        logprobs: tuple[Logprob, ...] = ()
        if request.sampling.logprobs is not None:
            every = top_logprobs(logits, len(logits))
            near = [self._logprob(other, every[other]) for other in list(every)[: request.sampling.logprobs]]
            logprobs = (self._logprob(token, every[token], tuple(near)),)
        text, stopped = request.stops.feed(request.text.step(self._words.tokenizer, token) or "")
        if request.emit(Piece(text, (token,), request.tokens, logprobs)):
            self._end(request)
            return
        if request.guide is not None:
            request.guide.take(token)
            stopped = stopped or request.guide.complete
        if stopped or request.tokens == request.most:
            self._finish(request, "stop" if stopped else "length")
            self._end(request)

    def _finish(self, request: _Request, reason: str) -> None:
        request.emit(Piece(request.stops.rest(), (), request.tokens, (), reason, len(request.prompt)))

    def _end(self, request: _Request) -> None:
        self._slots[request.slot] = None
        request.over.set()

    def _logprob(self, token: int, value: float, top: tuple[Logprob, ...] = ()) -> Logprob:
        raw = self._words.bytes_of(token)
        return Logprob(token, raw.decode(errors="replace"), tuple(raw), value, top)


class Scorer:
    """A model opened for scoring alone."""

    def __init__(self, run: Run, longest: int, verbose: bool) -> None:
        self._model = _open(run, context=max(longest, 1), slots=1, verbose=verbose)
        self._words = Detokenizer(run.tokenizer)
        self.version = self._model.version

    def top(self, ids: Sequence[int], positions: Sequence[int], top: int) -> Iterator[tuple[int, dict[int, float]]]:
        """For each position p, ascending: p and the ``top`` likeliest tokens after ids[:p], with log-probabilities."""
        import numpy as np

        from runtimes.sampling import top_logprobs

        wanted = sorted(set(positions))
        if not wanted:
            return
        if wanted[0] < 1 or wanted[-1] > len(ids):
            raise ValueError(f"positions {wanted[0]} to {wanted[-1]} do not lie in a sequence of {len(ids)} tokens")
        if any(not 0 <= token < self._model.vocabulary for token in ids):
            raise ValueError(f"a token id lies outside the vocabulary of {self._model.vocabulary}")
        asked = set(wanted)
        for begin in range(0, wanted[-1], SCORE_PIECE):
            part = np.array([ids[begin : min(begin + SCORE_PIECE, wanted[-1])]], np.int64)
            rows = [at for at in range(part.shape[1]) if begin + at + 1 in asked]
            kept = part.shape[1] - rows[0] if rows else 1
            logits = self._model.run(part, [begin], kept=kept)[0]
            for row in rows:
                yield begin + row + 1, top_logprobs(logits[row - part.shape[1]], top)

    def tokenize(self, text: str) -> list[int]:
        """The folder's own tokenizer: special tokens recognised, none added."""
        return self._words.encode(text)


@contextlib.contextmanager
def open_scorer(run: Run, *, longest: int, max_rss_bytes: int | None, verbose: bool) -> Iterator[Scorer]:
    """A Scorer for sequences of up to ``longest`` tokens. onnxruntime repacks weights into memory of its own, so
    max_rss_bytes bounds nothing.
    """
    yield Scorer(run, longest, verbose)


def _open(run: Run, *, context: int, slots: int, verbose: bool) -> Model:
    from runtimes.ort_model import Model

    optimized = bool(run.settings.get("optimized", True))
    return Model(run.model, context=context, slots=slots, threads=run.threads, optimized=optimized, verbose=verbose)


def load(run: Run, *, verbose: bool) -> Ort:
    """The engine of a manifest. Raises EngineError."""
    return Ort(run, verbose=verbose)
