"""Does on a T4, an Orin Nano or an AGX Orin what no test can do here, and prints one JSON verdict; for who has one.

    python3 tests/device/tensorrt_box.py BUNDLE > verdict.json

BUNDLE: what ``packager build CHECKPOINT --recipe tensorrt_engine --target t4`` (or jetson_orin_nano_8gb, or
jetson_agx_orin_64gb) printed, copied to the box. Standard library only. In turn: the preflight; the installation, which
on a Jetson builds the engine; that a second build finds it; the engine's answers against the source's, which the
bundle brings (--reference FILE for others); the same through the server, alone and in a batch; bin/bench; and that an
engine of another GPU (--wrong-engine FILE, the engine.rtx or engine.plan of one), a damaged one and a plan for another
GPU are refused in a sentence and crash nothing.

"pass" (exit code 0) when all of it holds, "fail" (1) when not, "not a device" (3) where there is no GPU that fits.
Nobody of this project has run it on a GPU yet.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

PASS, FAIL, NO_DEVICE = 0, 1, 3
SAME = 0.9999  # cosine of one text alone and in a batch


class Failed(Exception):
    """A step that did not hold: one sentence."""


def run(
    words: Sequence[object], *, env: dict[str, str] | None = None, cwd: Path = Path("/"), seconds: float = 7200
) -> tuple[int, str, str]:
    """Exit code (negative: the signal), standard output and error of a program. cwd: not this checkout, whose runtimes/
    ``python -m`` would take.
    """
    done = subprocess.run(
        [str(word) for word in words],
        env=env,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        errors="replace",
        timeout=seconds,
    )
    sys.stderr.write(done.stderr)
    return done.returncode, done.stdout, done.stderr


def document(words: Sequence[object], **more: Any) -> tuple[int, dict[str, Any]]:
    """The JSON that a program of ours printed. Raises Failed where it printed none."""
    code, out, error = run(words, **more)
    try:
        found = json.loads(out)
        if isinstance(found, dict):
            return code, found
    except ValueError:
        pass
    said = error.strip().splitlines()
    raise Failed(f"{words[0]} ended with {code} and no JSON: {said[-1][:300] if said else 'no message'}")


def preflight(bundle: Path) -> dict[str, Any]:
    """What the preflight of the unpacked bundle says, the facts of this box included."""
    env = {**os.environ, "PYTHONPATH": str(bundle / "runtime"), "PYTHONDONTWRITEBYTECODE": "1"}
    _, found = document([sys.executable, "-m", "runtimes", "check", "--bundle", bundle, "--json"], env=env)
    return found


class Install:
    """An installed bundle."""

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self.manifest = json.loads((prefix / "manifest.json").read_text(encoding="utf-8"))
        self.plan = json.loads((prefix / "model" / "plan.json").read_text(encoding="utf-8"))
        self.env = {**os.environ, "PYTHONPATH": str(prefix / "runtime"), "PYTHONNOUSERSITE": "1"}
        self.python = prefix / "venv" / "bin" / "python"

    def engine(self, *words: str) -> tuple[int, dict[str, Any]]:
        return document([self.prefix / "bin" / "engine", *words, "--json"])

    def tried(self, engine: Path, profile: int, home: Path | None = None) -> tuple[int, dict[str, Any]]:
        """An engine run on the reference texts, in a process of its own: {"cosine_min", …} or {"error"}."""
        plan = (home or self.prefix) / "model" / "plan.json"
        words = [self.python, "-m", "runtimes.engines.tensorrt.check", plan, profile, engine]
        try:
            return document(words, env=self.env)
        except Failed as error:
            return -1, {"crash": str(error)}


@contextlib.contextmanager
def served(install: Install, wait: float) -> Iterator[int]:
    """The port of bin/serve. Raises Failed when it does not come up."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    child = subprocess.Popen([install.prefix / "bin" / "serve", "--port", str(port)], stdout=sys.stderr, cwd="/")
    try:
        end = time.monotonic() + wait
        while call(port, "/health")[0] != 200:
            if child.poll() is not None or time.monotonic() > end:
                raise Failed(f"bin/serve did not come up (exit code {child.poll()})")
            time.sleep(0.5)
        yield port
    finally:
        child.terminate()
        try:
            child.wait(timeout=60)
        except subprocess.TimeoutExpired:
            child.kill()


def call(port: int, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    """Status and JSON of a request; 0 where nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        given = None if body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, given, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    except (OSError, ValueError, http.client.HTTPException):
        return 0, None
    finally:
        connection.close()


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    norm = math.sqrt(sum(a * a for a in one)) * math.sqrt(sum(b * b for b in other))
    return sum(a * b for a, b in zip(one, other)) / max(norm, 1e-12)  # noqa: B905 - Python 3.8


def compared(port: int, reference: dict[str, Any]) -> dict[str, float]:
    """An embedder's vectors through HTTP: against the source's, and alone against in a batch. Raises Failed."""

    def vectors(ids: list[list[int]]) -> list[list[float]]:
        code, answer = call(port, "/v1/embeddings", {"input": ids})
        if code != 200:
            raise Failed(f"/v1/embeddings answered {code}: {answer}")
        return [row["embedding"] for row in answer["data"]]

    together = vectors(reference["ids"])
    alone = [vectors([ids])[0] for ids in reference["ids"]]
    found = {"to_source": min(map(cosine, together, reference["outputs"])), "alone": min(map(cosine, together, alone))}
    if found["to_source"] < reference["cosine_min"] or found["alone"] < SAME:
        raise Failed(f"the server's vectors differ: {found}; at least {reference['cosine_min']} and {SAME} count")
    return found


def refusals(install: Install, engine: Path, profile: int, wrong: Path | None, work: Path) -> dict[str, str]:
    """What each of the wrong engines is told; Raises Failed where one is taken or something crashes."""
    found = {}
    damaged = work / "damaged"
    data = bytearray(engine.read_bytes())
    for place in range(min(4096, len(data))):
        data[place] ^= 0xFF
    damaged.write_bytes(data)
    for name, file in (("damaged", damaged), ("another GPU's", wrong)):
        if file is None:
            found[name] = "not tried: give --wrong-engine"
            continue
        code, said = install.tried(file, profile)
        if code != 0 or "error" not in said:
            raise Failed(f"an engine that is {name} was not refused: {said}")
        found[name] = said["error"]
    other = work / "other"
    shutil.copytree(install.prefix / "model", other / "model")
    shutil.copyfile(install.prefix / "manifest.json", other / "manifest.json")
    key = install.plan["engine"] if install.plan["engine"] else install.plan["allowed"]
    key["sm"] = ["8.6"] if install.plan["allowed"]["sm"] != ["8.6"] else ["8.9"]
    path = other / "model" / "plan.json"
    path.chmod(0o644)
    path.write_text(json.dumps(install.plan), encoding="utf-8")
    words = [install.python, "-m", "runtimes", "engine", "--bundle", other, "build", "--json"]
    code, said = document(words, env=install.env)
    if code != 4 or "compute capability" not in said.get("error", ""):
        raise Failed(f"a plan for {key['sm']} was not refused: {code} {said}")
    found["a plan for another GPU"] = said["error"]
    return found


def steps(bundle: Path, options: argparse.Namespace, work: Path, verdict: dict[str, Any]) -> None:
    """Everything in turn, into the verdict. Raises Failed."""
    prefix = options.prefix.resolve() if options.prefix else work / "install"
    words: list[object] = [bundle / "install.sh", "--prefix", prefix]
    begun = time.monotonic()
    code, _, error = run([*words, *(["--python", options.python] if options.python else [])])
    verdict["install_seconds"] = round(time.monotonic() - begun, 1)
    if code:
        raise Failed(f"install.sh ended with {code}: {error.strip().splitlines()[-1:]}")
    install = Install(prefix)
    verdict["check"] = document([prefix / "bin" / "check", "--json"])[1]["refusal"] or "fits"
    begun = time.monotonic()
    code, built = install.engine("build")
    verdict["engine"] = built
    verdict["second_build_seconds"] = round(time.monotonic() - begun, 1)
    if code:
        raise Failed(f"bin/engine build: {built.get('error')}")
    _, shown = install.engine("show")
    profile = int(shown.get("profile", 0))
    verdict["engine"] = {**built, "made": shown.get("made"), "profile": profile}
    engine = Path(built["file"])
    file = options.reference or prefix / "model" / (install.plan.get("reference") or {}).get("file", "reference.json")
    reference = json.loads(Path(file).read_text(encoding="utf-8"))
    code, tried = install.tried(engine, profile)
    verdict["answers"] = tried
    if code or tried.get("cosine_min", -1) < reference["cosine_min"]:
        raise Failed(f"the engine's answers are not the source's: {tried}")
    with served(install, options.wait) as port:
        verdict["health"] = call(port, "/health")[1]
        if install.manifest["run"]["task"] == "embed":
            verdict["served"] = compared(port, reference)
    report = work / "report.json"
    code, _, _ = run([prefix / "bin" / "bench", "--output", report, *(["--quick"] if options.quick else [])])
    if code:
        raise Failed(f"bin/bench ended with {code}")
    measured = json.loads(report.read_text(encoding="utf-8"))
    verdict["bench"] = {key: measured[key] for key in ("batches", "cold_start", "memory", "load")}
    verdict["refusals"] = refusals(install, engine, profile, options.wrong_engine, work)


def main() -> int:
    """Print the verdict; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prefix", type=Path, help="where to install (default: a temporary folder)")
    parser.add_argument("--python", help="the Python for the install, on a Jetson the system's own")
    parser.add_argument("--reference", type=Path, help="other texts and answers than the bundle's, in its form")
    parser.add_argument("--wrong-engine", type=Path, help="an engine that was made for another GPU")
    parser.add_argument("--wait", type=float, default=1200, help="seconds that bin/serve may take to come up")
    parser.add_argument("--quick", action="store_true", help="the short benchmark")
    options = parser.parse_args()
    bundle = options.bundle.resolve()
    if options.wrong_engine:
        options.wrong_engine = options.wrong_engine.resolve()
    verdict: dict[str, Any] = {"verdict": "fail", "bundle": bundle.name}
    try:
        found = preflight(bundle)
        verdict |= {"bundle": found["bundle"], "preflight": found["refusal"] or "fits", "box": found["facts"]}
        gpus = found["facts"].get("gpus")
        bad = [item["name"] for item in found["findings"] if item["ok"] is False]
        if not gpus or "GPU" in bad or "system" in bad or "processor" in bad:
            verdict |= {"verdict": "not a device", "why": found["refusal"] or "no GPU was found"}
        else:
            with tempfile.TemporaryDirectory(prefix="tensorrt-box-") as work:
                steps(bundle, options, Path(work), verdict)
            verdict["verdict"] = "pass"
    except (Failed, OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
        verdict["error"] = str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}"
    sys.stdout.write(json.dumps(verdict, indent=1, ensure_ascii=False) + "\n")
    return {"pass": PASS, "not a device": NO_DEVICE}.get(verdict["verdict"], FAIL)


if __name__ == "__main__":
    sys.exit(main())
