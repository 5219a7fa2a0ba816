"""INT8 ONNX of an encoder: exported without its weights, proven in float32, rounded, and proven in its runtime."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from packager.checkpoint.encoder import EncoderFacts, Pooling, read_encoder
from packager.core.errors import GateFailed, InputError
from packager.core.processes import WORKERS, follow, version_of
from packager.core.store import RECORD
from packager.formats.onnx.encoder_graph import SMALL, Form, block_for, fill, linear_inputs, read_back
from packager.formats.onnx.external_data import DATA, MODEL
from packager.recipe import Artifact, Estimate, Job, Run, ServingOptions, provenance

if TYPE_CHECKING:
    from packager.checkpoint.checkpoint import Checkpoint
    from packager.core.store import Cost, Step
    from packager.target import Target

OPSET = 21
# Measured for torch, transformers and the exporter, independent of the model (docs/explanation/encoders.md).
EXPORT_RAM, EXPORT_SECONDS = 460_000_000, 25
SERVER_BYTES = 120_000_000  # Python, onnxruntime, FastAPI and a tokenizer of 30 000 words
# The least share of the weights in 8 bits. Small random models have larger heads.
LEAST_SHARE = 0.5
KEPT_FILES = (
    "config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
)


class Options(ServingOptions, Protocol):
    """The recipe's options that this module reads."""

    @property
    def bits(self) -> int: ...
    @property
    def favour(self) -> Form: ...
    @property
    def pooling(self) -> str: ...


def facts_of(checkpoint: Checkpoint, options: Options) -> EncoderFacts:
    """The encoder's facts. Raises InputError for an encoder that cannot be served."""
    pooling: Pooling | None = None if options.pooling == "auto" else options.pooling  # type: ignore[assignment]
    return read_encoder(checkpoint, longest=options.context, pooling=pooling)


def why_not(checkpoint: Checkpoint, target: Target, options: Options) -> str | None:
    try:
        facts = facts_of(checkpoint, options)
    except InputError as error:
        return str(error)
    if facts.task == "classify" and options.pooling != "auto":
        return f"pooling={options.pooling} is for embedders, and {checkpoint.architecture} is a classifier."
    if facts.max_length < 3:
        return f"context={options.context} leaves no room for a word between the special tokens; set 16 or more."
    if options.bits != 8:
        return f"bits={options.bits} is for language models, and {checkpoint.architecture} is an encoder; set bits=8."
    if options.favour == "fidelity":
        for name, inputs in linear_inputs(checkpoint):
            if block_for(inputs) is None:
                return f"{name} has {inputs} inputs, which blocks of 64, 32 or 16 do not divide; set favour=speed."
    return None


def estimate(checkpoint: Checkpoint, target: Target, options: Options) -> Estimate:
    layers = dict(linear_inputs(checkpoint))
    shape = checkpoint.shape
    size = linear = 0
    for name, tensor in checkpoint.tensors.items():
        table = len(tensor.shape) == 2 and "embeddings" in name
        scales = tensor.shape[0] * 8 if options.favour == "speed" else tensor.elements // 16
        if name in layers:
            linear += tensor.elements + scales
        elif table:
            size += tensor.elements + 4 * tensor.shape[0]
        else:
            size += 4 * tensor.elements
    size += linear
    largest = max((tensor.elements for tensor in checkpoint.tensors.values()), default=0)
    length = min(options.context, shape.context)
    try:
        facts = facts_of(checkpoint, options)
        length, notes = facts.max_length, [facts.origin]
        if facts.prompt:
            notes.append(f"Every text gets the prompt {facts.prompt!r} before it, as the model's files say.")
    except InputError as error:
        notes = [str(error)]  # why_not refuses it; the plan still shows sizes
    activations = options.slots * length * (6 * shape.intermediate + 2 * shape.heads * length) * 4
    return Estimate(
        artifact_bytes=size,
        build_ram_bytes=EXPORT_RAM + 8 * min(largest, 1 << 22),
        build_disk_bytes=size + 4 * checkpoint.parameters,
        load_bytes=2 * size,  # the mapped file, and onnxruntime's packed copy of it
        kv_bytes=0,
        overhead_bytes=SERVER_BYTES + activations,
        read_per_token_bytes=linear,
        context=length,
        slots=options.slots,
        seconds=EXPORT_SECONDS + round(checkpoint.parameters / 1e6 * 0.4, 1),
        notes=tuple(notes),
    )


def build(job: Job, options: Options) -> Artifact:
    """Export, prove, quantize, prove again. Raises GateFailed, InputError or ToolError."""
    from packager.fidelity.gate_encoder import EncoderProof
    from packager.metrics.encoders import EncoderThresholds

    facts = facts_of(job.checkpoint, options)
    limits = EncoderThresholds().changed(
        job.limits, task=facts.task, labelled=bool(job.calibration and job.calibration.labels)
    )
    steps: list[Step] = []
    report: dict[str, Any] = {}
    proof = EncoderProof.begin(job, facts, steps)
    graph = exported(job, facts, steps)
    if job.verify:
        whole = filled(job, graph, "float32", steps)
        report["unquantized"] = proof.exact(whole, _here(job, facts, options, whole), "the unquantized ONNX")
    model = filled(job, graph, options.favour, steps)
    report |= _read_back(job.checkpoint, model.path)
    more = "favour=fidelity keeps more." if options.favour == "speed" else "Another recipe may keep more."
    _, fidelity = proof.kept(model, _here(job, facts, options, model), "the INT8 ONNX", limits, more)
    if fidelity:
        report["fidelity"] = fidelity
    files = {MODEL: model.path / MODEL, DATA: model.path / DATA, **kept_files(job, steps)}
    return Artifact(
        format="onnx",
        files=files,
        run=_run(job, facts, options, files),
        report=report,
        provenance=provenance(
            job,
            options,
            steps,
            exporter=f"torch {version_of('torch')}, opset {OPSET}",
            quantizer="packager: one scale an output channel, activations by token"
            if options.favour == "speed"
            else "packager: blocks of 64, MatMulNBits",
        ),
        costs=tuple(step.cost() for step in steps),
    )


def exported(job: Job, facts: EncoderFacts, steps: list[Step]) -> Step:
    """The step with the graph without weights."""

    def make(folder: Path, cost: Cost) -> None:
        job_file = {
            "checkpoint": str(job.checkpoint.path),
            "classify": facts.task == "classify",
            "token_types": facts.token_types,
            "opset": OPSET,
            "output": str(folder / "graph.onnx"),
        }
        follow(WORKERS / "export_encoder.py", job_file, "exporting the graph", job.progress, cost, work=folder)

    inputs = {"checkpoint": job.checkpoint.digest, "opset": OPSET}
    step = job.store.step("encoder-graph", inputs, make, progress=job.progress)
    steps.append(step)
    return step


def filled(job: Job, graph: Step, form: Form, steps: list[Step]) -> Step:
    """The step with the ONNX file in one form."""

    def make(folder: Path, cost: Cost) -> None:
        with job.progress.step(f"writing the weights ({form})"):
            fill(graph.path / "graph.onnx", job.checkpoint, folder, form)

    inputs = {
        "checkpoint": job.checkpoint.digest,
        "graph": graph.key,
        "form": form,
    }
    step = job.store.step("encoder-onnx", inputs, make, progress=job.progress)
    steps.append(step)
    return step


def _here(job: Job, facts: EncoderFacts, options: Options, model: Step) -> Run:
    """The run object of a file in the store."""
    files = {MODEL: model.path / MODEL, "tokenizer.json": job.checkpoint.path / "tokenizer.json"}
    return _run(job, facts, options, files).here(files[MODEL], files)


def _read_back(checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    """The types of the file's tensors, for the report. Raises GateFailed when its weights are not in 8 bits."""
    written = read_back(folder)
    small = sum(written.bytes_by_type.get(kind, 0) for kind in ("INT8", "UINT8"))
    expected = len(list(linear_inputs(checkpoint)))
    weights = sum(tensor.elements for tensor in checkpoint.tensors.values() if tensor.elements >= SMALL)
    if written.rounded < expected or small < LEAST_SHARE * weights:
        raise GateFailed(
            f"the ONNX has only {written.rounded} of {expected} layers and {small} bytes in INT8.",
            why="The exporter writes this model's layers in a form that the quantizer does not know.",
            fix="Do not ship it; report the architecture.",
        )
    return {"tensor_types": dict(written.count_by_type), "bytes_by_type": dict(written.bytes_by_type)}


def kept_files(job: Job, steps: list[Step]) -> Mapping[str, Path]:
    """tokenizer.json and the small files on the model's use, for the box and for other tools."""
    checkpoint = job.checkpoint

    def make(folder: Path, cost: Cost) -> None:
        for name in ("tokenizer.json", *KEPT_FILES):
            if (checkpoint.path / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(checkpoint.path / name, folder / name)

    inputs = {"checkpoint": checkpoint.digest, "files": list(KEPT_FILES)}
    step = job.store.step("encoder-files", inputs, make, progress=job.progress)
    steps.append(step)
    paths = [path for path in sorted(step.path.rglob("*")) if path.is_file() and path.name != RECORD]
    return {path.relative_to(step.path).as_posix(): path for path in paths}


def _run(job: Job, facts: EncoderFacts, options: Options, files: Mapping[str, Path]) -> Run:
    size = estimate(job.checkpoint, job.target, options)
    return Run.of(
        job.checkpoint,
        "ort_encoder",
        f"model/{MODEL}",
        options,
        read_per_token_bytes=size.read_per_token_bytes,
        model_bytes=sum(path.stat().st_size for name, path in files.items() if name in (MODEL, DATA)),
        task=facts.task,
        chat_template=None,
        context=facts.max_length,
        settings=facts.settings(),
    )
