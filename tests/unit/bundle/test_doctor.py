"""``packager doctor``: recorded boxes find their target, a bundle's refusal ends as the box's own check does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from packager.bundle.doctor import examine, shown_facts, target_needs
from packager.core.errors import UsageError
from packager.planning.catalog import load_target, target_names
from tests.conftest import ROOT
from tests.unit.command import packager

BOXES = ROOT / "tests" / "unit" / "boxes"


@pytest.mark.parametrize(("box", "nearest", "others"), [
    ("orin_nano_jetpack_6_2", "jetson_orin_nano_8gb", set()),
    ("orin_nano_jetpack_7_2_1", "jetson_orin_nano_8gb", set()),
    ("agx_orin_jetpack_7_2", "jetson_agx_orin_64gb", {"jetson_orin_nano_8gb", "jetson_orin_nx_16gb"}),
    ("xavier_nx_jetpack_5_1", "jetson_xavier_nx", set()),
    ("thor_jetpack_7_0", "jetson_thor", set()),
    ("t4_driver_535", "t4", {"desktop_linux_x86_64", "ollama"}),
    ("desktop_rtx_3060", "desktop_linux_x86_64", {"ollama"}),
    ("desktop_no_gpu", "desktop_linux_x86_64", {"ollama"}),
    ("orin_nano_4gb", None, set()),
])  # fmt: skip
def test_a_box_finds_its_target(box: str, nearest: str | None, others: set[str]) -> None:
    """The one that says most of it; a larger board of a family is the smaller ones too."""
    document = examine(None, None, BOXES / f"{box}.json", files=False)
    assert document["nearest"] == nearest
    assert {row["target"] for row in document["targets"] if row["ok"]} == others | ({nearest} if nearest else set())
    assert all(row["refusal"] for row in document["targets"] if not row["ok"])


def test_a_target_with_an_unknown_fact_is_not_the_nearest() -> None:
    """A T4 whose nvidia-smi does not answer is perhaps a T4."""
    document = examine(None, None, BOXES / "t4_without_nvidia_smi_answer.json", files=False)
    assert [row["unknown"] for row in document["targets"] if row["target"] == "t4"] == [["GPU"]]
    assert document["nearest"] == "desktop_linux_x86_64"
    shown = packager("doctor", "--facts", BOXES / "t4_without_nvidia_smi_answer.json").stdout
    assert re.search(r"^t4 +perhaps +GPU unknown$", shown, re.MULTILINE)


@pytest.mark.parametrize("name", target_names())
def test_every_target_has_needs(name: str) -> None:
    """With the exact architecture of its GPU and the JetPack releases that were looked at; no size of any model."""
    target = load_target(name)
    needs = target_needs(target)
    assert needs["disk_bytes"] == 0 and bool(needs["ram_bytes"]) != target.memory.assumed
    assert (needs["gpu"] is not None) == (target.gpu is not None and target.gpu.architecture.startswith("sm_"))
    if needs["gpu"]:
        assert needs["gpu"]["exact"] and needs["gpu"]["capability"].replace(".", "") == target.gpu.architecture[3:]  # type: ignore[union-attr]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A manifest that asks for TensorRT on an Orin, and one damaged file."""
    cases = json.loads((BOXES / "cases.json").read_text(encoding="utf-8"))
    manifest = {
        "schema_version": 1,
        "bundle": "b",
        "run": {},
        "needs": cases["bundles"]["orin_tensorrt"]["needs"],
        "files": [],
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (tmp_path / "SHA256SUMS").write_text("0" * 64 + "  manifest.json\n", encoding="utf-8")
    return tmp_path


def test_a_bundle_is_held_against_another_boxs_facts(bundle: Path) -> None:
    """Exit codes as bin/check: 4 for a wrong box, 5 for a damaged bundle, 0 with warnings."""
    wrong = packager("doctor", bundle, "--facts", BOXES / "orin_nano_jetpack_5_1.json", "--json")
    document = json.loads(wrong.stdout)
    assert wrong.returncode == 4 and document["verdict"]["exit_code"] == 4
    refusal = document["verdict"]["refusal"]
    assert refusal.startswith("JetPack: expected JetPack 6.2 or 7.2") and refusal in wrong.stderr
    assert packager("doctor", bundle, "--facts", BOXES / "orin_nano_7w.json").returncode == 5
    fits = packager("doctor", bundle, "--facts", BOXES / "orin_nano_7w.json", "--no-files")
    assert fits.returncode == 0 and "It fits." in fits.stdout
    assert "warning  power mode: expected MAXN_SUPER" in fits.stdout


def test_a_target_is_chosen_by_name(tmp_path: Path) -> None:
    """And by a file of the user's own."""
    facts = BOXES / "t4_driver_535.json"
    assert examine(None, "t4", facts, files=False)["verdict"]["ok"]
    refused = packager("doctor", "--target", "jetson_orin_nano_8gb", "--facts", facts)
    assert refused.returncode == 4 and "processor: expected aarch64, found x86_64" in refused.stderr
    mine = tmp_path / "mine.toml"
    text = (ROOT / "targets" / "t4.toml").read_text(encoding="utf-8")
    mine.write_text(text.replace("sm_75", "sm_80"), encoding="utf-8")
    document = examine(None, str(mine), facts, files=False)
    assert document["verdict"]["refusal"].startswith("GPU: expected an NVIDIA GPU of compute capability 8.0 with")
    assert len(document["targets"]) == len(target_names())


def test_wrong_usage_is_an_error(tmp_path: Path) -> None:
    """A folder that is no bundle, facts that are none, two questions at once."""
    with pytest.raises(UsageError, match=r"has no manifest\.json"):
        examine(tmp_path, None, None, files=True)
    (tmp_path / "facts.json").write_text("[]", encoding="utf-8")
    with pytest.raises(UsageError, match="holds no facts of a box"):
        examine(None, None, tmp_path / "facts.json", files=True)
    (tmp_path / "manifest.json").write_text("{}", encoding="utf-8")
    assert packager("doctor", tmp_path, "--target", "t4").returncode == 2
    assert packager("doctor", tmp_path, "--facts", BOXES / "t4_driver_535.json").returncode == 5


def test_this_machine_is_shown() -> None:
    """Facts and targets, whatever this machine is, with nothing left blank."""
    done = packager("doctor")
    assert done.returncode == 0 and "Nearest target: " in done.stdout
    rows = dict(shown_facts(examine(None, None, None, files=False)["facts"]))
    assert all(rows.values()) and rows["system"] != "unknown, unknown"
