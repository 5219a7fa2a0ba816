"""TensorRT bundles of MiniLM, served by what they carry, without a GPU.

What stands in for the GPU is told in each test: onnxruntime on the CPU as users can ask for it, or the tests' own
stand-ins for TensorRT and CUDA (tests/unit/runtimes/gpu_double), which run the same ONNX. Real engines on real GPUs
are for tests/device/tensorrt_box.py, which ends here with "not a device".
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from packager.bundle.assemble import Contents, assemble
from packager.bundle.manifest import Needs
from packager.bundle.wheels import fetch_wheels
from packager.cli.console import Console
from packager.core.store import Store, cache_root
from packager.planning.catalog import load_target, runtimes_folder
from tests.conftest import ROOT
from tests.real.serving import call, served
from tests.real.test_bundle import ALONE, pythons
from tests.real.test_bundle import alone as alone
from tests.real.test_encoder import TEXTS, source_vectors
from tests.real.test_tensorrt import made
from tests.real.test_tensorrt import t4_bundle as t4_bundle
from tests.unit.bundle.parts import RUN
from tests.unit.runtimes.gpu_bundle import DOUBLE, environment, make_bundle, write_plan

pytestmark = pytest.mark.real


def copied(bundle: Path, place: Path) -> Path:
    """The bundle again, its files shared: an engine that is built goes into the copy."""
    shutil.copytree(bundle, place, copy_function=os.link)
    return place


def vectors(base: str) -> np.ndarray[Any, Any]:
    code, answer = call(base, "/v1/embeddings", {"input": TEXTS})
    assert code == 200, answer
    return np.array([row["embedding"] for row in answer["data"]])


def cosines(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    result: np.ndarray[Any, Any] = (found * expected).sum(axis=1) / np.linalg.norm(found, axis=1)
    return result


def test_a_t4_bundle_on_the_cpu_gives_the_source_s_vectors(t4_bundle: Path, minilm: Path, tmp_path: Path) -> None:
    """--device cpu: the same tokenizing, padding to the profile, pooling and HTTP around the ONNX that ships."""
    env = {**os.environ, "PYTHONPATH": str(t4_bundle / "runtime"), "PYTHONDONTWRITEBYTECODE": "1"}
    with served(t4_bundle, tmp_path / "log.txt", "--device", "cpu", env=env) as base:
        assert cosines(vectors(base), source_vectors(minilm, TEXTS, tmp_path)).min() >= 0.999
        assert call(base, "/health")[1]["engine"]["device"] == "cpu"


def test_an_orin_s_bundle_builds_tries_and_serves_its_engine(store: Store, minilm: Path, tmp_path: Path) -> None:
    """Stand-ins for trtexec, TensorRT and CUDA around the real ONNX: the engine is compared with the source's answers
    that the bundle brings before it is kept, and the server gives the source's vectors through device buffers.
    """
    bundle = copied(made(store, tmp_path / "out", minilm, "jetson_orin_nano_8gb", name="minilm"), tmp_path / "box")
    env = environment(tmp_path) | {"PYTHONPATH": f"{bundle / 'runtime'}:{DOUBLE}", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "runtimes", "engine", "--bundle", bundle, "build", "--json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    entry = json.loads((Path(json.loads(done.stdout)["file"]).parent / "entry.json").read_text("utf-8"))
    assert entry["made"]["checked"]["cosine_min"] >= 0.995 and entry["made"]["checked"]["texts"] >= 4
    with served(bundle, tmp_path / "log.txt", env=env) as base:
        found = vectors(base)
        assert cosines(found, source_vectors(minilm, TEXTS, tmp_path)).min() >= 0.999
        for text, row in zip(TEXTS, found, strict=True):
            _, answer = call(base, "/v1/embeddings", {"input": text})
            assert np.dot(answer["data"][0]["embedding"], row) >= 0.9999
    assert "building the engine" not in (tmp_path / "log.txt").read_text("utf-8")


def without_needs(bundle: Path) -> None:
    """Take from the manifest what it asks of a GPU, so that the preflight lets this machine through."""
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    manifest["needs"]["gpu"] = None
    manifest["needs"]["glibc_min"] = None
    text = json.dumps(manifest, indent=2)
    path.unlink()
    path.write_text(text, encoding="utf-8")
    sums = (bundle / "SHA256SUMS").read_text("utf-8").splitlines()
    digest = hashlib.sha256(text.encode()).hexdigest()
    (bundle / "SHA256SUMS").unlink()
    (bundle / "SHA256SUMS").write_text(
        "".join(f"{digest}  manifest.json\n" if line.endswith("  manifest.json") else f"{line}\n" for line in sums),
        encoding="utf-8",
    )


def test_an_install_says_that_there_is_no_gpu(t4_bundle: Path, alone: list[str], tmp_path: Path) -> None:
    """As it ships it is refused; let through, the real wheels (TensorRT-RTX, cuda-bindings) install and load without a
    network or a driver, and the engine step refuses in a sentence and leaves nothing.
    """
    bundle, prefix = copied(t4_bundle, tmp_path / "bundle"), tmp_path / "prefix"
    oldest = pythons()[0]  # on a T4 server with Ubuntu 22.04 that is 3.10, of which numpy has an older version
    command = [*ALONE, bundle / "install.sh", "--prefix", prefix, "--python", oldest]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, prefix.exists()) == (4, False) and "GPU: expected" in done.stderr
    without_needs(bundle)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 4 and last.startswith("GPU: expected an NVIDIA GPU with its driver, found none (")
    assert last.endswith("To install without it, add --skip-engine.") and not prefix.exists()


def test_the_device_script_ends_with_a_verdict_here(t4_bundle: Path) -> None:
    script = ROOT / "tests" / "device" / "tensorrt_box.py"
    done = subprocess.run([sys.executable, script, t4_bundle], capture_output=True, text=True, check=False)
    verdict = json.loads(done.stdout)
    assert (done.returncode, verdict["verdict"]) == (3, "not a device")
    assert verdict["why"].startswith("GPU: expected") and verdict["box"]["gpus"] == []


SMI = """
import sys
told = {"name": "Orin", "compute_cap": "8.7", "memory.total": "7620", "memory.free": "7000", "driver_version": "540.4"}
asked = [word.split("=")[1].split(",") for word in sys.argv if word.startswith("--query-gpu=")]
print(", ".join(told.get(name, "[N/A]") for name in asked[0]) if asked else "CUDA Version: 12.6")
"""


def standing_in(work: Path) -> Path:
    """A bundle as the packager assembles it, wheels and all, whose "model" echoes its tokens; the stand-in for CUDA
    lies in its runtime/, so that an install has it.
    """
    source = make_bundle(work / "source")
    ids = [[3, 5], [7] * 40, [9, 2, 4]]
    outputs = [[sum(row) / len(row), 1.0] for row in ids]
    text = json.dumps({"schema_version": 1, "cosine_min": 0.99, "ids": ids, "outputs": outputs})
    (source / "model" / "reference.json").write_text(text, encoding="utf-8")
    write_plan(source, reference={"file": "reference.json", "sha256": hashlib.sha256(text.encode()).hexdigest()})
    target = load_target("t4")
    lock = ROOT / "locks" / "box-tensorrt.lock"
    wheels = fetch_wheels(lock, target, cache_root() / "box-wheels", Console(quiet=True))
    gpu = {
        "capability": "8.7",
        "exact": True,
        "count": 1,
        "bytes": 10**8,
        "driver_min": None,
        "cuda": None,
        "tensorrt": None,
        "jetpack": None,
    }
    run = json.loads((source / "manifest.json").read_text("utf-8"))["run"]
    contents = Contents(
        name="tiny",
        target={"name": "orin", "digest": "0" * 64},
        recipe={"name": "tensorrt_engine", "options": {}},
        needs=Needs("linux", "x86_64", wheels.python[0], wheels.python[-1], None, 1000, 10**8, gpu),
        wheels=wheels,
        run={**RUN, **run},
        files={path.name: path for path in (source / "model").iterdir()},
        runtimes=runtimes_folder(),
    )
    bundle = assemble(contents, work / "out", Console(quiet=True)).path
    sums = (bundle / "SHA256SUMS").read_text("utf-8")
    for name in ("cuda/bindings/__init__.py", "cuda/bindings/driver.py"):
        goal = bundle / "runtime" / name
        goal.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(DOUBLE / name, goal)
        sums += f"{hashlib.sha256(goal.read_bytes()).hexdigest()}  runtime/{name}\n"
    (bundle / "SHA256SUMS").write_text(sums, encoding="utf-8")
    return bundle


def test_the_device_script_goes_through_all_its_steps(tmp_path: Path) -> None:
    """So that it works where it counts: install, build, answers, server, benchmark and the refusals, with stand-ins for
    nvidia-smi, trtexec, TensorRT and CUDA. A source that differs fails it.
    """
    bundle = standing_in(tmp_path)
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "nvidia-smi").write_text(f"#!{sys.executable}{SMI}", encoding="utf-8")
    (programs / "nvidia-smi").chmod(0o755)
    env = environment(tmp_path, PACKAGER_TENSORRT=str(DOUBLE))
    env["PATH"] = f"{programs}:{env['PATH']}"
    del env["PYTHONPATH"]
    wrong = tmp_path / "wrong.plan"
    engine = {"sm": "8.6", "version": "10.3.0.30", "onnx": "echo", "profile": {}}
    wrong.write_text(json.dumps(engine), encoding="utf-8")
    script = ROOT / "tests" / "device" / "tensorrt_box.py"
    command = [
        sys.executable,
        script,
        bundle,
        "--quick",
        "--wrong-engine",
        wrong,
        "--prefix",
        tmp_path / "prefix",
        "--python",
        pythons()[0],
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    verdict = json.loads(done.stdout)
    assert (done.returncode, verdict["verdict"]) == (0, "pass"), (verdict, done.stderr)
    assert verdict["engine"]["made"]["checked"]["texts"] == 3 and verdict["served"]["to_source"] > 0.999
    assert "expecting compute 8.7 got compute 8.6" in verdict["refusals"]["another GPU's"]
    assert verdict["bench"]["batches"][0]["texts_per_second"]["mean"] > 0
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"cosine_min": 0.99, "ids": [[3, 5]], "outputs": [[-4.0, 1.0]]}), encoding="utf-8")
    done = subprocess.run([*command, "--reference", other], env=env, capture_output=True, text=True, check=False)
    verdict = json.loads(done.stdout)
    assert (done.returncode, verdict["verdict"]) == (1, "fail") and "the server's vectors differ" in verdict["error"]
