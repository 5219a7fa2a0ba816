"""Moves pieces from the engine's threads to the event loop, and requests from the event loop to the threads.

All answers share one mailbox: after a decoding step every slot's thread puts its piece there, and only the first piece
wakes the event loop. So eight streams cost one wake-up per step, not eight.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from runtimes.engine import Busy, Engine, EngineError, Piece, Sampling
from runtimes.server.metrics import Metrics

MAX_WAITING = 256


class Answer:
    """One running answer, seen from the event loop: ``await next()`` returns all pieces since the last call."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.done = False
        self.error: EngineError | None = None
        self.cancelled = threading.Event()
        self.waiter: asyncio.Future[None] | None = None

    async def next(self) -> list[Piece]:
        """At least one piece, or an empty list at the end. Raises the engine's EngineError."""
        while not self.pieces:
            if self.error is not None:
                raise self.error
            if self.done:
                return []
            self.waiter = asyncio.get_running_loop().create_future()
            await self.waiter
        pieces, self.pieces = self.pieces, []
        return pieces

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


class Dispatcher:
    """Runs at most ``engine.slots`` answers at once; other requests wait here, where cancelling is free."""

    def __init__(self, engine: Engine, metrics: Metrics) -> None:
        self.engine, self.metrics = engine, metrics
        self.loop = asyncio.get_running_loop()
        self.free = asyncio.Semaphore(engine.slots)
        self.threads = ThreadPoolExecutor(engine.slots, thread_name_prefix="slot")
        self.mail: deque[tuple[Answer, Piece | None]] = deque()
        self.posted = False
        self.waiting = 0
        self.running: set[Answer] = set()

    async def start(self, prompt: Sequence[int], sampling: Sampling) -> Answer:
        """Wait for a slot and start the answer. Raises Busy for a full queue. Cancelling the wait leaves the queue."""
        if self.waiting >= MAX_WAITING:
            raise Busy(f"{MAX_WAITING} requests are waiting already.")
        self.waiting += 1
        self.metrics.waiting.set(self.waiting)
        try:
            await self.free.acquire()
        finally:
            self.waiting -= 1
            self.metrics.waiting.set(self.waiting)
        answer = Answer()
        self.running.add(answer)
        self.metrics.running.set(len(self.running))
        self.threads.submit(self._work, answer, prompt, sampling)
        return answer

    def stop(self, answer: Answer) -> None:
        """The client needs no more of the answer; cancel it if it still runs."""
        if not answer.done:
            answer.cancelled.set()
            self.metrics.cancelled.inc()

    def cancel_all(self) -> None:
        """End every running answer at its next piece."""
        for answer in list(self.running):
            answer.cancelled.set()

    def close(self) -> None:
        """Cancel everything and wait for the engine's threads."""
        self.cancel_all()
        self.threads.shutdown(wait=True)

    # -- on the engine's threads --------------------------------------------------------------------------------

    def _work(self, answer: Answer, prompt: Sequence[int], sampling: Sampling) -> None:
        cancelled, mail = answer.cancelled, self.mail

        def emit(piece: Piece) -> bool:
            mail.append((answer, piece))
            self._post()
            return cancelled.is_set()

        try:
            if not cancelled.is_set():
                self.engine.stream(prompt, sampling, emit)
        except EngineError as error:
            answer.error = error
        except Exception as error:
            answer.error = EngineError(f"the engine failed: {error!r}")
        finally:
            mail.append((answer, None))
            self._post()

    def _post(self) -> None:
        # No lock: _deliver clears the flag before it empties the mailbox, so a piece put while the flag is set is
        # still delivered; two threads that read it unset at once wake the loop twice, which is harmless.
        if not self.posted:
            self.posted = True
            self.loop.call_soon_threadsafe(self._deliver)

    # -- on the event loop --------------------------------------------------------------------------------------

    def _deliver(self) -> None:
        self.posted = False
        mail, woken = self.mail, set()
        while mail:
            answer, piece = mail.popleft()
            if piece is None:
                answer.done = True
                self.running.discard(answer)
                self.metrics.running.set(len(self.running))
                self.free.release()
            else:
                answer.pieces.append(piece)
            woken.add(answer)
        for answer in woken:
            answer.wake()


class Stopwatch:
    """Times one answer for /metrics. Pieces without a token (prefill progress) do not count."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.begun = self.last = time.perf_counter()
        self.seen = 0

    def take(self, piece: Piece) -> None:
        if piece.tokens > self.seen:
            now = time.perf_counter()
            if self.seen == 0:
                self.metrics.first.observe(now - self.begun)
            else:
                self.metrics.between.observe((now - self.last) / (piece.tokens - self.seen))
            self.seen, self.last = piece.tokens, now
        if piece.finish is not None:
            self.metrics.prompt_tokens.inc(piece.prompt_tokens)
            self.metrics.cached_tokens.inc(piece.cached_tokens)

    def close(self) -> None:
        self.metrics.tokens.inc(self.seen)

    def facts(self) -> dict[str, int]:
        """Fields for the access log."""
        return {"completion_tokens": self.seen}
