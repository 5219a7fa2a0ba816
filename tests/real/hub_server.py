"""A hub on loopback: what a download needs of Hugging Face's and ModelScope's API, and cuts in the line."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


class Hub:
    """One model, org/name, at one commit.

    cut: how often the download of a file breaks off half way. asked: every request as "METHOD path [range]".
    """

    def __init__(self, folder: Path) -> None:
        self.files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        self.cut: dict[str, int] = {}
        self.asked: list[str] = []
        self.url = ""


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            return None

        def do_HEAD(self) -> None:
            self.answer(send=False)

        def do_GET(self) -> None:
            self.answer(send=True)

        def answer(self, send: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            asked_range = self.headers.get("Range", "")
            hub.asked.append(f"{self.command} {path} {asked_range}".strip())
            start = int(asked_range.removeprefix("bytes=").partition("-")[0]) if asked_range else 0
            if path in ("/api/models/org/name/revision/main", f"/api/models/org/name/revision/{COMMIT}"):
                self.json({"id": "org/name", "sha": COMMIT, "siblings": [{"rfilename": name} for name in hub.files]})
            elif path.startswith(f"/api/models/org/name/tree/{COMMIT}"):
                self.json(
                    [
                        {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}  # noqa: S324
                        for name, data in hub.files.items()
                    ]
                )
            elif path == "/api/v1/models/org/name/repo/files":
                listed = [
                    {"Path": name, "Type": "blob", "Size": len(data), "Sha256": hashlib.sha256(data).hexdigest()}
                    for name, data in hub.files.items()
                ]
                self.json({"Code": 200, "Success": True, "Data": {"Files": listed}})
            elif path == "/api/v1/models/org/name/repo":
                self.file(parse_qs(urlsplit(self.path).query)["FilePath"][0], start, send)
            elif path.startswith("/org/name/resolve/") and path.split("/", 5)[5] in hub.files:
                self.file(path.split("/", 5)[5], start, send)
            elif path.startswith("/api/models/org/name/revision/"):
                self.json({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
            else:
                self.json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

        def json(self, value: object, status: int = 200, extra: dict[str, str] | None = None) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            for key, text in {"Content-Type": "application/json", **(extra or {})}.items():
                self.send_header(key, text)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def file(self, name: str, start: int, send: bool) -> None:
            data = hub.files[name]
            self.send_response(206 if start else 200)
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')  # noqa: S324
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(data) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.end_headers()
            if send and hub.cut.get(name, 0) > 0:
                hub.cut[name] -= 1
                self.wfile.write(data[start : start + (len(data) - start) // 2])
                self.wfile.flush()
                self.close_connection = True
            elif send:
                self.wfile.write(data[start:])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
