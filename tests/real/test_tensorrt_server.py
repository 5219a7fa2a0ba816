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

from packager.store import Store
from tests.conftest import ROOT
from tests.real.serving import call, served
from tests.real.test_bundle import ALONE, pythons
from tests.real.test_bundle import alone as alone
from tests.real.test_encoder import TEXTS, source_vectors
from tests.real.test_tensorrt import made
from tests.real.test_tensorrt import t4_bundle as t4_bundle
from tests.unit.runtimes.gpu_bundle import DOUBLE, environment

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
        encoding="utf-8")  # fmt: skip


def test_an_install_says_that_there_is_no_gpu(t4_bundle: Path, alone: list[str], tmp_path: Path) -> None:
    """As it ships it is refused; let through, the real wheels (TensorRT-RTX, cuda-bindings) install and load without a
    network or a driver, the engine step refuses in a sentence and leaves nothing, and --skip-engine installs it.
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
    done = subprocess.run([*command, "--skip-engine"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([prefix / "bin" / "serve", "--port", "0"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("GPU: expected an NVIDIA GPU with its driver, found none (")
    done = subprocess.run([prefix / "bin" / "engine", "show", "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 4 and json.loads(done.stdout)["bundled"] == "engine.rtx"
    shutil.rmtree(prefix)


def test_the_device_script_ends_with_a_verdict_here(t4_bundle: Path) -> None:
    script = ROOT / "tests" / "device" / "tensorrt_box.py"
    done = subprocess.run([sys.executable, script, t4_bundle], capture_output=True, text=True, check=False)
    verdict = json.loads(done.stdout)
    assert (done.returncode, verdict["verdict"]) == (3, "not a device")
    assert verdict["why"].startswith("GPU: expected") and verdict["box"]["gpus"] == []
