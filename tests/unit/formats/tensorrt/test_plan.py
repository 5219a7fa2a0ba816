"""Where a TensorRT engine can come about, the shapes it takes, and the words that the box's builder gets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from packager.checkpoint.checkpoint import Checkpoint, open_checkpoint
from packager.cli.console import Console
from packager.formats.tensorrt import compiler
from packager.formats.tensorrt import plan as tensorrt_plan
from packager.planning.catalog import load_recipe, load_target, target_names
from packager.planning.options import parse_options
from packager.planning.plan import Plan, make_plan
from packager.target import Target
from tests.unit.sketch import SMOLLM2, sketch
from tests.unit.tiny_encoder import tiny_encoder

INPUTS = ["input_ids", "attention_mask"]


def opened(tmp_path: Path, **changes: Any) -> Checkpoint:
    folder = tiny_encoder(tmp_path / "tiny", **changes)
    return open_checkpoint(str(folder), progress=Console(quiet=True), cache=tmp_path / "cache")


def planned(checkpoint: Any, target: Target, *sets: str) -> Plan:
    recipe = load_recipe("tensorrt_engine")
    return make_plan(checkpoint, target, recipe, parse_options(recipe, target, sets))


def with_gpu(name: str, architecture: str) -> Target:
    target = load_target("t4")
    assert target.gpu is not None
    return replace(target, gpu=replace(target.gpu, name=name, architecture=architecture))


@pytest.mark.parametrize(
    ("architecture", "expected"), [("sm_75", "7.5"), ("sm_110", "11.0"), ("sm_120", "12.0"), ("Apple M2", None)]
)
def test_the_capability_is_read_of_the_architecture(architecture: str, expected: str | None) -> None:
    """The last digit is the minor version, however many stand before it."""
    assert tensorrt_plan.capability(with_gpu("x", architecture)) == expected


def test_the_t4_is_compiled_for_here_and_an_orin_builds_its_own() -> None:
    """An engine is compiled only for a GPU that TensorRT-RTX knows; the Orin's plan names its own versions alone."""
    t4, orin = load_target("t4"), load_target("jetson_orin_nano_8gb")
    assert tensorrt_plan.compiled_here(t4) and not tensorrt_plan.compiled_here(orin)
    assert tensorrt_plan.allowed(t4) == {"sm": ["7.5"], "tensorrt": None, "jetpack": None}
    where = tensorrt_plan.allowed(orin)
    assert where["sm"] == ["8.7"] and where["jetpack"] == [entry.jetpack for entry in orin.software]
    assert where["tensorrt"] == {"min": "10.3", "below": "11"}


def test_ten_is_more_than_nine() -> None:
    """Versions are compared as numbers, not as text."""
    orin = load_target("jetson_orin_nano_8gb")
    images = tuple(replace(orin.software[0], tensorrt=version) for version in ("10.16.2", "10.3", "10.9"))
    assert tensorrt_plan.allowed(replace(orin, software=images))["tensorrt"]["min"] == "10.3"


def test_a_gpu_of_another_architecture_is_refused_with_both_numbers() -> None:
    """An RTX engine of SM 8.6 would not be an Orin's: nothing near is taken for the thing itself."""
    sentence = str(tensorrt_plan.why_not(with_gpu("NVIDIA H100", "sm_90")))
    assert "9.0" in sentence and "8.6" in sentence and "NVIDIA H100" in sentence
    assert tensorrt_plan.why_not(with_gpu("NVIDIA RTX 3060", "sm_86")) is None


def test_jetpack_5_is_refused_because_its_types_are_hints() -> None:
    """Xavier's TensorRT 8.5 has no strongly typed networks."""
    sentence = str(tensorrt_plan.why_not(load_target("jetson_xavier_nx")))
    assert "8.5.2" in sentence and "strongly typed" in sentence


def test_an_unconfirmed_tensorrt_is_no_plan() -> None:
    """A system image whose TensorRT nobody has confirmed gets no range made up."""
    thor = load_target("jetson_thor")
    unknown = replace(thor, software=tuple(replace(entry, tensorrt=None) for entry in thor.software))
    assert "not confirmed" in str(tensorrt_plan.why_not(unknown))
    known = replace(thor, software=tuple(replace(entry, tensorrt="10.13.3") for entry in thor.software))
    assert tensorrt_plan.why_not(known) is None


def test_a_target_without_an_nvidia_gpu_is_refused() -> None:
    for name in ("desktop_linux_x86_64", "desktop_macos_arm64"):
        assert "no NVIDIA GPU" in str(tensorrt_plan.why_not(load_target(name)))


def test_smaller_profiles_take_fewer_texts_and_never_shorter_ones() -> None:
    """Half as many texts each time, down to one; every input has the same shapes, in order."""
    profiles = tensorrt_plan.profiles(INPUTS, 8, 256)
    assert [profile["input_ids"]["max"] for profile in profiles] == [[8, 256], [4, 256], [2, 256], [1, 256]]
    for profile in profiles:
        assert list(profile) == INPUTS and profile["input_ids"] == profile["attention_mask"]
        shape = profile["input_ids"]
        assert all(a <= b <= c for a, b, c in zip(shape["min"], shape["opt"], shape["max"], strict=True))
    assert tensorrt_plan.profiles(INPUTS, 1, 3) == [
        {name: {"min": [1, 1], "opt": [1, 1], "max": [1, 3]} for name in INPUTS}
    ]


def test_trtexec_gets_the_shapes_of_the_first_profile() -> None:
    """As trtexec writes them: name:1x64, inputs separated by commas; the workspace in MiB."""
    words = tensorrt_plan.trtexec(tensorrt_plan.profiles(INPUTS, 4, 128)[0], 512 << 20)
    assert "--optShapes=input_ids:2x64,attention_mask:2x64" in words
    assert "--maxShapes=input_ids:4x128,attention_mask:4x128" in words
    assert "--memPoolSize=workspace:512M" in words and "--stronglyTyped" in words


def test_an_encoder_is_planned_where_tensorrt_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T4 and the Orins take it; the Xavier says why not; the desktop without a GPU names what serves the model."""
    monkeypatch.setattr(compiler, "why_not_here", lambda: None)
    tiny = opened(tmp_path)
    taken = {name for name in target_names() if not planned(tiny, load_target(name)).refusals}
    assert {"t4", "jetson_orin_nano_8gb", "jetson_orin_nx_16gb", "jetson_agx_orin_64gb"} <= taken
    assert "jetson_xavier_nx" not in taken and "desktop_linux_x86_64" not in taken
    assert any("strongly typed" in sentence for sentence in planned(tiny, load_target("jetson_xavier_nx")).refusals)
    assert any("onnx_int8" in sentence for sentence in planned(tiny, load_target("desktop_linux_x86_64")).refusals)
    note = " ".join(planned(tiny, load_target("jetson_orin_nano_8gb")).notes)
    assert "builds its engine itself" in note


def test_a_machine_that_cannot_compile_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a T4 this machine has to be one that TensorRT-RTX has wheels for; for a Jetson it may be any."""
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    tiny = opened(tmp_path)
    assert any("riscv64" in sentence for sentence in planned(tiny, load_target("t4")).refusals)
    assert not planned(tiny, load_target("jetson_orin_nano_8gb")).refusals


def test_int8_is_planned_smaller_than_fp16(tmp_path: Path) -> None:
    """One byte a weight of a layer where two were; the plan says that it is the least."""
    tiny, target = opened(tmp_path), load_target("jetson_orin_nano_8gb")
    half, whole = planned(tiny, target, "precision=int8"), planned(tiny, target)
    assert half.estimate.artifact_bytes < whole.estimate.artifact_bytes
    assert any("stay in fp16" in note for note in half.notes)


def test_int8_on_a_gpu_that_nvidia_lists_for_floats_alone_has_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A T4's compute capability 7.5; not an Orin's, and not for float16."""
    monkeypatch.setattr(compiler, "why_not_here", lambda: None)
    tiny = opened(tmp_path)
    warnings = {
        (name, precision): any("lists no INT8" in note for note in planned(tiny, load_target(name), precision).notes)
        for name in ("t4", "jetson_orin_nano_8gb")
        for precision in ("precision=int8", "precision=fp16")
    }
    assert [key for key, sentence in warnings.items() if sentence] == [("t4", "precision=int8")]


def test_a_language_model_is_sent_to_the_recipe_that_serves_it() -> None:
    """One sentence, naming the recipes of that very target; a T4 takes one."""
    sentence = " ".join(planned(sketch(SMOLLM2), load_target("jetson_orin_nano_8gb")).refusals)
    assert "language model" in sentence and "gguf" in sentence and "edge_llm" in sentence and "Orin Nano" in sentence
    assert planned(sketch(SMOLLM2), load_target("t4")).refusals == ()


def test_a_classifier_has_no_pooling(tmp_path: Path) -> None:
    """What is nonsense for the model is refused as in onnx_int8."""
    model = opened(tmp_path, architectures=["BertForSequenceClassification"])
    assert any("pooling=cls" in sentence for sentence in planned(model, load_target("t4"), "pooling=cls").refusals)


def test_a_plan_names_files_by_their_digests_and_no_path(tmp_path: Path) -> None:
    """The text has no place of this machine, no time, and is the same twice."""
    for name in ("model.onnx", "model.onnx.data", "engine.rtx", "reference.json"):
        (tmp_path / name).write_bytes(name.encode())
    texts = [
        tensorrt_plan.to_text(
            tensorrt_plan.make_plan(
                load_target("t4"),
                tmp_path,
                precision="fp16",
                shapes=tensorrt_plan.profiles(INPUTS, 2, 16),
                outputs=[{"name": "logits", "dtype": "float32"}],
                engine=tmp_path / "engine.rtx",
                reference=tmp_path / "reference.json",
            )
        )
        for _ in range(2)
    ]
    assert texts[0] == texts[1] and str(tmp_path) not in texts[0]
    plan = json.loads(texts[0])
    assert plan["engine"]["sm"] == ["7.5"] and plan["engine"]["bytes"] == len("engine.rtx")
    assert len({plan["onnx"]["sha256"], plan["engine"]["sha256"], plan["reference"]["sha256"]}) == 3
