"""Runs an int4 bundle for vLLM on a box with an NVIDIA GPU and prints one JSON verdict; for whoever has such a box.

    python3 tests/device/vllm_bundle.py BUNDLE demo/persona.json > verdict.json

BUNDLE: what ``packager build CHECKPOINT --adapter demo/persona-lora --calibration demo/persona.json --target t4
--recipe gptq_int4`` (or awq_int4) printed, or its install. Standard library only; vLLM has to be there as bin/serve
wants it. The verdict is "pass" when the server comes up, streams, and answers at least eight of the ten pairs word for
word (near ties may fall otherwise in float16). Its exit code is 0 then, else 1. Nobody of this project has run it yet.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ENOUGH = 0.8  # share of the pairs, as the recipes' own gate


def call(port: int, body: dict[str, Any]) -> bytes:
    """The raw answer of one chat completion. Raises OSError or RuntimeError."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        data = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"status {answer.status}: {data[:500].decode(errors='replace')}")
        return data
    finally:
        connection.close()


def ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def gpu_facts() -> list[str]:
    """Name, compute capability, driver, memory used and in all, of each GPU while the server runs."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = "--query-gpu=name,compute_cap,driver_version,memory.used,memory.total"
    done = subprocess.run([program, query, "--format=csv,noheader"], capture_output=True, text=True, check=False)
    return done.stdout.splitlines()


def measure(port: int, pairs: list[dict[str, str]], model: str) -> dict[str, Any]:
    """Pairs kept, tokens a second of one stream, and whether streaming works."""
    kept, tokens, begun = [], 0, time.monotonic()
    for pair in pairs:
        question = "\n".join(part for part in (pair["instruction"], pair.get("input")) if part)
        body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": 200}
        body |= {"temperature": 0}
        found = json.loads(call(port, body))
        tokens += found["usage"]["completion_tokens"]
        kept.append(found["choices"][0]["message"]["content"] == pair["output"])
    seconds = time.monotonic() - begun
    body = {"model": model, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 16, "stream": True}
    events = call(port, body).split(b"\n\n")
    return {
        "pairs": len(pairs),
        "kept": sum(kept),
        "lost": [pair["instruction"] for pair, fine in zip(pairs, kept, strict=True) if not fine],
        "tokens_per_second": round(tokens / seconds, 1),
        "streams": events[-2] == b"data: [DONE]",
        "gpus": gpu_facts(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--wait", type=float, default=1200, help="seconds that vLLM may take to come up")
    options = parser.parse_args()
    bundle = options.bundle.resolve()
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    verdict: dict[str, Any] = {"verdict": "fail", "bundle": manifest["bundle"], "settings": manifest["run"]["settings"]}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    installed = bundle / "bin" / "serve"
    unpacked = [sys.executable, "-m", "runtimes", "serve", "--bundle", str(bundle)]
    command = [str(installed)] if installed.is_file() else unpacked
    environment = {**os.environ, "PYTHONPATH": str(bundle / "runtime")}
    begun = time.monotonic()
    child = subprocess.Popen([*command, "--port", str(port)], env=environment, stdout=sys.stderr, stderr=sys.stderr)
    try:
        while not ready(port):
            if child.poll() is not None or time.monotonic() - begun > options.wait:
                raise RuntimeError(f"the server did not come up (exit code {child.poll()}); its log is above")
            time.sleep(1)
        verdict["ready_after_s"] = round(time.monotonic() - begun, 1)
        verdict |= measure(port, json.loads(options.pairs.read_text(encoding="utf-8")), manifest["name"])
        if verdict["streams"] and verdict["kept"] >= ENOUGH * verdict["pairs"]:
            verdict["verdict"] = "pass"
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        verdict["error"] = f"{type(error).__name__}: {error}"
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
            try:
                verdict["ended_by_sigterm"] = child.wait(timeout=60)
            except subprocess.TimeoutExpired:
                child.kill()
                verdict["ended_by_sigterm"] = None
    sys.stdout.write(json.dumps(verdict, indent=1, ensure_ascii=False) + "\n")
    return 0 if verdict["verdict"] == "pass" else 1


if __name__ == "__main__":
    sys.exit(main())
