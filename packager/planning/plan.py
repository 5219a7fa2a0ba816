"""The plan of a build: size, speed, whether it fits, and if not, why and which settings would. It writes nothing."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from packager.core.errors import UsageError
from packager.planning.options import parse_options
from packager.recipe import Estimate, Need, Options, Recipe
from packager.target import GIB, Target

if TYPE_CHECKING:
    from packager.checkpoint.checkpoint import Checkpoint

# The oldest Python of runtimes/ and of xllamacpp's wheels.
RUNTIME_PYTHON = (3, 10)
# Above this share of the free memory the plan has a note.
TIGHT = 0.9
SMALLEST_CONTEXT = 512


@dataclass(frozen=True)
class Plan:
    """The plan of one build. Sizes in bytes; refusals and notes are sentences; without refusals it can be built.

    box_bytes: weights, KV cache of all slots and the runtime together. budget_bytes: the target's free memory for them.
    tokens_per_second_ceiling: bandwidth ÷ bytes read per token, at batch 1; an upper bound for every engine.
    """

    checkpoint: str
    target: str
    recipe: str
    options: Mapping[str, Any]
    estimate: Estimate
    box_bytes: int
    budget_bytes: int
    tokens_per_second_ceiling: float
    refusals: tuple[str, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            **plain,
            "options": dict(self.options),
            "estimate": {**dataclasses.asdict(self.estimate), "notes": list(self.estimate.notes)},
            "refusals": list(self.refusals),
            "notes": list(self.notes),
            "fits": self.box_bytes <= self.budget_bytes,
        }


def make_plan(
    checkpoint: Checkpoint, target: Target, recipe: Recipe[Options], options: Options, notes: Sequence[str] = ()
) -> Plan:
    """The plan of one build. options: an instance of ``recipe.options`` (see parse_options). notes: sentences from
    ``recipe.resolve_auto``, put first among the plan's notes.

    Raises UsageError for invalid options, such as a context of 0; a build that cannot fit or work has refusals instead.
    """
    for key in ("context", "slots"):
        if (value := getattr(options, key, 1)) is not None and value < 1:
            raise UsageError(f"{key}={value} is not valid.", fix=f"Set {key} to 1 or more.")
    estimate = recipe.estimate(checkpoint, target, options)
    box = _box(estimate)
    budget = target.budget(recipe.name, estimate.gpu)
    bandwidth = target.bandwidth_for(recipe.name, estimate.gpu)
    refusals = [*_unsupported(target, recipe), *_python(target), *_missing(recipe.needs, options)]
    if why := recipe.why_not(checkpoint, target, options):
        refusals.append(why)
    if box > budget:
        refusals.append(_too_big(checkpoint, target, recipe, options, box, budget))
    return Plan(
        checkpoint=checkpoint.name,
        target=target.name,
        recipe=recipe.name,
        options={
            key: estimate.context if key == "context" and value is None else value
            for key, value in dataclasses.asdict(options).items()
        },
        estimate=estimate,
        box_bytes=box,
        budget_bytes=budget,
        tokens_per_second_ceiling=round(bandwidth / max(1, estimate.read_per_token_bytes), 1),
        refusals=tuple(refusals),
        notes=(*notes, *_notes(target, recipe, estimate, box, budget), *estimate.notes),
    )


class TargetFit(TypedDict):
    """Whether a checkpoint fits a target with its default recipe. line: the sizes, or the first refusal."""

    target: str
    title: str
    recipe: str
    fits: bool
    line: str


def fit_all(checkpoint: Checkpoint) -> list[TargetFit]:
    """Whether the checkpoint fits each known target."""
    from packager.planning import catalog

    rows: list[TargetFit] = []
    for name in catalog.target_names():
        target = catalog.load_target(name)
        recipe = catalog.load_recipe(target.recipe)
        plan = make_plan(checkpoint, target, recipe, options := parse_options(recipe, target, ()))
        changes: dict[str, Any] = {}
        if plan.refusals:
            for changes in _singles(recipe, options):
                other = make_plan(checkpoint, target, recipe, dataclasses.replace(options, **changes))
                if not other.refusals:
                    break
            else:
                other = plan
        else:
            other = plan
        rows.append(
            {
                "target": name,
                "title": target.title,
                "recipe": recipe.name,
                "fits": not other.refusals,
                "line": _line(other, changes if other is not plan else {}),
            }
        )
    return rows


def _line(plan: Plan, changes: Mapping[str, Any]) -> str:
    if plan.refusals:
        return plan.refusals[0]
    setting = f"with {_sets(changes)}: " if changes else ""
    quant = f"{plan.options['quant']}, " if "quant" in plan.options else ""
    return (
        f"{setting}{quant}{_gib(plan.box_bytes)} of {_gib(plan.budget_bytes)} GiB, "
        f"at most {plan.tokens_per_second_ceiling:.0f} tokens/s"
    )


def _box(estimate: Estimate) -> int:
    return estimate.load_bytes + estimate.kv_bytes + estimate.overhead_bytes


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}" if size >= GIB / 10 else f"{size / GIB:.2f}"


def _unsupported(target: Target, recipe: Recipe[Any]) -> Iterator[str]:
    from packager.planning.catalog import recipe_names

    # No target lists a user's own recipe; its why_not decides whether it works there.
    if recipe.name not in target.recipes.supported and recipe.name in recipe_names():
        supported = ", ".join(target.recipes.supported)
        yield f"{target.title} does not run what the {recipe.name} recipe makes; it supports {supported}."


def _versions(target: Target) -> list[tuple[int, ...]]:
    return [tuple(int(part) for part in version.split(".")) for version in target.python]


def _python(target: Target) -> Iterator[str]:
    if max(_versions(target)) < RUNTIME_PYTHON:
        least = ".".join(map(str, RUNTIME_PYTHON))
        yield (
            f"{target.title} comes with Python {', '.join(target.python)} and the runtime needs {least} or newer; "
            f"install Python {least} beside the system's own there, and plan for a copy of the target file with "
            f'python = ["{least}"].'
        )


def _missing(needs: Sequence[Need], options: object) -> Iterator[str]:
    """Needs whose module is not installed. ``when`` is "" or "option=value|value"."""
    from importlib.util import find_spec

    for need in needs:
        option, _, values = need.when.partition("=")
        if option and str(getattr(options, option, None)) not in values.split("|"):
            continue
        if find_spec(need.module.partition(".")[0]) is None:
            reason = f" for {need.when}" if need.when else ""
            yield f'it needs the module {need.module}{reason}, which is not installed; pip install "{need.brings}".'


def _notes(target: Target, recipe: Recipe[Any], estimate: Estimate, box: int, budget: int) -> Iterator[str]:
    yield from target.notes
    old = [version for version, parts in zip(target.python, _versions(target), strict=True) if parts < RUNTIME_PYTHON]
    if old and len(old) < len(target.python):
        yield f"Python {', '.join(old)} on the box is too old for the runtime; a newer one of the list has to be there."
    if TIGHT * budget < box <= budget:
        yield f"It is tight: {_gib(box)} of {_gib(budget)} GiB; another program on the box may push it out."
    gpu = target.gpu
    on_gpu = target.on_gpu(recipe.name) if estimate.gpu is None else estimate.gpu
    if gpu is not None and gpu.bandwidth_gb_s is not None and not on_gpu:
        ceiling = gpu.bandwidth_gb_s * 1e9 / max(1, estimate.read_per_token_bytes)
        unit = "tokens" if estimate.kv_bytes else "texts"  # an encoder reads its weights once a text
        yield f"The ceiling is that of main memory; from that of the {gpu.name} it would be {ceiling:.0f} {unit}/s."


# -- what would fit ---------------------------------------------------------------------------------------------------


def _too_big(
    checkpoint: Checkpoint, target: Target, recipe: Recipe[Options], options: Options, box: int, budget: int
) -> str:
    """One sentence: the memory it needs, and the settings that would fit."""

    def fits(changes: Mapping[str, Any]) -> bool:
        changed = dataclasses.replace(options, **changes)
        return _box(recipe.estimate(checkpoint, target, changed)) <= budget and not recipe.why_not(
            checkpoint, target, changed
        )

    fitting = _first_of_each(_singles(recipe, options), fits)
    if not fitting:
        fitting = [next((changes for changes in _pairs(recipe, options) if fits(changes)), {})]
    ways = [_sets(changes) for changes in fitting if changes]
    need = f"it needs {_gib(box)} GiB on the box and {target.title} has {_gib(budget)} GiB free for it; "
    if ways:
        return f"{need}{' or '.join(ways)} would fit."
    least = min(
        (
            _box(recipe.estimate(checkpoint, target, dataclasses.replace(options, **changes)))
            for changes in _pairs(recipe, options)
        ),
        default=box,
    )
    return f"{need}no setting fits (the smallest takes {_gib(least)} GiB): a smaller model or a larger box would."


def _sets(changes: Mapping[str, Any]) -> str:
    return " ".join(f"--set {key}={value}" for key, value in changes.items())


def _first_of_each(
    variants: Iterator[dict[str, Any]], fits: Callable[[Mapping[str, Any]], bool]
) -> list[dict[str, Any]]:
    """The first that fits for each option: fewer slots, or a shorter context, or a smaller type."""
    fitting: dict[str, dict[str, Any]] = {}
    for changes in variants:
        key = next(iter(changes))
        if key not in fitting and fits(changes):
            fitting[key] = changes
    return list(fitting.values())


def _smaller(recipe: Recipe[Options], options: Options) -> dict[str, list[Any]]:
    """For each option the values that need less memory than its own, best first: a quant's choices are declared best
    first, and other options list them in their metadata as ``smaller``.
    """
    hints = typing.get_type_hints(recipe.options)
    slots, context = getattr(options, "slots", 1), getattr(options, "context", None) or SMALLEST_CONTEXT
    smaller: dict[str, list[Any]] = {
        "slots": [n for n in (slots // 2, slots // 4, 1) if 1 <= n < slots],
        "context": [n for n in (context // 2, context // 4, context // 8) if n >= SMALLEST_CONTEXT],
    }
    for field in dataclasses.fields(recipe.options):
        choices = typing.get_args(hints["quant"]) if field.name == "quant" else field.metadata.get("smaller", ())
        if values := [other for other in choices if other != getattr(options, field.name)]:
            smaller[field.name] = values
    return smaller


def _singles(recipe: Recipe[Options], options: Options) -> Iterator[dict[str, Any]]:
    for key, values in _smaller(recipe, options).items():
        yield from ({key: value} for value in values)


def _pairs(recipe: Recipe[Options], options: Options) -> Iterator[dict[str, Any]]:
    smaller = _smaller(recipe, options)
    slots, contexts = smaller.pop("slots")[-1:] or [None], smaller.pop("context")
    weights = [{key: value} for key, values in smaller.items() for value in values] or [{}]
    for weight in weights:
        for context in (None, *contexts):
            for slot in slots:
                changes = {**weight, "context": context, "slots": slot}
                yield {key: value for key, value in changes.items() if value is not None}
