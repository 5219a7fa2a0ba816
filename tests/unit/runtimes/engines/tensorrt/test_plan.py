"""plan.json is read strictly: what is unknown, missing or out of the bundle refuses it in a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runtimes.engines.tensorrt.plan import read_plan, shape_flags, trtexec_arguments
from runtimes.manifest import ManifestError
from tests.unit.runtimes.gpu_bundle import make_bundle, profile, write_plan

COMPILED = {
    "file": "engine.rtx",
    "sha256": "0" * 64,
    "bytes": 3,
    "library": "tensorrt-rtx",
    "version": "1.7.1",
    "sm": ["7.5"],
}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle")


def test_a_plan_is_read_whole(bundle: Path) -> None:
    """Files lie beside the plan, shapes keep their order, and the digest is that of the bytes."""
    plan = read_plan(bundle / "model" / "plan.json")
    assert plan.onnx == bundle / "model" / "model.onnx"
    assert [one.dtype for one in plan.inputs] == ["int64", "int64"]
    assert plan.profiles[1]["input_ids"].max == (2, 32)
    assert (plan.library, plan.sm, plan.tensorrt_min, plan.tensorrt_below) == ("tensorrt", ("8.7",), "10.3", "11")
    before = plan.digest
    write_plan(bundle, workspace_bytes=1 << 30)
    assert read_plan(bundle / "model" / "plan.json").digest != before


def test_an_engine_that_the_bundle_brings_is_run_by_its_own_library(bundle: Path) -> None:
    (bundle / "model" / "engine.rtx").write_bytes(b"rtx")
    write_plan(bundle, engine=COMPILED)
    plan = read_plan(bundle / "model" / "plan.json")
    assert plan.compiled is not None and plan.compiled.sm == ("7.5",)
    assert plan.library == "tensorrt-rtx"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema_version": 2}, "its schema_version is 2 where this runtime reads 1"),
        ({"surprise": 1}, "the plan has 'surprise', which this runtime does not know"),
        ({"strongly_typed": False}, "strongly_typed is not true"),
        ({"precision": "fp8"}, "its precision is 'fp8' where fp16 or int8 is known"),
        ({"workspace_bytes": True}, "workspace_bytes is True where a whole number above 0 is expected"),
        ({"profiles": []}, "it has no profile"),
        ({"profiles": [{"input_ids": profile(1, 8)["input_ids"]}]}, "a profile has no attention_mask"),
        ({"profiles": [profile(2, 8, least=3)]}, "the profile of input_ids does not keep min, opt and max in order"),
        ({"allowed": {"sm": []}}, "allowed.sm is [] where compute capabilities"),
        ({"allowed": {"sm": ["sm_87"]}}, "allowed.sm is ['sm_87'] where compute capabilities"),
        ({"allowed": {"sm": ["8.7"], "tensorrt": {"min": "10.3-rc"}}}, "allowed.tensorrt.min is '10.3-rc'"),
        ({"inputs": [{"name": "input_ids", "dtype": "float64"}]}, "inputs has 'input_ids' of 'float64'"),
        ({"onnx": {"file": "../manifest.json", "sha256": "0" * 64}}, "onnx.file names '../manifest.json', and no such"),
        ({"onnx": {"file": "model.onnx", "sha256": "abc"}}, "onnx.sha256 is 'abc' where a sha256 is expected"),
        ({"builder": {"trtexec": ["--loadEngine=/etc/x"]}}, "builder.trtexec has '--loadEngine', which this runtime"),
        ({"builder": {"trtexec": ["--onnx=/etc/passwd"]}}, "builder.trtexec has '--onnx=/etc/passwd', whose value"),
        ({"builder": {"trtexec": ["--stronglyTyped=no"]}}, "builder.trtexec has '--stronglyTyped=no', whose value"),
        ({"engine": COMPILED}, "engine.file names 'engine.rtx', and no such file lies beside the plan"),
    ],
)
def test_a_plan_that_cannot_be_used_is_refused_by_name(bundle: Path, changes: dict[str, Any], words: str) -> None:
    path = write_plan(bundle, **changes)
    with pytest.raises(ManifestError) as refused:
        read_plan(path)
    assert words in str(refused.value)
    assert str(refused.value).count("\n") == 0 and str(refused.value).startswith("plan.json cannot be used: ")


def test_a_plan_that_is_no_json_is_refused(bundle: Path) -> None:
    path = bundle / "model" / "plan.json"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ManifestError, match=r"cannot be read .* copy the bundle again"):
        read_plan(path)
    path.write_text(json.dumps([1]), encoding="utf-8")
    with pytest.raises(ManifestError, match="the plan is no JSON object"):
        read_plan(path)


def test_a_smaller_profile_replaces_the_first_ones_shapes(bundle: Path) -> None:
    """trtexec gets each flag once: those of the profile, and what must always be there."""
    plan = read_plan(bundle / "model" / "plan.json")
    words = trtexec_arguments(plan, 1)
    assert words[0] == "--onnx=model.onnx"
    assert words[-3:] == shape_flags(plan.profiles[1])
    assert words[-1] == "--maxShapes=input_ids:2x32,attention_mask:2x32"
    assert len({word.partition("=")[0] for word in words}) == len(words)
    assert {"--stronglyTyped", "--skipInference", "--memPoolSize=workspace:256M"} <= set(words)
