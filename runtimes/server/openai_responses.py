"""Response bodies in the shapes of OpenAI's API: answers, stream chunks (SSE) and errors, as plain dictionaries.

Stream chunks are built for every token, so the fixed part of a chunk is encoded once and only the text each time.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence

from runtimes.engine import Logprob, Piece

DONE = b"data: [DONE]\n\n"


def dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def error_body(message: str, kind: str, *, param: str | None = None, code: str | None = None) -> dict[str, object]:
    """OpenAI's error object. kind: invalid_request_error, not_found_error, server_error, overloaded_error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def usage_of(last: Piece) -> dict[str, object]:
    return {
        "prompt_tokens": last.prompt_tokens,
        "completion_tokens": last.tokens,
        "total_tokens": last.prompt_tokens + last.tokens,
        "prompt_tokens_details": {"cached_tokens": last.cached_tokens},
    }


class ResponseBuilder:
    """Builds the response to one request. chat: chat.completion shapes, else text_completion shapes.

    prompt_ids: the prompt's token ids when the response reports token ids. logprobs, usage: whether it has them.
    """

    def __init__(
        self, *, chat: bool, model: str, logprobs: bool, usage: bool, prompt_ids: Sequence[int] | None = None
    ) -> None:
        self.chat, self.model, self.logprobs, self.usage = chat, model, logprobs, usage
        self.prompt_ids = prompt_ids
        self.id = ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12)
        self.created = int(time.time())
        kind = "chat.completion" if chat else "text_completion"
        self.head = {"id": self.id, "object": kind, "created": self.created, "model": model}
        chunk = dict(self.head, object="chat.completion.chunk" if chat else kind)
        self._chunk = chunk
        null_usage = ',"usage":null' if usage else ""
        before = '{"index":0,"delta":{"content":' if chat else '{"index":0,"text":'
        after = '},"logprobs":null,"finish_reason":null}' if chat else ',"logprobs":null,"finish_reason":null}'
        self._before = ("data: " + dumps(chunk)[:-1] + null_usage + ',"choices":[' + before).encode()
        self._after = (after + "]}\n\n").encode()
        self._offset = 0

    # -- streamed -----------------------------------------------------------------------------------------------

    def opening(self) -> bytes:
        """The first chunk: the role, and the prompt's ids when the request wants them."""
        if not self.chat and self.prompt_ids is None:
            return b""
        choice: dict[str, object] = {"index": 0, "logprobs": None, "finish_reason": None}
        choice |= {"delta": {"role": "assistant", "content": ""}} if self.chat else {"text": ""}
        extra = {} if self.prompt_ids is None else {"prompt_token_ids": list(self.prompt_ids)}
        return self._event([choice], **extra)

    def chunk(self, piece: Piece) -> bytes:
        """One piece as a server-sent event; empty for a piece without content."""
        if self.prompt_ids is None and not piece.logprobs:
            if not piece.text:
                return b""
            return self._before + json.dumps(piece.text, ensure_ascii=False).encode() + self._after
        if not (piece.text or piece.ids or piece.logprobs):
            return b""
        choice: dict[str, object] = {"index": 0}
        choice |= {"delta": {"content": piece.text}} if self.chat else {"text": piece.text}
        choice |= {"logprobs": self._logprobs(piece.logprobs), "finish_reason": None}
        if self.prompt_ids is not None:
            choice["token_ids"] = list(piece.ids)
        return self._event([choice])

    def closing(self, last: Piece) -> bytes:
        """The finish reason, the usage when the request wants it, and the end mark."""
        out = self.chunk(last)
        choice: dict[str, object] = {"index": 0, "logprobs": None, "finish_reason": last.finish}
        choice["delta" if self.chat else "text"] = {} if self.chat else ""
        out += self._event([choice])
        if self.usage:
            out += b"data: " + dumps({**self._chunk, "choices": [], "usage": usage_of(last)}).encode() + b"\n\n"
        return out + DONE

    def failure(self, body: dict[str, object]) -> bytes:
        """An error after the stream has begun."""
        return b"data: " + dumps(body).encode() + b"\n\n" + DONE

    def _event(self, choices: list[dict[str, object]], **extra: object) -> bytes:
        usage = {"usage": None} if self.usage else {}
        return b"data: " + dumps({**self._chunk, **usage, **extra, "choices": choices}).encode() + b"\n\n"

    # -- whole --------------------------------------------------------------------------------------------------

    def whole(self, pieces: Sequence[Piece]) -> dict[str, object]:
        """The response that is not streamed, from all pieces."""
        last = pieces[-1]
        text = "".join(piece.text for piece in pieces)
        logprobs = [entry for piece in pieces for entry in piece.logprobs]
        choice: dict[str, object] = {"index": 0}
        choice |= {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        choice |= {"logprobs": self._logprobs(logprobs) if self.logprobs else None, "finish_reason": last.finish}
        extra: dict[str, object] = {}
        if self.prompt_ids is not None:
            choice["token_ids"] = [token for piece in pieces for token in piece.ids]
            extra["prompt_token_ids"] = list(self.prompt_ids)
        return {**self.head, **extra, "choices": [choice], "usage": usage_of(last)}

    def _logprobs(self, entries: Sequence[Logprob]) -> dict[str, object] | None:
        if not entries:
            return {"content": []} if self.logprobs and self.chat else None
        if self.chat:
            return {"content": [_chat_logprob(entry) | {"top_logprobs": _tops(entry)} for entry in entries]}
        offsets = []
        for entry in entries:
            offsets.append(self._offset)
            self._offset += len(entry.text)
        return {
            "tokens": [entry.text for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [{other.text: other.logprob for other in entry.top} for entry in entries],
            "text_offset": offsets,
        }


def _chat_logprob(entry: Logprob) -> dict[str, object]:
    return {"token": entry.text, "logprob": entry.logprob, "bytes": list(entry.bytes)}


def _tops(entry: Logprob) -> list[dict[str, object]]:
    return [_chat_logprob(other) for other in entry.top]
