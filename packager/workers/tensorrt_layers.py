"""Which layers of an encoder take 8 bits, and with what scales: ``tensorrt_layers.py JOB.json``.

JOB.json: {"checkpoint", "classify": bool, "max_length", "pooling", "lower_case", "prompt", "threads", "groups":
[{"name", "modules": [str, …]}, …] (layers that read one activation), "calibration": [str, …], "texts": [str, …], "aim":
float, "output"}. Writes {"groups": [{"name", "damage", "kept", "scale", "clip", "smooth"}, …], "plain", "all",
"chosen", "path", "measure"}: see ``choose`` and ``without_evening_out``.

Scales are found on the calibration texts: of each activation some hundred tokens are kept, and the clipping point (and
whether channels are evened out first, Xiao et al. 2022) is the one whose rounded product is nearest to the exact one,
by mean squared error. What rounding costs is then measured on ``texts``, by rounding and rounding back in float32, as
QuantizeLinear and DequantizeLinear do: each group alone on some of them (its damage), then all, and then all without
the worst, the two worst, … until the measure reaches the aim.

The measure: mean cosine to the unrounded vectors for an embedder; for a classifier 1 - (squared error of the logits ÷
their variance over texts).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from packager.workers.source_encoder import Source

LIMIT, LEAST_SCALE = 127, 1e-6  # packager/formats/tensorrt/encoder_graph.py's
TOKENS, PER_TEXT = 256, 16  # kept of each activation
CLIPS = (1.0, 0.95, 0.9, 0.8, 0.7, 0.5, 0.3)
STRENGTHS = (None, 0.5, 0.7)  # of evening out: 0 leaves all to the activation, 1 to the weights
WORTH = 0.9  # of the error without it
BATCH, LONGEST = 16, 128  # texts at once, and tokens of a text that is measured
GLANCES = 3  # every third text is asked for a group's damage


def half(value: torch.Tensor) -> torch.Tensor:
    """As it is stored: float16."""
    return value.half().float()


def round_weight(weight: torch.Tensor) -> torch.Tensor:
    """A matrix [outputs, inputs] in 8 bits and back, one scale an output."""
    scale = half((weight.abs().amax(dim=1, keepdim=True) / LIMIT).clamp(min=LEAST_SCALE))
    return (weight / scale).round().clamp(-LIMIT, LIMIT) * scale


def round_activation(values: torch.Tensor, scale: float) -> torch.Tensor:
    """Any tensor in 8 bits and back with one scale; -128 is a value that QuantizeLinear gives."""
    return (values / scale).round().clamp(-128, LIMIT) * scale


class Group:
    """An activation and the layers that read it: what was seen of it, and how it is rounded."""

    def __init__(self, name: str, modules: Sequence[Any]) -> None:
        self.name, self.modules = name, list(modules)
        self.exact: list[torch.Tensor] = [module.weight.data for module in self.modules]
        self.seen: list[torch.Tensor] = []
        self.most = torch.zeros(self.exact[0].shape[1])
        self.scale, self.clip = 1.0, 1.0
        self.smooth: torch.Tensor | None = None
        self.plain = 1.0  # the best scale without evening out
        self.rounded: list[torch.Tensor] = []
        self.on = False
        for module in self.modules:
            module.register_forward_pre_hook(self._before)

    def look(self, values: torch.Tensor) -> None:
        """Keep some tokens of one text's activation [tokens, inputs]."""
        self.most = torch.maximum(self.most, values.abs().amax(dim=0))
        places = torch.linspace(0, len(values) - 1, min(PER_TEXT, len(values))).long()
        self.seen.append(values[places].clone())

    def settle(self) -> None:
        """Choose scale and smoothing on what was seen."""
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
                # evening out is one more product in the engine: it has to be worth it
                if error < best * (1 if smooth is None or self.smooth is not None else WORTH):
                    best, self.scale, self.clip, self.smooth = error, scale, clip, smooth
            if strength is None:
                self.plain = self.scale
        self.prepare()
        self.seen = []

    def prepare(self) -> None:
        """Round the weights as it was chosen."""
        even = [weight / self.smooth if self.smooth is not None else weight for weight in self.exact]
        self.rounded = [round_weight(weight) for weight in even]

    def switch(self, on: bool) -> None:
        """Compute rounded from now on, or exactly."""
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


def measure(exact: torch.Tensor, found: torch.Tensor, *, classify: bool) -> float:
    """How near the answers are: 1 is the same; see the module's text."""
    if not classify:
        return float(torch.nn.functional.cosine_similarity(exact, found, dim=1).mean())
    spread = ((exact - exact.mean(dim=0)) ** 2).sum().clamp(min=1e-12)
    return float(1 - ((exact - found) ** 2).sum() / spread)


def without_evening_out(groups: Sequence[Group], ask: Any) -> float:
    """The measure with every group rounded by its best single scale alone, for the report."""
    kept = [(group.scale, group.smooth) for group in groups]
    for group in groups:
        group.scale, group.smooth = group.plain, None
        group.prepare()
        group.switch(True)
    value = round(float(ask()), 6)
    for group, (scale, smooth) in zip(groups, kept, strict=True):
        group.scale, group.smooth = scale, smooth
        group.prepare()
        group.switch(False)
    return value


def choose(groups: Sequence[Group], ask: Any, glance: Any, aim: float, told: Iterable[Any]) -> dict[str, Any]:
    """{"damage": by name, "all": the measure with every group rounded, "path": [[the name that went back to float16,
    the measure then], …], "chosen": the last measure}. ``ask()`` measures the model as it is switched, ``glance()`` on
    some texts only, for the damages. told: is moved on after every measurement.
    """
    steps = iter(told)

    def measured(how: Any) -> float:
        value = round(float(how()), 6)
        next(steps, None)
        return value

    damage = {}
    for group in groups:
        group.switch(True)
        damage[group.name] = round(1 - measured(glance), 6)
        group.switch(False)
    for group in groups:
        group.switch(True)
    every = chosen = measured(ask)
    path: list[list[Any]] = []
    for group in sorted(groups, key=lambda group: (-damage[group.name], group.name)):
        if chosen >= aim:
            break
        group.switch(False)
        chosen = measured(ask)
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

    def told() -> Iterable[None]:
        for done in steps:
            print(json.dumps({"done": done, "total": total}), flush=True)
            yield None

    progress = iter(told())
    hooks = [
        group.modules[0].register_forward_pre_hook(lambda _module, given, group=group: group.look(_rows(given[0])))
        for group in groups
    ]
    for text in job["calibration"]:
        source.model(**source.read([text], LONGEST))
        next(progress, None)
    for hook in hooks:
        hook.remove()
    for group in groups:
        group.settle()
    ordered = sorted(job["texts"], key=len)  # texts of like length together: little padding
    batches = [source.read(ordered[start : start + BATCH], LONGEST) for start in range(0, len(ordered), BATCH)]
    some = ordered[GLANCES // 2 :: GLANCES] or ordered
    few = [source.read(some[start : start + BATCH], LONGEST) for start in range(0, len(some), BATCH)]
    exact, exact_few = answers(source, batches), answers(source, few)

    def ask() -> float:
        return measure(exact, answers(source, batches), classify=classify)

    def glance() -> float:
        return measure(exact_few, answers(source, few), classify=classify)

    plain = without_evening_out(groups, ask)
    found = choose(groups, ask, glance, job["aim"], progress)
    kept = {name for name, _ in found["path"]}
    entries = [
        {
            "name": group.name,
            "damage": found["damage"][group.name],
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
        **{key: found[key] for key in ("all", "chosen", "path")},
    }
    Path(job["output"]).write_text(json.dumps(answer, sort_keys=True), encoding="utf-8")


def _rows(values: torch.Tensor) -> torch.Tensor:
    """Tokens in rows, whatever stands before."""
    return values.reshape(-1, values.shape[-1])


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
