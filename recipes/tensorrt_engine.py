"""TensorRT: one recipe, two kinds of model. What each kind needs stands in its own module.

packager/tensorrt_encoder.py makes embedders and classifiers; packager/tensorrt_decoder.py speaks for language models.
Both offer ``why_not``, ``estimate`` and ``build`` with the arguments of this module's functions, and read the one
Options.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from packager.encoder_fidelity import EncoderThresholds
from packager.kinds import ByKind
from packager.recipe import Need, Recipe


@dataclass(frozen=True)
class Options:
    context: int = field(
        default=512,
        metadata={"doc": "most tokens of a text, the longest that the engine takes (never more than the model was made "
                  "for)", "min": 1},
    )
    slots: int = field(
        default=8, metadata={"doc": "texts computed together, the largest batch that the engine takes", "min": 1}
    )
    precision: Literal["fp16", "int8", "auto"] = field(
        default="fp16",
        metadata={"doc": "int8: layers in 8 bits as far as the accuracy allows, the rest in fp16; auto: int8 where at "
                  "least half of the layers can be, else fp16", "smaller": ("int8",)},
    )
    pooling: Literal["auto", "mean", "cls", "max", "mean_sqrt_len"] = field(
        default="auto", metadata={"doc": "embedders: how token states become a vector; auto: as the model's files say"}
    )


KINDS = ByKind(Options, encoder="packager.tensorrt_encoder", decoder="packager.tensorrt_decoder")

RECIPE = Recipe(
    name="tensorrt_engine",
    summary="TensorRT: an engine compiled without a GPU (T4), or a plan that a Jetson builds its own from",
    format="tensorrt",
    options=Options,
    needs=(
        Need("torch", "packager"),
        Need("transformers", "packager"),
        Need("onnx", "packager"),
        Need("onnxruntime", "packager"),
    ),
    why_not=KINDS.why_not,
    estimate=KINDS.estimate,
    build=KINDS.build,
    encoder_thresholds=EncoderThresholds(),
)
