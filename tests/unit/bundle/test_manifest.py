"""The manifest and its schema: round trip, canonical text, and every wrong manifest named by its place."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from packager.bundle.assemble import assemble
from packager.bundle.manifest import MANIFEST, from_dict, is_inside, load, schema, to_json, violations
from packager.core.errors import PackagerError, VerifyFailed
from packager.core.progress import Silent
from tests.unit.bundle.parts import contents


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A good manifest's text."""
    folder = tmp_path_factory.mktemp("manifest")
    return (assemble(contents(folder / "in"), folder / "out", Silent()).path / MANIFEST).read_text("utf-8")


@pytest.fixture
def plain(written: str) -> dict[str, Any]:
    """A good manifest as JSON."""
    parsed: dict[str, Any] = json.loads(written)
    return parsed


def test_the_schema_is_itself_valid_and_describes_every_key() -> None:
    """Draft 2020-12, and no property without a sentence for the reference."""
    Draft202012Validator.check_schema(schema())
    for name in ("target", "recipe", "run", "needs"):
        for key, value in schema()["properties"][name]["properties"].items():
            assert value.get("description") or "$ref" in value, f"{name}.{key} has no description"


def test_a_manifest_survives_the_round_trip(plain: dict[str, Any]) -> None:
    """Reading and writing gives the same bytes."""
    assert json.loads(to_json(from_dict(plain))) == plain
    assert to_json(from_dict(plain)) == to_json(from_dict(json.loads(to_json(from_dict(plain)))))


@pytest.mark.parametrize(
    ("where", "value", "named"),
    [
        (("run", "context"), 0, "$.run.context"),
        (("run", "model"), "/etc/passwd", "$.run.model"),
        (("needs", "system"), "beos", "$.needs.system"),
        (("needs", "python_min"), "three", "$.needs.python_min"),
        (("bundle",), "../x", "$.bundle"),
        (("surprise",), 1, "surprise"),
        (("files", 0, "sha256"), "abc", "$.files[0].sha256"),
        (("files", 0, "path"), "model/../../x", "leaves the bundle"),
        (("files", 0, "path"), "zzz", "not sorted"),
        (("schema_version",), 2, "schema_version"),
    ],
)
def test_a_wrong_value_is_named_by_its_place(
    plain: dict[str, Any], where: tuple[Any, ...], value: Any, named: str
) -> None:
    """The first violation says where it is."""
    assert violations(plain) == []
    wrong = copy.deepcopy(plain)
    place = wrong
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    assert any(named in text for text in violations(wrong))


@pytest.mark.parametrize(("gpu", "named"), [
    ({"capability": "7.5", "count": 1, "bytes": 1, "vllm": "0.33"}, None),
    ({"capability": "8.7", "exact": True, "count": 1, "bytes": 1, "driver_min": None, "cuda": None, "jetpack": ["6.2"],
      "tensorrt": {"min": "10.3", "below": "11"}}, None),
    ({"capability": "sm_87", "count": 1, "bytes": 1}, "$.needs.gpu.capability"),
    ({"capability": "8.7", "count": 0, "bytes": 1}, "$.needs.gpu.count"),
    ({"capability": "8.7", "bytes": 1}, "'count' is a required property"),
    ({"capability": "8.7", "count": 1, "bytes": 1, "tensorrt": {"least": "10"}}, "$.needs.gpu.tensorrt"),
    ({"capability": "8.7", "count": 1, "bytes": 1, "tensorrt": {}}, "$.needs.gpu.tensorrt"),
    ({"capability": "8.7", "count": 1, "bytes": 1, "jetpack": []}, "$.needs.gpu.jetpack"),
    ({"capability": "8.7", "count": 1, "bytes": 1, "jetpack": ["JetPack 6"]}, "$.needs.gpu.jetpack[0]"),
    ({"capability": "8.7", "count": 1, "bytes": 1, "driver": "535"}, "'driver' was unexpected"),
])  # fmt: skip
def test_what_a_bundle_asks_of_a_gpu_is_checked(plain: dict[str, Any], gpu: dict[str, Any], named: str | None) -> None:
    """vLLM's four keys as before, and TensorRT's; a misspelt key would never refuse a box."""
    plain["needs"]["gpu"] = gpu
    listed = violations(plain)
    assert listed == [] if named is None else any(named in text for text in listed)


def test_two_paths_that_differ_only_in_case_are_refused(plain: dict[str, Any]) -> None:
    """On Windows and macOS one would overwrite the other."""
    entry = plain["files"][0]
    plain["files"] = sorted([*plain["files"], {**entry, "path": entry["path"].swapcase()}], key=lambda one: one["path"])
    assert any("collides" in text for text in violations(plain))


@pytest.mark.parametrize(
    ("path", "good"),
    [
        ("model/model.gguf", True),
        ("a b/ü.json", True),
        ("../x", False),
        ("/x", False),
        ("a//b", False),
        ("a/./b", False),
        ("C:/x", False),
        ("a\\b", False),
        ("", False),
        ("a/..", False),
    ],
)
def test_only_plain_relative_paths_stay_inside(path: str, good: bool) -> None:
    """On every system."""
    assert is_inside(path) is good


def test_a_recipe_that_gives_a_wrong_run_is_stopped_before_anything_is_written(tmp_path: Path) -> None:
    """The schema is checked at build time too."""
    with pytest.raises(PackagerError) as caught:
        assemble(
            contents(tmp_path / "in", run={**contents(tmp_path / "in").run, "slots": "many"}),
            tmp_path / "out",
            Silent(),
        )
    assert "$.run.slots" in caught.value.what and not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema_version": 1}', "\udcff"])
def test_an_unreadable_manifest_is_a_failed_verification(tmp_path: Path, text: str) -> None:
    """Never a traceback."""
    (tmp_path / MANIFEST).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(VerifyFailed):
        load(tmp_path)
