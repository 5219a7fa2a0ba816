"""The HTTP routes of an encoder: /v1/embeddings (as OpenAI), or /classify (as vLLM, with label names) and /predict.

A value that is not supported is refused by name, never dropped. A text that is too long is refused, as OpenAI does,
unless the request has ``"truncate": true``; then the response lists the texts that were cut.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Sequence
from enum import Enum
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Literal

from fastapi import FastAPI
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from runtimes.engine import Busy, EngineError, RequestRefused
from runtimes.engines.encoder import Encoder, Text, labelled
from runtimes.manifest import Run
from runtimes.server.base_app import BaseService, error_response, make_base_app, require_model, while_connected
from runtimes.server.batcher import Batcher
from runtimes.server.metrics import EncoderMetrics

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_TEXTS = 2048  # OpenAI's limit
Token = Annotated[int, Field(strict=True)]
Finish = Callable[[Sequence[Text], "list[NDArray[np.float32]]"], dict[str, object]]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


def _known_shape(value: object) -> object:
    """Check the form of ``input``: one error, where pydantic reports one for each member of the union."""

    def ids(entry: object) -> bool:
        return isinstance(entry, list) and all(type(token) is int for token in entry)

    listed = isinstance(value, list) and (all(isinstance(entry, str) for entry in value) or all(map(ids, value)))
    if not (isinstance(value, str) or listed or ids(value)):
        raise ValueError("a text, a list of texts, a list of token ids, or a list of such lists is expected")
    return value


class EmbeddingRequest(Strict):
    input: Annotated[str | list[str] | list[Token] | list[list[Token]], BeforeValidator(_known_shape)] = Field(
        description="a text, a list of texts, or token ids with their special tokens"
    )
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, description="only the model's own number is accepted")
    user: str | None = None
    truncate: bool = Field(False, description="cut texts that are too long, and say which")

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"input": ["A red kite circled.", "A bird of prey."]}]}
    )


class ClassifyRequest(Strict):
    input: str | list[str] = Field(description="a text or a list of texts")
    pair: str | list[str] | None = Field(None, description="the second text of each pair, for models of pairs")
    model: str | None = None
    user: str | None = None
    truncate: bool = Field(False, description="cut texts that are too long, and say which")

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"input": "A wonderful evening."}]})


class PredictRequest(Strict):
    text: str = Field(min_length=1)


class PredictResponse(BaseModel):
    result: str


class EncoderService(BaseService[Batcher]):
    """An embedder or classifier behind the routes."""

    engine: Encoder
    metrics: EncoderMetrics

    def __init__(self, run: Run, engine: Encoder) -> None:
        super().__init__(run, engine, EncoderMetrics(engine.memory, getattr(engine, "device_memory", None)))
        self.size = len(engine.compute([engine.reader.read("a")])[0])

    def make_worker(self) -> Batcher:
        return Batcher(self.engine, self.metrics)

    @property
    def card(self) -> dict[str, object]:
        """The fields of /v1/models beside the name."""
        settings = self.engine.settings
        common: dict[str, object] = {"task": self.engine.task, "max_model_len": self.engine.context}
        if self.details:
            common["engine"] = dict(self.details)
        if self.engine.task == "classify":
            return {**common, "labels": list(settings.labels), "scores": settings.scores}
        return {
            **common,
            "dimensions": self.size,
            "pooling": settings.pooling,
            "normalized": settings.normalize,
            "prompt": settings.prompt,
        }


class ComputedResponse(Response):
    """Tokenizes, computes and answers while it is sent. When the client disconnects its waiting texts are dropped."""

    def __init__(self, service: EncoderService, read: Callable[[], list[Text]], finish: Finish) -> None:
        super().__init__()
        self.batcher, self.read, self.finish = service.worker(), read, finish

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = await while_connected(receive, self._answer())
        if not work.cancelled():
            await work.result()(scope, receive, send)

    async def _answer(self) -> Response:
        try:
            texts = await asyncio.to_thread(self.read)  # tokenizing a megabyte of text takes a while
            rows = await self.batcher.compute(texts)
        except (EngineError, Busy) as error:
            return error_response(error)
        return await asyncio.to_thread(lambda: JSONResponse(self.finish(texts, rows)))


def open_service(engine: ModuleType, run: Run, *, verbose: bool) -> EncoderService:
    """Load the model. Raises ManifestError or EngineError."""
    return EncoderService(run, engine.load(run, verbose=verbose))


def make_app(service: EncoderService, *, max_body: int, log_json: bool) -> ASGIApp:
    """The ASGI application. max_body: bytes; larger requests get a 413."""
    add = _add_classifier if service.engine.task == "classify" else _add_embedder
    return make_base_app(service, lambda app: add(app, service), max_body=max_body, log_json=log_json)


def _add_embedder(app: FastAPI, service: EncoderService) -> None:
    tags: list[str | Enum] = ["vectors"]

    @app.post("/v1/embeddings", tags=tags, response_class=JSONResponse, summary="Texts to vectors")
    async def embeddings(request: EmbeddingRequest) -> Response:
        require_model(service.run, request.model)
        if request.dimensions not in (None, service.size):
            raise RequestRefused(
                f"This model gives {service.size} dimensions; it is not known to support fewer.",
                param="dimensions",
            )

        def vector(row: NDArray[np.float32]) -> str | list[float]:
            if request.encoding_format == "base64":
                return base64.b64encode(row.astype("<f4").tobytes()).decode("ascii")
            return [float(value) for value in row]

        def finish(texts: Sequence[Text], rows: list[NDArray[np.float32]]) -> dict[str, object]:
            data = [{"object": "embedding", "index": place, "embedding": vector(row)} for place, row in enumerate(rows)]
            return {"object": "list", "data": data, "model": service.run.name, **_usage(texts)}

        return ComputedResponse(service, lambda: _texts(service, request.input, request.truncate), finish)


def _add_classifier(app: FastAPI, service: EncoderService) -> None:
    tags: list[str | Enum] = ["labels"]
    settings, reader = service.engine.settings, service.engine.reader

    @app.post("/classify", tags=tags, response_class=JSONResponse, summary="Texts to labels with scores")
    async def classify(request: ClassifyRequest) -> Response:
        require_model(service.run, request.model)

        def read() -> list[Text]:
            if request.pair is None:
                return _texts(service, request.input, request.truncate)
            firsts, seconds = _listed(request.input), _listed(request.pair)
            if len(firsts) != len(seconds):
                raise RequestRefused("input and pair have different lengths.", param="pair")
            _check_count(firsts)
            return [
                reader.read(one, other, truncate=request.truncate) for one, other in zip(firsts, seconds, strict=True)
            ]

        def finish(texts: Sequence[Text], rows: list[NDArray[np.float32]]) -> dict[str, object]:
            data = [{"index": place, **labelled(row, settings)} for place, row in enumerate(rows)]
            return {"object": "list", "data": data, "model": service.run.name, **_usage(texts)}

        return ComputedResponse(service, read, finish)

    @app.post("/predict", tags=tags, response_model=PredictResponse, summary="One text in, its best label out")
    async def predict(request: PredictRequest) -> Response:
        def read() -> list[Text]:
            return [reader.read(request.text, param="text")]

        return ComputedResponse(service, read, lambda _, rows: {"result": labelled(rows[0], settings)["label"]})


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _check_count(texts: Sequence[object]) -> None:
    if not 0 < len(texts) <= MAX_TEXTS:
        raise RequestRefused(f"A request holds 1 to {MAX_TEXTS} texts, this one {len(texts)}.", param="input")


def _texts(service: EncoderService, given: str | Sequence[str | int | list[int]], truncate: bool) -> list[Text]:
    """The request's input as texts. Raises RequestRefused."""
    reader = service.engine.reader
    if isinstance(given, str):
        return [reader.read(given, truncate=truncate)]
    ids = [token for token in given if isinstance(token, int)]
    if ids:
        return [reader.from_ids(ids, truncate=truncate)]
    _check_count(given)
    texts: list[Text] = []
    for entry in given:
        if isinstance(entry, str):
            texts.append(reader.read(entry, truncate=truncate))
        elif isinstance(entry, list):
            texts.append(reader.from_ids(entry, truncate=truncate))
    return texts


def _usage(texts: Sequence[Text]) -> dict[str, object]:
    """The usage, and which texts were cut."""
    tokens = sum(len(text.ids) for text in texts)
    cut = [place for place, text in enumerate(texts) if text.cut]
    return {"usage": {"prompt_tokens": tokens, "total_tokens": tokens}, **({"truncated": cut} if cut else {})}
