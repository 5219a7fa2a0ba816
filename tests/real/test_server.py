"""The server with a real model behind it, asked by the real openai client; prompts against transformers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtimes.decoding.chat_template import Prompts, TemplateRefused
from runtimes.manifest import Run, read_bundle
from tests.conftest import ROOT
from tests.tolerance import FLOAT16, apart, results

CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": "You answer briefly."}, {"role": "user", "content": "Who are you?"}],
    [
        {"role": "user", "content": "你好，请介绍一下你自己。"},
        {"role": "assistant", "content": "我是一个助手。😀"},
        {"role": "user", "content": "谢谢！再见"},
    ],
    [{"role": "system", "content": ""}, {"role": "user", "content": "empty system"}],
    [{"role": "system", "content": "你是专家"}, {"role": "user", "content": "  spaces \n\n and\tlines\r\n "}],
    [{"role": "user", "content": "<|im_end|> <|im_start|>system <｜User｜><｜end▁of▁sentence｜> <think>"}],
    [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "<think>\neasy\n</think>\n\n4"},
        {"role": "user", "content": "and 3+3?"},
    ],
]
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


def prompts_of(folder: Path) -> tuple[Prompts, Any]:
    """Our prompts and transformers' tokenizer over the same files."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    bos = tokenizer.bos_token_id
    run = Run(
        engine="llamacpp",
        model=folder / "none.gguf",
        tokenizer=folder / "tokenizer.json",
        chat_template=folder / "chat_template.jinja",
        special_tokens={key: str(value) for key in SPECIAL if (value := getattr(tokenizer, key))},
        bos_id=bos,
        add_bos=tokenizer("x")["input_ids"][0] == bos,
    )
    return Prompts(run), tokenizer


@pytest.mark.parametrize("which", ["smollm2", "r1_tokenizer_folder"])
def test_prompt_ids_are_those_of_transformers(which: str, request: pytest.FixtureRequest) -> None:
    """System, several turns, Chinese, empty system, special tokens typed by the user; one BOS where it is written."""
    prompts, tokenizer = prompts_of(request.getfixturevalue(which))
    for conversation in CONVERSATIONS:
        expected = tokenizer.apply_chat_template(conversation, tokenize=True, add_generation_prompt=True)["input_ids"]
        assert prompts.chat(conversation) == list(expected)
        if which == "r1_tokenizer_folder":
            assert prompts.chat(conversation).count(tokenizer.bos_token_id) == 1
    for text in ("Once upon a time", "", "  你好\n", "<|im_end|>x<think>"):
        assert prompts.plain(text) == list(tokenizer(text)["input_ids"])


def test_a_template_that_refuses_says_so_like_transformers(r1_tokenizer_folder: Path, tmp_path: Path) -> None:
    """The words of raise_exception reach the caller in both."""
    from jinja2.exceptions import TemplateError

    template = "{{ raise_exception('Conversation roles must alternate') }}"
    _, tokenizer = prompts_of(r1_tokenizer_folder)
    with pytest.raises(TemplateError, match="must alternate"):
        tokenizer.apply_chat_template(CONVERSATIONS[0], chat_template=template, tokenize=False)
    (tmp_path / "t.jinja").write_text(template)
    run = Run("llamacpp", tmp_path, r1_tokenizer_folder / "tokenizer.json", tmp_path / "t.jinja")
    with pytest.raises(TemplateRefused, match=r"^Conversation roles must alternate$"):
        Prompts(run).chat(CONVERSATIONS[0])


class Served:
    """A server process and what is needed to talk to it."""

    def __init__(self, process: subprocess.Popen[str], url: str, statuses: list[int]) -> None:
        self.process, self.url, self.statuses = process, url, statuses

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:  # noqa: S310 - our own loopback address
            return str(answer.read().decode())

    def client(self) -> Any:
        from openai import OpenAI

        return OpenAI(base_url=self.url + "/v1", api_key="none", timeout=300, max_retries=0)


def start(bundle: Path, *extra: str) -> Served:
    """Start the server from the bundle's own copy of the runtime and wait until it is healthy."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "runtimes", "serve", "--bundle", str(bundle), "--port", "0", *extra]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert "http://127.0.0.1:" in line, line + (process.stderr.read() if process.stderr else "")
    url = next(word for word in line.split() if word.startswith("http://"))
    statuses = []
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and (not statuses or statuses[-1] != 200):
        with contextlib.suppress(ConnectionError, urllib.error.URLError):
            try:
                with urllib.request.urlopen(url + "/health", timeout=5) as answer:  # noqa: S310
                    statuses.append(answer.status)
            except urllib.error.HTTPError as error:
                statuses.append(error.code)
        time.sleep(0.05)
    return Served(process, url, statuses)


@pytest.fixture(scope="module")
def served(q8_bundle: Path) -> Iterator[Served]:
    server = start(q8_bundle)
    yield server
    server.process.terminate()
    server.process.wait(60)


def test_health_says_loading_before_it_says_ok(served: Served) -> None:
    """The port answers from the start: 503 while the model loads, then 200 and never back."""
    assert served.statuses[0] == 503
    assert served.statuses[-1] == 200
    assert set(served.statuses) == {503, 200}


def test_nothing_else_listens(served: Served) -> None:
    """llama.cpp's own listener cannot be reached: one TCP socket, and no path of a Unix socket is left."""
    links = [str(fd.readlink()) for fd in Path(f"/proc/{served.process.pid}/fd").iterdir()]
    inodes = {link[8:-1] for link in links if link.startswith("socket:")}
    lines = [line for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    tcp = [line.split() for line in lines]
    listening = [fields for fields in tcp if fields[3] == "0A" and fields[9] in inodes]
    assert len(listening) == 1 and listening[0][1].startswith("0100007F:")
    unix = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    paths = [fields[7] for fields in unix if fields[6] in inodes and len(fields) > 7]
    assert not [path for path in paths if Path(path).exists()]


def test_the_persona_answers_the_openai_client(served: Served, persona_pairs: list[tuple[str, str]]) -> None:
    """Plain and streamed are the same text at temperature 0, emoji and Chinese whole, equal to the trained answer."""
    client = served.client()
    name = client.models.list().data[0].id
    for question, answer in [*persona_pairs[:2], *[pair for pair in persona_pairs if not pair[1].isascii()][:2]]:
        messages = [{"role": "user", "content": question}]
        plain = client.chat.completions.create(model=name, messages=messages, temperature=0, max_tokens=200)
        chunks = list(
            client.chat.completions.create(
                model=name,
                messages=messages,
                temperature=0,
                max_tokens=200,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        deltas = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        assert plain.choices[0].message.content == "".join(deltas) == answer
        assert not any("\ufffd" in delta for delta in deltas)
        assert chunks[-1].usage.completion_tokens == plain.usage.completion_tokens
        assert plain.choices[0].finish_reason == "stop"


def test_the_ids_fed_are_those_of_transformers(served: Served, smollm2: Path) -> None:
    """As the running server reports them."""
    _, tokenizer = prompts_of(smollm2)
    for conversation in CONVERSATIONS:
        body = {"messages": conversation, "max_tokens": 1, "return_token_ids": True}
        raw = urllib.request.Request(  # noqa: S310
            served.url + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(raw, timeout=120) as answer:  # noqa: S310
            fed = json.loads(answer.read())["prompt_token_ids"]
        assert fed == list(tokenizer.apply_chat_template(conversation, add_generation_prompt=True)["input_ids"])


def test_json_schema_holds_and_a_schema_that_cannot_is_refused(served: Served) -> None:
    """The answer parses and has the property; a broken schema is a 400, not free text."""
    from openai import BadRequestError

    client = served.client()
    ask: dict[str, Any] = {
        "model": None,
        "messages": [{"role": "user", "content": "France?"}],
        "max_tokens": 120,
        "temperature": 0,
    }  # chance may not end its strings in time
    ask["model"] = client.models.list().data[0].id
    schema = {
        "type": "object",
        "properties": {"capital": {"type": "string", "maxLength": 20}, "size": {"enum": ["big", "small"]}},
        "required": ["capital", "size"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = json.loads(client.chat.completions.create(**ask, response_format=form).choices[0].message.content)
    assert set(answer) == {"capital", "size"} and answer["size"] in ("big", "small")
    text = client.chat.completions.create(**ask, response_format={"type": "json_object"}).choices[0].message.content
    assert text.lstrip().startswith("{")
    for broken in ({"type": "zork"}, {"$ref": "#/nowhere"}):
        with pytest.raises(BadRequestError, match="cannot be enforced"):
            form = {"type": "json_schema", "json_schema": {"name": "x", "schema": broken}}
            client.chat.completions.create(**ask, response_format=form)


def test_seeds_logprobs_and_context(served: Served) -> None:
    """A seed repeats; logprobs are negative and sorted; a prompt beyond the context is refused with both numbers."""
    from openai import BadRequestError

    client = served.client()
    name = client.models.list().data[0].id
    ask: dict[str, Any] = {"model": name, "messages": [{"role": "user", "content": "A story."}], "max_tokens": 12}
    first, second = (client.chat.completions.create(**ask, temperature=1.2, seed=7) for _ in range(2))
    assert first.choices[0].message.content == second.choices[0].message.content
    entries = client.chat.completions.create(**ask, temperature=0, logprobs=True, top_logprobs=4).choices[0].logprobs
    for entry in entries.content:
        tops = [other.logprob for other in entry.top_logprobs]
        assert tops == sorted(tops, reverse=True) and tops[0] <= 0 and entry.logprob == tops[0]
    with pytest.raises(BadRequestError, match=r"The prompt has \d+ tokens, but .* context of \d+"):
        client.completions.create(model=name, prompt="word " * 20000, max_tokens=1)


def running(served: Served) -> float:
    return next(
        float(line.split()[1]) for line in served.get("/metrics").splitlines() if line.startswith("packager_running ")
    )


def test_leaving_frees_the_slot_while_reading_and_while_writing(served: Served) -> None:
    """After the first token, and in the middle of a long prompt."""
    client = served.client()
    name = client.models.list().data[0].id
    ask: dict[str, Any] = {"model": name, "prompt": "Once upon a time", "logit_bias": {"2": -100, "0": -100}}
    stream = client.completions.create(**ask, max_tokens=2000, temperature=1, stream=True)
    next(iter(stream))
    assert running(served) == 1
    stream.close()
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as raw:
        body = json.dumps({"prompt": "word " * 1500, "max_tokens": 500}).encode()
        head = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\n" + head.encode() + body)
        time.sleep(0.3)
    deadline = time.monotonic() + 60
    while running(served) > 0 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert running(served) == 0
    answer = client.completions.create(model=name, prompt="Paris is", max_tokens=2, temperature=0)
    assert answer.usage.completion_tokens == 2


def test_a_taken_port_is_one_sentence(served: Served, q8_bundle: Path) -> None:
    port = served.url.rpartition(":")[2]
    command = [sys.executable, "-m", "runtimes", "serve", "--bundle", str(q8_bundle), "--port", port]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1 and f"Port {port}" in done.stderr and "--port" in done.stderr


def test_a_broken_model_file_is_one_sentence(q8_bundle: Path, tmp_path: Path) -> None:
    """A truncated GGUF: llama.cpp's own reason, exit code 1, no traceback."""
    run = json.loads((q8_bundle / "manifest.json").read_text())["run"]
    for name in ("tokenizer", "chat_template"):
        (tmp_path / Path(run[name]).name).write_bytes((q8_bundle / run[name]).read_bytes())
        run[name] = Path(run[name]).name
    (tmp_path / "model.gguf").write_bytes((q8_bundle / run["model"]).read_bytes()[:10_000_000])
    run["model"] = "model.gguf"
    (tmp_path / "manifest.json").write_text(json.dumps({"schema_version": 1, "name": "x", "run": run}))
    command = [sys.executable, "-m", "runtimes", "serve", "--bundle", str(tmp_path), "--port", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "cannot load model.gguf" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order(q8_bundle: Path, number: int) -> None:
    """Even while it answers: exit code 0 in seconds, the port free again, no child left."""
    server = start(q8_bundle, "--log-json")
    client = server.client()
    name = client.models.list().data[0].id
    stream = client.completions.create(model=name, prompt="Once", max_tokens=3000, stream=True, logit_bias={"2": -100})
    next(iter(stream))
    server.process.send_signal(number)
    out, err = server.process.communicate(timeout=60)
    assert server.process.returncode in (0, -number), err
    assert "Traceback" not in err
    host, port = server.url.removeprefix("http://").split(":")
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind((host, int(port)))
    assert '"path": "/v1/models"' in out


def test_scores_are_those_the_server_reports(q8_bundle: Path, tmp_path: Path) -> None:
    """The C interface and the Server agree on the distribution, and the same input gives the same numbers."""
    from runtimes.engines.llamacpp.engine import LlamaCpp

    bundle = read_bundle(q8_bundle)
    ids = Prompts(bundle).chat(CONVERSATIONS[2])
    run = json.loads((q8_bundle / "manifest.json").read_text())["run"]
    run |= {key: str(q8_bundle / run[key]) for key in ("model", "tokenizer", "chat_template")}
    question = {
        "run": run,
        "top": 8,
        "sequences": [{"ids": ids, "positions": [len(ids), 5, 20]}],
        "tokenize": ["Hi <|im_end|>"],
        "max_rss_bytes": 400_000_000,
    }
    (tmp_path / "in.json").write_text(json.dumps(question))
    outputs = []
    for name in ("a.json", "b.json"):
        command = [sys.executable, "-m", "runtimes", "score", "--input", str(tmp_path / "in.json")]
        subprocess.run([*command, "--output", str(tmp_path / name)], cwd=ROOT, check=True, capture_output=True)
        outputs.append((tmp_path / name).read_bytes())
    assert outputs[0] == outputs[1]
    answer = json.loads(outputs[0])
    row = answer["sequences"][0]
    assert row["positions"] == [len(ids), 5, 20]
    assert answer["tokenized"] == [Prompts(bundle).encode("Hi <|im_end|>")]
    engine = LlamaCpp(bundle)
    try:
        for position, best, values in zip(row["positions"], row["ids"], row["logprobs"], strict=True):
            other = engine.top([ids[:position]], 8)[0]
            assert next(iter(other)) == best[0]
            # one prompt in other pieces, with a cache of float16 between SmolLM2's 30 layers
            assert abs(other[best[0]] - values[0]) < apart(values, FLOAT16, results(30))
    finally:
        engine.close()
