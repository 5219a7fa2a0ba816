"""INT8 ONNX for onnxruntime, for encoders and language models.

packager/formats/onnx/encoder.py builds embedders and classifiers, packager/formats/onnx/decoder.py language models.
Both have ``why_not``, ``estimate`` and ``build`` with the arguments of this module's functions, and read the Options
below.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from packager.formats.by_kind import ByKind
from packager.formats.onnx.decoder import thresholds
from packager.metrics.encoders import EncoderThresholds
from packager.recipe import Need, Recipe

if TYPE_CHECKING:
    from packager.checkpoint.checkpoint import Checkpoint
    from packager.prompts.calibration import Calibration
    from packager.target import Target


@dataclass(frozen=True)
class Options:
    context: int = field(
        default=4096,
        metadata={
            "doc": "most tokens of a conversation, or of an encoder's text (never more than it was made for)",
            "min": 1,
        },
    )
    bits: Literal[8, 4] = field(
        default=8,
        metadata={
            "doc": "of a language model's layers; 4 takes the tuned integers that Q4_0 and GPTQ share",
            "smaller": (4,),
        },
    )
    provider: Literal["cpu", "cuda"] = field(
        default="cpu",
        metadata={
            "doc": "language models: where onnxruntime computes; cuda: an NVIDIA GPU, in float16 (generated, not "
            "executed here)"
        },
    )
    tune: Literal["auto", "none", "quick", "full"] = field(
        default="auto",
        metadata={"doc": "with bits=4, on the calibration data; auto: quick where fine-tuning data is given"},
    )
    slots: int = field(
        default=4,
        metadata={
            "doc": "conversations answered at the same time, or texts that an encoder computes together",
            "min": 1,
        },
    )
    favour: Literal["speed", "fidelity"] = field(
        default="speed",
        metadata={"doc": "encoders: activations in 8 bits by token (speed), or by blocks of 64 inputs (fidelity)"},
    )
    pooling: Literal["auto", "mean", "cls", "max", "mean_sqrt_len"] = field(
        default="auto", metadata={"doc": "embedders: how token states become a vector; auto: as the model's files say"}
    )


def resolve_auto(
    options: Options, calibration: Calibration | None, checkpoint: Checkpoint
) -> tuple[Options, tuple[str, ...]]:
    """tune=auto tunes int4 when fine-tuning data is given and tuning takes under an hour; returns a note when it takes
    longer.
    """
    if options.tune != "auto":
        return options, ()
    if options.bits != 4 or calibration is None or checkpoint.family.kind != "decoder":
        return replace(options, tune="none"), ()
    from packager.formats.int4.tuning import affordable

    tune, notes = affordable(checkpoint, "The INT4 model's")
    return replace(options, tune=tune), notes


KINDS = ByKind(Options, encoder="packager.formats.onnx.encoder", decoder="packager.formats.onnx.decoder")


def why_not(checkpoint: Checkpoint, target: Target, options: Options) -> str | None:
    if options.provider == "cuda" and checkpoint.family.kind == "encoder":
        return "provider=cuda is for language models; the tensorrt_engine recipe serves encoders on an NVIDIA GPU."
    return KINDS.why_not(checkpoint, target, options)


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
    estimate=KINDS.estimate,
    build=KINDS.build,
    thresholds=thresholds,
    encoder_thresholds=EncoderThresholds(),
    resolve_auto=resolve_auto,
)
