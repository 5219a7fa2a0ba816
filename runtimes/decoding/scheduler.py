"""The scheduler of models that decode all slots in one run: continuous batching with chunked prefill.

One thread runs the model. It alternates: prefill one chunk of one prompt, then decode one token for every slot that
answers. So a long prompt delays the other answers by one chunk at most. Used by the engines whose model has a row of
the KV cache for each slot (engines/onnxruntime/cpu.py and cuda.py, engines/tensorrt/decoder.py).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from runtimes.decoding.detokenize import Detokenizer
from runtimes.decoding.stream import Stream, check_prompt, chunks_to_score
from runtimes.engine import Emit, EngineError, Piece, Sampling, iterate
from runtimes.manifest import Run
from runtimes.process import release_freed_memory, resident_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from runtimes.decoding.json_schema import Constraint
    from runtimes.decoding.sampling import Sampler

# Prompt tokens per prefill chunk: between two checks for a cancel, and between two tokens of the other answers.
PREFILL_CHUNK = 128
SCORE_CHUNK = 64  # logits take tokens x vocabulary x 4 bytes: 39 MB for 152,000 entries


class Model(Protocol):
    """A model with a row of the KV cache for each slot. Not thread-safe."""

    @property
    def version(self) -> str: ...
    @property
    def vocabulary(self) -> int: ...

    def run(
        self, ids: NDArray[np.int64], lengths: Sequence[int], *, slot: int = 0, kept: int = 1
    ) -> NDArray[np.float32]:
        """Compute tokens (rows, tokens) for the slots from ``slot`` on; the logits of the last ``kept``, (rows, kept,
        vocabulary). lengths: tokens in each row's cache before. Raises EngineError.
        """
        ...

    def memory(self) -> int:
        """Bytes held outside this process's memory."""
        ...

    def close(self) -> None: ...


@dataclass
class _Request:
    """One running answer. read: tokens in the slot's KV cache. last: the token to decode next, -1 during prefill.
    most: largest number of tokens. ends: ids that end the answer.
    """

    prompt: Sequence[int]
    sampling: Sampling
    most: int
    sampler: Sampler
    pieces: Stream
    constraint: Constraint | None
    ends: frozenset[int]
    slot: int = -1
    read: int = 0
    last: int = -1
    error: EngineError | None = None
    over: threading.Event = field(default_factory=threading.Event)


class _Collector:
    """Collects an answer's pieces."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []

    def take(self, piece: Piece) -> bool:
        self.pieces.append(piece)
        return False


class Scheduler:
    """One loaded model. Each of ``slots`` requests has its own ``context`` tokens. Raises EngineError."""

    def __init__(self, run: Run, model: Model) -> None:
        from runtimes.decoding.json_schema import ConstraintFactory

        self.context, self.slots = run.context, run.slots
        self._model = model
        self.version = self._model.version
        self._detokenizer = Detokenizer(run.tokenizer)
        self._stop_ids = frozenset(run.stop_ids)
        self._constraints = ConstraintFactory(run.tokenizer, self._model.vocabulary, run.stop_ids)
        self._wake = threading.Condition()
        self._waiting: deque[_Request] = deque()
        self._slots: list[_Request | None] = [None] * run.slots
        self._closing = False
        release_freed_memory()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    # -- the Engine protocol ------------------------------------------------------------------------------------

    def stream(self, prompt: Sequence[int], sampling: Sampling, emit: Emit) -> None:
        """Generate; ``emit`` is called on the model's thread for every piece and cancels by returning True."""
        from runtimes.decoding.sampling import Sampler

        check_prompt(prompt, self.context, self._model.vocabulary)
        room = self.context - len(prompt)
        most = room if sampling.max_tokens is None else min(room, sampling.max_tokens)
        pieces = Stream(self._detokenizer, sampling, len(prompt), emit)
        if most < 1:
            pieces.finish("length")
            return
        constraint = self._constraints.make(sampling.schema) if sampling.schema is not None else None
        self._run(_Request(prompt, sampling, most, Sampler(sampling, prompt), pieces, constraint, self._stop_ids))

    def _run(self, request: _Request) -> None:
        """Queue a request for the model's thread and wait for its end. Raises EngineError."""
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
        """The ``top`` likeliest tokens after every prefix of ``tokens``. Each prefix takes a slot, like a request."""
        from runtimes.decoding.sampling import Sampler

        greedy = Sampling(max_tokens=1, temperature=0.0, logprobs=top)
        for end in range(1, len(tokens) + 1):
            prompt = tokens[:end]
            check_prompt(prompt, self.context, self._model.vocabulary)
            collector = _Collector()
            pieces = Stream(self._detokenizer, greedy, len(prompt), collector.take)
            self._run(_Request(prompt, greedy, 1, Sampler(greedy, prompt), pieces, None, frozenset()))
            entry = next(piece.logprobs[0] for piece in collector.pieces if piece.logprobs)
            yield {other.id: other.logprob for other in entry.top}

    def memory(self) -> int:
        """Resident bytes of this process, in which the model runs, and its bytes on a device."""
        return resident_bytes() + self._model.memory()

    def close(self) -> None:
        """End running answers and free the model."""
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
            except Exception as error:  # of the library: fail all running requests, keep serving
                failure = error if isinstance(error, EngineError) else EngineError(f"the engine failed: {error!r}")
                for request in filter(None, list(self._slots)):
                    request.error = failure
                    self._end(request)

    def _admit(self) -> bool:
        """Assign free slots, the lowest first; wait while there is nothing to do. False when the engine closes."""
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
        """Prefill one chunk of a prompt; after the last chunk choose the first token."""
        import numpy as np

        begin, end = request.read, min(request.read + PREFILL_CHUNK, len(request.prompt))
        ids = np.array([request.prompt[begin:end]], np.int64)
        logits = self._model.run(ids, [begin], slot=request.slot)
        request.read = end
        if end == len(request.prompt):
            self._take(request, logits[0, -1])
        elif request.pieces.emit(Piece("")):
            self._end(request)

    def _decode(self) -> None:
        """Decode one token for every slot that answers. Slots between them are computed too; what that writes into
        their caches is overwritten later.
        """
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

    def _take(self, request: _Request, logits: NDArray[np.float32]) -> None:
        """Choose the next token and emit it; end the answer when it is complete."""
        import numpy as np

        from runtimes.decoding.sampling import logprob, top_logprobs

        constraint = request.constraint
        token = request.sampler.choose(
            logits if constraint is None else np.where(constraint.forbidden(), -np.inf, logits)
        )
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
        if constraint is not None:
            constraint.take(token)
        complete = constraint is not None and constraint.complete
        if complete or request.pieces.tokens == request.most:
            request.pieces.finish("stop" if complete else "length")
            self._end(request)

    def _end(self, request: _Request) -> None:
        self._slots[request.slot] = None
        request.over.set()


class Scorer:
    """A model opened for scoring alone."""

    def __init__(self, run: Run, model: Model) -> None:
        self._model, self._detokenizer = model, Detokenizer(run.tokenizer)
        self.version = model.version

    def top(self, ids: Sequence[int], positions: Sequence[int], top: int) -> Iterator[tuple[int, dict[int, float]]]:
        """For each position p, ascending: p and the ``top`` likeliest tokens after ids[:p], with log-probabilities."""
        import numpy as np

        from runtimes.decoding.sampling import top_logprobs

        for begin, chunk, rows in chunks_to_score(ids, positions, self._model.vocabulary, SCORE_CHUNK):
            kept = len(chunk) - rows[0] if rows else 1
            logits = self._model.run(np.array([chunk], np.int64), [begin], kept=kept)[0]
            for row in rows:
                yield begin + row + 1, top_logprobs(logits[row - len(chunk)], top)

    def tokenize(self, text: str) -> list[int]:
        """The folder's own tokenizer: special tokens recognised, none added."""
        return self._detokenizer.encode(text)
