"""GGUF for llama.cpp and Ollama: converted, compared with its source, quantized, and scored in the runtime that
ships.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from packager.formats.gguf.build import build, estimate, thresholds, why_not
from packager.recipe import Need, Recipe

if TYPE_CHECKING:
    from packager.checkpoint.checkpoint import Checkpoint
    from packager.prompts.calibration import Calibration


@dataclass(frozen=True)
class Options:
    quant: Literal[
        "F16",
        "BF16",
        "Q8_0",
        "Q6_K",
        "Q5_K_M",
        "Q5_K_S",
        "Q4_K_M",
        "Q4_K_S",
        "IQ4_NL",
        "Q4_0",
        "IQ4_XS",
        "Q3_K_M",
        "IQ3_M",
        "IQ3_S",
        "Q2_K",
        "IQ2_M",
    ] = field(default="Q8_0", metadata={"doc": "llama.cpp's quantization type"})
    context: int = field(
        default=4096, metadata={"doc": "tokens each conversation can hold (prompt and answer)", "min": 1}
    )
    slots: int = field(default=4, metadata={"doc": "conversations answered at the same time", "min": 1})
    kv_type: Literal["f16", "q8_0"] = field(default="f16", metadata={"doc": "type of the key/value cache"})
    imatrix: Literal["auto", "on", "off"] = field(
        default="auto", metadata={"doc": "importance matrix from the calibration data; auto: for types below Q6"}
    )
    tune: Literal["auto", "none", "quick", "full"] = field(
        default="auto",
        metadata={
            "doc": "Q4_0's integers tuned on the calibration data; auto: quick where fine-tuning data is given and it "
            "takes at most an hour"
        },
    )


def resolve_auto(
    options: Options, calibration: Calibration | None, checkpoint: Checkpoint
) -> tuple[Options, tuple[str, ...]]:
    """tune=auto tunes Q4_0 when fine-tuning data is given and tuning takes under an hour; returns a note when it takes
    longer.
    """
    if options.tune != "auto":
        return options, ()
    if options.quant != "Q4_0" or options.imatrix != "auto" or calibration is None:
        return replace(options, tune="none"), ()
    from packager.formats.int4.tuning import affordable

    tune, notes = affordable(checkpoint, "Q4_0's")
    return replace(options, tune=tune), notes


RECIPE = Recipe(
    name="gguf",
    summary="one GGUF file for llama.cpp and Ollama, served on the CPU through xllamacpp",
    format="gguf",
    options=Options,
    needs=(
        Need("torch", "packager"),
        Need("transformers", "packager"),
        Need("xllamacpp", "packager"),
        Need("gguf", "packager"),
    ),
    why_not=why_not,
    estimate=estimate,
    build=build,
    thresholds=thresholds,
    resolve_auto=resolve_auto,
)
