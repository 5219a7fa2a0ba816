"""Plans: figures, refusals that say what would work, and options read strictly."""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest

from packager.core.errors import UsageError
from packager.formats.gguf.sizes import estimate_gguf
from packager.planning import catalog
from packager.planning.options import options_keys, parse_options
from packager.planning.plan import Plan, fit_all, make_plan
from packager.recipe import Need, Recipe
from packager.target import Target
from tests.conftest import ROOT
from tests.unit.sketch import QWEN_1_5B, QWEN_7B, QWEN_32B, SMOLLM2, sketch


@dataclass(frozen=True)
class Options:
    quant: Literal["F16", "Q8_0", "Q4_K_M", "Q4_0"] = field(default="Q8_0", metadata={"doc": "the type"})
    context: int = field(default=4096, metadata={"min": 1})
    slots: int = 4
    ratio: float = 0.5
    loud: bool = False
    label: str | None = None


def _estimate(checkpoint: Any, target: Target, options: Options) -> Any:
    return estimate_gguf(checkpoint, target, quant=options.quant, context=options.context, slots=options.slots)


RECIPE: Recipe[Options] = Recipe(
    name="gguf", summary="", format="gguf", options=Options, needs=(), why_not=lambda *_: None, estimate=_estimate,
    build=lambda *_: pytest.fail("a plan builds nothing"),
)  # fmt: skip


def plan(config: dict[str, Any], target: str, *sets: str, recipe: Recipe[Options] = RECIPE) -> Plan:
    device = catalog.load_target(target)
    return make_plan(sketch(config), device, recipe, parse_options(recipe, device, sets))


def test_a_plan_that_fits() -> None:
    """Sizes add up, the ceiling is bandwidth by bytes, and the document is JSON."""
    made = plan(QWEN_1_5B, "jetson_orin_nano_8gb")
    assert made.refusals == ()
    assert made.options["quant"] == "Q4_K_M", "the target's own default"
    assert made.box_bytes == made.estimate.load_bytes + made.estimate.kv_bytes + made.estimate.overhead_bytes
    assert made.tokens_per_second_ceiling == pytest.approx(69.4, abs=0.2)
    document = json.loads(json.dumps(made.as_dict()))
    assert document["fits"] is True
    assert document["estimate"]["artifact_bytes"] == made.estimate.artifact_bytes


def test_a_recipe_says_itself_that_it_leaves_the_gpu_idle() -> None:
    """llama.cpp's note is for its own bundles, where there is an NVIDIA GPU to leave idle."""
    recipe = catalog.load_recipe("gguf")
    for name, idle in {"jetson_orin_nano_8gb": True, "t4": True, "desktop_linux_x86_64": False}.items():
        target = catalog.load_target(name)
        estimate = recipe.estimate(sketch(QWEN_1_5B), target, parse_options(recipe, target, ()))
        assert any("CPU build" in note for note in estimate.notes) == idle, name
        assert not any("llama.cpp" in note for note in target.notes), "every recipe would say it"


def test_too_big_says_what_would_fit() -> None:
    """A 7B in 8 bits does not fit the Orin Nano; in 4 bits it does."""
    (refusal,) = plan(QWEN_7B, "jetson_orin_nano_8gb", "quant=Q8_0").refusals
    assert refusal.startswith("it needs 8.1 GiB on the box and NVIDIA Jetson Orin Nano 8 GB has 6.4 GiB free for it")
    assert refusal.endswith("--set quant=Q4_K_M would fit.")
    assert not plan(QWEN_7B, "jetson_orin_nano_8gb", "quant=Q4_K_M").refusals


@pytest.mark.parametrize(
    ("target", "name", "settings", "way"),
    [
        ("t4", "tensorrt_engine", ("context=4096",), "--set precision=int8 would fit."),
        ("jetson_orin_nano_8gb", "onnx_int8", ("context=2048", "slots=1"), "--set bits=4 would fit."),
    ],
)
def test_smaller_weights_are_offered_by_the_recipes_own_name(
    target: str, name: str, settings: tuple[str, ...], way: str
) -> None:
    """A 7B is too large in one form, and the refusal names the form that fits."""
    recipe, device = catalog.load_recipe(name), catalog.load_target(target)
    (refusal,) = make_plan(sketch(QWEN_7B), device, recipe, parse_options(recipe, device, settings)).refusals
    assert refusal.endswith(f"GiB free for it; {way}")


def test_settings_named_as_fitting_fit() -> None:
    """Each way out of a refusal is a plan without refusals."""
    (refusal,) = plan(QWEN_1_5B, "desktop_linux_x86_64", "context=65536").refusals
    ways = refusal.partition("free for it; ")[2].removesuffix(" would fit.").split(" or ")
    assert ways[0] == "--set slots=2" and ways[1] == "--set context=32768"
    for way in ways:
        assert not plan(QWEN_1_5B, "desktop_linux_x86_64", "context=65536", way.removeprefix("--set ")).refusals


def test_only_several_changes_together_fit() -> None:
    """Where no single option is enough, a combination is named."""
    (refusal,) = plan(QWEN_7B, "desktop_linux_x86_64", "quant=F16", "slots=8", "context=32768").refusals
    settings = refusal.partition("free for it; ")[2].removesuffix(" would fit.")
    sets = [text.strip() for text in settings.split("--set") if text.strip()]
    assert len(sets) == 3
    assert not plan(QWEN_7B, "desktop_linux_x86_64", *sets).refusals


def test_nothing_fits() -> None:
    """A 32B has no place on an Orin Nano."""
    (refusal,) = plan(QWEN_32B, "jetson_orin_nano_8gb").refusals
    assert "no setting fits" in refusal and "a smaller model or a larger box would" in refusal


def test_old_python_is_refused() -> None:
    """The Xavier NX has Python 3.8."""
    refusal = plan(SMOLLM2, "jetson_xavier_nx").refusals[0]
    assert "comes with Python 3.8 and the runtime needs 3.10 or newer" in refusal and "install Python 3.10" in refusal


def test_missing_modules() -> None:
    """Only what the chosen options need counts, and the extra is named."""
    needs = (Need("json", "x"), Need("no_such_module", "packager[extra]", when="quant=Q4_K_M|F16"))
    recipe = replace(RECIPE, needs=needs)
    assert not plan(SMOLLM2, "desktop_linux_x86_64", recipe=recipe).refusals
    (refusal,) = plan(SMOLLM2, "desktop_linux_x86_64", "quant=F16", recipe=recipe).refusals
    assert "no_such_module for quant=Q4_K_M|F16" in refusal and 'pip install "packager[extra]"' in refusal


def test_the_recipe_s_own_refusal_and_unsupported_target() -> None:
    """why_not is shown as it is; a recipe of the catalog that the target does not list is refused."""
    assert plan(SMOLLM2, "t4", recipe=replace(RECIPE, why_not=lambda *_: "because.")).refusals == ("because.",)
    target = catalog.load_target("t4")
    other = replace(target, recipes=replace(target.recipes, supported=("onnx_int8",)))
    (refusal,) = make_plan(sketch(SMOLLM2), other, RECIPE, Options()).refusals
    assert refusal.endswith("it supports onnx_int8.")
    assert not make_plan(sketch(SMOLLM2), other, replace(RECIPE, name="mine"), Options()).refusals


def test_notes() -> None:
    """A discrete card's ceiling beside the host's, and a warning when it is tight."""
    assert any("from that of the NVIDIA T4" in note for note in plan(SMOLLM2, "t4").notes)
    assert any("It is tight" in note for note in plan(QWEN_1_5B, "desktop_linux_x86_64", "context=32768").notes)


def test_meaningless_options() -> None:
    """Zero slots are a mistake, not a plan."""
    with pytest.raises(UsageError, match="slots=0 is not valid"):
        plan(SMOLLM2, "t4", "slots=0")


def test_options_come_from_defaults_target_and_sets() -> None:
    """The last wins; values are read by their type, choices in any case."""
    target = catalog.load_target("jetson_thor")
    assert parse_options(RECIPE, target, ()) == Options(quant="Q8_0", context=8192, slots=8)
    sets = ["quant=q4_0", "context=512", "ratio=1e-1", "loud=true", "label=a=b", "slots = 2"]
    assert parse_options(RECIPE, target, sets) == Options("Q4_0", 512, 2, 0.1, True, "a=b")
    assert parse_options(RECIPE, target, ["label=x", "label=none"]).label is None


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("qaunt=Q8_0", 'no option "qaunt". Did you mean "quant"?'),
        ("quant=Q4_K", '--set quant is "Q4_K". Did you mean "Q4_K_M"? It can be: F16|Q8_0|Q4_K_M|Q4_0.'),
        ("quant", '--set quant has no "="'),
        ("context=4k", "It can be: integer"),
        ("context=4.5", "It can be: integer"),
        ("context=0", "context=0 is too small. Set context to 1 or more."),
        ("ratio=nan", "It can be: number"),
        ("loud=maybe", "It can be: true|false"),
    ],
)
def test_options_are_strict(entry: str, says: str) -> None:
    """Unknown keys and wrong values name what was meant."""
    with pytest.raises(UsageError) as caught:
        parse_options(RECIPE, catalog.load_target("t4"), [entry])
    assert says in str(caught.value)


def test_a_target_s_options_are_checked_too() -> None:
    """The target file is named as the origin of a misspelt option."""
    target = replace(catalog.load_target("t4"), options={"gguf": {"contxt": 1}})
    with pytest.raises(UsageError, match=r"target t4, \[options.gguf\].*Did you mean \"context\"") as caught:
        parse_options(RECIPE, target, ())
    assert caught.value.exit_code == 2


def test_option_without_default() -> None:
    """It has to be given."""

    @dataclass(frozen=True)
    class Needy:
        size: int

    globals()["Needy"] = Needy
    recipe: Recipe[Any] = replace(RECIPE, options=Needy)  # type: ignore[arg-type]
    target = replace(catalog.load_target("t4"), options={})
    with pytest.raises(UsageError, match=r"needs a value for size\. Add --set size=integer"):
        parse_options(recipe, target, ())
    assert parse_options(recipe, target, ["size=3"]).size == 3


def test_options_keys() -> None:
    """For `recipes show` and the reference."""
    keys = options_keys(RECIPE)
    assert keys[0] == ("quant", "F16|Q8_0|Q4_K_M|Q4_0", "Q8_0", "the type")
    assert keys[-1] == ("label", "text|none", None, "")


def test_fit_all_covers_every_target() -> None:
    """One row a target, one line each, with the recipe that ships."""
    rows = fit_all(sketch(SMOLLM2))
    assert [row["target"] for row in rows] == list(catalog.target_names())
    fits = {row["target"]: row["fits"] for row in rows}
    assert fits["desktop_linux_x86_64"] and not fits["jetson_xavier_nx"]
    assert all("\n" not in row["line"] and row["line"] for row in rows)


def test_every_target_s_options_are_options_of_its_recipe() -> None:
    """A target file cannot name an option that the shipped recipe does not have."""
    for name in catalog.target_names():
        target = catalog.load_target(name)
        for recipe in target.recipes.supported:
            assert parse_options(catalog.load_recipe(recipe), target, ())


DOCS = ROOT / "docs" / "how-to"


def _blocks(file: Path, language: str) -> list[str]:
    parts = file.read_text(encoding="utf-8").split("```")
    blocks = [part.partition("\n") for part in parts[1::2]]
    return [textwrap.dedent(text) for name, _, text in blocks if name == language]


def test_the_how_to_for_targets_works(tmp_path: Path) -> None:
    """The file in docs/how-to/add-a-target.md loads and gives a plan."""
    file = tmp_path / "kiosk.toml"
    file.write_text(_blocks(DOCS / "add-a-target.md", "toml")[0], encoding="utf-8")
    made = plan(SMOLLM2, str(file))
    assert made.target == "kiosk" and not made.refusals


def test_the_how_to_for_recipes_plans(tmp_path: Path) -> None:
    """The module in docs/how-to/add-a-recipe.md loads, plans and refuses; tests/real follows it to a served answer."""
    from packager.checkpoint.checkpoint import open_checkpoint
    from packager.core.progress import Silent
    from tests.unit.tiny import tiny_checkpoint

    file = tmp_path / "gguf_as_it_is.py"
    file.write_text(_blocks(DOCS / "add-a-recipe.md", "python")[0], encoding="utf-8")
    recipe = catalog.load_recipe(str(file))
    target = catalog.load_target("desktop_linux_x86_64")
    options = parse_options(recipe, target, ["context=32"])
    checkpoint = open_checkpoint(str(tiny_checkpoint(tmp_path / "model")), progress=Silent(), cache=tmp_path / "cache")
    assert not make_plan(checkpoint, target, recipe, options).refusals
    assert make_plan(checkpoint, target, recipe, replace(options, context=65)).refusals
