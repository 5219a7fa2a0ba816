"""Request bodies in the shapes of OpenAI's API, checked by pydantic, and their conversion to a Sampling.

A value that is not supported is refused by name, never dropped: an answer that ignores part of the request looks right.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from runtimes.engine import RequestRefused, Sampling

MAX_MESSAGES = 2048
MAX_STOPS = 16


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """The message for the chat template: role and content as text."""
        content = self.content
        return {
            "role": self.role,
            "content": content if isinstance(content, str) else "".join(part.text for part in content),
        }


class StreamOptions(Strict):
    include_usage: bool = False


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None


class Common(Strict):
    """The fields of both chat and completions. Not OpenAI's: top_k, min_p, repetition_penalty, return_token_ids."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, le=1 << 24)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1 << 24)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: str | list[str] | None = None
    n: Literal[1] | None = None
    logit_bias: dict[int, float] | None = Field(None, max_length=1024)
    response_format: ResponseFormat | None = None
    user: str | None = None
    return_token_ids: bool | None = Field(None, description="also return prompt_token_ids and token_ids (as vLLM does)")

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if isinstance(stop, list) and len(stop) > MAX_STOPS:
            raise ValueError(f"at most {MAX_STOPS} stop strings")
        return stop

    def schema_text(self) -> str | None:
        """The JSON Schema that the answer must follow, or None. Raises RequestRefused."""
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_object":
            return '{"type": "object"}'
        schema = (wanted.json_schema or {}).get("schema")
        if not isinstance(schema, dict):
            raise RequestRefused(
                'response_format of type json_schema needs {"json_schema": {"name": …, "schema": {…}}}.',
                code="invalid_json_schema",
                param="response_format.json_schema.schema",
            )
        return json.dumps(schema, sort_keys=False)

    def logprob_count(self) -> int | None:
        return None

    def token_limit(self) -> int | None:
        return self.max_tokens

    def sampling(self, defaults: Mapping[str, float]) -> Sampling:
        """The Sampling of the request, with the bundle's values as defaults. Raises RequestRefused."""

        def pick(name: str, fallback: float) -> float:
            value = getattr(self, name)
            return float(defaults.get(name, fallback) if value is None else value)

        stops = () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        return Sampling(
            max_tokens=self.token_limit(),
            temperature=pick("temperature", 1.0),
            top_p=pick("top_p", 1.0),
            top_k=max(0, int(pick("top_k", 0))),
            min_p=pick("min_p", 0.0),
            repetition_penalty=pick("repetition_penalty", 1.0),
            presence_penalty=pick("presence_penalty", 0.0),
            frequency_penalty=pick("frequency_penalty", 0.0),
            seed=self.seed,
            stop=tuple(stop for stop in stops if stop),
            logprobs=self.logprob_count(),
            logit_bias=self.logit_bias or {},
            schema=self.schema_text(),
            exact_ids=bool(self.return_token_ids) and not self.stream,
        )


class ChatRequest(Common):
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, le=1 << 24)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 64}]},
    )

    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def logprob_count(self) -> int | None:
        if not self.logprobs:
            if self.top_logprobs:
                raise RequestRefused("top_logprobs needs logprobs to be true.", param="top_logprobs")
            return None
        return self.top_logprobs or 0


class CompletionRequest(Common):
    prompt: str | list[int] | list[str] = Field(description="a text, a list holding one text, or a list of token ids")
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"prompt": "The capital of France is", "max_tokens": 16}]}
    )

    def logprob_count(self) -> int | None:
        return self.logprobs


class PredictRequest(Strict):
    text: str = Field(min_length=1, description="the user's message")


class PredictResponse(BaseModel):
    result: str


class AnswerResponse(BaseModel):
    answer: str
