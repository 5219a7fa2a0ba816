"""GPTQ and AWQ folders with torch and transformers alone: without a GPU, vLLM or a compiler.

Correct everywhere, but slow: the weights are dequantized at each use, and requests take turns token by token. A server
with a GPU runs vLLM (runtimes/engines/vllm.py). JSON schemas are refused.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from runtimes.decoding.detokenize import Detokenizer
from runtimes.decoding.stream import Stream, check_prompt, chunks_to_score
from runtimes.engine import Emit, EngineError, Piece, RequestRefused, Sampling, iterate
from runtimes.manifest import Run
from runtimes.process import limit_spinning, resident_bytes

if TYPE_CHECKING:
    from runtimes.engines.transformers.model import Model

CHUNK = 256  # prompt tokens per prefill chunk: between two checks for a cancel, and between two turns of the others
SCORE_CHUNK = 64  # logits take tokens x vocabulary x 4 bytes: 39 MB for 152,000 entries


class FairLock:
    """A first-in, first-out lock: no answer starves another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._busy = False

    def __enter__(self) -> None:
        with self._lock:
            if not self._busy:
                self._busy = True
                return
            mine = threading.Lock()
            mine.acquire()
            self._waiting.append(mine)
        mine.acquire()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._busy = False


class Transformers:
    """One loaded folder. Each of ``slots`` requests has its own ``context`` tokens. Raises EngineError."""

    def __init__(self, run: Run, *, verbose: bool = False) -> None:
        self.context, self.slots = run.context, run.slots
        self._model = load_model(run, verbose)
        self._detokenizer = Detokenizer(run.tokenizer)
        self._stop_ids = frozenset(run.stop_ids)
        self._turns = FairLock()
        self.version = version()

    def stream(self, prompt: Sequence[int], sampling: Sampling, emit: Emit) -> None:
        """Generate in the calling thread; ``emit`` is called for every piece and cancels by returning True."""
        from runtimes.decoding.sampling import Sampler, logprob, top_logprobs

        check_prompt(prompt, self.context, self._model.vocabulary)
        if sampling.schema is not None:
            raise RequestRefused(
                "This engine does not support JSON Schemas; ask for JSON in the prompt, or use a bundle of "
                "the gguf recipe.",
                code="unsupported",
                param="response_format",
            )
        room = self.context - len(prompt)
        most = room if sampling.max_tokens is None else min(room, sampling.max_tokens)
        state = Stream(self._detokenizer, sampling, len(prompt), emit)
        if most < 1:
            state.finish("length")
            return
        cache = self._model.cache()
        logits: Any = None
        for begin in range(0, len(prompt), CHUNK):
            part = prompt[begin : begin + CHUNK]
            with self._turns:
                logits = self._model.read(part, cache, [len(part) - 1])[0]
            if emit(Piece("")):
                return
        sampler = Sampler(sampling, prompt)
        while True:
            token = sampler.choose(logits)
            top = None
            if sampling.logprobs is not None and token not in self._stop_ids:
                top = (logprob(logits, token), top_logprobs(logits, sampling.logprobs))
            if token in self._stop_ids:
                state.ended(token)
                return
            if state.take(token, top):
                return
            if state.tokens == most:
                state.finish("length")
                return
            with self._turns:
                logits = self._model.read([token], cache, [0])[0]

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[Piece]:
        """The pieces of one answer; closing the iterator cancels and frees the slot."""
        return iterate(lambda emit: self.stream(prompt, sampling, emit))

    def score(self, tokens: Sequence[int], top: int) -> Iterator[Mapping[int, float]]:
        """The ``top`` likeliest tokens after every prefix of ``tokens``."""
        for _, row in distributions(self._model, tokens, range(1, len(tokens) + 1), top, self._turns):
            yield row

    def memory(self) -> int:
        """Resident bytes of this process; the model runs in it."""
        return resident_bytes()

    def close(self) -> None:
        """Free the model. Running generations must have ended."""
        del self._model


class Scorer:
    """A folder opened for scoring alone."""

    def __init__(self, run: Run, verbose: bool) -> None:
        self._model = load_model(run, verbose)
        self._detokenizer = Detokenizer(run.tokenizer)
        self.version = version()

    def top(self, ids: Sequence[int], positions: Sequence[int], top: int) -> Iterator[tuple[int, dict[int, float]]]:
        """For each position p, ascending: p and the ``top`` likeliest tokens after ids[:p], with log-probabilities."""
        return distributions(self._model, ids, positions, top, contextlib.nullcontext())

    def tokenize(self, text: str) -> list[int]:
        """The folder's own tokenizer: special tokens recognised, none added."""
        return self._detokenizer.encode(text)


def distributions(
    model: Model, ids: Sequence[int], positions: Sequence[int], top: int, turns: contextlib.AbstractContextManager[None]
) -> Iterator[tuple[int, dict[int, float]]]:
    """The rows of ``Scorer.top``; each chunk of the sequence takes one turn. Raises ValueError."""
    from runtimes.decoding.sampling import top_logprobs

    cache = model.cache()
    for begin, part, rows in chunks_to_score(ids, positions, model.vocabulary, SCORE_CHUNK):
        with turns:
            logits = model.read(part, cache, rows)
        for row, values in zip(rows, logits, strict=True):
            yield begin + row + 1, top_logprobs(values, top)


@contextlib.contextmanager
def open_scorer(run: Run, *, longest: int, max_rss_bytes: int | None, verbose: bool) -> Iterator[Scorer]:
    """A Scorer; sequences may have any length. Weights are read into memory, so max_rss_bytes has no effect."""
    yield Scorer(run, verbose)


def load_model(run: Run, verbose: bool) -> Model:
    """The model in the folder of ``run.model``. Raises EngineError."""
    limit_spinning()
    for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        os.environ.setdefault(key, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from runtimes.engines.transformers.int4 import UnknownForm
    from runtimes.engines.transformers.model import open_model

    try:
        return open_model(run.model.parent, str(run.settings.get("device", "cpu")), run.threads)
    except (UnknownForm, OSError, ValueError, KeyError, RuntimeError) as error:
        raise EngineError(f"{run.model.parent.name} cannot be loaded: {error}") from None


def version() -> str:
    from importlib.metadata import version as of

    return f"transformers {of('transformers')}, torch {of('torch')}"


def load(run: Run, *, verbose: bool) -> Transformers:
    """The engine of a manifest. Raises EngineError."""
    return Transformers(run, verbose=verbose)
