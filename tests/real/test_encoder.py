"""Encoders from checkpoint to client: MiniLM and a small random classifier, built, read back, served and asked."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from packager.build import Request, build
from packager.bundle.benchmark import bench
from packager.bundle.verify import verify
from packager.cli.console import Console
from packager.core.errors import GateFailed, UsageError
from packager.core.store import Store
from tests.real.conftest import LABELS, TARGET, TEXTS, built
from tests.real.serving import call, served
from tests.real.test_bundle import alone as alone
from tests.real.test_bundle import install
from tests.tolerance import other_integers

pytestmark = pytest.mark.real


def source_vectors(checkpoint: Path, texts: list[str], work: Path) -> np.ndarray[Any, Any]:
    """transformers' own mean-pooled, normalised vectors, written out here once more and not taken from the packager."""
    script = (
        "import json, sys, torch; from transformers import AutoModel, AutoTokenizer\n"
        "texts = json.loads(sys.argv[2])\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "model = AutoModel.from_pretrained(sys.argv[1]).eval()\n"
        "batch = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors='pt')\n"
        "with torch.inference_mode(): states = model(**batch).last_hidden_state\n"
        "mask = batch['attention_mask'].unsqueeze(-1)\n"
        "mean = (states * mask).sum(1) / mask.sum(1)\n"
        "open(sys.argv[3], 'w').write(json.dumps(torch.nn.functional.normalize(mean, dim=1).tolist()))\n"
    )
    output = work / "vectors.json"
    subprocess.run(
        [sys.executable, "-c", script, checkpoint, json.dumps(texts), output], check=True, capture_output=True
    )
    return np.array(json.loads(output.read_text(encoding="utf-8")))


@pytest.fixture(scope="session")
def minilm_bundle(store: Store, minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(store, tmp_path_factory.mktemp("minilm"), minilm, recipe="onnx_int8", name="minilm")


@pytest.fixture(scope="session")
def classifier_bundle(
    store: Store, classifier: Path, labelled_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("classifier")
    return built(store, out, classifier, recipe="onnx_int8", name="classifier", calibration=labelled_file)


@pytest.fixture(scope="session")
def embedder(minilm_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(minilm_bundle, tmp_path_factory.mktemp("log") / "log.txt") as base:
        yield base


def manifest(bundle: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    return found


def test_minilm_keeps_its_cosine_at_a_quarter_of_the_bytes(minilm_bundle: Path) -> None:
    """Cosine at least 0.99 and at most 0.27 of the float32 bytes; the float32 form equals transformers."""
    found = manifest(minilm_bundle)
    report, run = found["report"], found["run"]
    assert report["fidelity"]["general"]["cosine_mean"] >= 0.99
    assert report["fidelity"]["general"]["rank"] >= 0.97
    assert report["unquantized"]["general"]["cosine_min"] >= 0.9999
    assert run["model_bytes"] <= 0.27 * 4 * 22_565_376  # parameters without the pooler, which is not exported
    assert report["tensor_types"]["INT8"] == 39  # 6 layers of 6 matrices, and three embedding tables
    assert (run["task"], run["context"], run["settings"]["pooling"], run["settings"]["normalize"]) == (
        "embed",
        256,
        "mean",
        True,
    )
    assert (minilm_bundle / "model" / "1_Pooling" / "config.json").is_file()
    assert verify(minilm_bundle).ok


def test_the_same_inputs_give_the_same_bytes(minilm: Path, minilm_bundle: Path, tmp_path: Path) -> None:
    """Built again in an empty store: the same manifest, so the same digest of every file."""
    again = built(Store(tmp_path / "store"), tmp_path / "out", minilm, recipe="onnx_int8", name="minilm", verify=False)
    first, second = manifest(minilm_bundle)["files"], manifest(again)["files"]
    assert first == second


def test_the_openai_client_gets_transformers_vectors(embedder: str, minilm: Path, tmp_path: Path) -> None:
    """Its own decoding (base64) included; each text alone gives the same as all together."""
    import openai

    client = openai.OpenAI(base_url=f"{embedder}/v1", api_key="none")
    answer = client.embeddings.create(model="minilm", input=TEXTS)
    vectors = np.array([row.embedding for row in answer.data])
    cosines = (vectors * source_vectors(minilm, TEXTS, tmp_path)).sum(axis=1)
    assert cosines.min() >= 0.98 and cosines.mean() >= 0.99, cosines
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > len(TEXTS)
    for text, together in zip(TEXTS, vectors, strict=True):
        single = client.embeddings.create(model="minilm", input=text, encoding_format="float")
        # a text's vector must not depend on its neighbours in the batch; 384: the inputs of MiniLM's sums
        assert np.abs(np.array(single.data[0].embedding) - together).max() < other_integers(together, 384)


def test_near_texts_are_near(embedder: str) -> None:
    """The paraphrase is nearer than the other subject: the vectors mean something."""
    body = call(embedder, "/v1/embeddings", {"input": TEXTS[:3], "encoding_format": "base64"})[1]
    one, near, far = (np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in body["data"])
    assert one @ near > one @ far + 0.2


def test_wrong_and_long_inputs(embedder: str) -> None:
    """Too long is refused, or cut when asked and then told; an empty text is refused."""
    long = "word " * 400
    status, body = call(embedder, "/v1/embeddings", {"input": long})
    assert status == 400 and body["error"]["code"] == "context_length_exceeded"
    status, body = call(embedder, "/v1/embeddings", {"input": ["a", long], "truncate": True})
    assert status == 200 and body["truncated"] == [1] and body["usage"]["prompt_tokens"] == 256 + 3
    assert call(embedder, "/v1/embeddings", {"input": ""})[0] == 400


def test_it_installs_and_answers_without_a_network(minilm_bundle: Path, tmp_path: Path, alone: list[str]) -> None:
    """In a namespace without a network, by a Python that the bundle is for; no request leaves the box."""
    place = tmp_path / "box"
    done = install(minilm_bundle, place, sys.executable, alone)
    assert done.returncode == 0, done.stderr
    packages = {path.name for path in (place / "venv").glob("lib/*/site-packages/*")}
    assert "onnxruntime" in packages and not packages & {"torch", "transformers", "onnxruntime_genai"}
    question = tmp_path / "question.json"
    run = manifest(minilm_bundle)["run"]
    run |= {key: str(place / run[key]) for key in ("model", "tokenizer")}
    question.write_text(json.dumps({"run": run, "texts": TEXTS}), encoding="utf-8")
    python = place / "venv" / "bin" / "python"
    output = tmp_path / "answer.json"
    command = [*alone, str(python), "-m", "runtimes", "encode", "--input", str(question), "--output", str(output)]
    env = {"PYTHONPATH": str(place / "runtime"), "PATH": "/usr/bin:/bin"}
    asked = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert asked.returncode == 0, asked.stderr
    assert len(json.loads(output.read_text(encoding="utf-8"))["outputs"]) == len(TEXTS)
    checked = subprocess.run([str(place / "bin" / "check")], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_a_classifier_keeps_its_labels(classifier_bundle: Path, classifier: Path, tmp_path: Path) -> None:
    """Names from id2label, the source's label for each text, scores that sum to one; accuracy was measured."""
    report = manifest(classifier_bundle)["report"]
    assert report["fidelity"]["tuning"]["labelled"] == len(TEXTS)
    assert report["fidelity"]["general"]["agreement"] >= 0.95
    script = (
        "import json, sys; from transformers import pipeline\n"
        "ask = pipeline('text-classification', model=sys.argv[1], device='cpu')\n"
        "open(sys.argv[3], 'w').write(json.dumps(ask(json.loads(sys.argv[2]))))\n"
    )
    output = tmp_path / "labels.json"
    subprocess.run(
        [sys.executable, "-c", script, classifier, json.dumps(TEXTS), output], check=True, capture_output=True
    )
    expected = json.loads(output.read_text(encoding="utf-8"))
    with served(classifier_bundle, tmp_path / "log.txt") as base:
        status, body = call(base, "/classify", {"input": TEXTS})
        assert status == 200
        for row, source in zip(body["data"], expected, strict=True):
            assert row["label"] == source["label"] and row["score"] == pytest.approx(source["score"], abs=0.05)
            assert sum(row["scores"].values()) == pytest.approx(1)
            assert set(row["scores"]) == set(LABELS.values())
        predicted = call(base, "/predict", {"text": TEXTS[0]})
        assert predicted == (200, {"result": expected[0]["label"]})
        assert call(base, "/v1/embeddings", {"input": "a"})[0] == 404


def test_weights_in_blocks_keep_more(store: Store, minilm: Path, minilm_bundle: Path, tmp_path: Path) -> None:
    """favour=fidelity: nearer to the source, still at most 0.27 of the bytes."""
    other = manifest(built(store, tmp_path, minilm, recipe="onnx_int8", name="minilm", sets=("favour=fidelity",)))
    speed = manifest(minilm_bundle)["report"]["fidelity"]["general"]
    assert other["report"]["fidelity"]["general"]["cosine_mean"] > speed["cosine_mean"]
    assert other["run"]["model_bytes"] <= 0.27 * 4 * 22_565_376


def test_a_threshold_that_is_missed_stops_the_build(store: Store, minilm: Path, tmp_path: Path) -> None:
    """Exit code 6, the table in details, and no bundle; a language model's limit is refused."""
    request = Request(str(minilm), TARGET, recipe="onnx_int8", name="minilm", limits={"min_cosine": 0.9999})
    with pytest.raises(GateFailed, match="mean cosine, general texts") as caught:
        build(request, tmp_path / "out", Console(quiet=True), store)
    assert caught.value.details is not None and caught.value.details["shortfalls"]
    assert not list((tmp_path / "out").glob("minilm*"))
    wrong = Request(str(minilm), TARGET, recipe="onnx_int8", name="minilm", limits={"max_kl": 0.1})
    with pytest.raises(UsageError, match="does not apply to an embedder"):
        build(wrong, tmp_path / "out", Console(quiet=True), store)


def test_the_bench_has_latency_throughput_and_the_baseline(minilm_bundle: Path, minilm: Path) -> None:
    """One text and eight, percentiles and memory, and transformers beside it taking more memory."""
    found = bench(minilm_bundle, quick=True, baseline=minilm, with_baseline=True, progress=Console(quiet=True))
    assert [row["texts"] for row in found["batches"]] == [1, 8]
    for row in found["batches"]:
        latency = row["latency_ms"]
        assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"] and row["texts_per_second"]["mean"] > 0
    assert found["memory"]["peak_rss_bytes"] < 0.5 * found["baseline"]["memory_bytes"]
    assert verify(minilm_bundle).ok
