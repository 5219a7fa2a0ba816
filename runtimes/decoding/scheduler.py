"""A model that decodes all slots in one run: requests take slots, prompts are read between, tokens chosen one by one.

One thread runs the model. In turn it reads a piece of one waiting prompt and decodes a token for every slot that is
answering, so a long prompt holds the others up for no longer than its piece takes. Shared by the engines whose model
keeps a row of keys and values for each slot (ort.py, tensorrt_decoder.py).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from runtimes.decoding.detokenize import Detokenizer
from runtimes.decoding.stream import Stream, check_prompt, pieces_to_score
from runtimes.engine import Emit, EngineError, Piece, Sampling, iterate
from runtimes.manifest import Run
from runtimes.process import give_back, resident_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from runtimes.decoding.json_schema import Guide
    from runtimes.decoding.sampling import Sampler

PIECE = 128  # prompt tokens read at once: between two chances to cancel, and between two tokens of the others
SCORE_PIECE = 64  # logits take tokens x vocabulary x 4 bytes: 39 MB for 152,000 entries


class Model(Protocol):
    """What decodes. Rows of keys and values for each slot; not for two threads at once."""

    @property
    def version(self) -> str: ...
    @property
    def vocabulary(self) -> int: ...

    def run(
        self, ids: NDArray[np.int64], lengths: Sequence[int], *, slot: int = 0, kept: int = 1
    ) -> NDArray[np.float32]:
        """Compute tokens (rows, tokens) for the slots from ``slot`` on; the logits of the last ``kept``, (rows, kept,
        vocabulary). lengths: tokens that each row holds before. Raises EngineError.
        """
        ...

    def memory(self) -> int:
        """Bytes that it holds outside this process's memory."""
        ...

    def close(self) -> None: ...


@dataclass
class _Request:
    """One answer under way. read: tokens whose keys and values are in the slot's cache. last: the token to decode
    next, -1 while the prompt is read.
    """

    prompt: Sequence[int]
    sampling: Sampling
    most: int
    sampler: Sampler
    pieces: Stream
    guide: Guide | None
    ends: frozenset[int]
    slot: int = -1
    read: int = 0
    last: int = -1
    error: EngineError | None = None
    over: threading.Event = field(default_factory=threading.Event)


class _Kept:
    """Collects an answer's pieces."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []

    def take(self, piece: Piece) -> bool:
        self.pieces.append(piece)
        return False


class Slots:
    """One loaded model. Each of ``slots`` requests has ``context`` tokens of its own. Raises EngineError."""

    def __init__(self, run: Run, model: Model) -> None:
        from runtimes.decoding.json_schema import Guides

        self.context, self.slots = run.context, run.slots
        self._model = model
        self.version = self._model.version
        self._words = Detokenizer(run.tokenizer)
        self._stop_ids = frozenset(run.stop_ids)
        self._guides = Guides(run.tokenizer, self._model.vocabulary, run.stop_ids)
        self._wake = threading.Condition()
        self._waiting: deque[_Request] = deque()
        self._slots: list[_Request | None] = [None] * run.slots
        self._closing = False
        give_back()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    # -- the Engine protocol ------------------------------------------------------------------------------------

    def stream(self, prompt: Sequence[int], sampling: Sampling, emit: Emit) -> None:
        """Generate; ``emit`` is called on the model's thread for every piece and cancels by returning True."""
        from runtimes.decoding.sampling import Sampler

        check_prompt(prompt, self.context, self._model.vocabulary)
        room = self.context - len(prompt)
        most = room if sampling.max_tokens is None else min(room, sampling.max_tokens)
        pieces = Stream(self._words, sampling, len(prompt), emit)
        if most < 1:
            pieces.finish("length")
            return
        guide = self._guides.make(sampling.schema) if sampling.schema is not None else None
        self._run(_Request(prompt, sampling, most, Sampler(sampling, prompt), pieces, guide, self._stop_ids))

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
        from runtimes.decoding.sampling import Sampler

        greedy = Sampling(max_tokens=1, temperature=0.0, logprobs=top)
        for end in range(1, len(tokens) + 1):
            prompt = tokens[:end]
            check_prompt(prompt, self.context, self._model.vocabulary)
            kept = _Kept()
            pieces = Stream(self._words, greedy, len(prompt), kept.take)
            self._run(_Request(prompt, greedy, 1, Sampler(greedy, prompt), pieces, None, frozenset()))
            found = next(piece.logprobs[0] for piece in kept.pieces if piece.logprobs)
            yield {entry.id: entry.logprob for entry in found.top}

    def memory(self) -> int:
        """Resident bytes of this process, in which the model runs, and what it holds on a device."""
        return resident_bytes() + self._model.memory()

    def close(self) -> None:
        """End what still runs and free the model."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        self._model.close()

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
        elif request.pieces.emit(Piece("")):
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
        import numpy as np

        from runtimes.decoding.sampling import logprob, top_logprobs

        guide = request.guide
        token = request.sampler.choose(logits if guide is None else np.where(guide.forbidden(), -np.inf, logits))
        request.last = token
        if token in request.ends:
            request.pieces.ended(token)
            self._end(request)
            return
        top = None
        if request.sampling.logprobs is not None:
            top = (logprob(logits, token), top_logprobs(logits, request.sampling.logprobs))
        if request.pieces.take(token, top):
            self._end(request)
            return
        if guide is not None:
            guide.take(token)
        complete = guide is not None and guide.complete
        if complete or request.pieces.tokens == request.most:
            request.pieces.finish("stop" if complete else "length")
            self._end(request)

    def _end(self, request: _Request) -> None:
        self._slots[request.slot] = None
        request.over.set()


class Scorer:
    """A model opened for scoring alone."""

    def __init__(self, run: Run, model: Model) -> None:
        self._model, self._words = model, Detokenizer(run.tokenizer)
        self.version = model.version

    def top(self, ids: Sequence[int], positions: Sequence[int], top: int) -> Iterator[tuple[int, dict[int, float]]]:
        """For each position p, ascending: p and the ``top`` likeliest tokens after ids[:p], with log-probabilities."""
        import numpy as np

        from runtimes.decoding.sampling import top_logprobs

        for begin, part, rows in pieces_to_score(ids, positions, self._model.vocabulary, SCORE_PIECE):
            kept = len(part) - rows[0] if rows else 1
            logits = self._model.run(np.array([part], np.int64), [begin], kept=kept)[0]
            for row in rows:
                yield begin + row + 1, top_logprobs(logits[row - len(part)], top)

    def tokenize(self, text: str) -> list[int]:
        """The folder's own tokenizer: special tokens recognised, none added."""
        return self._words.encode(text)
