"""Runs a bundle with the runtime that it carries, from the bundle's own folder, and asks it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def environment(bundle: Path) -> dict[str, str]:
    """What the box sets: the bundle's copy of runtimes/ and nothing of the checkout on the path."""
    return {**os.environ, "PYTHONPATH": str(bundle / "runtime"), "PYTHONDONTWRITEBYTECODE": "1"}


@contextlib.contextmanager
def served(bundle: Path, log: Path, *words: str, env: Mapping[str, str] | None = None) -> Iterator[str]:
    """The base address of a server on a free port; ended with SIGTERM. words: more options. env: its environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with log.open("wb") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "runtimes", "serve", "--bundle", bundle, "--port", str(port), *words],
            env=environment(bundle) if env is None else env,
            stdout=output,
            stderr=output,
            cwd=bundle.parent,
        )
        base = f"http://127.0.0.1:{port}"
        try:
            end = time.monotonic() + 120
            while True:
                assert child.poll() is None, log.read_text(encoding="utf-8", errors="replace")
                assert time.monotonic() < end, "the server did not become ready"
                with contextlib.suppress(OSError, ValueError):
                    if call(base, "/health", timeout=2)[0] == 200:
                        break
                time.sleep(0.2)
            yield base
        finally:
            child.send_signal(signal.SIGTERM)
            child.wait(timeout=30)


def call(base: str, path: str, body: dict[str, Any] | None = None, timeout: float = 300) -> tuple[int, Any]:
    """Status and parsed JSON of one request: POST with a body, else GET."""
    connection = http.client.HTTPConnection(base.removeprefix("http://"), timeout=timeout)
    try:
        if body is None:
            connection.request("GET", path)
        else:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def chat(base: str, messages: list[dict[str, str]], **more: Any) -> Any:
    """The document of one greedy chat completion."""
    status, document = call(base, "/v1/chat/completions", {"messages": messages, "temperature": 0, **more})
    assert status == 200, document
    return document


def ask(base: str, question: str, **more: Any) -> str:
    """One greedy answer to one question."""
    document = chat(base, [{"role": "user", "content": question}], **{"max_tokens": 160, **more})
    return str(document["choices"][0]["message"]["content"])


def rendered(bundle: Path, conversations: list[list[dict[str, str]]], work: Path) -> list[list[int]]:
    """The ids that the bundle's server feeds its model."""
    run = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["run"]
    for key in ("model", "tokenizer", "chat_template"):
        run[key] = run[key] and str(bundle / run[key])
    job, output = work / "render.json", work / "rendered.json"
    job.write_text(json.dumps({"run": run, "conversations": conversations}), encoding="utf-8")
    subprocess.run(
        [sys.executable, "-m", "runtimes", "render", "--input", job, "--output", output],
        env=environment(bundle),
        check=True,
    )
    found: list[list[int]] = json.loads(output.read_text(encoding="utf-8"))["ids"]
    return found
