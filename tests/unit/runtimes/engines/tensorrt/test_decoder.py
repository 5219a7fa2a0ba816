"""A language model's steps: the inputs of an engine, and the limits of its profile. The engine is a fake."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtimes.engine import EngineError
from runtimes.engines.tensorrt.decoder import Model, rounded
from runtimes.engines.tensorrt.plan import Shapes
from tests.unit.runtimes.gpu_bundle import environment, make_bundle, write_plan

PROFILE = {
    "input_ids": Shapes((1, 1), (2, 1), (2, 128)),
    "start": Shapes((1,), (2,), (2,)),
    "places": Shapes((64,), (256,), (300,)),
    "wanted": Shapes((1,), (1,), (64,)),
}


class Fake:
    """Records its steps; every logit is the slot's number."""

    def __init__(self) -> None:
        self.steps: list[tuple[dict[str, Any], int, int]] = []

    def step(self, inputs: Mapping[str, Any], slot: int, rows: int) -> Any:
        self.steps.append(({name: array.tolist() for name, array in inputs.items()}, slot, rows))
        return np.full((rows, len(inputs["wanted"]), 7), slot, np.float32)

    def memory(self) -> int:
        return 5

    def close(self) -> None:
        self.steps.clear()


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
def model(fake: Fake) -> Model:
    return Model(fake, PROFILE, 7, "fake 1", 2)


def test_the_last_tokens_are_asked_for_from_where_the_row_stands(model: Model, fake: Fake) -> None:
    logits = model.run(np.array([[4, 5, 6]]), [10], slot=1, kept=2)
    assert logits.shape == (1, 2, 7)
    [(inputs, slot, rows)] = fake.steps
    assert (slot, rows) == (1, 1)
    assert inputs["input_ids"] == [[4, 5, 6]]
    assert inputs["start"] == [10]
    assert inputs["wanted"] == [1, 2]
    assert inputs["places"] == list(range(64))


def test_the_longest_row_decides_how_far_is_looked(model: Model, fake: Fake) -> None:
    """Powers of two, and never beyond the cache."""
    model.run(np.array([[1], [2]]), [3, 130])
    model.run(np.array([[1], [2]]), [3, 299])
    assert [len(inputs["places"]) for inputs, _, _ in fake.steps] == [256, 300]
    assert [rounded(count) for count in (1, 64, 65, 1000)] == [64, 64, 128, 1024]


@pytest.mark.parametrize(
    ("shape", "lengths", "slot", "kept"),
    [((2, 1), [0, 0], 1, 1), ((1, 129), [0], 0, 1), ((1, 100), [250], 0, 1), ((1, 100), [0], 0, 65)],
)
def test_more_than_the_engine_takes_is_an_error(
    model: Model, fake: Fake, shape: tuple[int, int], lengths: list[int], slot: int, kept: int
) -> None:
    """Too many rows, too long a piece, beyond the cache, too many logits."""
    with pytest.raises(EngineError, match="more than the engine takes"):
        model.run(np.zeros(shape, np.int64), lengths, slot=slot, kept=kept)
    assert not fake.steps


def test_device_memory_is_the_engines(model: Model) -> None:
    assert model.memory() == 5


def test_the_engine_tool_says_what_a_bundle_brings_and_whether_it_fits_this_gpu(tmp_path: Path) -> None:
    """show: digest and GPU; build: the engine is the one of the plan; another GPU is refused in a sentence."""
    bundle = make_bundle(tmp_path / "bundle", run={"engine": "tensorrt_decoder", "task": "generate"})
    data = b"an engine"
    (bundle / "model" / "engine.rtx").write_bytes(data)
    compiled = {
        "file": "engine.rtx",
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "sm": ["7.5"],
        "library": "tensorrt-rtx",
        "version": "1.7.1",
    }
    inputs = [{"name": "input_ids", "dtype": "int64"}, {"name": "past_key_values.0.key", "dtype": "float16"}]
    one = {
        "input_ids": {"min": [1, 1], "opt": [2, 1], "max": [2, 64]},
        "past_key_values.0.key": {"min": [1, 1, 64, 8], "opt": [2, 1, 64, 8], "max": [2, 1, 64, 8]},
    }
    write_plan(bundle, engine=compiled, allowed={"sm": ["7.5"]}, inputs=inputs, profiles=[one])

    def tool(what: str, sm: str) -> tuple[int, dict[str, Any]]:
        env = environment(tmp_path, device={"name": "Tesla T4", "sm": sm, "tensorrt": "1.7.1.116"})
        command = [sys.executable, "-m", "runtimes", "engine", "--bundle", bundle, what, "--json"]
        done = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
        return done.returncode, json.loads(done.stdout)

    code, result = tool("show", "7.5")
    assert (code, result["ok"], result["sha256"]) == (0, True, compiled["sha256"])
    code, result = tool("build", "7.5")
    assert (code, result["largest"], result["checked"]) == (0, {"input_ids": [2, 64]}, None)
    code, result = tool("show", "8.6")
    assert (code, result["ok"]) == (4, False)
    assert result["error"].startswith("GPU: expected compute capability 7.5, found Tesla T4 with 8.6;")
    (bundle / "model" / "engine.rtx").write_bytes(b"an other!")
    code, result = tool("build", "7.5")
    assert code == 9 and "expected the engine that was bundled" in result["error"]
