"""A language model's steps: what an engine is asked for, and what is more than it takes. The engine is a fake."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from runtimes.engine import EngineError
from runtimes.tensorrt_decoder import Model, rounded
from runtimes.tensorrt_plan import Shapes

PROFILE = {
    "input_ids": Shapes((1, 1), (2, 1), (2, 128)),
    "start": Shapes((1,), (2,), (2,)),
    "places": Shapes((64,), (256,), (300,)),
    "wanted": Shapes((1,), (1,), (64,)),
}


class Fake:
    """Records what it is asked; every logit is the slot's number."""

    def __init__(self) -> None:
        self.asked: list[tuple[dict[str, Any], int, int]] = []

    def step(self, inputs: Mapping[str, Any], slot: int, rows: int) -> Any:
        self.asked.append(({name: array.tolist() for name, array in inputs.items()}, slot, rows))
        return np.full((rows, len(inputs["wanted"]), 7), slot, np.float32)

    def memory(self) -> int:
        return 5

    def close(self) -> None:
        self.asked.clear()


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
def model(fake: Fake) -> Model:
    return Model(fake, PROFILE, 7, "fake 1", 2)


def test_the_last_tokens_are_asked_for_from_where_the_row_stands(model: Model, fake: Fake) -> None:
    logits = model.run(np.array([[4, 5, 6]]), [10], slot=1, kept=2)
    assert logits.shape == (1, 2, 7)
    [(inputs, slot, rows)] = fake.asked
    assert (slot, rows) == (1, 1)
    assert inputs["input_ids"] == [[4, 5, 6]]
    assert inputs["start"] == [10]
    assert inputs["wanted"] == [1, 2]
    assert inputs["places"] == list(range(64))


def test_the_longest_row_decides_how_far_is_looked(model: Model, fake: Fake) -> None:
    """Powers of two, and never beyond the cache."""
    model.run(np.array([[1], [2]]), [3, 130])
    model.run(np.array([[1], [2]]), [3, 299])
    assert [len(inputs["places"]) for inputs, _, _ in fake.asked] == [256, 300]
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
    assert not fake.asked


def test_device_memory_is_the_engines(model: Model) -> None:
    assert model.memory() == 5
