"""A recipe for two kinds of model calls the module of the checkpoint's kind; each module has its functions."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from packager.formats.by_kind import ByKind
from packager.planning.catalog import load_recipe, load_target, recipe_names
from tests.unit.sketch import SMOLLM2, sketch


@dataclass(frozen=True)
class Options:
    context: int = 8


def test_the_checkpoints_kind_chooses_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """All three questions go to it, with their arguments as they are; the other kind's module is not imported."""

    def answer(*given: Any) -> Any:
        return given

    speaker = SimpleNamespace(why_not=answer, estimate=answer, build=answer)
    monkeypatch.setattr(importlib, "import_module", {"speakers": speaker}.__getitem__)
    kinds: ByKind[Any] = ByKind(Options, encoder="readers", decoder="speakers")
    arguments: Any = (sketch(SMOLLM2), load_target("t4"), Options())
    job: Any = SimpleNamespace(checkpoint=arguments[0])
    returned: list[Any] = [kinds.why_not(*arguments), kinds.estimate(*arguments), kinds.build(job, arguments[2])]
    assert returned == [arguments, arguments, (job, arguments[2])]


OF_TWO_KINDS = {
    name: maker
    for name in recipe_names()
    if isinstance(maker := getattr(load_recipe(name).build, "__self__", None), ByKind)
}


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("recipe", sorted(OF_TWO_KINDS))
def test_each_module_offers_what_its_recipe_asks(recipe: str, kind: str) -> None:
    """The modules are named as text, so neither an import nor the type checker would miss a function."""
    module = importlib.import_module(getattr(OF_TWO_KINDS[recipe], kind))
    for name in ("why_not", "estimate", "build"):
        parameters = list(inspect.signature(getattr(OF_TWO_KINDS[recipe], name)).parameters)
        assert list(inspect.signature(getattr(module, name)).parameters) == parameters


def test_the_recipes_of_two_kinds_are_these() -> None:
    """The check above would say nothing of a recipe that it does not find."""
    assert set(OF_TWO_KINDS) == {"onnx_int8", "tensorrt_engine"}
