"""The HTTP face: FastAPI routes over one Service. No CORS, no file access, nothing fetched from elsewhere."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from enum import Enum
from importlib import resources
from typing import Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response

from runtimes.api import AnswerResponse, ChatRequest, CompletionRequest, Health, PredictRequest, PredictResponse
from runtimes.chat import Prompts, TemplateRefused
from runtimes.engine import Engine, Piece, RequestRefused, Sampling
from runtimes.generation import Streamed, Whole, refused
from runtimes.manifest import Run
from runtimes.metrics import Metrics
from runtimes.outer import Outer
from runtimes.pump import Pump
from runtimes.replies import Reply, error_body

log = logging.getLogger("runtimes")
_ASSETS = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon-32x32.png": "image/png",
}
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:"
)


class Service:
    """The model behind the routes. The engine is loaded and has answered a token when it comes here."""

    def __init__(self, run: Run, prompts: Prompts, engine: Engine) -> None:
        self.run, self.prompts, self.engine = run, prompts, engine
        self.pump: Pump | None = None
        self.metrics = Metrics(engine.memory)

    def start(self) -> None:
        """Begin to take requests; called on the event loop."""
        self.pump = Pump(self.engine, self.metrics)
        self.metrics.ready.set(1)

    def cancel_all(self) -> None:
        """End every running answer; called on the event loop."""
        if self.pump is not None:
            self.pump.cancel_all()

    async def stop(self) -> None:
        """Cancel what still runs and free the model."""
        pump, self.pump = self.pump, None
        if pump is not None:
            await asyncio.to_thread(pump.close)
        await asyncio.to_thread(self.engine.close)

    def working(self) -> Pump:
        """The pump, or a 503 while the server stops."""
        if self.pump is None:
            raise HTTPException(503, "The server is stopping.")
        return self.pump

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.run.name:
            raise HTTPException(404, f"The model {name!r} does not exist here; this server has {self.run.name!r}.")

    def user_turn(self, text: str) -> list[int]:
        """One user message as the model should see it: through the chat template where there is one."""
        if self.prompts.has_template:
            return self.prompts.chat([{"role": "user", "content": text}])
        return self.prompts.plain(text)


def make_app(service: Service, *, max_body: int, log_json: bool) -> Any:
    """The ASGI application. max_body: bytes; larger requests get a 413."""

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
    _add_generation(app, service)
    _add_status(app, service)
    _add_docs(app)
    return Outer(app, service.metrics, max_body=max_body, log_json=log_json)


def _add_generation(app: FastAPI, service: Service) -> None:
    run = service.run
    tags: list[str | Enum] = ["answers"]

    def reply(request: ChatRequest | CompletionRequest, prompt: list[int], chat: bool) -> Response:
        pump = service.working()
        sampling = request.sampling(run.sampling)
        answer = Reply(
            chat=chat,
            model=run.name,
            logprobs=sampling.logprobs is not None,
            usage=bool(request.stream_options and request.stream_options.include_usage),
            prompt_ids=prompt if request.return_token_ids else None,
        )
        if request.stream:
            return Streamed(pump, prompt, sampling, answer)
        return Whole(pump, prompt, sampling, answer.whole)

    @app.post("/v1/chat/completions", tags=tags, response_class=JSONResponse, summary="Chat, plain or streamed")
    async def chat(request: ChatRequest) -> Response:
        service.check_model(request.model)
        service.working()
        return reply(request, service.prompts.chat([message.plain() for message in request.messages]), chat=True)

    @app.post("/v1/completions", tags=tags, response_class=JSONResponse, summary="Continue a text, plain or streamed")
    async def completions(request: CompletionRequest) -> Response:
        service.check_model(request.model)
        service.working()
        return reply(request, _prompt_ids(service, request.prompt), chat=False)

    def defaults() -> Sampling:
        return ChatRequest.model_construct(messages=[]).sampling(run.sampling)

    @app.post("/predict", tags=tags, response_model=PredictResponse, summary="One text in, one result out")
    async def predict(request: PredictRequest) -> Response:
        pump = service.working()
        finish = _wrapped("result")
        return Whole(pump, service.user_turn(request.text), defaults(), finish)

    @app.get("/answer", tags=tags, response_model=AnswerResponse, summary="One question in the address, one answer")
    async def answer(prompt: str = Query(min_length=1, description="what the user says")) -> Response:
        pump = service.working()
        return Whole(pump, service.user_turn(prompt), defaults(), _wrapped("answer"))


def _wrapped(key: str) -> Callable[[list[Piece]], dict[str, str]]:
    return lambda pieces: {key: "".join(piece.text for piece in pieces)}


def _prompt_ids(service: Service, prompt: str | list[int] | list[str]) -> list[int]:
    if isinstance(prompt, str):
        return service.prompts.plain(prompt)
    if len(prompt) == 1 and isinstance(prompt[0], str):
        return service.prompts.plain(prompt[0])
    ids = [token for token in prompt if isinstance(token, int)]
    if len(ids) != len(prompt):
        raise RequestRefused("One prompt a request: send several requests, they are decoded together.", param="prompt")
    size = service.prompts.vocabulary()
    if any(not 0 <= token < size for token in ids):
        raise RequestRefused(f"A token id of the prompt lies outside the vocabulary of {size}.", param="prompt")
    return ids


def _add_status(app: FastAPI, service: Service) -> None:
    tags: list[str | Enum] = ["status"]

    @app.get("/v1/models", tags=tags, summary="The one model served here")
    async def models() -> dict[str, Any]:
        card = {
            "id": service.run.name,
            "object": "model",
            "created": 0,
            "owned_by": "packager",
            "max_model_len": service.run.context,
        }
        return {"object": "list", "data": [card]}

    @app.get("/health", tags=tags, response_model=Health, summary="200 once the model has answered a token")
    async def health() -> Response:
        working = service.pump is not None
        body = Health(status="ok" if working else "stopping", model=service.run.name)
        return JSONResponse(body.model_dump(), 200 if working else 503)

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
        return refused(error)

    @app.exception_handler(TemplateRefused)
    async def template(_: Request, error: TemplateRefused) -> Response:
        body = error_body(f"The chat template refuses: {error}", "invalid_request_error", param="messages")
        return JSONResponse(body, 400)

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
        return JSONResponse(error_body("The server failed; its log says more.", "server_error"), 500)
