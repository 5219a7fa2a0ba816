"""TensorRT, for encoders and language models.

packager/formats/tensorrt/encoder.py builds embedders and classifiers, packager/formats/tensorrt/decoder.py language
models. Both have ``why_not``, ``estimate`` and ``build`` with the arguments of this module's functions, and read the
Options below.
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

TEXT, CONVERSATION, LEAST = 512, 4096, 1024  # tokens when context is none: of a text, a conversation, the least


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
    """Calls the kinds' modules with a context, chosen when the option is none."""

    def why_not(self, checkpoint: Checkpoint, target: Target, options: Options) -> str | None:
        return super().why_not(checkpoint, target, self.sized(checkpoint, target, options))

    def estimate(self, checkpoint: Checkpoint, target: Target, options: Options) -> Estimate:
        size = super().estimate(checkpoint, target, self.sized(checkpoint, target, options))
        usual = min(CONVERSATION, checkpoint.shape.context)
        if options.context is None and checkpoint.family.kind == "decoder" and size.context < usual:
            note = f"A conversation holds {size.context} tokens: {usual} for {size.slots} slots need more memory."
            return replace(size, notes=(*size.notes, note))
        return size

    def build(self, job: Job, options: Options) -> Artifact:
        return super().build(job, self.sized(job.checkpoint, job.target, options))

    def sized(self, checkpoint: Checkpoint, target: Target, options: Options) -> Options:
        """The options with a context: for a language model the longest of a few with which it fits into GPU memory."""
        if options.context is not None:
            return options
        if checkpoint.family.kind != "decoder":
            return replace(options, context=TEXT)
        longest = min(CONVERSATION, checkpoint.shape.context)
        lengths = [longest, *(n for n in (longest // 2, longest // 4) if n >= LEAST)]
        for length in lengths:
            size = super().estimate(checkpoint, target, replace(options, context=length))
            if size.load_bytes + size.kv_bytes + size.overhead_bytes <= target.budget("tensorrt_engine"):
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
