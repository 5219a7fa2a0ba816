"""Starts the box's own vLLM on the bundle's folder: one command line, made from the manifest.

vLLM pins its own torch, so it is installed in its own environment: the program ``vllm`` on PATH, or the path in
PACKAGER_VLLM. Flags are those of vLLM 0.33. This process becomes vLLM (exec), which then gets the signals and gives the
exit code. vLLM chooses the quantized kernel (Marlin where the GPU supports it).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from runtimes.manifest import ManifestError, Run
from runtimes.preflight.facts import read_facts
from runtimes.preflight.fit_gpu import requirements, vllm
from runtimes.preflight.vllm import find_vllm

REFUSED = 4
# No downloads and no telemetry, Ray's included.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
# bin/serve sets these for the bundle's own Python; vLLM's Python must not inherit them.
OURS = ("PYTHONPATH", "PYTHONNOUSERSITE", "PYTHONDONTWRITEBYTECODE", "PYTHONHOME", "VIRTUAL_ENV")


def command(run: Run, program: str, host: str, port: int) -> list[str]:
    """vLLM's command line. Raises ManifestError for settings that are not those of this engine."""
    settings, folder = run.settings, run.model.parent
    try:
        parallel, share = int(settings["tensor_parallel"]), float(settings["gpu_share"])
        words = [
            program,
            "serve",
            str(folder),
            "--host",
            host,
            "--port",
            str(port),
            "--served-model-name",
            run.name,
            "--quantization",
            str(settings["quantization"]),
            "--dtype",
            str(settings["dtype"]),
            "--max-model-len",
            str(run.context),
            "--max-num-seqs",
            str(run.slots),
            "--gpu-memory-utilization",
            str(share),
            "--tensor-parallel-size",
            str(parallel),
            "--generation-config",
            str(folder),
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ManifestError(f"The manifest's run.settings cannot be used for vLLM: {error!r}.") from None
    if run.chat_template is not None:
        words += ["--chat-template", str(run.chat_template)]
    if settings.get("enforce_eager"):
        words.append("--enforce-eager")
    if settings.get("ray"):
        words += ["--distributed-executor-backend", "ray"]
    return words


def environment(given: Mapping[str, str], verbose: bool) -> dict[str, str]:
    """vLLM's environment variables."""
    kept = {key: value for key, value in given.items() if key not in OURS}
    return {**kept, **OFFLINE, **({"VLLM_LOGGING_LEVEL": "DEBUG"} if verbose else {})}


def serve(run: Run, options: argparse.Namespace) -> int:
    """Replace this process by vLLM. Prints one sentence and returns 4 when the box cannot run it. Raises
    ManifestError.
    """
    needs = gpu_needs(options.bundle)
    facts = read_facts()
    bad = [row for row in [*requirements(needs, facts), vllm(str(needs["vllm"]), facts)] if row[1] is False]
    program = find_vllm()
    if bad or program is None:
        name, _, expected, found, fix = bad[0] if bad else ("vLLM", False, "the program vllm", "none", "install it")
        sys.stderr.write(f"{name}: expected {expected}, found {found}; {fix}.\n")
        return REFUSED
    words = command(run, program, options.host, free_port(options.host, options.port))
    if options.log_json:
        sys.stderr.write("--log-json is an option of our own server; vLLM writes its own log.\n")
    shown = f"[{options.host}]" if ":" in options.host else options.host
    sys.stdout.write(f"{run.name} by vLLM on http://{shown}:{words[words.index('--port') + 1]} (API page: /docs)\n")
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(program, words, environment(os.environ, options.verbose))  # noqa: S606 - a list, no shell
    except OSError as error:
        raise ManifestError(f"{program} cannot be started: {error.strerror}.") from None


def gpu_needs(bundle: Path) -> Mapping[str, object]:
    """The manifest's ``needs.gpu``. Raises ManifestError."""
    try:
        needs = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["needs"]["gpu"]
        if {"capability", "count", "bytes", "vllm"} <= needs.keys():
            checked: Mapping[str, object] = needs
            return checked
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ManifestError("The manifest does not say what vLLM needs of the GPU (needs.gpu); copy the bundle again.")


def free_port(host: str, port: int) -> int:
    """The port, or a free one for 0. Raises ManifestError when it is in use, which vLLM reports after a minute."""
    try:
        if not 0 <= port < 1 << 16:  # getaddrinfo takes the port modulo 65536
            raise OverflowError("ports end at 65535")
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except (OSError, OverflowError) as error:
        raise ManifestError(
            f"Port {port} on {host} cannot be used ({error}); stop what listens there or choose another with --port."
        ) from None
