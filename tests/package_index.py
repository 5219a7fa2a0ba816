"""A package index on loopback, of a folder of wheels: what pip and uv ask of one, and what they asked."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote


class Index:
    """url: what PIP_INDEX_URL is set to. asked: the paths of all requests, in order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []
        self.url = ""

    def page(self, package: str) -> bytes | None:
        """The page of one package; None where there is no such package."""
        names = [path.name for path in sorted(self.folder.glob("*.whl"))]
        found = [name for name in names if name.partition("-")[0].replace("_", "-").lower() == package]
        links = "".join(f'<a href="/files/{quote(name)}">{name}</a>\n' for name in found)
        return f"<!DOCTYPE html><html><body>\n{links}</body></html>".encode() if found else None


@contextmanager
def index_of(folder: Path) -> Iterator[Index]:
    """Serve the wheels of a folder while the block runs."""
    index = Index(folder)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            return None

        def do_HEAD(self) -> None:
            self.answer(send=False)

        def do_GET(self) -> None:
            self.answer(send=True)

        def answer(self, *, send: bool) -> None:
            path = unquote(self.path)
            index.asked.append(path)
            kind, _, name = path.strip("/").partition("/")
            file = folder / name
            body = index.page(name) if kind == "simple" else file.read_bytes() if file.is_file() else None
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Type", "text/html" if kind == "simple" else "application/octet-stream")
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            if send:
                self.wfile.write(body or b"")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    index.url = f"http://127.0.0.1:{server.server_address[1]}/simple"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield index
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
