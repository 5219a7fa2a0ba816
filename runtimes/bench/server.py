"""Shared by the benchmarks: the bundle's own server as a child, and the report's head and load."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from runtimes.bench import machine as box
from runtimes.bench.client import BenchError, Client
from runtimes.preflight.check import read_manifest
from runtimes.process import die_with_parent

SCHEMA_VERSION = 1
LOAD_PER_CORE = 0.5  # load average per core before the run, above which a note is added


def free_port() -> int:
    """A port of the loopback address that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def server(bundle: Path, wait: float) -> Iterator[tuple[subprocess.Popen[bytes], Client, float]]:
    """The bundle's server as a child: its process, a client, and its start in perf_counter seconds.

    Yields once /health reports that the model is loaded. wait: seconds to wait for that. Raises BenchError with the
    last line of the server's log when it ends or is late.
    """
    port = free_port()
    command = [sys.executable, "-m", "runtimes", "serve", "--bundle", str(bundle.absolute()), "--port", str(port)]
    runtime = str(Path(__file__).resolve().parent.parent.parent)  # also the working directory, which -m searches first
    env = {**os.environ, "PYTHONPATH": runtime, "PYTHONDONTWRITEBYTECODE": "1"}
    avoid = read_manifest(bundle)["run"].get("stop_ids") or ()
    with tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        child = subprocess.Popen(
            command,
            env=env,
            cwd=runtime,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent if sys.platform == "linux" else None,
        )
        try:
            client = Client(f"http://127.0.0.1:{port}", avoid=avoid)
            while not client.ready():
                if child.poll() is not None or time.perf_counter() - started > wait:
                    log.seek(0)
                    words = log.read().decode("utf-8", "replace").strip().splitlines()
                    state = "ended" if child.poll() is not None else f"was not ready after {wait:.0f} s"
                    raise BenchError(f"The server {state}: {words[-1][:300] if words else 'its log is empty'}")
                time.sleep(0.01)
            yield child, client, started
        finally:
            child.terminate()
            try:
                child.wait(timeout=15)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def head(manifest: Mapping[str, Any], url: str | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The first fields of every report. url: of a server that already runs, instead of the bundle's own."""
    facts = manifest["run"]
    return {
        "schema_version": SCHEMA_VERSION,
        "bundle": manifest["bundle"],
        "name": manifest.get("name"),
        "target": manifest.get("target"),
        "recipe": manifest.get("recipe"),
        "engine": facts["engine"],
        "measured_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),  # noqa: UP017 - Python 3.10
        "settings": {**settings, "slots": facts.get("slots"), "context": facts.get("context"), "server": url or "own"},
        "machine": box.machine(),
        "versions": box.versions(),
        "model_bytes": facts.get("model_bytes"),
        "cold_start": None,
        "memory": None,
        "notes": [],
    }


def load_since(before: Sequence[float] | None) -> dict[str, Any]:
    """The machine's load before the run and now."""
    return {"before": before, "after": box.load_average(), "logical_cores": os.cpu_count()}


def busy(load: Mapping[str, Any]) -> list[str]:
    """A note when the machine had other load before the run."""
    before, cores = load["before"], load["logical_cores"] or 1
    if not before or before[0] <= LOAD_PER_CORE * cores:
        return []
    return [f"The machine was busy before the run (load {before[0]} on {cores} cores): figures are too low."]
