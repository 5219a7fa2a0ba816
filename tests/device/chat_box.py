"""Runs a language model's bundle on a Jetson or a T4 and prints one JSON verdict; for whoever has such a box.

    python3 tests/device/chat_box.py BUNDLE demo/persona.json [--prefix DIR] > verdict.json

BUNDLE: what ``packager build CHECKPOINT --adapter demo/persona-lora --calibration demo/persona.json`` printed, with
``--target jetson_orin_nano_8gb --recipe edge_llm`` (or any Jetson of that recipe), or with ``--target t4 --recipe
tensorrt_engine --set context=4096``. Standard library only. It looks at the box, installs the bundle under --prefix,
starts bin/serve (the first start builds or finishes the engine), asks the pairs, starts it again from what was kept,
and ends it. The verdict is "pass" when all of that works and at least eight of ten pairs are answered word for word;
"not a device" on a machine that is no Jetson and has no NVIDIA GPU. Exit code 0 for "pass", else 1. Nobody of this
project has run it on a device yet.
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from vllm_bundle import ENOUGH, gpu_facts, measure, ready

RELEASE, MODEL = Path("/etc/nv_tegra_release"), Path("/proc/device-tree/model")


def box() -> dict[str, Any]:
    """What the box says of itself."""
    release = RELEASE.read_text(encoding="utf-8", errors="replace").splitlines()[:1] if RELEASE.is_file() else []
    model = MODEL.read_bytes().rstrip(b"\0").decode(errors="replace") if MODEL.is_file() else None
    return {"l4t": release[0] if release else None, "model": model, "dpkg": packages(), "gpus": gpu_facts()}


def packages() -> dict[str, str]:
    """Versions of JetPack's packages, as dpkg has them."""
    names = ("nvidia-jetpack", "libnvinfer10", "python3-libnvinfer")
    try:
        done = subprocess.run(
            ["dpkg-query", "-W", "-f=${Package} ${Version}\n", *names], capture_output=True, text=True, check=False
        )
    except OSError:
        return {}
    return dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)


def start(prefix: Path, wait: float) -> tuple[subprocess.Popen[bytes], int, float]:
    """The server, its port, and the seconds until it answered. Raises RuntimeError."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    begun = time.monotonic()
    child = subprocess.Popen([prefix / "bin" / "serve", "--port", str(port)], stdout=sys.stderr, stderr=sys.stderr)
    while not ready(port):
        if child.poll() is not None or time.monotonic() - begun > wait:
            end(child)
            raise RuntimeError(f"the server did not come up (exit code {child.poll()}); its log is above")
        time.sleep(1)
    return child, port, round(time.monotonic() - begun, 1)


def end(child: subprocess.Popen[bytes]) -> int | None:
    """Its exit code after SIGTERM; None when it had to be killed."""
    if child.poll() is None:
        child.send_signal(signal.SIGTERM)
        try:
            return child.wait(timeout=60)
        except subprocess.TimeoutExpired:
            child.kill()
            return None
    return child.returncode


def install(bundle: Path, prefix: Path, verdict: dict[str, Any]) -> None:
    """Install the bundle; the verdict has what it said. Raises RuntimeError."""
    done = subprocess.run(
        [bundle / "install.sh", "--prefix", prefix], stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False
    )
    verdict["install"] = {"code": done.returncode, "said": done.stderr.strip().splitlines()[-1:]}
    if done.returncode:
        raise RuntimeError("the bundle did not install")


def run(bundle: Path, prefix: Path, pairs: list[dict[str, str]], wait: float, verdict: dict[str, Any]) -> None:
    """Fill the verdict. Raises what went wrong."""
    name = str(verdict["model"])
    install(bundle, prefix, verdict)
    for number in ("first", "second"):
        child, port, seconds = start(prefix, wait)
        try:
            verdict[f"{number}_start_s"] = seconds
            if number == "first":
                verdict |= measure(port, pairs, name)
        finally:
            verdict[f"{number}_ended_by_sigterm"] = end(child)
    # what the first start made is found by the second: to make it again would take as long
    verdict["second_is_quicker"] = verdict["second_start_s"] < verdict["first_start_s"]
    if verdict["streams"] and verdict["kept"] >= ENOUGH * verdict["pairs"] and verdict["second_is_quicker"]:
        verdict["verdict"] = "pass"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--prefix", type=Path, help="where to install to (default: a temporary folder)")
    parser.add_argument("--wait", type=float, default=3600, help="seconds that the first start may take")
    options = parser.parse_args()
    bundle = options.bundle.resolve()
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    verdict: dict[str, Any] = {"verdict": "fail", "bundle": manifest["bundle"], "model": manifest["name"], "box": box()}
    try:
        if not any(verdict["box"][key] for key in ("l4t", "model", "gpus")):
            verdict["verdict"] = "not a device"
        else:
            with tempfile.TemporaryDirectory() as scratch:
                prefix = options.prefix or Path(scratch) / "installed"
                pairs = json.loads(options.pairs.read_text(encoding="utf-8"))
                run(bundle, prefix, pairs, options.wait, verdict)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        verdict["error"] = f"{type(error).__name__}: {error}"
    sys.stdout.write(json.dumps(verdict, indent=1, ensure_ascii=False) + "\n")
    return 0 if verdict["verdict"] == "pass" else 1


if __name__ == "__main__":
    sys.exit(main())
