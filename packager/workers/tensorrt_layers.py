"""Chooses the layers of an encoder that can be in 8 bits, and their scales: ``tensorrt_layers.py JOB.json``.

JOB.json: {"checkpoint", "classify": bool, "max_length", "pooling", "lower_case", "prompt", "threads", "groups":
[{"name", "modules": [str, …]}, …] (layers that read one activation), "calibration": [str, …], "texts": [str, …], "aim":
float, "output"}. Writes {"groups": [{"name", "damage", "kept", "scale", "clip", "smooth"}, …], "plain", "all",
"chosen", "path", "measure"}: see ``choose`` and ``without_smoothing``.

Scales come from the calibration texts: some hundred tokens of each activation are kept, and the chosen clipping point
(and SmoothQuant's smoothing, Xiao et al. 2022) is the one whose rounded product has the least mean squared error. The
cost of rounding is then measured on ``texts``, by quantizing and dequantizing in float32 as QuantizeLinear and
DequantizeLinear do: each group alone on some of them (its damage), then all groups, and then all without the worst, the
two worst, … until the measure reaches the aim.

The measure: mean cosine to the unrounded vectors for an embedder; for a classifier 1 - (squared error of the logits ÷
their variance over texts).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from packager.workers.source_encoder import Source

LIMIT, LEAST_SCALE = 127, 1e-6  # packager/formats/tensorrt/encoder_graph.py's
TOKENS, PER_TEXT = 256, 16  # tokens kept of each activation, in total and of a text
CLIPS = (1.0, 0.95, 0.9, 0.8, 0.7, 0.5, 0.3)
STRENGTHS = (None, 0.5, 0.7)  # of smoothing: 0 leaves the range to the activation, 1 moves it to the weights
WORTH = 0.9  # smoothing is used when its error is below this share of the error without it
BATCH, LONGEST = 16, 128  # texts of a batch, and most tokens of a text
EVERY = 3  # every third text is used to measure a group's damage


def half(value: torch.Tensor) -> torch.Tensor:
    """Rounded to float16, the stored type."""
    return value.half().float()


def round_weight(weight: torch.Tensor) -> torch.Tensor:
    """A matrix [outputs, inputs] quantized to 8 bits and dequantized, with one scale for each output."""
    scale = half((weight.abs().amax(dim=1, keepdim=True) / LIMIT).clamp(min=LEAST_SCALE))
    return (weight / scale).round().clamp(-LIMIT, LIMIT) * scale


def round_activation(values: torch.Tensor, scale: float) -> torch.Tensor:
    """A tensor quantized to 8 bits and dequantized with one scale; QuantizeLinear can give -128."""
    return (values / scale).round().clamp(-128, LIMIT) * scale


class Group:
    """An activation and the layers that read it: its recorded tokens and its rounding."""

    def __init__(self, name: str, modules: Sequence[Any]) -> None:
        self.name, self.modules = name, list(modules)
        self.exact: list[torch.Tensor] = [module.weight.data for module in self.modules]
        self.seen: list[torch.Tensor] = []
        self.most = torch.zeros(self.exact[0].shape[1])
        self.scale, self.clip = 1.0, 1.0
        self.smooth: torch.Tensor | None = None
        self.plain = 1.0  # the best scale without smoothing
        self.rounded: list[torch.Tensor] = []
        self.on = False
        for module in self.modules:
            module.register_forward_pre_hook(self._before)

    def record(self, values: torch.Tensor) -> None:
        """Record some tokens of one text's activation [tokens, inputs]."""
        self.most = torch.maximum(self.most, values.abs().amax(dim=0))
        places = torch.linspace(0, len(values) - 1, min(PER_TEXT, len(values))).long()
        self.seen.append(values[places].clone())

    def calibrate(self) -> None:
        """Choose scale and smoothing on the recorded tokens."""
        rows = torch.cat(self.seen)
        rows = rows[torch.linspace(0, len(rows) - 1, min(TOKENS, len(rows))).long()]
        products = [rows @ weight.T for weight in self.exact]
        largest = torch.stack([weight.abs().amax(dim=0) for weight in self.exact]).amax(dim=0).clamp(min=1e-5)
        best = float("inf")
        for strength in STRENGTHS:
            smooth = None
            if strength is not None:
                smooth = largest ** (1 - strength) / self.most.clamp(min=1e-5) ** strength
                smooth = half((smooth / smooth.log().mean().exp()).clamp(1e-3, 1e3))
            weights = [round_weight(weight / smooth if smooth is not None else weight) for weight in self.exact]
            even = rows * smooth if smooth is not None else rows
            most = self.most * smooth if smooth is not None else self.most
            for clip in CLIPS:
                scale = max(float(half(most.max() * clip / LIMIT)), LEAST_SCALE)
                close = round_activation(even, scale)
                error = sum(
                    float(((close @ weight.T - product) ** 2).sum())
                    for weight, product in zip(weights, products, strict=True)
                )
                # smoothing is one more product in the engine, so its gain must be large enough
                if error < best * (1 if smooth is None or self.smooth is not None else WORTH):
                    best, self.scale, self.clip, self.smooth = error, scale, clip, smooth
            if strength is None:
                self.plain = self.scale
        self.prepare()
        self.seen = []

    def prepare(self) -> None:
        """Round the weights with the chosen smoothing."""
        even = [weight / self.smooth if self.smooth is not None else weight for weight in self.exact]
        self.rounded = [round_weight(weight) for weight in even]

    def switch(self, on: bool) -> None:
        """Switch rounding on or off."""
        self.on = on
        for module, exact, rounded in zip(self.modules, self.exact, self.rounded, strict=True):
            module.weight.data = rounded if on else exact

    def _before(self, module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if not self.on:
            return None
        values = given[0] * self.smooth if self.smooth is not None else given[0]
        return (round_activation(values, self.scale), *given[1:])


def answers(source: Source, batches: Sequence[Any]) -> torch.Tensor:
    """The model's vectors or logits of all texts."""
    return torch.cat([source.answers(batch) for batch in batches])


def measure(exact: torch.Tensor, rounded: torch.Tensor, *, classify: bool) -> float:
    """The agreement of two outputs (see the module's docstring); 1 when they are equal."""
    if not classify:
        return float(torch.nn.functional.cosine_similarity(exact, rounded, dim=1).mean())
    spread = ((exact - exact.mean(dim=0)) ** 2).sum().clamp(min=1e-12)
    return float(1 - ((exact - rounded) ** 2).sum() / spread)


def without_smoothing(groups: Sequence[Group], measured: Callable[[], float]) -> float:
    """The measure with every group rounded by its best scale without smoothing, for the report."""
    kept = [(group.scale, group.smooth) for group in groups]
    for group in groups:
        group.scale, group.smooth = group.plain, None
        group.prepare()
        group.switch(True)
    value = round(float(measured()), 6)
    for group, (scale, smooth) in zip(groups, kept, strict=True):
        group.scale, group.smooth = scale, smooth
        group.prepare()
        group.switch(False)
    return value


def choose(
    groups: Sequence[Group],
    on_all: Callable[[], float],
    on_some: Callable[[], float],
    aim: float,
    progress: Iterable[None],
) -> dict[str, Any]:
    """{"damage": by name, "all": the measure with every group rounded, "path": [[the name that went back to float16,
    the measure then], …], "chosen": the last measure}.

    on_all, on_some: measure the model, as it is switched, on all texts, or on some for the damages. progress: advanced
    after every measurement.
    """
    steps = iter(progress)

    def measured(how: Callable[[], float]) -> float:
        value = round(float(how()), 6)
        next(steps, None)
        return value

    damage = {}
    for group in groups:
        group.switch(True)
        damage[group.name] = round(1 - measured(on_some), 6)
        group.switch(False)
    for group in groups:
        group.switch(True)
    every = chosen = measured(on_all)
    path: list[list[Any]] = []
    for group in sorted(groups, key=lambda group: (-damage[group.name], group.name)):
        if chosen >= aim:
            break
        group.switch(False)
        chosen = measured(on_all)
        path.append([group.name, chosen])
    return {"damage": damage, "all": every, "path": path, "chosen": chosen}


@torch.inference_mode()
def main(job: dict[str, Any]) -> None:
    classify = job["classify"]
    source = Source(job)
    named = dict(source.model.named_modules())
    groups = [Group(entry["name"], [named[name] for name in entry["modules"]]) for entry in job["groups"]]

    total = len(job["calibration"]) + 2 * len(groups) + 1
    steps = iter(range(1, total + 1))

    def steps_done() -> Iterator[None]:
        for done in steps:
            print(json.dumps({"done": done, "total": total}), flush=True)
            yield None

    progress = steps_done()
    hooks = [
        group.modules[0].register_forward_pre_hook(lambda _module, given, group=group: group.record(_rows(given[0])))
        for group in groups
    ]
    for text in job["calibration"]:
        source.model(**source.read([text], LONGEST))
        next(progress, None)
    for hook in hooks:
        hook.remove()
    for group in groups:
        group.calibrate()
    ordered = sorted(job["texts"], key=len)  # texts of like length together: little padding
    batches = [source.read(ordered[start : start + BATCH], LONGEST) for start in range(0, len(ordered), BATCH)]
    some = ordered[EVERY // 2 :: EVERY] or ordered
    few = [source.read(some[start : start + BATCH], LONGEST) for start in range(0, len(some), BATCH)]
    exact, exact_few = answers(source, batches), answers(source, few)

    def on_all() -> float:
        return measure(exact, answers(source, batches), classify=classify)

    def on_some() -> float:
        return measure(exact_few, answers(source, few), classify=classify)

    plain = without_smoothing(groups, on_all)
    choice = choose(groups, on_all, on_some, job["aim"], progress)
    kept = {name for name, _ in choice["path"]}
    entries = [
        {
            "name": group.name,
            "damage": choice["damage"][group.name],
            "kept": group.name in kept,
            "scale": group.scale,
            "clip": group.clip,
            "smooth": None if group.smooth is None else [float(value) for value in group.smooth],
        }
        for group in groups
    ]
    answer = {
        "groups": entries,
        "measure": "variance" if classify else "cosine",
        "plain": plain,
        **{key: choice[key] for key in ("all", "chosen", "path")},
    }
    Path(job["output"]).write_text(json.dumps(answer, sort_keys=True), encoding="utf-8")


def _rows(values: torch.Tensor) -> torch.Tensor:
    """An activation [..., inputs] as [tokens, inputs]."""
    return values.reshape(-1, values.shape[-1])


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
