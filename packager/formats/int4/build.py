"""The recipes gptq_int4 and awq_int4: one tuning, one of two containers, and the engine of the target.

A target with vLLM on its GPU gets a bundle that starts vLLM; another target with ``transformers`` among its runtimes
gets our own server on torch. Both are scored by the latter, which also runs on the build machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from packager.checkpoint.families import kv_cache_bytes
from packager.core.store import RECORD
from packager.formats.int4.folder import read_back
from packager.metrics.thresholds import Thresholds
from packager.recipe import Artifact, Estimate, Job, Need, Recipe, Run, provenance

if TYPE_CHECKING:
    from packager.checkpoint.checkpoint import Checkpoint
    from packager.checkpoint.families import ModelShape
    from packager.core.store import Cost, Step
    from packager.fidelity.artifact import Candidate
    from packager.fidelity.samples import Samples
    from packager.formats.int4.folder import Form
    from packager.formats.int4.tuning import Tuned
    from packager.target import Target

MIB = 1 << 20
# Python with torch, transformers and FastAPI, measured after the ten answers of the demo's persona; the tokenizer takes
# about 1 kB a token of the vocabulary. Prompts are read 256 tokens at a time (runtimes/engines/transformers/engine.py).
TRANSFORMERS_BYTES, BYTES_PER_TOKEN, PROMPT_CHUNK = 460 * MIB, 1000, 256
# vLLM's GPU memory besides weights and KV cache (CUDA's context, the activations of its profiling run), and its host
# memory, for which vLLM advises a few GB for each GPU. Both are assumptions.
VLLM_BYTES, VLLM_HOST_BYTES = 3 << 29, 4 << 30
VLLM_VERSION = "0.33"  # this module follows its flags and loaders; older versions call the kernels differently
VLLM_CAPABILITY = "7.5"  # the oldest GPU of its Marlin and AWQ kernels
DECODE_RATE = 3.5e8  # parameters per second when two cores decode in float32
OTHERS_SCORE = "by runtimes/engines/transformers/engine.py in float32, not by vLLM"


@dataclass(frozen=True)
class Options:
    tune: Literal["quick", "full", "none"] = field(
        default="quick", metadata={"doc": "iterations a layer: 20 (quick), 200 (full), or plain rounding (none)"}
    )
    group: Literal[32, 64, 128] = field(
        default=32, metadata={"doc": "inputs that share a scale; 32 shares its tuning with the gguf recipe's Q4_0"}
    )
    context: int = field(
        default=4096, metadata={"doc": "tokens each conversation can hold (prompt and answer)", "min": 1}
    )
    slots: int = field(default=4, metadata={"doc": "conversations answered at the same time", "min": 1})
    tensor_parallel: int = field(default=1, metadata={"doc": "vLLM only: GPUs that share each layer", "min": 1})
    ray: bool = field(
        default=False, metadata={"doc": "vLLM only: the GPUs are those of a Ray cluster, on several machines"}
    )
    enforce_eager: bool = field(
        default=False, metadata={"doc": "vLLM only: no CUDA graphs: slower, and less memory on a small GPU"}
    )
    gpu_share: float = field(
        default=0.9, metadata={"doc": "vLLM only: share of the GPU's memory that it takes at its start", "min": 0.1}
    )


def make_recipe(form: Form) -> Recipe[Options]:
    """The recipe of one container."""
    name = f"{form.name}_int4"
    return Recipe(
        name=name,
        summary=f"{form.title} int4 tuned layer by layer, for vLLM on a GPU or torch without one",
        format=form.name,
        options=Options,
        needs=(Need("torch", "packager"), Need("transformers", "packager")),
        why_not=partial(why_not, form),
        estimate=partial(estimate, form),
        build=partial(build, form),
        thresholds=thresholds,
    )


def thresholds(options: Options) -> Thresholds:
    """The limits of a model of 135 M parameters in groups of four bits; larger ones are closer to their source."""
    return Thresholds(max_kl=1.0, min_top1=0.55)


def engine_for(form: Form, target: Target) -> str | None:
    """The engine of a bundle for the target; None when it supports none of the two."""
    if "vllm" in target.runtimes and target.on_gpu(f"{form.name}_int4"):
        return "vllm"
    return "transformers" if "transformers" in target.runtimes else None


def why_not(form: Form, checkpoint: Checkpoint, target: Target, options: Options) -> str | None:
    from packager.formats.int4.tuning import linear_modules, ragged

    name = f"{form.name}_int4"
    if checkpoint.family.kind != "decoder":
        return f"{name} serves decoder language models, and {checkpoint.architecture} is none; use another recipe."
    if uneven := ragged(checkpoint, options.group):
        fitting = [str(size) for size in (128, 64, 32) if not ragged(checkpoint, size)]
        way = f"set group={' or '.join(fitting)}" if fitting else "use the gguf recipe with quant=Q8_0"
        return f"groups of {options.group} do not divide {uneven}, and no loader takes ragged ones; {way}."
    for module, (rows, _) in linear_modules(checkpoint).items():
        if rows % 8:
            return f"{module} has {rows} outputs, and {form.title} packs eight to a word; use the gguf recipe."
    if options.context > checkpoint.shape.context:
        return (
            f"a context of {options.context} tokens is more than the {checkpoint.shape.context} the model was made "
            f"for; set context={checkpoint.shape.context} or less."
        )
    engine = engine_for(form, target)
    if engine is None:
        return (
            f"{target.title} has neither vllm (on its GPU) nor transformers among its runtimes, and nothing else "
            f"serves {form.title}; use the gguf recipe."
        )
    return _why_not_parallel(checkpoint, options, engine)


def _why_not_parallel(checkpoint: Checkpoint, options: Options, engine: str) -> str | None:
    count, shape = options.tensor_parallel, checkpoint.shape
    if not 0.1 <= options.gpu_share <= 1.0:
        return f"gpu_share={options.gpu_share} is no share of a GPU; set it between 0.1 and 1."
    if engine != "vllm":
        if count > 1 or options.ray or options.enforce_eager:
            return "tensor_parallel, ray and enforce_eager are vLLM's, and this target runs no vLLM; leave them out."
        return None
    if shape.heads % count:
        return f"{shape.heads} attention heads cannot be shared by {count} GPUs; set tensor_parallel to a divisor."
    if (shape.intermediate // count) % options.group or shape.intermediate % count:
        return (
            f"{shape.intermediate} inner features in groups of {options.group} cannot be shared by {count} GPUs; set "
            "tensor_parallel or group lower."
        )
    return None


def weight_bytes(form: Form, checkpoint: Checkpoint, group: int) -> int:
    """Bytes of all tensors to write."""
    from packager.formats.int4.folder import specs
    from packager.formats.int4.tuning import linear_modules

    modules = linear_modules(checkpoint)
    if any(inputs % group or rows % 8 for rows, inputs in modules.values()):  # why_not refuses it
        return checkpoint.parameters // 2
    return sum(spec.nbytes for spec in specs(form, checkpoint, modules, group))


def estimate(form: Form, checkpoint: Checkpoint, target: Target, options: Options) -> Estimate:
    from packager.formats.int4.tuning import costs

    shape = checkpoint.shape
    size = weight_bytes(form, checkpoint, options.group)
    embedding = 0 if shape.tied else 2 * shape.vocab * shape.hidden  # one row of it is read, unless it is the head
    ram, seconds = costs(checkpoint, options.tune)
    served_by_vllm = engine_for(form, target) == "vllm"
    kind = "f16" if served_by_vllm else "f32"
    cache = kv_cache_bytes(shape.layers, shape.kv_heads, shape.head_dim, options.context, options.slots, kind)
    share = options.tensor_parallel
    return Estimate(
        artifact_bytes=size,
        build_ram_bytes=max(ram, _transformers_bytes(shape) + size),
        build_disk_bytes=3 * size,
        load_bytes=size // share,
        kv_bytes=cache // share,
        overhead_bytes=VLLM_BYTES if served_by_vllm else _transformers_bytes(shape),
        read_per_token_bytes=size - embedding,
        context=options.context,
        slots=options.slots,
        seconds=round(seconds + 60, 1),
        notes=_notes(served_by_vllm, share),
    )


def _transformers_bytes(shape: ModelShape) -> int:
    """Bytes of our own server besides weights and KV cache."""
    activations = 4 * PROMPT_CHUNK * (3 * shape.intermediate + 4 * shape.hidden)
    return TRANSFORMERS_BYTES + BYTES_PER_TOKEN * shape.vocab + activations


def _notes(served_by_vllm: bool, share: int) -> tuple[str, ...]:
    if not served_by_vllm:
        return ("torch dequantizes as it computes, far below the ceiling; on a CPU the gguf recipe is faster.",)
    notes = [
        f"The box needs vLLM {VLLM_VERSION} or newer in an environment of its own. This project has run it nowhere: "
        f"generated, not executed here; the fidelity score is taken {OTHERS_SCORE}."
    ]
    if share > 1:
        notes.append(f"Memory is that of one of {share} GPUs.")
    return tuple(notes)


def build(form: Form, job: Job, options: Options) -> Artifact:
    """Tune, pack and prove. Raises GateFailed or ToolError."""
    from packager.fidelity.gate import Subject, prove
    from packager.formats.int4 import tuning

    engine = engine_for(form, job.target) or "transformers"
    steps: list[Step] = []

    def ship(samples: Samples | None) -> tuple[tuple[tuning.Tuned, Step], Candidate]:
        tuned = tuning.tune(job, samples, budget=options.tune, group=options.group)
        folder = packed(form, job, tuned)
        steps.extend([tuned.step, folder])
        run = _run(form, job, options, files_of(folder), engine)
        return (tuned, folder), candidate(form, job, run, folder)

    subject = Subject(
        tokenizer="the tokenizer beside the weights",
        context=options.context,
        thresholds=thresholds(options),
        fix="Give the fine-tuning pairs with --calibration, or tune=full.",
        ship=ship,
        calibrated=options.tune != "none",
        scored_by=OTHERS_SCORE if engine == "vllm" else "",
    )
    proof = prove(job, subject, steps)
    tuned, folder = proof.made
    files = files_of(folder)
    return Artifact(
        format=form.name,
        files=files,
        run=_run(form, job, options, files, engine),
        report={**proof.report, "int4": {**tuned.as_dict(), **read_back(form, folder.path, job.checkpoint)}},
        provenance=provenance(job, options, steps, quantizer=tuned.method),
        costs=tuple(step.cost() for step in steps),
    )


def files_of(folder: Step) -> dict[str, Path]:
    """The artifact's files in a step's folder, by name."""
    return {path.name: path for path in sorted(folder.path.iterdir()) if path.name != RECORD}


def packed(form: Form, job: Job, tuned: Tuned) -> Step:
    """The step with the packed folder."""
    from packager.formats import tokenizer_files
    from packager.formats.int4 import folder as int4_folder

    beside = tokenizer_files.tokenizer_files(job, tokenizer_files.TRANSFORMERS)

    def make(folder: Path, cost: Cost) -> None:
        with job.progress.step(f"packing as {form.title}"):
            int4_folder.write(form, job.checkpoint, tuned, beside.values(), folder)

    inputs = {"checkpoint": job.checkpoint.digest, "tuned": tuned.step.key}
    return job.store.step(form.name, inputs, make, progress=job.progress)


def candidate(form: Form, job: Job, run: Run, folder: Step) -> Candidate:
    """The folder with the engine that opens it on the build machine."""
    from packager.core.processes import version_of
    from packager.fidelity.artifact import Candidate

    here = run.here(folder.path / PurePosixPath(run.model).name, files_of(folder), engine="transformers", settings={})
    return Candidate(
        f"the {form.title} model",
        here,
        {"model": folder.key, "torch": version_of("torch"), "transformers": version_of("transformers")},
        seconds_a_token=job.checkpoint.parameters / DECODE_RATE,
    )


def _run(form: Form, job: Job, options: Options, files: Mapping[str, Path], engine: str) -> Run:
    weights = [name for name in files if name.endswith(".safetensors")]
    size = estimate(form, job.checkpoint, job.target, options)
    return Run.of(
        job.checkpoint,
        engine,
        f"model/{weights[0]}",
        options,
        read_per_token_bytes=size.read_per_token_bytes,
        model_bytes=sum(files[name].stat().st_size for name in weights),
        settings=_vllm_settings(form, job.target, options) if engine == "vllm" else {},
    )


def _vllm_settings(form: Form, target: Target, options: Options) -> dict[str, Any]:
    """The settings from which runtimes/engines/vllm.py makes its command line."""
    architecture = target.gpu.architecture if target.gpu else ""
    return {
        "quantization": form.name,
        "dtype": "half" if architecture in ("sm_70", "sm_72", "sm_75") else "auto",  # bfloat16 needs SM 8.0
        "tensor_parallel": options.tensor_parallel,
        "ray": options.ray,
        "enforce_eager": options.enforce_eager,
        "gpu_share": options.gpu_share,
        "capability": VLLM_CAPABILITY,
        "vllm": VLLM_VERSION,
        "host_bytes": VLLM_HOST_BYTES,
    }
