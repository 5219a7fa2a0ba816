"""ASGI middleware of every request: limits its size, counts it in /metrics, writes the access log."""

from __future__ import annotations

import json
import sys
import time

import anyio
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtimes.server.metrics import BaseMetrics
from runtimes.server.openai_responses import error_body

PATHS = frozenset(
    [
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/predict",
        "/answer",
        "/health",
        "/metrics",
        "/docs",
        "/v1/embeddings",
        "/classify",
    ]
)

LINGER_S = 2.0  # closing a connection with unread bytes resets it, and the client loses the 413
LINGER_BYTES = 64 * 2**20


class Middleware:
    """max_body: largest request body in bytes. log_json: write one JSON line per request to standard output."""

    def __init__(self, app: ASGIApp, metrics: BaseMetrics, *, max_body: int, log_json: bool) -> None:
        self.app, self.metrics, self.max_body, self.log_json = app, metrics, max_body, log_json

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status, received = time.perf_counter(), 0, 0
        too_large = f"The request is larger than {self.max_body} bytes."

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self.max_body:
                    if message.get("more_body"):
                        await drop_rest(receive)
                    raise HTTPException(413, too_large, {"Connection": "close"})
            return message

        try:
            if self._declared(scope) > self.max_body:
                # a client that sends Expect has not sent the body yet
                if not any(name == b"expect" for name, _ in scope["headers"]):
                    await drop_rest(receive)
                body = error_body(too_large, "invalid_request_error", code="request_too_large")
                await JSONResponse(body, 413, {"Connection": "close"})(scope, receive, counted)
            else:
                await self.app(scope, limited, counted)
        finally:
            path = scope["path"] if scope["path"] in PATHS else "other"
            # 499, nginx's code: the client disconnected before the first byte
            self.metrics.requests.labels(path, str(status or 499)).inc()
            if self.log_json:
                self._log(scope, status or 499, time.perf_counter() - begun)

    @staticmethod
    def _declared(scope: Scope) -> int:
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit():
                return int(value)
        return 0

    @staticmethod
    def _log(scope: Scope, status: int, seconds: float) -> None:
        client = scope.get("client")
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "client": client[0] if client else None,
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "ms": round(seconds * 1000, 1),
            **(scope.get("state", {}).get("facts") or {}),
        }
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


async def drop_rest(receive: Receive) -> None:
    """Drain the body, for LINGER_S and LINGER_BYTES at most, so that the client receives the 413."""
    dropped = 0
    with anyio.move_on_after(LINGER_S):
        while dropped < LINGER_BYTES:
            message = await receive()
            dropped += len(message.get("body", b""))
            if message["type"] != "http.request" or not message.get("more_body"):
                return
