"""The HTTP routes of a language model: chat, completions, /predict and /answer."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from types import ModuleType

from fastapi import FastAPI, Query, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from runtimes.decoding.chat_template import Prompts, TemplateRefused
from runtimes.engine import Engine, Piece, RequestRefused, Sampling
from runtimes.manifest import Run
from runtimes.server.base_app import BaseService, make_base_app, require_model
from runtimes.server.dispatcher import Dispatcher
from runtimes.server.metrics import Metrics
from runtimes.server.openai_requests import (
    AnswerResponse,
    ChatRequest,
    CompletionRequest,
    PredictRequest,
    PredictResponse,
)
from runtimes.server.openai_responses import ResponseBuilder, error_body
from runtimes.server.responses import StreamedResponse, WholeResponse


class Service(BaseService[Dispatcher]):
    """A language model behind the routes."""

    engine: Engine
    metrics: Metrics

    def __init__(self, run: Run, prompts: Prompts, engine: Engine) -> None:
        super().__init__(run, engine, Metrics(engine.memory))
        self.prompts = prompts

    def make_worker(self) -> Dispatcher:
        return Dispatcher(self.engine, self.metrics)

    @property
    def card(self) -> dict[str, object]:
        """The fields of /v1/models beside the name."""
        return {"max_model_len": self.run.context}

    def check_model(self, name: str | None) -> None:
        require_model(self.run, name)

    def user_turn(self, text: str) -> list[int]:
        """Token ids of one user message: through the chat template where there is one."""
        if self.prompts.has_template:
            return self.prompts.chat([{"role": "user", "content": text}])
        return self.prompts.plain(text)


def open_service(engine: ModuleType, run: Run, *, verbose: bool) -> Service:
    """Load the model. Raises ManifestError or EngineError."""
    prompts = Prompts(run)
    return Service(run, prompts, engine.load(run, verbose=verbose))


def make_app(service: Service, *, max_body: int, log_json: bool) -> ASGIApp:
    """The ASGI application. max_body: bytes; larger requests get a 413."""

    def add_routes(app: FastAPI) -> None:
        _add_generation(app, service)

        @app.exception_handler(TemplateRefused)
        async def template(_: Request, error: TemplateRefused) -> Response:
            body = error_body(f"The chat template refuses: {error}", "invalid_request_error", param="messages")
            return JSONResponse(body, 400)

    return make_base_app(service, add_routes, max_body=max_body, log_json=log_json)


def _add_generation(app: FastAPI, service: Service) -> None:
    run = service.run
    tags: list[str | Enum] = ["answers"]

    def reply(request: ChatRequest | CompletionRequest, prompt: list[int], chat: bool) -> Response:
        dispatcher = service.worker()
        sampling = request.sampling(run.sampling)
        builder = ResponseBuilder(
            chat=chat,
            model=run.name,
            logprobs=sampling.logprobs is not None,
            usage=bool(request.stream_options and request.stream_options.include_usage),
            prompt_ids=prompt if request.return_token_ids else None,
        )
        if request.stream:
            return StreamedResponse(dispatcher, prompt, sampling, builder)
        return WholeResponse(dispatcher, prompt, sampling, builder.whole)

    @app.post("/v1/chat/completions", tags=tags, response_class=JSONResponse, summary="Chat, plain or streamed")
    async def chat(request: ChatRequest) -> Response:
        service.check_model(request.model)
        service.worker()  # 503 while the server stops, before the prompt is tokenized
        return reply(request, service.prompts.chat([message.plain() for message in request.messages]), chat=True)

    @app.post("/v1/completions", tags=tags, response_class=JSONResponse, summary="Continue a text, plain or streamed")
    async def completions(request: CompletionRequest) -> Response:
        service.check_model(request.model)
        service.worker()  # 503 while the server stops, before the prompt is tokenized
        return reply(request, _prompt_ids(service, request.prompt), chat=False)

    def defaults() -> Sampling:
        return ChatRequest.model_construct(messages=[]).sampling(run.sampling)

    @app.post("/predict", tags=tags, response_model=PredictResponse, summary="One text in, one result out")
    async def predict(request: PredictRequest) -> Response:
        dispatcher = service.worker()
        finish = _wrapped("result")
        return WholeResponse(dispatcher, service.user_turn(request.text), defaults(), finish)

    @app.get("/answer", tags=tags, response_model=AnswerResponse, summary="One question in the address, one answer")
    async def answer(prompt: str = Query(min_length=1, description="the user's message")) -> Response:
        dispatcher = service.worker()
        return WholeResponse(dispatcher, service.user_turn(prompt), defaults(), _wrapped("answer"))


def _wrapped(key: str) -> Callable[[list[Piece]], dict[str, str]]:
    return lambda pieces: {key: "".join(piece.text for piece in pieces)}


def _prompt_ids(service: Service, prompt: str | list[int] | list[str]) -> list[int]:
    if isinstance(prompt, str):
        return service.prompts.plain(prompt)
    if len(prompt) == 1 and isinstance(prompt[0], str):
        return service.prompts.plain(prompt[0])
    ids = [token for token in prompt if isinstance(token, int)]
    if len(ids) != len(prompt):
        raise RequestRefused(
            "One prompt per request: send several requests, which are decoded together.", param="prompt"
        )
    size = service.prompts.vocabulary()
    if any(not 0 <= token < size for token in ids):
        raise RequestRefused(f"A token id of the prompt lies outside the vocabulary of {size}.", param="prompt")
    return ids
