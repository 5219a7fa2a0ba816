"""Which layers of an encoder ship in 8 bits: found on texts, layer by layer, and told with figures.

workers/tensorrt_layers.py measures; here its texts are chosen, its step is kept in the store, and its answer becomes
what packager/formats/tensorrt/encoder_graph.py writes and what the manifest says. Scales come from calibration texts,
the choice from the texts that the artifact is compared on afterwards, with a margin: the measure is taken in float32
and not in the engine.
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
PASSAGES, OWN, CHOSEN = 64, 128, 128  # texts: of the package's own, of the user's, and to choose on
MARGIN = 0.001  # of the cosine above its threshold
LOGITS = 0.98  # a classifier's aim: this share of the logits' variance stays


@dataclass(frozen=True)
class Choice:
    """What was found. plain: the child's answer. rounded: how each group in 8 bits is rounded, by its name. texts and
    calibration: how many were used. aim: what the measure had to reach.
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
        """Matrices in 8 bits, and all."""
        inside = self.rounded
        return sum(len(group.weights) for group in self.groups if group.name in inside), sum(
            len(group.weights) for group in self.groups
        )

    def report(self) -> dict[str, Any]:
        """The form that stands in the manifest: the measure with every layer rounded, what each costs alone, and which
        stayed in float16.
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
    """Measure and choose, once. graph: the step with the exported graph."""
    found = groups(graph.path / "graph.onnx")
    aim = round(min(limits.min_cosine + MARGIN, 1.0), 6) if facts.task == "embed" else LOGITS
    calibration = calibration_texts(texts)
    measured = [texts.all[place] for places in texts.sets.values() for place in _spread(places, CHOSEN // 2 + 1)]

    def make(folder: Path, cost: Cost) -> None:
        asked = {
            "checkpoint": str(job.checkpoint.path),
            "classify": facts.task == "classify",
            "max_length": facts.max_length,
            "pooling": facts.pooling,
            "lower_case": facts.lower_case,
            "prompt": facts.prompt,
            "threads": os.cpu_count() or 1,
            "groups": [
                {"name": group.name, "modules": [weight.removesuffix(".weight") for weight in group.weights]}
                for group in found
            ],
            "calibration": calibration,
            "texts": measured,
            "aim": aim,
            "output": str(folder / "layers.json"),
        }
        name = f"what 8 bits cost, layer by layer ({len(found)} of them)"
        total = float(len(calibration) + 2 * len(found) + 1)
        follow(
            CHILD, asked, name, job.progress, cost, work=folder, total=total, unit="runs", path=[WORKERS.parent.parent]
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
    return Choice(found, step.read_json("layers.json"), len(measured), len(calibration), aim)


def calibration_texts(texts: Texts) -> list[str]:
    """Passages of the package's text, and the user's own texts where there are some; never those that the package
    compares on.
    """
    passages = [" ".join(part.split()) for part in (DATA / "general.txt").read_text(encoding="utf-8").split("\n\n")]
    passages = [passage for passage in passages if len(passage) > 40]
    own = texts.sets["tuning"]
    return [passages[place] for place in _spread(range(len(passages)), PASSAGES)] + [
        texts.all[place] for place in _spread(own, OWN)
    ]


def _spread(places: range, most: int) -> Sequence[int]:
    """At most ``most`` of some places, evenly apart."""
    if len(places) <= most:
        return places
    return [places[number * len(places) // most] for number in range(most)]
