"""``serve``: opens the port at once, loads the model, and answers until SIGINT or SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from runtimes.engines.registry import module
from runtimes.manifest import ManifestError, Run, read_bundle

USAGE, UNUSABLE, FAILED = 2, 3, 1
MAX_BODY = 8 << 20
GRACE_SECONDS = 5


def main(argv: Sequence[str]) -> int:
    """Serve until SIGINT or SIGTERM. Exit codes: 0 stopped, 1 the model failed, 2 usage, 3 bundle or port unusable."""
    options = _parser().parse_args(argv)
    try:
        run = read_bundle(options.bundle)
        engine = module(run.engine)
        if options.device is not None:
            run = replace(run, device=_device(options.device, engine, run))
        if hasattr(engine, "serve"):
            return int(engine.serve(run, options))
        listener = _listen(options.host, options.port)
    except ManifestError as error:
        sys.stderr.write(f"{error}\n")
        return UNUSABLE
    with listener:
        return _serve(run, engine, options, listener)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m runtimes serve", description="Serve a bundle's model over HTTP.")
    parser.add_argument("--bundle", type=Path, required=True, metavar="DIR", help="the unpacked bundle")
    parser.add_argument("--host", default="127.0.0.1", help="address (default: %(default)s, this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="port, 0 for any free one (default: %(default)s)")
    parser.add_argument("--max-body", type=int, default=MAX_BODY, metavar="BYTES", help="largest request (8 MiB)")
    parser.add_argument(
        "--device",
        help="bundles for a GPU: gpu (default) or cpu; TensorRT's also onnxruntime, and "
        "both by an onnxruntime of your own in the install's venv",
    )
    parser.add_argument("--log-json", action="store_true", help="one JSON line a request on standard output")
    parser.add_argument("--verbose", action="store_true", help="show the engine's own log")
    return parser


def _device(name: str, engine: ModuleType, run: Run) -> str:
    """The value of --device. Raises ManifestError where the engine has no such device."""
    known = getattr(engine, "DEVICES", ())
    if name not in known:
        raise ManifestError(
            f"The engine {run.engine} has no --device {name}"
            + (f"; choose {', '.join(known)}." if known else "; leave it out.")
        )
    return name


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ManifestError with one sentence when the address is in use or not this machine's."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, OverflowError) as error:
        raise ManifestError(f"{host} port {port} is not an address to listen on: {error}.") from None
    try:
        if os.name == "posix":  # on Windows this option would let two servers share the port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # listen now, not when uvicorn starts: so a second server on this port fails here
        listener.listen(512)
    except OSError as error:
        listener.close()
        raise ManifestError(
            f"Port {port} on {host} cannot be used ({error.strerror}); stop what listens there or choose another "
            "with --port."
        ) from None
    return listener


def _serve(run: Run, source: ModuleType, options: argparse.Namespace, listener: socket.socket) -> int:
    # imported before the model loads, so that an incomplete install fails at once
    import uvicorn

    from runtimes.engine import EngineError
    from runtimes.server.http_protocol import HttpProtocol
    from runtimes.server.loading import answering

    app_module = importlib.import_module(f"runtimes.server.{getattr(source, 'APP', 'chat_app')}")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    sys.stdout.write(f"{run.name} on http://{shown}:{port} (API page: /docs)\n")
    sys.stdout.flush()
    # llama.cpp loads with the GIL held, so a Python handler would not run; the default handler ends the process
    interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with answering(listener, run.name):
            service = app_module.open_service(source, run, verbose=options.verbose)
    except (ManifestError, EngineError) as error:
        sys.stderr.write(f"{error}\n")
        return FAILED if isinstance(error, EngineError) else UNUSABLE
    finally:
        signal.signal(signal.SIGINT, interrupt)

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            """Cancel answers that still run after GRACE_SECONDS: uvicorn would cut them off with a traceback."""
            asyncio.get_running_loop().call_later(GRACE_SECONDS, service.cancel_all)
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app_module.make_app(service, max_body=options.max_body, log_json=options.log_json),
        http=HttpProtocol,
        loop="asyncio",
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=3 * GRACE_SECONDS,
    )
    try:
        Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        return 0
    return 0
