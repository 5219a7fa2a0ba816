"""Recorded boxes against bundles: every sentence that docs/reference/refusals.md prints, and what must stand in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runtimes.preflight import check
from tests.conftest import ROOT

BOXES = ROOT / "tests" / "unit" / "boxes"
CASES: dict[str, Any] = json.loads((BOXES / "cases.json").read_text(encoding="utf-8"))


def examined(box: str, bundle: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    """The exit code and document of one run of the preflight."""
    needs = CASES["bundles"][bundle]["needs"]
    manifest = {"schema_version": 1, "bundle": bundle, "run": {}, "needs": needs, "files": []}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    code = check.main(["--bundle", str(folder), "--facts", str(BOXES / f"{box}.json"), "--no-files", "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("box", "bundle", "starts"), [
    ("orin_nano_jetpack_5_1", "orin_tensorrt",
     "JetPack: expected JetPack 6.2 or 7.2, found JetPack 5.1.4 (Jetson Linux 35.6.0); install one of them"),
    ("xavier_nx_jetpack_5_1", "orin_tensorrt",
     "GPU: expected an NVIDIA GPU of compute capability 8.7 with 1.0 GB of memory, found Xavier (7.2, 7.2 GB);"),
    ("thor_jetpack_7_0", "orin_tensorrt",
     "GPU: expected an NVIDIA GPU of compute capability 8.7 with 1.0 GB of memory, found NVIDIA Thor (11.0, 131.9 GB)"),
    ("arm_server_sm86", "orin_any_jetpack",
     "GPU: expected an NVIDIA GPU of compute capability 8.7 with 1.0 GB of memory, found NVIDIA RTX A2000 (8.6, 6.4 GB)"
     "; an engine for 8.7 does not load on another architecture"),
    ("orin_nano_jetpack_6_2", "orin_tensorrt_10_16",
     "TensorRT: expected TensorRT 10.16 or newer and older than 11, found TensorRT 10.3.0.30; update the box's "),
    ("orin_nano_without_tensorrt", "orin_tensorrt",
     "TensorRT: expected TensorRT 10.3 or newer and older than 11, found none; install it with the rest of JetPack"),
    ("t4_driver_470", "t4_tensorrt",
     "driver: expected NVIDIA driver 525.60.13 or newer, found driver 470.256.02; update NVIDIA's driver to 525.60.13"),
    ("t4_driver_535", "t4_onnx_cuda",
     "driver: expected NVIDIA driver 580.65.06 or newer, found driver 535.183.01; update NVIDIA's driver to 580.65.06"),
    ("t4_driver_470", "t4_cuda", "CUDA: expected a driver for CUDA 12.0 or newer, found CUDA 11.4; update NVIDIA's"),
    ("desktop_rtx_3060", "t4_tensorrt", "GPU: expected an NVIDIA GPU of compute capability 7.5 with 2.0 GB of memory"),
    ("desktop_no_gpu", "t4_tensorrt",
     "GPU: expected an NVIDIA GPU of compute capability 7.5 with 2.0 GB of memory, found none;"),
    ("desktop_card_without_driver", "t4_tensorrt",
     "GPU: expected an NVIDIA GPU of compute capability 7.5 with 2.0 GB of memory, found an NVIDIA card "
     "without its driver; install NVIDIA's driver"),
    ("a100_mig", "t4_vllm",
     "GPU: expected an NVIDIA GPU of compute capability 7.5 or newer with 8.6 GB of memory, found NVIDIA "
     "A100-SXM4-40GB (8.0, 5.0 GB);"),
    ("orin_nano_4gb", "orin_gguf", "memory: expected at least 6.0 GB of RAM, found 4.0 GB; use a box with more memory"),
    ("disk_full", "orin_gguf", "disk: expected 5.0 GB free where it is installed, found 120.0 MB;"),
    ("glibc_too_old", "orin_gguf", "C library: expected glibc 2.35 or newer, found glibc 2.31;"),
    ("x86_for_aarch64", "orin_gguf", "processor: expected aarch64, found x86_64;"),
    ("windows_for_linux", "orin_gguf", "system: expected Linux, found Windows"),
    ("desktop_musl", "desktop_gguf", "C library: expected glibc 2.28 or newer, found musl;"),
])  # fmt: skip
def test_a_wrong_box_is_told_the_gravest_thing_in_one_sentence(
    box: str, bundle: str, starts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Expected, found, what to do: exit code 4, one line, one full stop at its end."""
    code, result = examined(box, bundle, tmp_path, capsys)
    assert (code, result["exit_code"], result["ok"]) == (4, 4, False)
    assert result["refusal"].startswith(starts)
    assert result["refusal"].endswith(".") and "\n" not in result["refusal"]


@pytest.mark.parametrize(("box", "bundle", "says"), [
    ("orin_nano_7w", "orin_tensorrt", ["power mode: expected MAXN_SUPER, the fastest of this board, found 7W; where "
                                       "its cooling and power supply allow it, set it with sudo nvpmodel", "clocks:"]),
    ("orin_nano_jetpack_6_2", "orin_tensorrt", ["clocks: expected GPU clocks that are locked, for figures that can be "
                                                "compared, found 306 to 1020 MHz; run sudo jetson_clocks"]),
    ("t4_crowded", "t4_tensorrt", ["free GPU memory: expected 2.0 GB free now, found 1.2 GB; end the programs"]),
    ("t4_without_nvidia_smi_answer", "t4_tensorrt", []),
    ("agx_orin_jetpack_7_2", "orin_tensorrt_10_16", []),
    ("t4_driver_535", "t4_tensorrt", []),
])  # fmt: skip
def test_what_only_slows_a_box_down_is_a_warning(
    box: str, bundle: str, says: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 0; the warnings are in the document, and nothing else is."""
    code, result = examined(box, bundle, tmp_path, capsys)
    assert (code, result["refusal"]) == (0, "")
    assert len(result["warnings"]) == len(says)
    for sentence, start in zip(result["warnings"], says, strict=True):
        assert sentence.startswith(start)


@pytest.mark.parametrize(("box", "bundle", "unknown"), [
    ("orin_nano_jetpack_6_unknown", "orin_tensorrt", {"JetPack"}),
    ("orin_in_docker", "orin_tensorrt", {"JetPack", "driver"}),
    ("t4_without_nvidia_smi_answer", "t4_tensorrt", {"GPU", "CUDA"}),
])  # fmt: skip
def test_what_cannot_be_read_refuses_nothing(
    box: str, bundle: str, unknown: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is shown as unknown, with the reason where there is one."""
    code, result = examined(box, bundle, tmp_path, capsys)
    assert code == 0 and {one["name"] for one in result["findings"] if one["ok"] is None} == unknown
    if box == "t4_without_nvidia_smi_answer":
        assert "unknown (nvidia-smi does not answer)" in [one["found"] for one in result["findings"]]


def test_a_warning_stands_on_standard_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With its advice: people see it without --json, and standard error stays for refusals."""
    examined("orin_nano_7w", "orin_tensorrt", tmp_path, capsys)
    assert check.main(["--bundle", str(tmp_path), "--facts", str(BOXES / "orin_nano_7w.json"), "--no-files"]) == 0
    shown = capsys.readouterr()
    assert "warning  power mode: 7W (better: MAXN_SUPER, the fastest of this board); where its cooling" in shown.out
    assert shown.err == ""


def test_every_case_names_a_recorded_box_and_a_bundle() -> None:
    """The table that is printed is made of them."""
    for case in CASES["cases"]:
        assert (BOXES / f"{case['box']}.json").is_file() and case["needs"] in CASES["bundles"] and case["is"]


@pytest.mark.parametrize(("text", "says"), [
    ("{", "cannot be read as recorded facts"),
    ("[]", "holds no facts of a box"),
    ('{"ram_bytes": "8 GB"}', "ram_bytes has to be int or null, and is '8 GB'"),
    ('{"gpus": [{"bytes": true}]}', "gpus[0].bytes has to be int or null"),
    ('{"gpus": ["T4"]}', "gpus[0] has to be an object"),
])  # fmt: skip
def test_facts_that_were_edited_by_hand_are_checked(
    text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence and the exit code of a wrong usage."""
    (tmp_path / "facts.json").write_text(text, encoding="utf-8")
    assert check.main(["--bundle", str(tmp_path), "--facts", str(tmp_path / "facts.json")]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
