"""Language models under recipes/tensorrt_engine.py: refused, with the recipe that serves them on that target.

The seam for a graph with a KV cache: the same three functions as packager/tensorrt_encoder.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from packager.errors import PlanRefused
from packager.recipe import Artifact, Estimate, Job

if TYPE_CHECKING:
    from packager.checkpoint import Checkpoint
    from packager.target import Target

RECIPE = "tensorrt_engine"


def why_not(checkpoint: Checkpoint, target: Target, options: Any) -> str | None:
    others = [name for name in target.recipes.supported if name != RECIPE]
    serves = f"{' or '.join(others)} serves it on the {target.title}" if others else "no recipe serves it there"
    return (
        f"{checkpoint.architecture} is a language model, and {RECIPE} makes engines of embedders and classifiers; "
        f"{serves}."
    )


def estimate(checkpoint: Checkpoint, target: Target, options: Any) -> Estimate:
    """What float16 weights would take; the plan shows it beside the refusal."""
    shape, weights = checkpoint.shape, 2 * checkpoint.parameters
    context = min(options.context, shape.context)
    return Estimate(
        artifact_bytes=weights,
        build_ram_bytes=weights,
        build_disk_bytes=2 * weights,
        load_bytes=weights,
        kv_bytes=4 * shape.layers * shape.kv_heads * shape.head_dim * context * options.slots,
        overhead_bytes=0,
        read_per_token_bytes=weights,
        context=context,
        slots=options.slots,
        seconds=0.0,
    )


def build(job: Job, options: Any) -> Artifact:
    """Raises PlanRefused: the plan has refused already."""
    raise PlanRefused(str(why_not(job.checkpoint, job.target, options)))
