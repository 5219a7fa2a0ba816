"""TensorRT for an encoder: a strongly typed ONNX that is compared with its source, and its engine or the plan for one.

The graph comes from onnx_int8's export (packager/formats/onnx/encoder.py) and is proven in float32 as there. This
module writes it in float16, or in float16 with INT8 layers. The comparison runs the shipped file on onnxruntime's CPU
provider, with the box's tokenization and pooling, because an engine does not run without its GPU.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from packager.checkpoint.encoder import EncoderFacts
from packager.core.errors import GateFailed, InputError
from packager.core.processes import version_of
from packager.formats.onnx import encoder
from packager.formats.onnx.encoder_graph import Form, linear_inputs
from packager.formats.onnx.external_data import DATA, MODEL
from packager.formats.tensorrt import compiler, encoder_graph
from packager.formats.tensorrt import plan as tensorrt_plan
from packager.metrics.encoders import EncoderThresholds
from packager.recipe import Artifact, Estimate, Job, Run, ServingOptions, provenance

if TYPE_CHECKING:
    from packager.checkpoint.checkpoint import Checkpoint
    from packager.core.store import Cost, Step
    from packager.fidelity.encoders import Encoded
    from packager.fidelity.gate_encoder import EncoderProof
    from packager.formats.tensorrt.int8 import Choice
    from packager.target import Target

# The default threshold of each precision: mean cosine to the source's vectors.
COSINES = {"fp16": 0.999, "int8": 0.99}
FIXES = {
    "fp16": "The recipe onnx_int8 keeps float32 where float16 does not reach.",
    "int8": "A higher --min-cosine keeps more layers in fp16; precision=fp16 keeps all.",
}
# Memory of a CUDA context, TensorRT and the server besides weights and activations: an assumption, not measured.
CUDA_BYTES, SERVER_BYTES = 500_000_000, 120_000_000
COMPILE_SECONDS = 10
# Measured on MiniLM: bytes per parameter to choose layers (746 MB in total), seconds per million parameters.
LAYERS_RAM, FP16_PACE, INT8_PACE = 13, 0.6, 3.5


class Options(ServingOptions, Protocol):
    """The recipe's options that this module reads."""

    @property
    def precision(self) -> str: ...
    @property
    def pooling(self) -> str: ...


@dataclass(frozen=True)
class _Exported:
    """The options as onnx_int8's export reads them."""

    context: int
    slots: int
    pooling: str
    bits: int = 8
    favour: Form = "speed"


def why_not(checkpoint: Checkpoint, target: Target, options: Options) -> str | None:
    refused = encoder.why_not(checkpoint, target, _Exported(options.context, options.slots, options.pooling))
    if refused is not None:
        return refused
    if (why := tensorrt_plan.why_not(target)) is not None:
        others = [name for name in target.recipes.supported if name == "onnx_int8"]
        return f"{why} {others[0]} serves this model on its processor." if others else why
    return compiler.why_not_here() if tensorrt_plan.compiled_here(target) else None


def estimate(checkpoint: Checkpoint, target: Target, options: Options) -> Estimate:
    layers = {name for name, _ in linear_inputs(checkpoint)}
    linear = sum(tensor.elements for name, tensor in checkpoint.tensors.items() if name in layers)
    other = sum(tensor.elements for name, tensor in checkpoint.tensors.items() if name not in layers)
    size = 2 * other + (1 if options.precision == "int8" else 2) * linear
    shape = checkpoint.shape
    length, notes = min(options.context, shape.context), []
    try:
        facts = encoder.facts_of(checkpoint, _Exported(options.context, options.slots, options.pooling))
        length = facts.max_length
        notes.append(facts.origin)
        if facts.prompt:
            notes.append(f"Every text gets the prompt {facts.prompt!r} before it, as the model's files say.")
    except InputError as error:
        notes.append(str(error))  # why_not refuses it; the plan still shows sizes
    here = tensorrt_plan.compiled_here(target)
    if here and (fetched := compiler.to_fetch()):
        notes.append(fetched)
    if not here and tensorrt_plan.why_not(target) is None:
        notes.append("The box builds its engine itself when it is installed: no engine is compiled here.")
    if here and (warned := compiler.unlisted(tensorrt_plan.capability(target), options.precision)):
        notes.append(warned)
    if options.precision != "fp16":
        notes.append("Layers that 8 bits would cost too much stay in fp16: the size is the least it can be.")
    activations = options.slots * length * (6 * shape.intermediate + 3 * shape.heads * length) * 2
    building = 0 if here else tensorrt_plan.workspace(target)
    pace = FP16_PACE if options.precision == "fp16" else INT8_PACE
    return Estimate(
        artifact_bytes=(2 if here else 1) * size,
        build_ram_bytes=encoder.EXPORT_RAM + (options.precision != "fp16") * LAYERS_RAM * checkpoint.parameters,
        build_disk_bytes=3 * size + 4 * checkpoint.parameters,
        load_bytes=size,
        kv_bytes=0,
        overhead_bytes=CUDA_BYTES + SERVER_BYTES + activations + building,
        read_per_token_bytes=(1 if options.precision == "int8" else 2) * linear,
        context=length,
        slots=options.slots,
        seconds=encoder.EXPORT_SECONDS + COMPILE_SECONDS * here + round(checkpoint.parameters / 1e6 * pace, 1),
        notes=tuple(notes),
    )


@dataclass
class _Work:
    """The state of one build."""

    job: Job
    options: Options
    facts: EncoderFacts
    steps: list[Step]
    graph: Step
    proof: EncoderProof


def build(job: Job, options: Options) -> Artifact:
    """Export, prove, write the typed graph, prove it, compile or plan it. Raises GateFailed or ToolError."""
    from packager.fidelity.gate_encoder import EncoderProof

    facts = encoder.facts_of(job.checkpoint, _Exported(options.context, options.slots, options.pooling))
    steps: list[Step] = []
    proof = EncoderProof.begin(job, facts, steps)
    work = _Work(job, options, facts, steps, encoder.exported(job, facts, steps), proof)
    report: dict[str, Any] = {}
    if job.verify:
        whole = encoder.filled(job, work.graph, "float32", steps)
        report["unquantized"] = proof.exact(whole, _here(work, whole), "the unquantized ONNX")
    made = _made(work, report)
    engine = None
    if tensorrt_plan.compiled_here(job.target):
        profile = _profiles(work)[0]
        sm = [str(tensorrt_plan.capability(job.target))]
        compiled = compiler.compile_engine(job, made.model.path / MODEL, made.model.key, profile, sm, steps)
        engine = compiled.path / compiler.ENGINE
        by = f"{compiler.LIBRARY} {compiler.BUILD}"
        report["engine"] = {"bytes": engine.stat().st_size, "sm": sm, "library": by}
    files = {MODEL: made.model.path / MODEL, DATA: made.model.path / DATA}
    files |= _planned(work, made, engine) | ({compiler.ENGINE: engine} if engine else {})
    files |= encoder.kept_files(job, steps)
    size = estimate(job.checkpoint, job.target, options)
    return Artifact(
        format="tensorrt",
        files=files,
        run=_run(work, made.precision, files),
        report=report,
        provenance=provenance(
            job,
            options,
            steps,
            exporter=f"torch {version_of('torch')}, opset {encoder.OPSET}",
            writer=f"packager: strongly typed, opset {encoder_graph.OPSET}",
            compiler=f"{compiler.LIBRARY} {compiler.BUILD}" if engine else None,
        ),
        costs=tuple(step.cost() for step in steps),
        gpu=tensorrt_plan.gpu_needs(job.target, size.load_bytes + size.overhead_bytes),
    )


@dataclass(frozen=True)
class _Made:
    """The shipped ONNX. outputs: for the comparison's texts, None when nothing was compared."""

    model: Step
    precision: str
    outputs: Encoded | None


def _made(work: _Work, report: dict[str, Any]) -> _Made:
    """The typed ONNX in the chosen precision, or in that which "auto" selects; adds its figures to the report."""
    precision = work.options.precision
    if precision == "fp16":
        return _fp16(work, report)
    plain: dict[str, Any] = {}
    # the float16 file must be right before rounding, whatever thresholds the user sets for INT8
    _fp16(work, plain, limits=replace(EncoderThresholds(), min_cosine=COSINES["fp16"]))
    try:
        made = _int8(work, report)
    except GateFailed as error:
        if precision == "int8":
            raise
        work.job.progress.note(f"precision=auto: fp16, because {error.what}")
        return _fp16(work, report)
    if work.job.verify:
        report["float16"] = plain["fidelity"]
    return made


def _fp16(work: _Work, report: dict[str, Any], *, limits: EncoderThresholds | None = None) -> _Made:
    model = _typed(work, None)
    outputs = _compared(work, model, "fp16", limits or _limits(work, "fp16"), report)
    report |= _types(model)
    return _Made(model, "fp16", outputs)


def _int8(work: _Work, report: dict[str, Any]) -> _Made:
    """Raises GateFailed when too few layers can be in 8 bits, or the file misses a threshold."""
    from packager.formats.tensorrt.int8 import choose

    limits = _limits(work, "int8")
    choice = choose(work.job, work.facts, work.graph, work.proof.texts, limits, work.steps)
    rounded, every = choice.matrices
    least = every / 2 if work.options.precision == "auto" else 1
    if rounded < least:
        raise GateFailed(
            f"only {rounded} of {every} layers can be in 8 bits: all the others cost too much.",
            why=f"With every layer in 8 bits the {choice.report()['measure']} is {choice.plain['all']:.4f}, "
            f"{choice.aim:.4f} is needed.",
            fix="Build with --set precision=fp16, or allow more: --min-cosine, --min-agreement.",
        )
    model = _typed(work, choice)
    inner: dict[str, Any] = {}
    outputs = _compared(work, model, "int8", limits, inner)
    types = _types(model)
    if types["int8_matrices"] != rounded:
        raise GateFailed(
            f"the file has {types['int8_matrices']} layers in 8 bits instead of {rounded}.",
            fix="Do not ship it; report the architecture.",
        )
    report |= inner | types | {"int8": choice.report()}
    return _Made(model, "int8", outputs)


def _limits(work: _Work, precision: str) -> EncoderThresholds:
    labelled = bool(work.job.calibration and work.job.calibration.labels)
    usual = replace(EncoderThresholds(), min_cosine=COSINES[precision])
    return usual.changed(work.job.limits, task=work.facts.task, labelled=labelled)


def _compared(
    work: _Work, model: Step, precision: str, limits: EncoderThresholds, report: dict[str, Any]
) -> Encoded | None:
    """The file's outputs, compared with the source's. Raises GateFailed when it misses a threshold."""
    outputs, fidelity = work.proof.kept(model, _here(work, model), f"the {precision} ONNX", limits, FIXES[precision])
    if fidelity:
        by = f"onnxruntime {version_of('onnxruntime')} on the CPU, the ONNX file that ships"
        report["fidelity"] = {**fidelity, "measured_by": by}
    return outputs


def _typed(work: _Work, choice: Choice | None) -> Step:
    """The step with the typed ONNX file: all in float16, or with the chosen layers in 8 bits."""

    rounded = {} if choice is None else choice.rounded
    graph = work.graph.path / "graph.onnx"

    def make(folder: Path, cost: Cost) -> None:
        with work.job.progress.step(f"writing the typed ONNX ({'fp16' if choice is None else 'int8 and fp16'})"):
            encoder_graph.write(graph, work.job.checkpoint, folder, rounded)

    inputs = {
        "checkpoint": work.job.checkpoint.digest,
        "graph": work.graph.key,
        "rounded": {name: [one.scale, one.smooth] for name, one in rounded.items()},
    }
    step = work.job.store.step("typed-onnx", inputs, make, progress=work.job.progress)
    work.steps.append(step)
    return step


def _types(model: Step) -> dict[str, Any]:
    written = encoder_graph.read_back(model.path)
    return {
        "tensor_types": dict(written.count_by_type),
        "bytes_by_type": dict(written.bytes_by_type),
        "int8_matrices": written.int8,
    }


def _here(work: _Work, model: Step) -> Run:
    """The run object of an ONNX file in the store: onnxruntime, with the encoders' tokenization and pooling."""
    files = {"tokenizer.json": work.job.checkpoint.path / "tokenizer.json"}
    run = _run(work, "fp16", {}).here(model.path / MODEL, files)
    return replace(run, engine="ort_encoder", model_bytes=0, settings=work.facts.settings())


def _inputs(facts: EncoderFacts) -> list[str]:
    return ["input_ids", "attention_mask", *(["token_type_ids"] if facts.token_types else [])]


def _profiles(work: _Work) -> list[tensorrt_plan.Profile]:
    return tensorrt_plan.profiles(_inputs(work.facts), work.options.slots, work.facts.max_length)


def _planned(work: _Work, made: _Made, engine: Path | None) -> dict[str, Path]:
    """plan.json, and reference.json when outputs were compared."""
    name = "last_hidden_state" if work.facts.task == "embed" else "logits"
    answers = None
    source = work.proof.source
    if made.outputs is not None and source is not None:
        answers = tensorrt_plan.references(work.proof.texts.sets["general"], source, made.outputs)

    def make(folder: Path, cost: Cost) -> None:
        reference = None
        if answers is not None:
            reference = folder / tensorrt_plan.REFERENCE
            reference.write_text(json.dumps(answers, sort_keys=True) + "\n", encoding="utf-8")
        plan = tensorrt_plan.make_plan(
            work.job.target,
            made.model.path,
            precision=made.precision,
            shapes=_profiles(work),
            outputs=[{"name": name, "dtype": "float32"}],
            engine=engine,
            reference=reference,
        )
        (folder / tensorrt_plan.PLAN).write_text(tensorrt_plan.to_text(plan), encoding="utf-8")

    inputs = {
        "model": made.model.key,
        "precision": made.precision,
        "target": work.job.target.digest,
        "profiles": _profiles(work),
        "engine": next((step.key for step in work.steps if step.name == "tensorrt-engine"), None) if engine else None,
        "reference": answers,
    }
    step = work.job.store.step("tensorrt-plan", inputs, make, progress=work.job.progress)
    work.steps.append(step)
    names = [tensorrt_plan.PLAN, *([tensorrt_plan.REFERENCE] if answers is not None else [])]
    return {name: step.path / name for name in names}


def _run(work: _Work, precision: str, files: Mapping[str, Path]) -> Run:
    size = estimate(work.job.checkpoint, work.job.target, work.options)
    here = tensorrt_plan.compiled_here(work.job.target)
    loaded = (compiler.ENGINE,) if here else (MODEL, DATA)
    serving = _Exported(work.facts.max_length, work.options.slots, work.options.pooling)
    return Run.of(
        work.job.checkpoint,
        "tensorrt",
        f"model/{tensorrt_plan.PLAN}",
        serving,
        read_per_token_bytes=size.read_per_token_bytes,
        model_bytes=sum(files[name].stat().st_size for name in loaded if name in files),
        task=work.facts.task,
        chat_template=None,
        settings={
            **work.facts.settings(),
            "library": compiler.LIBRARY if here else "tensorrt",
            "precision": precision,
            # main memory of a box with a discrete GPU: the engine's file, CUDA and the server
            **({"host_bytes": 2 * size.load_bytes + CUDA_BYTES + SERVER_BYTES} if here else {}),
        },
    )
