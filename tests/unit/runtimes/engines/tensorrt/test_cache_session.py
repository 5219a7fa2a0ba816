"""Keys and values that stay on the GPU: one address for input and output, rows by offset. The driver is a fake."""

from __future__ import annotations

from typing import Any

import pytest

from runtimes.engines.tensorrt.cache_session import CacheSession

SIZES = {"input_ids": 16, "logits": 64, "past_key_values.0.key": 4096, "present.0.key": 4096}


class Cuda:
    """Hands out addresses and writes down what is zeroed."""

    def __init__(self) -> None:
        self.next, self.cleared = 1000, list[tuple[int, int]]()

    def take(self, size: int) -> int:
        self.next += 100_000
        return self.next

    def clear(self, address: int, size: int) -> None:
        self.cleared.append((address, size))


class Context:
    """Writes down where tensors lie."""

    def __init__(self) -> None:
        self.at: dict[str, int] = {}

    def set_tensor_address(self, name: str, address: int) -> None:
        self.at[name] = address


@pytest.fixture
def session() -> Any:
    made: Any = object.__new__(CacheSession)
    made._cuda, made._context = Cuda(), Context()
    made._largest = {"input_ids": (4, 2), "past_key_values.0.key": (4, 2, 16, 16), "present.0.key": (4, 2, 16, 16)}
    made._addresses = made._take(SIZES)
    return made


def test_a_cache_goes_in_and_comes_out_at_one_zeroed_place(session: Any) -> None:
    """What TensorRT's cache update demands; and garbage that is no number would outlive its mask."""
    at = session._addresses
    assert at["past_key_values.0.key"] == at["present.0.key"]
    assert len(set(at.values())) == 3
    assert session._cuda.cleared == [(at["past_key_values.0.key"], 4096)]


def test_some_rows_begin_at_their_first(session: Any) -> None:
    """A row of 2 heads x 16 places x 16 dimensions in float16 is 1024 bytes."""
    shapes = session.rows_at(2, 1)
    assert shapes == {"past_key_values.0.key": (1, 2, 16, 16)}
    base = session._addresses["past_key_values.0.key"]
    assert session._context.at == {"past_key_values.0.key": base + 2048, "present.0.key": base + 2048}
