"""INT8 ONNX of an encoder: exported without its weights, proven in float32, rounded, and asked through its runtime."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from packager.checkpoint.encoder import EncoderFacts, Pooling, read_encoder
from packager.core.errors import GateFailed, InputError
from packager.core.processes import WORKERS, follow, version_of
from packager.core.store import RECORD, code_digest
from packager.formats.onnx.encoder_graph import SMALL, Form, block_for, fill, linear_inputs, read_back
from packager.formats.onnx.external_data import DATA, MODEL
from packager.recipe import Artifact, Estimate, Job, ServingOptions, provenance

if TYPE_CHECKING:
    from packager.checkpoint.checkpoint import Checkpoint
    from packager.core.store import Cost, Step
    from packager.fidelity.encoders import Encoded, Texts
    from packager.target import Target

OPSET = 21
# Measured: torch, transformers and the exporter take this, whatever the model (docs/explanation/encoders.md).
EXPORT_RAM, EXPORT_SECONDS = 460_000_000, 25
SERVER_BYTES = 120_000_000  # Python, onnxruntime, FastAPI and a tokenizer of 30 000 words
# What a file has to hold in 8 bits of all it holds, or nothing was done; small random models have larger heads.
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
    """What is read of the recipe's options."""

    @property
    def bits(self) -> int: ...
    @property
    def favour(self) -> Form: ...
    @property
    def pooling(self) -> str: ...


def facts_of(checkpoint: Checkpoint, options: Options) -> EncoderFacts:
    """Raises InputError for an encoder that cannot be served."""
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
        notes = [str(error)]  # it is refused; a figure is shown all the same
    activations = options.slots * length * (6 * shape.intermediate + 2 * shape.heads * length) * 4
    return Estimate(
        artifact_bytes=size,
        build_ram_bytes=EXPORT_RAM + 8 * min(largest, 1 << 22),
        build_disk_bytes=size + 4 * checkpoint.parameters,
        load_bytes=2 * size,  # the mapped file, and onnxruntime's own arrangement of it
        kv_bytes=0,
        overhead_bytes=SERVER_BYTES + activations,
        read_per_token_bytes=linear,
        context=length,
        slots=options.slots,
        seconds=EXPORT_SECONDS + round(checkpoint.parameters / 1e6 * 0.4, 1),
        notes=tuple(notes),
    )


def build(job: Job, options: Options) -> Artifact:
    from packager.fidelity.encoders import compare, make_texts, require_same_ids, source_outputs
    from packager.metrics.encoders import EncoderThresholds, as_dict, require_exact, require_kept

    facts = facts_of(job.checkpoint, options)
    limits = EncoderThresholds().changed(
        job.limits, task=facts.task, labelled=bool(job.calibration and job.calibration.labels)
    )
    steps: list[Step] = []
    report: dict[str, Any] = {}
    graph = exported(job, facts, steps)
    texts: Texts | None = None
    source: Encoded | None = None
    if job.verify:
        texts = make_texts(job.calibration, facts.labels)
        source, step = source_outputs(job, facts, texts)
        steps.append(step)
        whole = filled(job, graph, "float32", steps)
        found = _asked(job, facts, options, whole, texts, "the unquantized ONNX", steps)
        require_same_ids(texts, source, found)
        scores = compare(facts, texts, source, found)
        for score in scores.values():
            if score is not None:
                require_exact(score, "the unquantized ONNX")
        report["unquantized"] = {name: asdict(score) for name, score in scores.items() if score is not None}
    model = filled(job, graph, options.favour, steps)
    report |= _read_back(job.checkpoint, model.path)
    if texts is not None and source is not None:
        found = _asked(job, facts, options, model, texts, "the INT8 ONNX", steps)
        scores = compare(facts, texts, source, found)
        report["fidelity"] = as_dict(scores, limits)
        more = "favour=fidelity keeps more." if options.favour == "speed" else "Another recipe may keep more."
        require_kept(scores, limits, "the INT8 ONNX", more)
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
    """The graph without weights."""
    child = WORKERS / "export_encoder.py"

    def make(folder: Path, cost: Cost) -> None:
        asked = {
            "checkpoint": str(job.checkpoint.path),
            "classify": facts.task == "classify",
            "token_types": facts.token_types,
            "opset": OPSET,
            "output": str(folder / "graph.onnx"),
        }
        follow(child, asked, "exporting the graph", job.progress, cost, work=folder)

    versions = {name: version_of(name) for name in ("torch", "transformers", "onnxscript", "onnx-ir")}
    inputs = {"checkpoint": job.checkpoint.digest, **versions, "opset": OPSET, "code": code_digest(child)}
    step = job.store.step("encoder-graph", inputs, make, progress=job.progress)
    steps.append(step)
    return step


def filled(job: Job, graph: Step, form: Form, steps: list[Step]) -> Step:
    """The ONNX file in one form."""
    from packager.formats.onnx import encoder_graph, external_data

    def make(folder: Path, cost: Cost) -> None:
        with job.progress.step(f"writing the weights ({form})"):
            fill(graph.path / "graph.onnx", job.checkpoint, folder, form)

    inputs = {
        "checkpoint": job.checkpoint.digest,
        "graph": graph.key,
        "form": form,
        "onnx": version_of("onnx"),
        "code": code_digest(Path(encoder_graph.__file__), Path(external_data.__file__)),
    }
    step = job.store.step("encoder-onnx", inputs, make, progress=job.progress)
    steps.append(step)
    return step


def _asked(
    job: Job, facts: EncoderFacts, options: Options, model: Step, texts: Texts, what: str, steps: list[Step]
) -> Encoded:
    """The texts through the runtime that ships."""
    from packager.fidelity.encoders import shipped_outputs

    files = {MODEL: model.path / MODEL, "tokenizer.json": job.checkpoint.path / "tokenizer.json"}
    run = {
        **_run(job, facts, options, files),
        "model": str(files[MODEL]),
        "tokenizer": str(files["tokenizer.json"]),
    }
    found, step = shipped_outputs(job, run, texts, what=what, model=model.key)
    steps.append(step)
    return found


def _read_back(checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    """What the file holds. Raises GateFailed when its weights are not in 8 bits, whatever was asked for."""
    found = read_back(folder)
    small = sum(found.bytes_by_type.get(kind, 0) for kind in ("INT8", "UINT8"))
    expected = len(list(linear_inputs(checkpoint)))
    weights = sum(tensor.elements for tensor in checkpoint.tensors.values() if tensor.elements >= SMALL)
    if found.rounded < expected or small < LEAST_SHARE * weights:
        raise GateFailed(
            f"the ONNX was to be INT8, but only {found.rounded} of {expected} layers and {small} bytes of it are.",
            why="The exporter writes this model's layers in a form that the quantizer does not know.",
            fix="Do not ship it; report the architecture.",
        )
    return {"tensor_types": dict(found.count_by_type), "bytes_by_type": dict(found.bytes_by_type)}


def kept_files(job: Job, steps: list[Step]) -> Mapping[str, Path]:
    """tokenizer.json and the small files that say how the model is used, for the box and for other tools."""
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


def _run(job: Job, facts: EncoderFacts, options: Options, files: Mapping[str, Path]) -> dict[str, Any]:
    size = estimate(job.checkpoint, job.target, options)
    weights = [path.stat().st_size for name, path in files.items() if name in (MODEL, DATA)]
    return {
        "engine": "ort_encoder",
        "task": facts.task,
        "model": f"model/{MODEL}",
        "tokenizer": "model/tokenizer.json",
        "chat_template": None,
        **job.checkpoint.tokenizer.as_run(),
        "context": facts.max_length,
        "slots": options.slots,
        "threads": 0,
        "read_per_token_bytes": size.read_per_token_bytes,
        "model_bytes": sum(weights),
        "settings": facts.settings(),
    }
