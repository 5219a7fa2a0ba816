"""The flags that verbs share come to one Request, with every value in its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from packager.build import Request
from packager.cli import show
from packager.cli.flags import LIMITS
from packager.metrics.encoders import EncoderThresholds
from packager.metrics.thresholds import Thresholds
from tests.unit.command import packager

COMMON = [
    "org/m",
    "--adapter",
    "lora",
    "--revision",
    "v1",
    "--name",
    "n",
    "--target",
    "t4",
    "--recipe",
    "gguf",
    "--set",
    "quant=Q8_0",
    "--set",
    "slots=2",
    "--calibration",
    "pairs.json",
]
EXPECTED = Request("org/m", "t4", "gguf", Path("lora"), "v1", "n", ("quant=Q8_0", "slots=2"), Path("pairs.json"))


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the verb hands on, in the place of the work itself."""
    arguments: list[Any] = []
    for verb in ("plan", "build"):
        monkeypatch.setattr(show, verb, lambda _console, *given: arguments.extend(given))
    return arguments


def test_plan_asks_for_what_the_flags_say(called: list[Any]) -> None:
    """And for nothing else."""
    assert packager("plan", *COMMON).returncode == 0
    assert called == [EXPECTED]


def test_build_adds_its_own(called: list[Any]) -> None:
    """Only the thresholds that were given replace the recipe's; 0 is one."""
    own = ["--template", "qwen", "--trust-calibration", "--seed", "3", "--no-verify", "--max-kl=0", "--min-rank=-1"]
    assert packager("build", *COMMON, *own, "-o", "out").returncode == 0
    request, out = called
    assert out == Path("out")
    assert (request.template, request.trust_calibration, request.seed, request.verify) == ("qwen", True, 3, False)
    assert request.limits == {"max_kl": 0.0, "min_rank": -1.0}
    plain = {"checkpoint", "target", "recipe", "adapter", "revision", "name", "sets", "calibration"}
    assert all(getattr(request, name) == getattr(EXPECTED, name) for name in plain)


def test_without_flags_everything_is_the_recipes(called: list[Any]) -> None:
    """A Request's own defaults, and a comparison."""
    assert packager("build", "org/m", "--target", "t4", "-o", "out").returncode == 0
    assert called[0] == Request("org/m", "t4")


def test_every_threshold_has_a_flag() -> None:
    """Of a language model and of an encoder: one that nobody could set would be a promise."""
    assert set(LIMITS) == {*Thresholds.__dataclass_fields__, *EncoderThresholds.__dataclass_fields__}
