"""TensorRT bundles of encoders: the engine compiled here for a T4, the plan for an Orin, and what 8 bits cost.

No GPU here: the ONNX file that ships is what is run and compared; that an engine runs is shown by tests/device.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from packager.build import Request, build
from packager.bundle.verify import verify
from packager.cli.console import Console
from packager.core.errors import GateFailed, ToolError
from packager.core.store import Store
from packager.formats.tensorrt import compiler, int8
from tests.conftest import ROOT

pytestmark = pytest.mark.real

if compiler.why_not_here() is not None:
    pytest.skip("TensorRT-RTX has no wheels for this machine", allow_module_level=True)


def made(store: Store, out: Path, checkpoint: Path, target: str, **request: Any) -> Path:
    """A bundle of recipe tensorrt_engine."""
    return build(
        Request(str(checkpoint), target, recipe="tensorrt_engine", **request), out, Console(quiet=True), store
    ).path


def manifest(bundle: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    return found


def plan(bundle: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bundle / "model" / "plan.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="session")
def t4_bundle(store: Store, minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(store, tmp_path_factory.mktemp("t4"), minilm, "t4", name="minilm")


@pytest.fixture(scope="session")
def int8_bundle(store: Store, minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("t4-int8")
    return made(store, out, minilm, "t4", name="minilm", sets=("precision=int8",), limits={"min_cosine": 0.995})


def test_minilm_for_a_t4_brings_an_engine_and_keeps_its_vectors(t4_bundle: Path) -> None:
    """Mean cosine 0.999 at least, every type in the file float16, an engine of SM 7.5, and nothing missing."""
    found, own = manifest(t4_bundle), plan(t4_bundle)
    report = found["report"]
    assert report["fidelity"]["general"]["cosine_mean"] >= 0.999 and report["unquantized"]["general"]["rank"] == 1.0
    assert set(report["tensor_types"]) == {"FLOAT16", "INT64"}
    engine = t4_bundle / "model" / own["engine"]["file"]
    assert engine.stat().st_size == own["engine"]["bytes"] == report["engine"]["bytes"] > 40_000_000
    assert own["engine"]["sm"] == own["allowed"]["sm"] == ["7.5"]
    assert (found["needs"]["gpu"]["capability"], found["needs"]["gpu"]["exact"]) == ("7.5", True)
    assert verify(t4_bundle).ok


def test_the_box_reads_the_plan(t4_bundle: Path) -> None:
    """The reader that the bundle carries takes what the packager wrote, every file by its digest."""
    from runtimes.engines.tensorrt.plan import read_plan
    from runtimes.files import file_sha256

    found = read_plan(t4_bundle / "model" / "plan.json")
    assert found.compiled is not None and file_sha256(found.compiled.file) == found.compiled.sha256
    assert file_sha256(found.onnx) == found.onnx_sha256 and found.reference is not None
    assert [value.name for value in found.inputs] == ["input_ids", "attention_mask", "token_type_ids"]


def test_the_engine_has_the_same_digest_in_another_store(minilm: Path, t4_bundle: Path, tmp_path: Path) -> None:
    """Exported, written and compiled again in a store of its own: the same bytes. (Nothing is compared there, so that
    bundle has no reference answers.)
    """
    again = plan(made(Store(tmp_path / "store"), tmp_path / "out", minilm, "t4", name="minilm", verify=False))
    first = plan(t4_bundle)
    assert again["engine"] == first["engine"] and again["onnx"] == first["onnx"]
    assert again["reference"] is None and first["reference"] is not None


def test_int8_says_what_every_layer_cost_and_keeps_the_worst_in_fp16(int8_bundle: Path, t4_bundle: Path) -> None:
    """The threshold is kept because some layers stay in fp16; the dearest ones are those; the file has what is told."""
    found = manifest(int8_bundle)
    report = found["report"]
    told = report["int8"]
    kept = [layer["name"] for layer in told["kept_in_fp16"]]
    damages = {layer["name"]: layer["damage"] for layer in told["layers"]}
    assert told["all_layers"] < told["aim"] <= told["as_shipped"] and 0 < len(kept) < len(damages) == 24
    assert min(damages[name] for name in kept) >= max(cost for name, cost in damages.items() if name not in kept)
    assert told["all_layers_without_evening_out"] < told["all_layers"]
    assert report["fidelity"]["general"]["cosine_mean"] >= 0.995
    matrices = sum(3 if name.endswith("attention.self") else 1 for name in damages if name not in kept)
    assert report["int8_matrices"] == matrices == sum(1 for name in initializers(int8_bundle) if name.endswith(".q8"))
    assert found["run"]["model_bytes"] < 0.9 * manifest(t4_bundle)["run"]["model_bytes"]
    assert plan(int8_bundle)["precision"] == "int8" and verify(int8_bundle).ok


def initializers(bundle: Path) -> list[str]:
    import onnx

    model = onnx.load(str(bundle / "model" / "model.onnx"), load_external_data=False)
    return [tensor.name for tensor in model.graph.initializer]


def test_an_orin_gets_a_plan_and_no_engine(store: Store, minilm: Path, tmp_path: Path) -> None:
    """What it builds for itself: types, shapes, the versions of its JetPacks; no file of another architecture."""
    from runtimes.engines.tensorrt.plan import read_plan, trtexec_arguments

    bundle = made(store, tmp_path, minilm, "jetson_orin_nano_8gb", name="minilm", sets=("context=128", "slots=4"))
    own = plan(bundle)
    assert own["engine"] is None and not list((bundle / "model").glob("*.rtx"))
    assert own["allowed"]["sm"] == ["8.7"] and own["allowed"]["tensorrt"]["min"] == "10.3"
    assert manifest(bundle)["needs"]["gpu"]["jetpack"] == own["allowed"]["jetpack"]
    read = read_plan(bundle / "model" / "plan.json")
    assert [profile["input_ids"].max for profile in read.profiles] == [(4, 128), (2, 128), (1, 128)]
    assert "--maxShapes=input_ids:1x128,attention_mask:1x128,token_type_ids:1x128" in trtexec_arguments(read, 2)
    assert not list((bundle / "wheels").glob("tensorrt*")), "the box has its own"
    assert verify(bundle).ok


def test_a_classifier_keeps_its_labels(
    store: Store, classifier: Path, labelled_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights are the hardest: labels agree in fp16 and INT8. "auto" is INT8 then; where more is asked of the
    logits than any rounding keeps, "auto" is fp16, and INT8 stops with the figures.
    """

    def asked(precision: str, name: str) -> dict[str, Any]:
        bundle = made(
            store,
            tmp_path / name,
            classifier,
            "t4",
            name="classifier",
            calibration=labelled_file,
            sets=(f"precision={precision}",),
        )
        found = manifest(bundle)
        assert found["run"]["task"] == "classify" and plan(bundle)["outputs"][0]["name"] == "logits"
        assert found["run"]["settings"]["precision"] == plan(bundle)["precision"]
        assert found["report"]["fidelity"]["tuning"]["labelled"] > 0
        assert found["report"]["fidelity"]["general"]["agreement"] >= 0.95
        return found["report"] | {"precision": plan(bundle)["precision"]}

    whole, half = asked("fp16", "fp16"), asked("auto", "auto")
    assert (whole["precision"], half["precision"]) == ("fp16", "int8")
    assert half["int8_matrices"] > 0 == whole["int8_matrices"]
    assert half["fidelity"]["general"]["max_error"] > whole["fidelity"]["general"]["max_error"]
    monkeypatch.setattr(int8, "LOGITS", 1.01)
    assert asked("auto", "strict")["precision"] == "fp16"
    with pytest.raises(GateFailed, match="only 0 of 12 layers"):
        asked("int8", "stopped")


def test_a_model_that_float16_ruins_is_stopped(store: Store, minilm: Path, tmp_path: Path) -> None:
    """The gate is a gate: asked for more than float16 has, there is no bundle."""
    request = Request(str(minilm), "t4", recipe="tensorrt_engine", name="minilm", limits={"min_rank": 0.9999999})
    with pytest.raises(GateFailed, match="rank correlation"):
        build(request, tmp_path / "out", Console(quiet=True), store)
    assert not list((tmp_path / "out").glob("minilm*"))


def test_a_broken_library_is_told_in_one_sentence(
    t4_bundle: Path, minilm: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module that does not load, and one that is missing: exit code 7, and what to remove."""
    broken = tmp_path / "broken" / compiler.MODULE
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('libtensorrt_rtx.so.1: cannot open shared object file')\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    for place, says in ((broken.parent, "libtensorrt_rtx.so.1"), (empty, "tensorrt_rtx_bindings")):
        monkeypatch.setattr(compiler, "compiler", lambda _progress, place=place: place)
        request = Request(str(minilm), "t4", recipe="tensorrt_engine", name="minilm", sets=("slots=3",))
        with pytest.raises(ToolError, match="cannot be loaded") as caught:
            build(request, tmp_path / "out", Console(quiet=True), store)
        assert says in caught.value.why and str(place) in caught.value.fix


def test_the_parser_s_refusal_names_the_node(tmp_path: Path) -> None:
    """A graph with an operator that TensorRT has not: the child says which node."""
    import onnx
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info("input_ids", TensorProto.FLOAT16, ["batch", "length"])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT16, None)
    node = helper.make_node("Unheard", ["input_ids"], ["out"], name="Unheard:out", domain="nobody")
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("nobody", 1)]
    model = helper.make_model(helper.make_graph([node], "g", [value], [out]), opset_imports=opsets, ir_version=9)
    onnx.save(model, str(tmp_path / "model.onnx"))
    job = {
        "onnx": str(tmp_path / "model.onnx"),
        "sm": ["7.5"],
        "output": str(tmp_path / "out.rtx"),
        "profile": {"input_ids": {"min": [1, 1], "opt": [1, 1], "max": [1, 1]}},
    }
    (tmp_path / "job.json").write_text(json.dumps(job), encoding="utf-8")
    place = compiler.compiler(Console(quiet=True))
    ran = subprocess.run(
        [sys.executable, ROOT / "packager/workers/tensorrt_compile.py", tmp_path / "job.json"],
        env={"PYTHONPATH": str(place)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1 and "Unheard" in ran.stdout and not (tmp_path / "out.rtx").exists()
