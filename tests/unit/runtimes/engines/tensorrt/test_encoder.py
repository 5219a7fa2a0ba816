"""A TensorRT bundle's server without a GPU: TensorRT and CUDA are the stand-ins of gpu_double/, everything else is what
ships. The stand-in "model" gives each token's id and a one, so that pooled vectors can be foretold.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from runtimes.engine import EngineError
from runtimes.engines.tensorrt.encoder import pad_to_profile
from runtimes.engines.tensorrt.onnxruntime import providers_for
from runtimes.engines.tensorrt.plan import Shapes, read_plan
from tests.conftest import ROOT
from tests.real.serving import call, served
from tests.tolerance import FLOAT16
from tests.unit.runtimes.gpu_bundle import environment, make_bundle, write_plan

pytestmark = pytest.mark.real  # every test starts processes; `make unit` leaves it out, `make test` does not


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, Path]]:
    """Address, bundle and log of a server whose engine was not there when it started."""
    folder = tmp_path_factory.mktemp("tensorrt")
    bundle = make_bundle(folder / "bundle")
    with served(bundle, folder / "log.txt", env=environment(folder)) as base:
        yield base, bundle, folder / "log.txt"


def token_ids(bundle: Path, text: str) -> list[int]:
    result: list[int] = Tokenizer.from_file(str(bundle / "model" / "tokenizer.json")).encode(text).ids
    return result


def test_serve_builds_the_engine_that_is_missing_and_answers(server: tuple[str, Path, Path]) -> None:
    """Each text's vector is the mean of its own tokens, whatever stands beside it in the batch: padding of the batch
    and of the engine's shapes has no part in it.
    """
    base, bundle, log = server
    assert "building the engine for Orin" in log.read_text("utf-8")
    texts = ["a", "a longer text than the others", "bc"]
    code, answer = call(base, "/v1/embeddings", {"input": texts})
    assert code == 200
    vectors = [row["embedding"] for row in answer["data"]]
    expected = [[sum(ids) / len(ids), 1.0] for ids in (token_ids(bundle, text) for text in texts)]
    np.testing.assert_allclose(vectors, expected, rtol=FLOAT16)  # the engine's output is float16


def test_health_models_and_metrics_name_the_engine(server: tuple[str, Path, Path]) -> None:
    base, bundle, _ = server
    engine = call(base, "/health")[1]["engine"]
    assert engine == {
        "precision": "fp16",
        "library": "TensorRT 10.3.0.30",
        "device": "Orin",
        "compute_capability": "8.7",
        "engine": engine["engine"],
    }
    assert (bundle / "cache" / "engines" / engine["engine"] / "engine.plan").is_file()
    (card,) = call(base, "/v1/models")[1]["data"]
    assert (card["engine"], card["max_model_len"]) == (engine, 64)
    with urllib.request.urlopen(f"{base}/metrics") as answer:  # noqa: S310 - our own server
        lines = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if line[0] != "#")
    size = (bundle / "cache" / "engines" / engine["engine"] / "engine.plan").stat().st_size
    held = size + 1000 + 2 * 4 * 64 * 8 + 4 * 64 * 2 * 2  # file, activations, int64 inputs, float16 output
    assert float(lines["packager_device_memory_bytes"]) == held
    assert float(lines["packager_resident_memory_bytes"]) > held


def test_more_texts_than_the_engine_takes_are_batches(server: tuple[str, Path, Path]) -> None:
    """run.slots is 8, the engine's largest batch 4: nothing larger reaches it, and 30 texts are all answered."""
    base, bundle, _ = server
    texts = ["x" * (1 + number % 60) for number in range(30)]
    code, answer = call(base, "/v1/embeddings", {"input": texts})
    assert code == 200 and len(answer["data"]) == 30
    (only,) = set(token_ids(bundle, "x"))
    np.testing.assert_allclose([row["embedding"] for row in answer["data"]], [[only, 1.0]] * 30, rtol=FLOAT16)
    code, answer = call(base, "/v1/embeddings", {"input": "y" * 65})
    assert code == 400 and "65 tokens and this model takes 64" in answer["error"]["message"]


def test_bench_measures_it(server: tuple[str, Path, Path], tmp_path: Path) -> None:
    """bin/bench's own figures of a server that runs, the engine's key beside them."""
    base, bundle, _ = server
    command = [
        sys.executable,
        "-m",
        "runtimes",
        "bench",
        "--bundle",
        bundle,
        "--quick",
        "--url",
        base,
        "--output",
        tmp_path / "report.json",
    ]
    subprocess.run(command, env=environment(tmp_path), check=True, capture_output=True, timeout=60)
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert report["engine"] == "tensorrt" and report["batches"][0]["texts_per_second"]["mean"] > 0
    assert report["engine_details"]["engine"].startswith("sm8.7-10.3.0.30-")


def serve(bundle: Path, *words: str, **more: Any) -> tuple[int, str]:
    """Exit code and standard error of a server that does not come up."""
    done = subprocess.run(
        [sys.executable, "-m", "runtimes", "serve", "--bundle", bundle, "--port", "0", *words],
        env=environment(bundle.parent, **more),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"sm": "8.6", "name": "RTX 3060"}, "expected compute capability 8.7, found RTX 3060 with 8.6"),
        ({"count": 0}, "expected an NVIDIA GPU with its driver, found none"),
        ({"free": 100}, "The GPU's memory is full"),
    ],
)
def test_a_box_that_cannot_run_it_is_told_in_a_sentence(tmp_path: Path, facts: dict[str, Any], words: str) -> None:
    code, log = serve(make_bundle(tmp_path / "bundle"), device=facts)
    assert code == 1 and words in log.splitlines()[-1] and "Traceback" not in log


def test_an_engine_for_another_gpu_is_not_run_though_it_has_the_name(tmp_path: Path) -> None:
    """A cache that was copied from an 8.6 card into this box's place: TensorRT's own refusal is one sentence, and the
    server does not come up with it.
    """
    bundle = make_bundle(tmp_path / "bundle")
    env = environment(tmp_path)
    command = [sys.executable, "-m", "runtimes", "engine", "--bundle", bundle, "build", "--json"]
    result = json.loads(subprocess.run(command, env=env, check=True, capture_output=True).stdout)
    file = Path(result["file"])
    other = file.read_bytes().replace(b'"8.7"', b'"8.6"')
    file.write_bytes(other)
    entry = json.loads((file.parent / "entry.json").read_text("utf-8"))
    entry["sha256"] = hashlib.sha256(other).hexdigest()
    (file.parent / "entry.json").write_text(json.dumps(entry), encoding="utf-8")
    code, log = serve(bundle)
    assert code == 1
    assert "cannot be loaded by TensorRT 10.3.0.30 on Orin" in log and "expecting compute 8.7 got compute 8.6" in log


def test_no_other_device_is_used_than_was_asked_for(tmp_path: Path) -> None:
    """--device cpu is onnxruntime's and says what it misses; an unknown one, and any for another engine, is refused."""
    bundle = make_bundle(tmp_path / "bundle")
    code, log = serve(bundle, "--device", "cpu")  # "echo" is no ONNX
    assert code == 1 and "model.onnx does not load" in log
    code, log = serve(bundle, "--device", "tpu")
    assert (code, log) == (3, "The engine tensorrt has no --device tpu; choose gpu, onnxruntime, cpu.\n")
    code, log = serve(make_bundle(tmp_path / "other", run={"engine": "ort_encoder"}), "--device", "cpu")
    assert (code, log) == (3, "The engine ort_encoder has no --device cpu; leave it out.\n")
    code, log = serve(bundle, "--device", "onnxruntime")
    assert code == 1 and "expected a build with its TensorRT or CUDA provider, found" in log


def test_onnxruntime_gets_the_profile_and_a_place_for_its_engines(tmp_path: Path) -> None:
    plan = read_plan(make_bundle(tmp_path / "bundle") / "model" / "plan.json")
    offered = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    (first, options), second, last = providers_for("onnxruntime", offered, plan, plan.profiles[0], tmp_path)
    assert (first, second[0], last[0]) == tuple(offered)
    assert options["trt_profile_max_shapes"] == "input_ids:4x64,attention_mask:4x64"
    assert (options["trt_engine_cache_enable"], options["trt_engine_cache_path"]) == ("1", str(tmp_path))
    assert options["trt_fp16_enable"] == "1" and "trt_int8_enable" not in options
    with pytest.raises(EngineError, match="TensorRT or CUDA provider, found CPUExecutionProvider"):
        providers_for("onnxruntime", offered[2:], plan, plan.profiles[0], tmp_path)
    assert [name for name, _ in providers_for("cpu", offered, plan, plan.profiles[0], None)] == ["CPUExecutionProvider"]


@pytest.mark.parametrize(
    ("shape", "least", "most", "expected"),
    [
        ((1, 1), (1, 1), (4, 64), (1, 8)),
        ((3, 17), (1, 1), (4, 64), (3, 24)),
        ((4, 61), (1, 1), (4, 62), (4, 62)),
        ((1, 5), (4, 32), (4, 64), (4, 32)),
    ],
)
def test_batches_are_padded_to_what_the_profile_takes(
    shape: tuple[int, int], least: tuple[int, int], most: tuple[int, int], expected: tuple[int, int]
) -> None:
    """Lengths in steps of eight, up to the profile's own end; rows that are added are a text again, never empty."""
    inputs = {"input_ids": np.full(shape, 5), "attention_mask": np.ones(shape, np.int64)}
    result = pad_to_profile(inputs, {name: Shapes(least, least, most) for name in inputs}, 9)
    assert result["input_ids"].shape == result["attention_mask"].shape == expected
    assert (result["input_ids"][:, : shape[1]] == 5).all() and (result["input_ids"][:, shape[1] :] == 9).all()
    assert (result["attention_mask"].sum(axis=1) == shape[1]).all()


def test_an_engine_is_tried_on_the_sources_answers_before_it_is_kept(tmp_path: Path) -> None:
    """Right ones: kept, with the cosine in its entry. Wrong ones, as of a miscompiled model: refused, nothing kept."""
    bundle = make_bundle(tmp_path / "bundle")
    command = [sys.executable, "-m", "runtimes", "engine", "--bundle", bundle, "build", "--json"]

    def build(outputs: list[list[float]]) -> tuple[int, dict[str, Any]]:
        text = json.dumps({"schema_version": 1, "cosine_min": 0.99, "ids": [[3, 5], [7] * 40], "outputs": outputs})
        (bundle / "model" / "reference.json").write_text(text, encoding="utf-8")
        write_plan(bundle, reference={"file": "reference.json", "sha256": hashlib.sha256(text.encode()).hexdigest()})
        done = subprocess.run(command, env=environment(tmp_path), check=False, capture_output=True)
        return done.returncode, json.loads(done.stdout)

    code, result = build([[4.0, 1.0], [-7.0, 1.0]])
    assert code == 9
    assert "Engine: expected answers with a cosine of at least 0.99 to the source's, found -0.96" in result["error"]
    assert not [path for path in (bundle / "cache" / "engines").iterdir() if path.name != ".lock"]
    code, result = build([[4.0, 1.0], [7.0, 1.0]])
    assert code == 0, result
    entry = json.loads((Path(result["file"]).parent / "entry.json").read_text("utf-8"))
    assert entry["made"]["checked"]["texts"] == 2 and entry["made"]["checked"]["cosine_min"] > 0.9999


def test_a_box_without_trtexec_builds_by_the_python_interface(tmp_path: Path) -> None:
    """Strongly typed, the workspace as a limit, the profile's shapes: the calls of the stand-in's builder."""
    bundle = make_bundle(tmp_path / "bundle")
    env = environment(tmp_path)
    double = Path(env["PATH"].partition(":")[0])
    command = [sys.executable, "-m", "runtimes", "engine", "--bundle", bundle, "build", "--json"]
    done = subprocess.run(
        command,
        env={**env, "PATH": env["PATH"].removeprefix(f"{double}:")},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    result = json.loads(done.stdout)
    entry = json.loads((Path(result["file"]).parent / "entry.json").read_text("utf-8"))
    assert entry["made"]["by"] == "python"
    made = json.loads(Path(result["file"]).read_text("utf-8"))
    assert made["profile"]["input_ids"] == [[1, 1], [4, 32], [4, 64]] and made["workspace"] == 256 << 20


def test_of_the_systems_folder_only_tensorrt_is_imported(tmp_path: Path) -> None:
    """JetPack's dist-packages hold an old numpy and much else; the venv must not see any of it."""
    folder = tmp_path / "dist-packages"
    (folder / "tensorrt").mkdir(parents=True)
    (folder / "tensorrt" / "__init__.py").write_text("from .part import *\n__version__ = '10.3.0'\n", encoding="utf-8")
    (folder / "tensorrt" / "part.py").write_text("value = 1\n", encoding="utf-8")
    (folder / "other.py").write_text("raise SystemExit('the system got in')\n", encoding="utf-8")
    code = (
        "import sys; from runtimes.engines.tensorrt.session import library, library_version; before = list(sys.path)\n"
        "trt = library('tensorrt'); assert trt.value == 1 and library_version('tensorrt') == '10.3.0'\n"
        "assert sys.path == before and library('tensorrt') is trt\n"
        "try:\n    import other\nexcept ModuleNotFoundError:\n    print('apart')\n"
    )
    env = {"PYTHONPATH": str(ROOT), "PACKAGER_TENSORRT": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.stdout == "apart\n", done.stderr
    env["PACKAGER_TENSORRT"] = str(tmp_path)
    code = "from runtimes.engines.tensorrt.session import library; library('tensorrt')"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert "TensorRT: expected its Python package for Python 3." in done.stderr.splitlines()[-1]


def test_an_engine_that_the_bundle_brings_is_tried_and_its_kernels_are_kept(tmp_path: Path) -> None:
    """TensorRT-RTX: bin/engine build runs it on the source's answers, for no GPU could where it was compiled; what it
    compiles for the shapes of a server's start is there at the next one, in a file of this device's own.
    """
    bundle = make_bundle(tmp_path / "bundle", run={"settings": {"pooling": "mean", "library": "tensorrt-rtx"}})
    t4 = {"name": "Tesla T4", "sm": "7.5", "tensorrt": "1.7.1.116"}
    shapes = {name: [[1, 1], [4, 32], [4, 64]] for name in ("input_ids", "attention_mask")}
    engine = {"sm": "7.5", "version": "1.7.1.116", "onnx": str(bundle / "model" / "model.onnx"), "profile": shapes}
    data = json.dumps(engine).encode()
    (bundle / "model" / "engine.rtx").write_bytes(data)
    text = json.dumps({"schema_version": 1, "cosine_min": 0.99, "ids": [[3, 5]], "outputs": [[4.0, 1.0]]})
    (bundle / "model" / "reference.json").write_text(text, encoding="utf-8")
    compiled = {
        "file": "engine.rtx",
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "sm": ["7.5"],
        "library": "tensorrt-rtx",
        "version": "1.7.1",
    }
    reference = {"file": "reference.json", "sha256": hashlib.sha256(text.encode()).hexdigest()}
    write_plan(bundle, engine=compiled, reference=reference, allowed={"sm": ["7.5"]})
    env = environment(tmp_path, device=t4)
    command = [sys.executable, "-m", "runtimes", "engine", "--bundle", bundle, "build", "--json"]
    done = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
    result = json.loads(done.stdout)
    assert done.returncode == 0 and result["checked"]["texts"] == 1, (result, done.stderr)
    (bundle / "cache" / "engines").mkdir(parents=True, exist_ok=True)
    (bundle / "cache" / "engines" / "sm7.5-old.kernels").write_text("[]", encoding="utf-8")
    for more in ("a", "a longer text than that"):
        with served(bundle, tmp_path / "log.txt", env=env) as base:
            assert call(base, "/health")[1]["engine"]["library"] == "TensorRT-RTX 1.7.1.116"
            (kept,) = (bundle / "cache" / "engines").glob("sm7.5-1.7.1.116-*.kernels")
            assert [1, 8] in json.loads(kept.read_text("utf-8"))
            assert call(base, "/v1/embeddings", {"input": more})[0] == 200
    assert json.loads(kept.read_text("utf-8")) == [[1, 8], [4, 64], [1, 24]]
