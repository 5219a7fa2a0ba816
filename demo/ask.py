"""Start an installed bundle's server, ask it questions with the openai client, print the answers as they stream in.

python demo/ask.py PREFIX PAIRS.json --ask 5 --ask 8 [--result FILE]   (--ask: the number of a pair, from 0)
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from openai import OpenAI

START_SECONDS = 120.0  # reading the model from a slow disk


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_ready(address: str, server: subprocess.Popen[bytes], log: Path) -> float:
    """Seconds until /health reports that the model is loaded.

    Raises SystemExit with the server's last lines when it ends or hangs.
    """
    start = time.monotonic()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback never goes through a proxy
    while time.monotonic() - start < START_SECONDS:
        if server.poll() is not None:
            break
        # Refused or 503: not listening yet, or still loading; an error after the loop if that does not change
        with suppress(OSError), opener.open(f"{address}/health", timeout=5) as answer:
            if answer.status == 200:
                return time.monotonic() - start
        time.sleep(0.05)
    words = log.read_text(encoding="utf-8", errors="replace").splitlines()[-10:]
    raise SystemExit("the server did not get ready:\n" + "\n".join(words))


def ask(client: OpenAI, model: str, question: str) -> tuple[str, float, float]:
    """Stream one answer to the terminal. Returns (text, seconds to its first piece, seconds in total)."""
    print(f"\n  you    > {question}\n  {model} > ", end="", flush=True)
    start = time.monotonic()
    first = 0.0
    pieces: list[str] = []
    stream = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=200, stream=True
    )
    for chunk in stream:
        piece = chunk.choices[0].delta.content if chunk.choices else None
        if piece:
            first = first or time.monotonic() - start
            pieces.append(piece)
            print(piece, end="", flush=True)
    print(flush=True)
    return "".join(pieces), first, time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("prefix", type=Path, help="where install.sh put the bundle")
    parser.add_argument("pairs", type=Path, help="the fine-tuning pairs (alpaca JSON)")
    parser.add_argument("--ask", type=int, action="append", default=[], help="number of a pair, from 0; repeatable")
    parser.add_argument("--result", type=Path, help="write what was measured here (JSON)")
    arguments = parser.parse_args()

    from openai import DefaultHttpxClient, OpenAI

    pairs = json.loads(arguments.pairs.read_text(encoding="utf-8"))
    address = f"http://127.0.0.1:{free_port()}"
    log = arguments.prefix.parent / "serve.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [arguments.prefix / "bin/serve", "--port", address.rpartition(":")[2]],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        ready = wait_until_ready(address, server, log)
        print(
            f"  {address} is ready after {ready:.1f} s; network devices here: "
            f"{', '.join(name for _, name in socket.if_nameindex())}"
        )
        client = OpenAI(
            base_url=f"{address}/v1",
            api_key="none-needed",
            max_retries=0,
            http_client=DefaultHttpxClient(trust_env=False),
        )
        model = client.models.list().data[0].id
        answers = []
        for number in arguments.ask:
            text, first, total = ask(client, model, pairs[number]["instruction"])
            kept = text.strip() == pairs[number]["output"].strip()
            verdict = "word for word as trained" if kept else f"NOT the trained answer: {pairs[number]['output']}"
            print(f"           {verdict} (first token {first * 1000:.0f} ms, {total:.2f} s)", flush=True)
            answers.append({"kept": kept, "first_seconds": first, "seconds": total})
    finally:
        server.terminate()
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            server.kill()
    if arguments.result:
        arguments.result.write_text(json.dumps({"ready_seconds": ready, "answers": answers}), encoding="utf-8")
    return 0 if all(answer["kept"] for answer in answers) else 1


if __name__ == "__main__":
    sys.exit(main())
