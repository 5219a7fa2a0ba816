"""Imports torch and transformers once and forks a child for each worker that needs them: ``fork_server.py SOCKET``.

A fresh interpreter takes 6 s for these imports on an idle machine, 15 s on a busy one; a fork takes none. SOCKET is the
number of an inherited Unix socket. A request is one JSON line, ``{"argv", "path", "env", "cwd"}``, with the descriptor
that becomes the child's stdout and stderr. The answers are ``{"pid"}`` and, when the child has ended, ``{"status",
"max_rss"}``; max_rss is in bytes.
"""

from __future__ import annotations

import gc
import io
import json
import os
import runpy
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

from packager.workers.with_parent import die_with_parent

PRELOADED = (
    "torch",
    "transformers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "safetensors.torch",
)


# This process has its own folder and the package's first on the path; a worker has its request's folders instead.
BASE = sys.path[2:]


def preload() -> None:
    """Import the workers' libraries. A missing one is left to the worker, whose error names it."""
    for name in PRELOADED:
        try:
            __import__(name)
        except ImportError:
            return


def become(request: dict[str, Any], output: int) -> None:
    """In the forked child: set the worker's output, environment, folder and arguments."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv[:] = request["argv"]
    sys.path[:] = [str(Path(sys.argv[0]).resolve().parent), *request["path"], *BASE]
    # unbuffered, as with PYTHONUNBUFFERED: a progress line must be readable at once
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "wb", closefd=False), "utf-8", "strict", write_through=True)
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "wb", closefd=False), "utf-8", "backslashreplace", write_through=True)


def serve(link: socket.socket) -> str | None:
    """Fork for each request until the other end closes, then return None; in a child return the script to run."""
    waiting = link.makefile("rb")
    while True:
        message, descriptors, _, _ = socket.recv_fds(link, 1 << 20, 1)
        if not message:
            return None
        while not message.endswith(b"\n"):
            message += waiting.readline()
        request, own = json.loads(message), os.getpid()
        child = os.fork()
        if child == 0:
            link.close()
            die_with_parent(own)
            become(request, descriptors[0])
            return str(request["argv"][0])
        os.close(descriptors[0])
        link.sendall(json.dumps({"pid": child}).encode() + b"\n")
        _, status, usage = os.wait4(child, 0)
        ended = {"status": os.waitstatus_to_exitcode(status), "max_rss": usage.ru_maxrss * 1024}
        link.sendall(json.dumps(ended).encode() + b"\n")


def run_worker(script: str) -> int:
    """Run the worker's script and return its exit status, as the interpreter would."""
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        sys.stderr.write(f"{end.code}\n")
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its children
    preload()
    gc.freeze()  # imported objects stay shared memory: a child's garbage collection does not touch them
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        worker = serve(connection)
    if worker is not None:
        # without the interpreter's shutdown, which copies shared memory and takes seconds
        os._exit(run_worker(worker))
