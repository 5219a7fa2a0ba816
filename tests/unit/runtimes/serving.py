"""A scripted engine behind the real server on a real port: what the HTTP face does, without a model."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from runtimes.decoding.chat_template import Prompts
from runtimes.engine import Emit, EngineError, Logprob, Piece, RequestRefused, Sampling, StopScanner, iterate
from runtimes.manifest import Run
from runtimes.server.chat_app import Service, make_app
from runtimes.server.http_protocol import HttpProtocol

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' and not loop.first %}"
    "{{ raise_exception('System message must be first') }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_tokenizer(folder: Path) -> Path:
    """A byte-level tokenizer without merges: one id a byte, and one added token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: at for at, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|assistant|>"])
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def write_bundle(folder: Path, **manifest: Any) -> Path:
    """A bundle of safetensors, whose server is not ours, as far as starting it reads it. manifest: its keys; the files
    are added to its ``run``.
    """
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model.safetensors").touch()
    write_tokenizer(folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    files = {
        "model": "model/model.safetensors",
        "tokenizer": "model/tokenizer.json",
        "chat_template": "model/chat_template.jinja",
    }
    plain = {"schema_version": 1, "name": "tiny", **manifest, "run": {**files, **manifest["run"]}}
    (folder / "manifest.json").write_text(json.dumps(plain), encoding="utf-8")
    return folder


def make_run(folder: Path, **changes: Any) -> Run:
    template = folder / "chat_template.jinja"
    template.write_text(TEMPLATE, encoding="utf-8")
    values: dict[str, Any] = {
        "engine": "scripted",
        "model": folder / "model.gguf",
        "tokenizer": write_tokenizer(folder),
        "chat_template": template,
        "name": "tiny",
        "sampling": {"temperature": 0.5, "top_k": 7},
        "context": 64,
        "slots": 2,
    }
    return Run(**{**values, **changes})


class Scripted:
    """Emits ``words`` one by one, ``delay`` seconds apart; records its requests."""

    version = "scripted 1"

    def __init__(
        self, words: Sequence[str] = ("Hello", ",", " wörld", " 🌍"), delay: float = 0.0, slots: int = 2
    ) -> None:
        self.words, self.delay, self.slots, self.context = list(words), delay, slots, 64
        self.requests: list[tuple[list[int], Sampling]] = []
        self.emitted = 0
        self.running = self.most = self.cancelled = 0
        self.lock = threading.Lock()
        self.closed = False
        self.fail_after: int | None = None

    def stream(self, prompt: Sequence[int], sampling: Sampling, emit: Emit) -> None:
        with self.lock:
            self.requests.append((list(prompt), sampling))
            self.running += 1
            self.most = max(self.most, self.running)
        try:
            self._stream(prompt, sampling, emit)
        finally:
            with self.lock:
                self.running -= 1

    def _stream(self, prompt: Sequence[int], sampling: Sampling, emit: Emit) -> None:
        if len(prompt) >= self.context:
            raise RequestRefused("too long", code="context_length_exceeded")
        emit(Piece(""))
        stops, words = StopScanner(sampling.stop), self.words[: sampling.max_tokens]
        for at, word in enumerate(words, 1):
            time.sleep(self.delay)
            if self.fail_after == at:
                raise EngineError("the graphics card fell out")
            text, stopped = stops.feed(word)
            logprobs: tuple[Logprob, ...] = ()
            if sampling.logprobs is not None:
                chosen = Logprob(at, word, tuple(word.encode()), -0.5)
                logprobs = (Logprob(at, word, tuple(word.encode()), -0.5, (chosen,) * sampling.logprobs),)
            self.emitted += 1
            if emit(Piece(text, (at,), at, logprobs)):
                self.cancelled += 1
                return
            if stopped:
                emit(Piece("", (), at, (), "stop", len(prompt), 0))
                return
        reason = "length" if sampling.max_tokens and sampling.max_tokens <= len(self.words) else "stop"
        emit(Piece(stops.rest(), (), len(words), (), reason, len(prompt), 3))

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[Piece]:
        return iterate(lambda emit: self.stream(prompt, sampling, emit))

    def score(self, tokens: Sequence[int], top: int) -> Iterator[Mapping[int, float]]:
        return iter(())

    def memory(self) -> int:
        return 12345

    def close(self) -> None:
        self.closed = True


class Client:
    """Plain http.client requests to the running server."""

    def __init__(self, port: int, engine: Scripted) -> None:
        self.port, self.engine = port, engine

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)

    def send(self, method: str, path: str, body: Any = None) -> tuple[int, Any, dict[str, str]]:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        with contextlib.closing(self.connect()) as connection:
            connection.request(method, path, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            raw = response.read()
            headers = {name.lower(): value for name, value in response.getheaders()}
        plain = headers.get("content-type", "").startswith("application/json")
        return response.status, json.loads(raw) if plain else raw.decode(), headers

    def chat(self, text: str = "Hi", **fields: Any) -> tuple[int, Any]:
        messages = fields.pop("messages", [{"role": "user", "content": text}])
        status, body, _ = self.send("POST", "/v1/chat/completions", {"messages": messages, **fields})
        return status, body

    def stream(self, path: str = "/v1/chat/completions", **fields: Any) -> list[dict[str, Any]]:
        """The decoded events of a streamed answer, the end mark checked and left out."""
        status, raw, _ = self.send("POST", path, {**fields, "stream": True})
        assert status == 200, raw
        events = [event.removeprefix("data: ") for event in raw.split("\n\n") if event]
        assert events[-1] == "[DONE]"
        return [json.loads(event) for event in events[:-1]]


@contextlib.contextmanager
def serving(run: Run, engine: Scripted, *, max_body: int = 1 << 20, log_json: bool = False) -> Iterator[Client]:
    """The real application under the real uvicorn, on a free port."""
    with listening(make_app(Service(run, Prompts(run), engine), max_body=max_body, log_json=log_json)) as port:
        yield Client(port, engine)


@contextlib.contextmanager
def listening(app: Any) -> Iterator[int]:
    """The port of an application under uvicorn, as runtimes/server/serve.py starts it."""
    config = uvicorn.Config(app, http=HttpProtocol, loop="asyncio", log_config=None, access_log=False, lifespan="on")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            deadline = time.monotonic() + 10
            while not server.started and time.monotonic() < deadline:
                time.sleep(0.01)
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(20)
