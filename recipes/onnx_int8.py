"""INT8 ONNX for onnxruntime: one recipe, two kinds of model. What each kind needs stands in its own module.

packager/onnx_encoder.py makes embedders and classifiers, packager/onnx_decoder.py language models. Both offer
``why_not``, ``estimate`` and ``build`` with the arguments of this module's functions, and read the one Options below.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, Protocol, cast

from packager.encoder_fidelity import EncoderThresholds
from packager.gates import Thresholds
from packager.recipe import Artifact, Estimate, Job, Need, Recipe

if TYPE_CHECKING:
    from packager.checkpoint import Checkpoint
    from packager.target import Target

MODULES = {"encoder": "packager.onnx_encoder", "decoder": "packager.onnx_decoder"}
SAID = {"encoder": "embedders and classifiers", "decoder": "decoder language models"}


@dataclass(frozen=True)
class Options:
    context: int = field(
        default=4096,
        metadata={"doc": "most tokens of a conversation, or of an encoder's text (never more than it was made for)",
                  "min": 1},
    )
    slots: int = field(
        default=4,
        metadata={"doc": "conversations answered at the same time, or texts that an encoder computes together",
                  "min": 1},
    )
    favour: Literal["speed", "fidelity"] = field(
        default="speed",
        metadata={"doc": "encoders: activations in 8 bits by token (speed), or by blocks of 64 inputs (fidelity)"},
    )
    pooling: Literal["auto", "mean", "cls", "max", "mean_sqrt_len"] = field(
        default="auto", metadata={"doc": "embedders: how token states become a vector; auto: as the model's files say"}
    )


class Maker(Protocol):
    """One kind's module."""

    why_not: Callable[[Checkpoint, Target, Options], str | None]
    estimate: Callable[[Checkpoint, Target, Options], Estimate]
    build: Callable[[Job, Options], Artifact]


def maker(checkpoint: Checkpoint) -> Maker | None:
    """The module for this kind of model; None when this version has none."""
    name = MODULES[checkpoint.family.kind]
    return cast(Maker, importlib.import_module(name)) if find_spec(name) else None


def thresholds(options: Options) -> Thresholds:
    """What a language model must keep: eight bits cost a model of 135 M parameters no more than this."""
    return Thresholds(max_kl=0.05, min_top1=0.88)


def why_not(checkpoint: Checkpoint, target: Target, options: Options) -> str | None:
    found = maker(checkpoint)
    if found is None:
        return f"this version of onnx_int8 does not make {SAID[checkpoint.family.kind]}; use another recipe."
    return found.why_not(checkpoint, target, options)


def estimate(checkpoint: Checkpoint, target: Target, options: Options) -> Estimate:
    found = maker(checkpoint)
    if found is not None:
        return found.estimate(checkpoint, target, options)
    size = checkpoint.parameters  # refused; a figure is shown all the same
    return Estimate(size, size, size, size, 0, 0, size, options.context, options.slots, 0.0)


def build(job: Job, options: Options) -> Artifact:
    found = maker(job.checkpoint)
    assert found is not None, "the plan refuses what no module makes"
    return found.build(job, options)


RECIPE = Recipe(
    name="onnx_int8",
    summary="INT8 ONNX for onnxruntime: embedders and classifiers, language models",
    format="onnx",
    options=Options,
    needs=(
        Need("torch", "packager"),
        Need("transformers", "packager"),
        Need("onnx", "packager"),
        Need("onnxruntime", "packager"),
    ),
    why_not=why_not,
    estimate=estimate,
    build=build,
    thresholds=thresholds,
    encoder_thresholds=EncoderThresholds(),
)
