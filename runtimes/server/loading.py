"""Answers 503 on the server's port while the model loads; /health has status "loading".

llama.cpp's constructor holds the GIL until the model is loaded, so the server process cannot answer. This child process
can: it inherits the listening socket, and ends when its standard input closes, which also happens when the server dies.
Standard library only, so that it starts at once.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def answering(listener: socket.socket, model: str) -> Iterator[None]:
    """Let a child process answer on the port; on exit the port belongs to the caller again.

    Windows cannot pass a socket this way: there connections wait until the model is loaded.
    """
    if os.name != "posix":
        yield
        return
    listener.setblocking(False)  # two processes may wake for one connection; the loser must not wait in accept
    child = subprocess.Popen(
        [sys.executable, "-E", "-s", __file__, str(listener.fileno()), model],
        stdin=subprocess.PIPE,
        pass_fds=(listener.fileno(),),
    )
    try:
        yield
    finally:
        with suppress(BrokenPipeError):
            child.communicate(b"")
        if child.poll() is None:
            child.kill()


class _Handler(BaseHTTPRequestHandler):
    timeout = 5
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        assert isinstance(self.server, _Server)
        if self.path.partition("?")[0] == "/health":
            body: dict[str, object] = {"status": "loading", "model": self.server.model}
        else:
            message = "The model is still loading; /health shows when it is ready."
            body = {"error": {"message": message, "type": "overloaded_error", "param": None, "code": "not_ready"}}
        data = json.dumps(body).encode()
        self.close_connection = True
        self.send_response(503)
        for name, value in (("Content-Type", "application/json"), ("Content-Length", str(len(data)))):
            self.send_header(name, value)
        self.send_header("Retry-After", "1")
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_HEAD = do_PUT = do_DELETE = do_OPTIONS = answer

    def log_message(self, *_: object) -> None:
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # finish responses that have started
    model = ""

    def handle_error(self, *_: object) -> None:
        return None  # a client disconnected


def main(descriptor: int, model: str) -> None:
    """Answer until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    server = _Server(("", 0), _Handler, bind_and_activate=False)
    server.socket.close()
    server.socket, server.model = socket.socket(fileno=descriptor), model
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    sys.stdin.buffer.read()
    server.shutdown()
    server.block_on_close = True
    # closes only this process's copy of the listening socket, and waits for running responses
    server.server_close()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
