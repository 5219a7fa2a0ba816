"""One answer over HTTP: waits for a slot, streams or collects, and cancels when the client disconnects."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from runtimes.engine import Busy, EngineError, Piece, Sampling
from runtimes.server.base_app import error_response, while_connected
from runtimes.server.dispatcher import Answer, Dispatcher, Stopwatch
from runtimes.server.openai_responses import ResponseBuilder, error_body

CUT_OFF = "The server is stopping; the answer was cut off."


class GeneratedResponse(Response, ABC):
    """A response that generates its answer while it is sent."""

    def __init__(self, dispatcher: Dispatcher, prompt: Sequence[int], sampling: Sampling) -> None:
        super().__init__()
        self.dispatcher, self.prompt, self.sampling = dispatcher, prompt, sampling
        self.watch = Stopwatch(dispatcher.metrics)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            work = await while_connected(receive, self._run(scope, receive, send))
        finally:
            scope.setdefault("state", {})["facts"] = self.watch.facts()
        if not work.cancelled():
            work.result()  # raises its exception

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer: Answer | None = None
        try:
            answer = await self.dispatcher.start(self.prompt, self.sampling)
            pieces = await answer.next()  # after the first pieces no error status can be sent
        except (EngineError, Busy) as error:
            await error_response(error)(scope, receive, send)
        else:
            await self._send(answer, pieces, scope, receive, send)
        finally:
            if answer is not None:
                self.dispatcher.stop(answer)
            self.watch.close()

    @abstractmethod
    async def _send(self, answer: Answer, pieces: list[Piece], scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer; pieces: its first ones."""


class WholeResponse(GeneratedResponse):
    """Collects the answer and sends it as one JSON object. finish: turns all pieces into that object."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        prompt: Sequence[int],
        sampling: Sampling,
        finish: Callable[[list[Piece]], Mapping[str, object]],
    ) -> None:
        super().__init__(dispatcher, prompt, sampling)
        self.finish = finish

    async def _send(self, answer: Answer, pieces: list[Piece], scope: Scope, receive: Receive, send: Send) -> None:
        collected: list[Piece] = []
        try:
            while pieces:
                for piece in pieces:
                    self.watch.take(piece)
                collected += pieces
                pieces = await answer.next()
            if not collected or collected[-1].finish is None:
                raise EngineError(CUT_OFF)
        except EngineError as error:
            await error_response(error)(scope, receive, send)
            return
        await JSONResponse(self.finish(collected))(scope, receive, send)


class StreamedResponse(GeneratedResponse):
    """Sends server-sent events as pieces come."""

    def __init__(
        self, dispatcher: Dispatcher, prompt: Sequence[int], sampling: Sampling, builder: ResponseBuilder
    ) -> None:
        super().__init__(dispatcher, prompt, sampling)
        self.builder = builder

    async def _send(self, answer: Answer, pieces: list[Piece], scope: Scope, receive: Receive, send: Send) -> None:
        builder, take = self.builder, self.watch.take
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        data, finished = builder.opening(), False
        try:
            while pieces:
                for piece in pieces:
                    take(piece)
                    finished = piece.finish is not None
                    data += builder.chunk(piece) if piece.finish is None else builder.closing(piece)
                if data:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                    data = b""
                pieces = await answer.next()
            if not finished:
                raise EngineError(CUT_OFF)
        except EngineError as error:
            data += builder.failure(error_body(str(error), "server_error", code="engine_failed"))
        await send({"type": "http.response.body", "body": data, "more_body": False})
