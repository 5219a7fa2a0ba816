"""Batches texts of concurrent requests: one thread, batches of at most ``slots`` texts.

Requests take turns, one text each, so that a request with thousands of texts does not delay one with a single text. At
most half of a batch is padding: a short text is not computed at the length of a long one.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from runtimes.engine import Busy, EngineError
from runtimes.engines.encoder import Encoder, Text
from runtimes.server.metrics import EncoderMetrics

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_WAITING = 8192  # texts
STOPPING = "The server is stopping; the texts were not computed."


class Group:
    """The texts of one request. rows: their results, in the request's order."""

    def __init__(self, texts: Sequence[Text], loop: asyncio.AbstractEventLoop) -> None:
        self.texts = texts
        self.rows: list[NDArray[np.float32] | None] = [None] * len(texts)
        # longest first, so that the texts of a batch have similar lengths
        self.left = deque(sorted(range(len(texts)), key=lambda place: -len(texts[place].ids)))
        self.computing = 0
        self.arrived = time.perf_counter()
        self.loop, self.done = loop, loop.create_future()

    def finish(self, error: EngineError | None = None) -> None:
        """Complete the request; called on the computing thread. error: fail it."""

        def set_result() -> None:
            if not self.done.done():
                self.done.set_exception(error) if error else self.done.set_result(None)

        self.loop.call_soon_threadsafe(set_result)


class Batcher:
    """The queue and the thread that empties it. Made on the event loop."""

    def __init__(self, engine: Encoder, metrics: EncoderMetrics) -> None:
        self.engine, self.metrics = engine, metrics
        self.loop = asyncio.get_running_loop()
        self.queue: deque[Group] = deque()
        self.changed = threading.Condition()
        self.waiting, self.closed = 0, False
        self.thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self.thread.start()

    async def compute(self, texts: Sequence[Text]) -> list[NDArray[np.float32]]:
        """A row for each text. Raises Busy or EngineError. Cancelling it removes the waiting texts from the queue."""
        group = Group(texts, self.loop)
        with self.changed:
            if self.closed:
                raise EngineError(STOPPING)
            if self.waiting and self.waiting + len(texts) > MAX_WAITING:
                raise Busy(f"{self.waiting} texts are waiting already.")
            self.queue.append(group)
            self._count(len(texts))
            self.changed.notify()
        try:
            await group.done
        finally:
            with self.changed:  # a completed group has nothing left
                self._count(-len(group.left))
                group.left.clear()
        return [row for row in group.rows if row is not None]

    def cancel_all(self) -> None:
        """Drop the waiting texts; the batch that is being computed ends by itself."""
        with self.changed:
            groups, self.queue = list(self.queue), deque()
            for group in groups:
                self._count(-len(group.left))
                group.left.clear()
        for group in groups:
            group.finish(EngineError(STOPPING))

    def close(self) -> None:
        """Cancel everything and wait for the thread."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.cancel_all()
        self.thread.join()

    def _count(self, more: int) -> None:
        self.waiting += more
        self.metrics.waiting.set(self.waiting)

    # -- on the computing thread ----------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.queue or self.closed)
                if self.closed:
                    return
                batch = self._next()
            if batch:
                self._compute(batch)

    def _next(self) -> list[tuple[Group, int]]:
        """The next batch as (group, place in it), one text of each group in turn."""
        batch: list[tuple[Group, int]] = []
        longest = total = 0
        passed: deque[Group] = deque()
        while self.queue and len(batch) < self.engine.slots:
            group = self.queue.popleft()
            if not group.left:
                continue
            size = len(group.texts[group.left[0]].ids)
            if batch and (len(batch) + 1) * max(longest, size) > 2 * (total + size):
                passed.append(group)  # it is first in the next batch
                continue
            batch.append((group, group.left.popleft()))
            group.computing += 1
            longest, total = max(longest, size), total + size
            self.queue.append(group)
        self.queue.extendleft(reversed(passed))
        self._count(-len(batch))
        return batch

    def _compute(self, batch: Sequence[tuple[Group, int]]) -> None:
        texts = [group.texts[place] for group, place in batch]
        begun = time.perf_counter()
        error: EngineError | None = None
        rows: list[NDArray[np.float32]] = []
        try:
            rows = self.engine.compute(texts)
        except EngineError as failure:
            error = failure
        except Exception as failure:
            error = EngineError(f"the engine failed: {failure!r}")
        self.metrics.compute.observe(time.perf_counter() - begun)
        self.metrics.batch.observe(len(batch))
        self.metrics.prompt_tokens.inc(sum(len(text.ids) for text in texts))
        for number, (group, place) in enumerate(batch):
            self.metrics.waited.observe(begun - group.arrived)
            group.computing -= 1
            if error is None:
                group.rows[place] = rows[number]
                if not group.left and not group.computing:
                    group.finish()
        if error is not None:
            with self.changed:
                for group in {group for group, _ in batch}:
                    self._count(-len(group.left))
                    group.left.clear()
                    group.finish(error)
