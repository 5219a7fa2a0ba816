"""Chooses the layers of an encoder that ship in 8 bits, by a measurement on texts.

workers/tensorrt_layers.py measures each layer. This module chooses its texts and runs it as a step of the store; its
output is the input of packager/formats/tensorrt/encoder_graph.py and goes into the manifest. Scales come from
calibration texts, the choice from the texts on which the artifact is compared afterwards, with a margin, because the
measurement is in float32 and not in the engine.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packager.core.processes import WORKERS, follow
from packager.core.store import digest_of
from packager.fidelity.encoders import Texts
from packager.formats.tensorrt.encoder_graph import Group, Rounding, groups
from packager.prompts.calibration import DATA

if TYPE_CHECKING:
    from packager.checkpoint.encoder import EncoderFacts
    from packager.core.store import Cost, Step
    from packager.metrics.encoders import EncoderThresholds
    from packager.recipe import Job

CHILD = WORKERS / "tensorrt_layers.py"
PASSAGES, OWN, CHOSEN = 64, 128, 128  # calibration texts of the package and of the user; texts to choose on
MARGIN = 0.001  # added to the cosine's threshold
LOGITS = 0.98  # a classifier's aim: the share of the logits' variance that is kept


@dataclass(frozen=True)
class Choice:
    """The result of the measurement. plain: the child's output. rounded: the rounding of each group in 8 bits, by its
    name. texts, calibration: number of texts used. aim: the least value of the measure.
    """

    groups: tuple[Group, ...]
    plain: dict[str, Any]
    texts: int
    calibration: int
    aim: float

    @property
    def rounded(self) -> dict[str, Rounding]:
        return {
            entry["name"]: Rounding(entry["scale"], tuple(entry["smooth"]) if entry["smooth"] else None)
            for entry in self.plain["groups"]
            if not entry["kept"]
        }

    @property
    def matrices(self) -> tuple[int, int]:
        """(number of matrices in 8 bits, number of all)."""
        inside = self.rounded
        return sum(len(group.weights) for group in self.groups if group.name in inside), sum(
            len(group.weights) for group in self.groups
        )

    def report(self) -> dict[str, Any]:
        """The form stored in the manifest: the measure with every layer rounded, the cost of each layer, and the layers
        kept in float16.
        """
        kept = [name for name, _ in self.plain["path"]]
        what = "mean cosine" if self.plain["measure"] == "cosine" else "share of the logits' variance"
        return {
            "measure": what,
            "texts": self.texts,
            "calibration_texts": self.calibration,
            "aim": self.aim,
            "all_layers_without_evening_out": self.plain["plain"],
            "all_layers": self.plain["all"],
            "as_shipped": self.plain["chosen"],
            "kept_in_fp16": [{"name": name, f"{what} then": value} for name, value in self.plain["path"]],
            "layers": [
                {
                    "name": entry["name"],
                    "precision": "fp16" if entry["name"] in kept else "int8",
                    "damage": entry["damage"],
                    "clipped_at": entry["clip"],
                    "evened_out": entry["smooth"] is not None,
                }
                for entry in self.plain["groups"]
            ],
        }


def choose(
    job: Job, facts: EncoderFacts, graph: Step, texts: Texts, limits: EncoderThresholds, steps: list[Step]
) -> Choice:
    """Measure and choose, once. graph: the step with the exported graph. steps: the list to which the step is added."""
    layers = groups(graph.path / "graph.onnx")
    aim = round(min(limits.min_cosine + MARGIN, 1.0), 6) if facts.task == "embed" else LOGITS
    calibration = calibration_texts(texts)
    measured = [texts.all[place] for places in texts.sets.values() for place in _spread(places, CHOSEN // 2 + 1)]

    def make(folder: Path, cost: Cost) -> None:
        measurement = {
            "checkpoint": str(job.checkpoint.path),
            "classify": facts.task == "classify",
            "max_length": facts.max_length,
            "pooling": facts.pooling,
            "lower_case": facts.lower_case,
            "prompt": facts.prompt,
            "threads": os.cpu_count() or 1,
            "groups": [
                {"name": group.name, "modules": [weight.removesuffix(".weight") for weight in group.weights]}
                for group in layers
            ],
            "calibration": calibration,
            "texts": measured,
            "aim": aim,
            "output": str(folder / "layers.json"),
        }
        name = f"what 8 bits cost, layer by layer ({len(layers)} of them)"
        total = float(len(calibration) + 2 * len(layers) + 1)
        follow(
            CHILD,
            measurement,
            name,
            job.progress,
            cost,
            work=folder,
            total=total,
            unit="runs",
            path=[WORKERS.parent.parent],
        )

    inputs = {
        "checkpoint": job.checkpoint.digest,
        "graph": graph.key,
        "settings": {**facts.settings(), "max_length": facts.max_length},
        "texts": digest_of([calibration, measured])[:40],
        "aim": aim,
    }
    step = job.store.step("tensorrt-layers", inputs, make, progress=job.progress)
    steps.append(step)
    return Choice(layers, step.read_json("layers.json"), len(measured), len(calibration), aim)


def calibration_texts(texts: Texts) -> list[str]:
    """Passages of the package's text, and the user's own texts, without the package's texts for the comparison."""
    passages = [" ".join(part.split()) for part in (DATA / "general.txt").read_text(encoding="utf-8").split("\n\n")]
    passages = [passage for passage in passages if len(passage) > 40]
    own = texts.sets["tuning"]
    return [passages[place] for place in _spread(range(len(passages)), PASSAGES)] + [
        texts.all[place] for place in _spread(own, OWN)
    ]


def _spread(places: range, most: int) -> Sequence[int]:
    """At most ``most`` of some indices, evenly spaced."""
    if len(places) <= most:
        return places
    return [places[number * len(places) // most] for number in range(most)]
