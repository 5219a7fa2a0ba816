"""The HTTP server over a scripted engine: shapes, refusals, streaming, cancelling, queueing."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.runtimes.serving import Client, Scripted, make_run, serving

TEXT = "Hello, wörld 🌍"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with serving(make_run(tmp_path_factory.mktemp("run")), Scripted()) as client:
        yield client


def test_a_chat_answer_has_openai_shape(client: Client) -> None:
    """Message, finish reason and usage stand where the OpenAI client looks for them."""
    status, body = client.chat()
    assert status == 200
    assert body["object"] == "chat.completion" and body["model"] == "tiny"
    choice = body["choices"][0]
    assert choice["message"]["role"] == "assistant" and choice["message"]["content"] == TEXT
    assert choice["finish_reason"] == "stop" and choice["logprobs"] is None
    assert body["usage"]["completion_tokens"] == 4
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + 4


def test_the_prompt_is_rendered_once_by_the_template(client: Client) -> None:
    """The ids the engine gets are the template's text, tokenized once."""
    client.chat("x")
    ids, sampling = client.engine.requests[-1]
    tokenizer = make_prompts_ids("<|user|>x\n<|assistant|>", client)
    assert ids == tokenizer
    assert (sampling.temperature, sampling.top_k) == (0.5, 7), "the bundle's defaults apply"


def make_prompts_ids(text: str, client: Client) -> list[int]:
    ask = {"prompt": text, "return_token_ids": True, "max_tokens": 1}
    status, body, _ = client.send("POST", "/v1/completions", ask)
    assert status == 200
    ids = body["prompt_token_ids"]
    assert isinstance(ids, list)
    return ids


def test_a_stream_gives_the_same_text_piece_by_piece(client: Client) -> None:
    """First the role, then the pieces, then the reason, then the usage when the request wants it."""
    events = client.stream(messages=[{"role": "user", "content": "Hi"}], stream_options={"include_usage": True})
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    text = "".join(e["choices"][0]["delta"].get("content", "") for e in events if e["choices"])
    assert text == TEXT
    assert [e["choices"][0]["finish_reason"] for e in events[:-1]] == [None] * (len(events) - 2) + ["stop"]
    assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] == 4
    assert all(e["usage"] is None for e in events[:-1])


def test_a_streamed_plain_completion_carries_text(client: Client) -> None:
    events = client.stream("/v1/completions", prompt="Once")
    assert "".join(e["choices"][0]["text"] for e in events) == TEXT
    assert events[-1]["choices"][0]["finish_reason"] == "stop"


def test_token_ids_are_answered_when_asked_for(client: Client) -> None:
    """return_token_ids shows what was fed and what came, as vLLM does."""
    _, body = client.chat(return_token_ids=True)
    assert body["choices"][0]["token_ids"] == [1, 2, 3, 4]
    assert body["prompt_token_ids"] == client.engine.requests[-1][0]
    assert client.engine.requests[-1][1].exact_ids
    events = client.stream(messages=[{"role": "user", "content": "Hi"}], return_token_ids=True)
    assert [i for e in events for i in e["choices"][0].get("token_ids", [])] == [1, 2, 3, 4]


def test_stop_strings_end_the_answer_and_are_left_out(client: Client) -> None:
    """Also when they lie across pieces."""
    _, body = client.chat(stop=["o, w"])
    assert body["choices"][0]["message"]["content"] == "Hell"
    assert body["choices"][0]["finish_reason"] == "stop"
    events = client.stream(messages=[{"role": "user", "content": "Hi"}], stop="🌍!")
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events) == TEXT


def test_max_tokens_gives_length(client: Client) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        _, body = client.chat(**{name: 2})
        assert body["choices"][0]["finish_reason"] == "length" and body["usage"]["completion_tokens"] == 2


def test_logprobs_have_both_shapes(client: Client) -> None:
    """Chat lists content entries; plain completions list tokens, offsets and alternatives."""
    _, body = client.chat(logprobs=True, top_logprobs=2)
    entries = body["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in entries] == ["Hello", ",", " wörld", " 🌍"]
    assert len(entries[0]["top_logprobs"]) == 2 and entries[0]["bytes"] == list(b"Hello")
    _, body, _ = client.send("POST", "/v1/completions", {"prompt": "x", "logprobs": 1})
    assert body["choices"][0]["logprobs"]["text_offset"] == [0, 5, 6, 12]


def test_predict_and_answer(client: Client) -> None:
    """The two plain endpoints speak through the chat template too."""
    assert client.send("POST", "/predict", {"text": "x"})[:2] == (200, {"result": TEXT})
    fed = client.engine.requests[-1][0]
    assert client.send("GET", "/answer?prompt=x")[:2] == (200, {"answer": TEXT})
    assert client.engine.requests[-1][0] == fed == make_prompts_ids("<|user|>x\n<|assistant|>", client)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"tools": []}, "tools"),
        ({"n": 2}, "n"),
        ({"temperature": 3}, "temperature"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "content"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_logprobs": 3}, "logprobs"),
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"messages": [{"role": "user", "content": "x" * 100}]}, "too long"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]},
            "System message must be first",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(client: Client, fields: dict[str, object], word: str) -> None:
    """A 400 in OpenAI's error shape names the field or says the template's own words."""
    for extra in ({}, {"stream": True}):
        status, body = client.chat(**{"messages": [{"role": "user", "content": "x"}], **fields, **extra})
        assert status == 400, body
        assert body["error"]["type"] == "invalid_request_error"
        assert word in body["error"]["message"] + str(body["error"]["param"])


def test_other_mistakes_have_their_own_status(client: Client) -> None:
    """Unknown model and path 404, wrong method 405, broken JSON 400, two prompts 400, foreign token ids 400."""
    assert client.chat(model="gpt-9")[0] == 404
    assert client.send("GET", "/nowhere")[0] == 404
    assert client.send("GET", "/predict")[0] == 405
    status, body, _ = client.send("POST", "/predict", b"{nope")
    assert status == 400 and "JSON" in body["error"]["message"]
    assert client.send("POST", "/v1/completions", {"prompt": ["a", "b"]})[0] == 400
    assert client.send("POST", "/v1/completions", {"prompt": [5, 99999]})[0] == 400
    assert client.chat(model="tiny")[0] == 200


def test_health_models_and_metrics(client: Client) -> None:
    client.chat()
    assert client.send("GET", "/health")[:2] == (200, {"status": "ok", "model": "tiny"})
    models = client.send("GET", "/v1/models")[1]
    assert models["data"][0]["id"] == "tiny" and models["data"][0]["max_model_len"] == 64
    text = client.send("GET", "/metrics")[1]
    assert 'packager_requests_total{path="/v1/chat/completions",status="200"}' in text
    assert "packager_time_to_first_token_seconds_count" in text and "packager_ready 1.0" in text
    assert "packager_resident_memory_bytes 12345.0" in text


def test_the_api_page_loads_nothing_from_elsewhere(client: Client) -> None:
    """Every address in /docs is this server's own, and a policy forbids others."""
    _, page, headers = client.send("GET", "/docs")
    assert "http://" not in page and "https://" not in page
    assert headers["content-security-policy"].startswith("default-src 'self'")
    for name in ("swagger-ui-bundle.js", "swagger-ui.css", "favicon-32x32.png"):
        with_body = client.connect()
        with_body.request("GET", f"/docs/{name}")
        assert with_body.getresponse().status == 200
        with_body.close()
    assert client.send("GET", "/docs/../app.py")[0] == 404
    assert "access-control-allow-origin" not in headers


def test_a_large_request_is_refused_and_told_so(tmp_path: Path) -> None:
    """By its declared length and by what really comes."""
    with serving(make_run(tmp_path), Scripted(), max_body=1000) as client:
        assert client.chat("x" * 2000)[0] == 413
        assert client.chat("x" * 8_000_000)[0] == 413  # more than the sockets hold: the refusal still arrives
        connection = client.connect()
        connection.putrequest("POST", "/predict")
        connection.putheader("Transfer-Encoding", "chunked")
        connection.endheaders()
        for _ in range(30):
            connection.send(b"200\r\n" + b"x" * 512 + b"\r\n")
            time.sleep(0.002)
        connection.send(b"0\r\n\r\n")
        assert connection.getresponse().status == 413
        connection.close()
        assert client.chat("small")[0] == 200


def test_a_head_without_end_is_cut_off(tmp_path: Path) -> None:
    """Headers that go on for ever cost 64 KiB, then the connection; long ones below that are served."""
    with serving(make_run(tmp_path), Scripted()) as client:
        connection = client.connect()
        connection.request("GET", "/health", headers={"X-Long": "x" * 20_000})
        assert connection.getresponse().status == 200
        connection.close()
        with socket.create_connection(("127.0.0.1", client.port), 10) as raw:
            raw.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
            answer = b""
            with contextlib.suppress(ConnectionError):
                for number in range(2000):
                    raw.sendall(b"X-%d: %s\r\n" % (number, b"x" * 1000))
                    time.sleep(0.0005)
            with contextlib.suppress(ConnectionError):
                answer = raw.recv(4096)
            assert number < 1999 and (b" 400 " in answer or not answer)
        assert client.send("GET", "/health")[0] == 200
        padded = json.dumps({"text": "x"}).encode() + b" " * 100_000
        assert client.send("POST", "/predict", padded)[0] == 200  # head and body in one read: more than a head may be


def wait_for(condition: object, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_the_engine(tmp_path: Path, stream: bool) -> None:
    """Streamed or not, the generation ends soon after the connection closes."""
    engine = Scripted(["word "] * 500, delay=0.02)
    with serving(make_run(tmp_path), engine) as client:
        connection = client.connect()
        body = {"messages": [{"role": "user", "content": "x"}], "stream": stream}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        assert wait_for(lambda: engine.emitted > 2)
        connection.sock.close()
        connection.close()
        assert wait_for(lambda: engine.running == 0)
        assert engine.cancelled == 1 and engine.emitted < 400
        assert "packager_cancelled_total 1.0" in client.send("GET", "/metrics")[1]


def test_more_requests_than_slots_wait_their_turn(tmp_path: Path) -> None:
    """The engine never sees more than its slots at once, and every request is answered."""
    from concurrent.futures import ThreadPoolExecutor

    engine = Scripted(delay=0.02)
    with serving(make_run(tmp_path), engine) as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: client.chat()[1]["choices"][0]["message"]["content"], range(8)))
    assert answers == [TEXT] * 8
    assert engine.most == 2 and engine.closed


def test_an_engine_that_fails_is_told_honestly(tmp_path: Path) -> None:
    """A 500 for a plain answer; an error event when the stream has begun."""
    engine = Scripted()
    engine.fail_after = 2
    with serving(make_run(tmp_path), engine) as client:
        status, body = client.chat()
        assert status == 500 and "graphics card" in body["error"]["message"]
        events = client.stream(messages=[{"role": "user", "content": "x"}])
        assert "graphics card" in events[-1]["error"]["message"]


def test_the_access_log_is_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(make_run(tmp_path), Scripted(), log_json=True) as client:
        client.chat()
    line = json.loads(capsys.readouterr().out.splitlines()[0])
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/chat/completions", 200)
    assert line["completion_tokens"] == 4 and line["ms"] >= 0
