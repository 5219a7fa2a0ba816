"""Language models of recipes/tensorrt_engine.py: a typed graph with a KV cache, compiled without a GPU.

TensorRT-RTX reads the graph's TensorScatter as its KVCacheUpdate, which writes the cache in place; the rest are
products, norms and a softmax. onnxruntime scores the shipped graph on this machine's CPU, in the graph's types. A
Jetson uses TensorRT Edge-LLM instead (packager/formats/edge_llm.py) and gets no plan.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from packager.checkpoint.families import kv_cache_bytes
from packager.formats.onnx import decoder_graph, rope
from packager.formats.onnx import matrices as onnx_matrices
from packager.formats.tensorrt import decoder_graph as typed_graph
from packager.formats.tensorrt import matrices
from packager.formats.tensorrt import plan as plans
from packager.formats.tensorrt.compiler import (
    ENGINE,
    LIBRARY,
    VERSION,
    compile_engine,
    same_bytes,
    to_fetch,
    unlisted,
    why_not_here,
)
from packager.formats.tokenizer_files import tokenizer_files
from packager.metrics.thresholds import Thresholds
from packager.recipe import Artifact, Estimate, Job, Run, ServingOptions, provenance

if TYPE_CHECKING:
    from collections.abc import Mapping

    from packager.checkpoint.checkpoint import Checkpoint
    from packager.core.store import Cost, Step
    from packager.fidelity.artifact import Candidate
    from packager.fidelity.samples import Samples
    from packager.target import Target

MODEL, DATA = "model.onnx", onnx_matrices.DATA
# Tokens of runtimes/decoding/scheduler.py's prompt pieces, tokens with logits in one, and the least places to read.
PIECE, KEPT, LEAST_SPAN = 128, 64, 64
# CUDA's context, TensorRT-RTX's run-time compilation and activations: an assumption, not measured on a T4.
DEVICE_BYTES = 1 << 30
# workers/fixed_addresses.py. SmolLM2's engine was the same in 15 of 15 compilations, 10 of them under load.
SAME = "all, in every compilation so far: TensorRT-RTX numbers lengths by their addresses, and these were fixed"
NOT_SAME = "all but the engine: TensorRT-RTX numbers lengths by their addresses, which could not be fixed"
DECODE_RATE = 1e8  # parameters per second when two cores decode: float16 is cast for every product
SCORED_BY = "onnxruntime on the build machine's processor, not by TensorRT"


class Options(ServingOptions, Protocol):
    """The recipe's options that this module reads."""

    @property
    def precision(self) -> str: ...


def bits(options: Options) -> int:
    """Bits of the layers' matrices; a language model's activations stay 16 bit, and "auto" is fp16."""
    return 8 if options.precision == "int8" else 16


def thresholds(options: Options) -> Thresholds:
    """float16 equals the source; the int8 limits are those of a model of 135 M parameters."""
    return Thresholds(max_kl=0.001, min_top1=0.995) if bits(options) == 16 else Thresholds(max_kl=0.1, min_top1=0.85)


def why_not(checkpoint: Checkpoint, target: Target, options: Options) -> str | None:
    """None, or one sentence with the recipes that serve the model on the target."""
    if target.software:
        return f"on a Jetson TensorRT serves language models by Edge-LLM alone; {_served(checkpoint, target)}."
    if reason := plans.why_not(target) or why_not_here():
        return f"{reason.rstrip('.')}; {_served(checkpoint, target)}."
    if reason := typed_graph.why_not(checkpoint):
        return f"{reason}; {_served(checkpoint, target)}."
    if options.context > checkpoint.shape.context:
        return (
            f"a context of {options.context} tokens is more than the {checkpoint.shape.context} the model was made "
            f"for; set context={checkpoint.shape.context} or less."
        )
    if options.context < LEAST_SPAN:
        return f"a context of {options.context} tokens leaves no room to answer; set context={LEAST_SPAN} or more."
    return None


def _served(checkpoint: Checkpoint, target: Target) -> str:
    """The recipes that can build the model for the target, its default first, as the end of a sentence."""
    from packager.planning.catalog import load_recipe
    from packager.planning.options import parse_options

    names = []
    for name in sorted(target.recipes.supported, key=lambda name: name != target.recipe):
        if name != "tensorrt_engine":
            recipe = load_recipe(name)
            if not recipe.why_not(checkpoint, target, parse_options(recipe, target, ())):
                names.append(name)
    return f"{' or '.join(names)} serves this model on {target.title}" if names else "no recipe serves it there"


def weight_bytes(checkpoint: Checkpoint, width: int) -> int:
    """Bytes of the data file: embedding and head always in 16 bits, a tied head not stored again."""
    shape = checkpoint.shape
    total = 0
    for name, info in checkpoint.tensors.items():
        if len(info.shape) == 2:
            layer = name.startswith("model.layers.")
            total += info.elements * (width if layer else 16) // 8 + (2 * info.shape[0] if layer and width == 8 else 0)
    return total - (2 * shape.vocab * shape.hidden if shape.tied and "lm_head.weight" in checkpoint.tensors else 0)


def estimate(checkpoint: Checkpoint, target: Target, options: Options) -> Estimate:
    """Sizes from the headers. The bundle has the weights twice: the graph's and the engine's."""
    shape = checkpoint.shape
    weights = weight_bytes(checkpoint, bits(options))
    # nodes; norms in float32; cosines and sines, half a head's width each (SmolLM2: 0.9 MB and 2 MB)
    rotated = rope.dims(checkpoint.config, shape.head_dim)
    graph = (30_000 + 8 * shape.hidden) * shape.layers + 4 * options.context * rotated
    engine = round(1.09 * weights)  # measured: SmolLM2 293.8 MB of 269.0
    embedding = 0 if shape.tied else 2 * shape.vocab * shape.hidden  # one row of it is read, unless it is the head
    notes = [
        f"The engine is for compute capability {plans.capability(target)} alone and for TensorRT-RTX {VERSION}, which "
        f"the bundle carries. Generated, not executed here; the fidelity score is taken by {SCORED_BY}."
    ]
    if fetched := to_fetch():
        notes.insert(0, fetched)
    if warned := unlisted(plans.capability(target), _precision(options)):
        notes.append(warned)
    return Estimate(
        artifact_bytes=weights + graph + engine,
        build_ram_bytes=(900 << 20) + 2 * weights,  # measured: SmolLM2 1.46 GB
        build_disk_bytes=2 * (weights + graph + engine),
        load_bytes=engine,
        kv_bytes=kv_cache_bytes(shape.layers, shape.kv_heads, shape.head_dim, options.context, options.slots, "f16"),
        overhead_bytes=DEVICE_BYTES + 8 * KEPT * shape.vocab,
        read_per_token_bytes=weights - embedding,
        context=options.context,
        slots=options.slots,
        seconds=round(60 + weights / 4e6, 1),
        notes=tuple(notes),
    )


def profile(checkpoint: Checkpoint, rows: int, context: int) -> plans.Profile:
    """The shapes of the engine, optimised for one token in every row."""
    shape = checkpoint.shape
    cache = [shape.kv_heads, context, shape.head_dim]
    tokens = min(PIECE, context)
    shapes: plans.Profile = {
        "input_ids": {"min": [1, 1], "opt": [rows, 1], "max": [rows, tokens]},
        "start": {"min": [1], "opt": [rows], "max": [rows]},
        "places": {"min": [LEAST_SPAN], "opt": [min(512, context)], "max": [context]},
        "wanted": {"min": [1], "opt": [1], "max": [min(KEPT, tokens)]},
    }
    for index in range(shape.layers):
        for part in ("key", "value"):
            shapes[decoder_graph.PAST.format(index, part)] = {
                "min": [1, *cache],
                "opt": [rows, *cache],
                "max": [rows, *cache],
            }
    return shapes


def build(job: Job, options: Options) -> Artifact:
    """Write, prove and compile the typed graph. Raises GateFailed or ToolError."""
    from packager.fidelity.gate import Subject, prove

    steps: list[Step] = []

    def ship(samples: Samples | None) -> tuple[Step, Candidate]:
        written = _written(job, options)
        steps.append(written)
        return written, _candidate(job, options, written)

    subject = Subject(
        tokenizer="the bundle's tokenizer",
        context=options.context,
        thresholds=thresholds(options),
        fix="Set precision=fp16, or use another recipe.",
        ship=ship,
        scored_by=SCORED_BY,
    )
    proof = prove(job, subject, steps)
    written = proof.made
    shapes = profile(job.checkpoint, options.slots, options.context)
    sm = [str(plans.capability(job.target))]
    engine = compile_engine(job, written.path / MODEL, written.key, shapes, sm, steps)
    planned = _plan(job, options, written, engine, shapes)
    steps.append(planned)
    about = {"library": LIBRARY, "version": VERSION, "executed": False}
    files = {
        MODEL: written.path / MODEL,
        DATA: written.path / DATA,
        ENGINE: engine.path / ENGINE,
        plans.PLAN: planned.path / plans.PLAN,
    }
    size = estimate(job.checkpoint, job.target, options)
    return Artifact(
        format="tensorrt",
        files={**files, **tokenizer_files(job)},
        run=_run(job, options, files[ENGINE]),
        report={**proof.report, "tensorrt": {**about, "same_bytes": SAME if same_bytes(engine) else NOT_SAME}},
        provenance=provenance(
            job,
            options,
            steps,
            quantizer=matrices.METHOD if bits(options) == 8 else "none: the source's weights, rounded to float16",
        ),
        costs=tuple(step.cost() for step in steps),
        gpu=plans.gpu_needs(job.target, size.load_bytes + size.kv_bytes + size.overhead_bytes),
    )


def _precision(options: Options) -> str:
    return "int8" if bits(options) == 8 else "fp16"


def _written(job: Job, options: Options) -> Step:
    """The step with the graph, its weights, and a plan without an engine for scoring."""

    checkpoint = job.checkpoint

    def make(folder: Path, cost: Cost) -> None:
        with (
            (folder / DATA).open("wb") as file,
            job.progress.step("writing the typed ONNX", float(checkpoint.weight_bytes), "B") as task,
        ):
            weights = matrices.Half(checkpoint, file, bits(options), task.advance)
            made = typed_graph.TypedDecoder(checkpoint, weights, options.context).model()
        (folder / MODEL).write_bytes(made.SerializeToString(deterministic=True))
        shapes = profile(checkpoint, 1, options.context)
        plain = plain_plan(checkpoint, job.target, folder, _precision(options), shapes, None)
        (folder / plans.PLAN).write_text(plans.to_text(plain), encoding="utf-8")

    inputs = {
        "checkpoint": checkpoint.digest,
        "context": options.context,
        "bits": bits(options),
        "target": job.target.digest,
    }
    return job.store.step("onnx-typed-decoder", inputs, make, progress=job.progress)


def _plan(job: Job, options: Options, written: Step, engine: Step, shapes: plans.Profile) -> Step:
    def make(folder: Path, cost: Cost) -> None:
        plain = plain_plan(job.checkpoint, job.target, written.path, _precision(options), shapes, engine.path / ENGINE)
        (folder / plans.PLAN).write_text(plans.to_text(plain), encoding="utf-8")

    inputs = {"model": written.key, "engine": engine.key, "target": job.target.digest}
    return job.store.step("tensorrt-plan", inputs, make, progress=job.progress)


def plain_plan(
    checkpoint: Checkpoint, target: Target, folder: Path, precision: str, shapes: plans.Profile, engine: Path | None
) -> Mapping[str, Any]:
    """plan.json of the graph in ``folder``. engine: compiled here, or None."""
    names = [
        decoder_graph.PRESENT.format(index, part)
        for index in range(checkpoint.shape.layers)
        for part in ("key", "value")
    ]
    outputs = [{"name": "logits", "dtype": "float32"}, *({"name": name, "dtype": "float16"} for name in names)]
    kinds = {name: "float16" for name in shapes if name.startswith("past_key_values.")}
    return plans.make_plan(
        target,
        folder,
        precision=precision,
        shapes=[shapes],
        outputs=outputs,
        engine=engine,
        reference=None,
        kinds=kinds,
    )


def _run(job: Job, options: Options, engine: Path | None) -> Run:
    """The run object. engine: the compiled file; None before it is compiled."""
    return Run.of(
        job.checkpoint,
        "tensorrt_decoder",
        f"model/{plans.PLAN}",
        options,
        read_per_token_bytes=estimate(job.checkpoint, job.target, options).read_per_token_bytes,
        model_bytes=engine.stat().st_size if engine else 0,
        settings={"library": LIBRARY},
    )


def _candidate(job: Job, options: Options, written: Step) -> Candidate:
    """The graph with the engine that opens it on the CPU of this machine."""
    from packager.core.processes import version_of
    from packager.fidelity.artifact import Candidate

    run = _run(job, options, None).here(written.path / plans.PLAN, tokenizer_files(job))
    return Candidate(
        f"the {_precision(options)} graph",
        replace(run, settings={"library": LIBRARY, "device": "cpu"}),
        {"model": written.key, "engine": version_of("onnxruntime")},
        seconds_a_token=job.checkpoint.parameters / DECODE_RATE,
    )
