"""TensorRT: one recipe, two kinds of model. What each kind needs stands in its own module.

packager/formats/tensorrt/encoder.py makes embedders and classifiers; packager/formats/tensorrt/decoder.py speaks for
language models. Both offer ``why_not``, ``estimate`` and ``build`` with the arguments of this module's functions, and
read the one Options.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from packager.formats.by_kind import ByKind
from packager.metrics.encoders import EncoderThresholds
from packager.recipe import Artifact, Estimate, Job, Need, Recipe

if TYPE_CHECKING:
    from packager.checkpoint.checkpoint import Checkpoint
    from packager.target import Target

TEXT, CONVERSATION, LEAST = 512, 4096, 1024  # tokens, where no context is asked for


@dataclass(frozen=True)
class Options:
    context: int | None = field(
        default=None,
        metadata={
            "doc": "most tokens of a text or a conversation, the longest that the engine takes; none: 512 of an "
            "encoder, 4096 of a language model or what it was made for, and less (down to 1024) where that is "
            "too much for the GPU's memory",
            "min": 1,
        },
    )
    slots: int = field(
        default=8, metadata={"doc": "texts computed together, the largest batch that the engine takes", "min": 1}
    )
    precision: Literal["fp16", "int8", "auto"] = field(
        default="fp16",
        metadata={
            "doc": "int8: layers in 8 bits as far as the accuracy allows, the rest in fp16; auto: int8 where at "
            "least half of the layers can be, else fp16",
            "smaller": ("int8",),
        },
    )
    pooling: Literal["auto", "mean", "cls", "max", "mean_sqrt_len"] = field(
        default="auto", metadata={"doc": "embedders: how token states become a vector; auto: as the model's files say"}
    )


class Sized(ByKind[Options]):
    """The kinds' modules, which are given a context wherever none was asked for."""

    def why_not(self, checkpoint: Checkpoint, target: Target, options: Options) -> str | None:
        return super().why_not(checkpoint, target, self.sized(checkpoint, target, options))

    def estimate(self, checkpoint: Checkpoint, target: Target, options: Options) -> Estimate:
        found = super().estimate(checkpoint, target, self.sized(checkpoint, target, options))
        asked = min(CONVERSATION, checkpoint.shape.context)
        if options.context is None and checkpoint.family.kind == "decoder" and found.context < asked:
            note = f"A conversation holds {found.context} tokens: {asked} for {found.slots} slots need more memory."
            return replace(found, notes=(*found.notes, note))
        return found

    def build(self, job: Job, options: Options) -> Artifact:
        return super().build(job, self.sized(job.checkpoint, job.target, options))

    def sized(self, checkpoint: Checkpoint, target: Target, options: Options) -> Options:
        """With a context: for a language model the longest of a few that fits its weights and caches on the GPU."""
        if options.context is not None:
            return options
        if checkpoint.family.kind != "decoder":
            return replace(options, context=TEXT)
        longest = min(CONVERSATION, checkpoint.shape.context)
        lengths = [longest, *(n for n in (longest // 2, longest // 4) if n >= LEAST)]
        for length in lengths:
            found = super().estimate(checkpoint, target, replace(options, context=length))
            if found.load_bytes + found.kv_bytes + found.overhead_bytes <= target.budget("tensorrt_engine"):
                return replace(options, context=length)
        return replace(options, context=lengths[-1])


KINDS = Sized(Options, encoder="packager.formats.tensorrt.encoder", decoder="packager.formats.tensorrt.decoder")

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
