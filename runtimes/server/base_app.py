"""The part of the HTTP server that all models share: errors, status, metrics, the API page. No CORS, no file access,
no outgoing requests.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from enum import Enum
from importlib import resources
from typing import Any, Generic, Literal, Protocol, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Receive

from runtimes.engine import Busy, RequestRefused
from runtimes.manifest import Run
from runtimes.server.metrics import BaseMetrics
from runtimes.server.middleware import Middleware
from runtimes.server.openai_responses import error_body

T = TypeVar("T")
AnyWorker = TypeVar("AnyWorker", bound="Worker")
log = logging.getLogger("runtimes")
_ASSETS = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon-32x32.png": "image/png",
}
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:"
)


class Health(BaseModel):
    status: Literal["ok", "loading", "stopping"]
    model: str
    engine: dict[str, str] | None = None  # details of an engine that was built for one device


class Worker(Protocol):
    """What answers requests while the server runs: the Dispatcher of a language model, the Batcher of an encoder."""

    def cancel_all(self) -> None: ...
    def close(self) -> None: ...


class Loaded(Protocol):
    """An engine that can be closed. One that was built for one device also has ``details``."""

    def close(self) -> None: ...


class BaseService(ABC, Generic[AnyWorker]):
    """The model behind the routes; it is loaded and has computed one answer."""

    def __init__(self, run: Run, engine: Loaded, metrics: BaseMetrics) -> None:
        self.run, self.engine, self.metrics = run, engine, metrics
        self._worker: AnyWorker | None = None

    @abstractmethod
    def make_worker(self) -> AnyWorker:
        """Make the worker; called on the event loop."""

    @property
    @abstractmethod
    def card(self) -> dict[str, object]:
        """The fields of /v1/models beside the name."""

    @property
    def details(self) -> Mapping[str, str]:
        """The engine's details in /health; empty for an engine that is not built for one device."""
        details: Mapping[str, str] = getattr(self.engine, "details", {})
        return details

    @property
    def serving(self) -> bool:
        """Whether requests are accepted."""
        return self._worker is not None

    def start(self) -> None:
        """Start to accept requests; called on the event loop."""
        self._worker = self.make_worker()
        self.metrics.ready.set(1)

    def worker(self) -> AnyWorker:
        """The worker. Raises HTTPException 503 while the server stops."""
        if self._worker is None:
            raise HTTPException(503, "The server is stopping.")
        return self._worker

    def cancel_all(self) -> None:
        """Cancel all running answers; called on the event loop."""
        if self._worker is not None:
            self._worker.cancel_all()

    async def stop(self) -> None:
        """Cancel running answers and free the model."""
        worker, self._worker = self._worker, None
        if worker is not None:
            await asyncio.to_thread(worker.close)
        await asyncio.to_thread(self.engine.close)


def make_base_app(
    service: BaseService[Any], add_routes: Callable[[FastAPI], None], *, max_body: int, log_json: bool
) -> ASGIApp:
    """The ASGI application. add_routes: adds the routes of this kind of model. max_body: bytes; more gets a 413."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await service.stop()

    app = FastAPI(
        title=service.run.name,
        description="A packaged model on this machine. Works without a network; nothing is sent elsewhere.",
        version="1",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    _add_errors(app)
    add_routes(app)
    _add_status(app, service)
    _add_docs(app)
    return Middleware(app, service.metrics, max_body=max_body, log_json=log_json)


def require_model(run: Run, name: str | None) -> None:
    """Raise HTTPException 404 for another model's name."""
    if name is not None and name != run.name:
        raise HTTPException(404, f"The model {name!r} does not exist here; this server has {run.name!r}.")


async def while_connected(receive: Receive, running: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Run a coroutine to its end, or cancel it when the client disconnects. Returns the task, which is done."""
    work = asyncio.create_task(running)
    gone = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        if not work.done():
            work.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)
    return work


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


def error_response(error: Exception) -> JSONResponse:
    """The HTTP response to an engine's error or a full queue."""
    if isinstance(error, RequestRefused):
        return JSONResponse(error_body(str(error), "invalid_request_error", param=error.param, code=error.code), 400)
    if isinstance(error, Busy):
        body = error_body(f"{error} Try again later.", "overloaded_error", code="overloaded")
        return JSONResponse(body, 503, {"Retry-After": "1"})
    return JSONResponse(error_body(str(error), "server_error", code="engine_failed"), 500)


def _add_status(app: FastAPI, service: BaseService[Any]) -> None:
    tags: list[str | Enum] = ["status"]

    @app.get("/v1/models", tags=tags, summary="The one model served here")
    async def models() -> dict[str, object]:
        card = {"id": service.run.name, "object": "model", "created": 0, "owned_by": "packager"}
        return {"object": "list", "data": [{**card, **service.card}]}

    @app.get("/health", tags=tags, response_model=Health, summary="200 once the model has answered")
    async def health() -> Response:
        status: Literal["ok", "stopping"] = "ok" if service.serving else "stopping"
        body = Health(status=status, model=service.run.name, engine=dict(service.details) or None)
        return JSONResponse(body.model_dump(exclude_none=True), 200 if service.serving else 503)

    @app.get("/metrics", tags=tags, summary="For Prometheus")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_docs(app: FastAPI) -> None:
    files = resources.files("fastapi_swagger.resources")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        page = get_swagger_ui_html(
            openapi_url="/openapi.json",
            title=app.title,
            swagger_js_url="/docs/swagger-ui-bundle.js",
            swagger_css_url="/docs/swagger-ui.css",
            swagger_favicon_url="/docs/favicon-32x32.png",
            swagger_ui_parameters={"validatorUrl": None},
        )
        page.headers["Content-Security-Policy"] = _POLICY
        return page

    @app.get("/docs/{name}", include_in_schema=False)
    async def asset(name: str) -> Response:
        if name not in _ASSETS:
            raise HTTPException(404, "There is no such file.")
        data = files.joinpath(name).read_bytes()
        return Response(data, media_type=_ASSETS[name], headers={"Cache-Control": "public, max-age=86400"})


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = [str(part) for part in first["loc"] if part not in ("body", "query")]
        param = ".".join(where) or None
        message = first["msg"]
        if first["type"] == "extra_forbidden":
            message = f"Unrecognized request argument: {param}. This server does not support it."
        elif first["type"] == "json_invalid":
            message = f"The body is not valid JSON: {first.get('ctx', {}).get('error', message)}."
        elif param:
            message = f"{param}: {message}"
        return JSONResponse(error_body(message, "invalid_request_error", param=param, code=first["type"]), 400)

    @app.exception_handler(RequestRefused)
    async def refuse(_: Request, error: RequestRefused) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        kinds = {404: "not_found_error", 503: "overloaded_error"}
        codes = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large", 503: "not_ready"}
        kind = kinds.get(error.status_code, "invalid_request_error")
        body = error_body(str(error.detail), kind, code=codes.get(error.status_code))
        return JSONResponse(body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def defect(_: Request, error: Exception) -> Response:
        log.exception("a defect of the server", exc_info=error)
        return JSONResponse(error_body("The server failed; see its log.", "server_error"), 500)
