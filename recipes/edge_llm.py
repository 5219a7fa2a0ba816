"""TensorRT Edge-LLM for Jetson Orin on JetPack 7.2 and Thor: float16 or tuned int4, the engine built on the box."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from packager.formats.edge_llm import build, estimate, thresholds, why_not
from packager.recipe import Need, Recipe


@dataclass(frozen=True)
class Options:
    quant: Literal["fp16", "int4"] = field(
        default="fp16", metadata={"doc": "weights: 16 bits, or tuned int4 in groups of 128 (Edge-LLM's only size)"}
    )
    tune: Literal["quick", "full", "none"] = field(
        default="quick", metadata={"doc": "int4: iterations a layer: 20 (quick), 200 (full), or plain rounding (none)"}
    )
    context: int = field(
        default=4096, metadata={"doc": "tokens each conversation can hold (prompt and answer)", "min": 1}
    )
    slots: int = field(default=1, metadata={"doc": "conversations answered at the same time", "min": 1})


RECIPE = Recipe(
    name="edge_llm",
    summary="TensorRT Edge-LLM on Jetson Orin (JetPack 7.2) and Thor: float16 or tuned int4, engine built on the box",
    format="safetensors",
    options=Options,
    needs=(Need("torch", "packager"), Need("transformers", "packager")),
    why_not=why_not,
    estimate=estimate,
    build=build,
    thresholds=thresholds,
)
