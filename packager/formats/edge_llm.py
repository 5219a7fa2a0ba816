"""Bundles for TensorRT Edge-LLM, NVIDIA's own engine for language models on Jetson Orin (JetPack 7.2) and Thor.

Its wheel for aarch64 contains runtime, plugins, server and a builder that makes the engine on the device from a Hugging
Face folder (installation.md and direct-engine-builder.md of 0.11.0's user guide). A bundle is therefore that folder, in
float16 or in the GPTQ form that our int4 tuning writes, with the wheels and a command line. The other way, its ONNX
export and llm_build, needs C++ programs that no wheel contains and that are compiled from a clone on the device, which
a box without a network cannot do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

from packager.checkpoint.families import kv_cache_bytes
from packager.formats.int4 import build as int4_build
from packager.formats.int4.folder import read_back
from packager.metrics.thresholds import Thresholds
from packager.recipe import Artifact, Estimate, Job, Run, ServingOptions, provenance

if TYPE_CHECKING:
    from packager.checkpoint.checkpoint import Checkpoint
    from packager.core.store import Cost, Step
    from packager.fidelity.artifact import Candidate
    from packager.fidelity.samples import Samples
    from packager.formats.int4.folder import Form
    from packager.formats.int4.tuning import Tuned
    from packager.target import Software, Target

VERSION = "0.11.0"  # this module follows its documents, flags and loaders; the lock pins it
DOWNLOAD_MB = 447  # size of its wheel for aarch64 in the bundle
# Those of its registry of decoders (direct-engine-builder.md) that the packager supports too.
MODELS = ("llama", "mistral", "qwen2", "qwen3")
HEADS = (64, 128)  # head dimensions of its supported checkpoints (supported-models.md)
GROUP = 128  # "currently supports 128 only" (tensorrt-plugins.md, Int4GroupwiseGemmPluginV2)
ALIGNED = 64  # inputs and outputs of an int4 matrix are multiples of it (checkpoint/repacking.py)
# "at least the deployed model size plus 2 GB of available device memory" (installation.md)
DEVICE_BYTES = 2 << 30
OTHERS_SCORE = "on the build machine in float32, not by TensorRT Edge-LLM"
# GPU architecture -> (compute capability, first JetPack) of the wheel (support-matrix.md, "Wheel Packaging Matrix").
ARCHITECTURES = {"sm_87": ("8.7", "7.2"), "sm_110": ("11.0", "7.0")}
WHERE = "Jetson Orin with JetPack 7.2 and Thor with JetPack 7"


class Options(ServingOptions, Protocol):
    """The recipe's options that this module reads."""

    @property
    def quant(self) -> str: ...
    @property
    def tune(self) -> str: ...


def thresholds(options: Options) -> Thresholds:
    """float16 equals the source; the limits for int4 in groups of 128 are those of a small model."""
    if options.quant == "fp16":
        return Thresholds(max_kl=0.001, min_top1=0.995)
    return Thresholds(max_kl=1.0, min_top1=0.55)


def releases(target: Target) -> list[Software]:
    """The target's JetPacks that Edge-LLM's wheel supports, oldest first."""
    if target.gpu is None or target.gpu.architecture not in ARCHITECTURES:
        return []
    first = _numbers(ARCHITECTURES[target.gpu.architecture][1])
    supported = [entry for entry in target.software if _numbers(entry.jetpack) >= first]
    return sorted(supported, key=lambda entry: _numbers(entry.jetpack))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def why_not(checkpoint: Checkpoint, target: Target, options: Options) -> str | None:
    """None, or one sentence why the recipe cannot build this checkpoint for the target."""
    from packager.formats.int4.tuning import linear_modules, ragged

    other = "use the gguf recipe for this model"
    if checkpoint.family.kind != "decoder":
        return f"edge_llm serves decoder language models, not {checkpoint.architecture}; use tensorrt_engine."
    if not releases(target):
        return f"TensorRT Edge-LLM runs on {WHERE}, and {target.title} is none of them; use the gguf recipe."
    if checkpoint.family.model_type not in MODELS:
        return f"TensorRT Edge-LLM builds {', '.join(MODELS)}, not {checkpoint.family.model_type}; {other}."
    if checkpoint.shape.head_dim not in HEADS:
        sizes = " or ".join(map(str, HEADS))
        return f"its models have heads of {sizes} dimensions, not {checkpoint.shape.head_dim}; {other}."
    if options.context > checkpoint.shape.context:
        return (
            f"a context of {options.context} tokens is more than the {checkpoint.shape.context} the model was made "
            f"for; set context={checkpoint.shape.context} or less."
        )
    if options.quant == "int4":
        if uneven := ragged(checkpoint, GROUP):
            return f"groups of {GROUP}, the only size that it supports, do not divide {uneven}; set quant=fp16."
        for module, (rows, inputs) in linear_modules(checkpoint).items():
            if rows % ALIGNED or inputs % ALIGNED:
                return f"{module} is {rows} x {inputs}, and int4 needs multiples of {ALIGNED}; set quant=fp16."
    return None


def _form() -> Form:
    from packager.formats.int4.gptq import FORM

    return FORM


def estimate(checkpoint: Checkpoint, target: Target, options: Options) -> Estimate:
    """Sizes from the headers."""
    from packager.formats.int4.tuning import costs

    shape = checkpoint.shape
    size, ram, seconds = 2 * checkpoint.parameters, 900 << 20, 60 + checkpoint.weight_bytes / 1.2e8
    if options.quant == "int4":
        size = int4_build.weight_bytes(_form(), checkpoint, GROUP)
        ram, longer = costs(checkpoint, options.tune)
        seconds += longer
    embedding = 0 if shape.tied else 2 * shape.vocab * shape.hidden  # one row of it is read, unless it is the head
    known = releases(target)
    return Estimate(
        artifact_bytes=size,
        build_ram_bytes=ram,
        build_disk_bytes=3 * size,
        load_bytes=size,
        kv_bytes=kv_cache_bytes(shape.layers, shape.kv_heads, shape.head_dim, options.context, options.slots, "f16"),
        overhead_bytes=DEVICE_BYTES,
        read_per_token_bytes=size - embedding,
        context=options.context,
        slots=options.slots,
        seconds=round(seconds, 1),
        notes=(
            f"The bundle is for JetPack {known[0].jetpack if known else 7} or newer and carries TensorRT Edge-LLM "
            f"{VERSION} ({DOWNLOAD_MB} MB): the box builds its engine with its own TensorRT at the first start, which "
            f"takes minutes. Generated, not executed here; the fidelity score is taken {OTHERS_SCORE}.",
        ),
    )


def build(job: Job, options: Options) -> Artifact:
    """The folder from which Edge-LLM builds its engine, proven against its source. Raises GateFailed."""
    from packager.fidelity.gate import Subject, prove

    steps: list[Step] = []
    four = options.quant == "int4"

    def ship(samples: Samples | None) -> tuple[tuple[Step, Tuned | None], Candidate]:
        if four:
            folder, tuned = _int4(job, samples, options, steps)
            return (folder, tuned), int4_build.candidate(
                _form(), job, _run(job, options, int4_build.files_of(folder)), folder
            )
        folder = _half(job)
        steps.append(folder)
        return (folder, None), _streamed(job, options, folder)

    subject = Subject(
        tokenizer="the tokenizer beside the weights",
        context=options.context,
        thresholds=thresholds(options),
        fix="Give the fine-tuning pairs with --calibration.",
        ship=ship,
        calibrated=four and options.tune != "none",
        scored_by=OTHERS_SCORE,
    )
    proof = prove(job, subject, steps)
    folder, tuned = proof.made
    report = {**proof.report, "edge_llm": {"version": VERSION, "executed": False}}
    if tuned:
        report["int4"] = {**tuned.as_dict(), **read_back(_form(), folder.path, job.checkpoint)}
    files = int4_build.files_of(folder)
    return Artifact(
        format="safetensors",
        files=files,
        run=_run(job, options, files),
        report=report,
        provenance=provenance(
            job, options, steps, quantizer=tuned.method if tuned else "none: the source's weights, rounded to float16"
        ),
        costs=tuple(step.cost() for step in steps),
        gpu=_needs(job, options),
        release=releases(job.target)[0].jetpack,
    )


def _needs(job: Job, options: Options) -> dict[str, Any]:
    """The required GPU and system, for the manifest: Edge-LLM supports exactly these."""
    size = estimate(job.checkpoint, job.target, options)
    assert job.target.gpu is not None
    return {
        "capability": ARCHITECTURES[job.target.gpu.architecture][0],
        "exact": True,
        "count": 1,
        "bytes": size.load_bytes + size.kv_bytes + size.overhead_bytes,
        "driver_min": None,
        "cuda": None,
        "tensorrt": None,
        "jetpack": [one.jetpack for one in releases(job.target)],
    }


def _int4(job: Job, samples: Samples | None, options: Options, steps: list[Step]) -> tuple[Step, Tuned]:
    """The tuned integers in a GPTQ folder."""
    from packager.formats.int4 import tuning

    tuned = tuning.tune(job, samples, budget=options.tune, group=GROUP)
    folder = int4_build.packed(_form(), job, tuned)
    steps += [tuned.step, folder]
    return folder, tuned


def _streamed(job: Job, options: Options, folder: Step) -> Candidate:
    """The float16 folder. No engine here runs it in bounded memory: the reference scores it a layer at a time, and no
    answers are generated.
    """
    from packager.checkpoint.checkpoint import open_checkpoint
    from packager.core.store import cache_root
    from packager.fidelity.artifact import Candidate

    files = int4_build.files_of(folder)
    run = _run(job, options, files)
    return Candidate(
        "the fp16 folder",
        run.here(files[PurePosixPath(run.model).name], files),
        {"model": folder.key},
        seconds_a_token=math.inf,
        streamed=open_checkpoint(str(folder.path), progress=job.progress, cache=cache_root(), name=job.checkpoint.name),
    )


def _half(job: Job) -> Step:
    """All tensors in float16, as Edge-LLM casts them on the device; here an overflow is an error."""
    from packager.formats import tokenizer_files
    from packager.formats.int4 import folder as int4_folder

    checkpoint = job.checkpoint
    beside = tokenizer_files.tokenizer_files(job, tokenizer_files.TRANSFORMERS)

    def make(folder: Path, cost: Cost) -> None:
        with job.progress.step("writing the weights in float16"):
            int4_folder.write_half(checkpoint, beside.values(), folder)

    return job.store.step(
        "half",
        {
            "checkpoint": checkpoint.digest,
        },
        make,
        progress=job.progress,
    )


def _run(job: Job, options: Options, files: Mapping[str, Path]) -> Run:
    weights = sorted(name for name in files if name.endswith(".safetensors"))
    return Run.of(
        job.checkpoint,
        "edgellm",
        f"model/{weights[0]}",
        options,
        read_per_token_bytes=estimate(job.checkpoint, job.target, options).read_per_token_bytes,
        model_bytes=sum(files[name].stat().st_size for name in weights),
        settings={"edgellm": VERSION, "reasoning": _reasoning(job.checkpoint)},
    )


def _reasoning(checkpoint: Checkpoint) -> str:
    """Edge-LLM's parser that separates the thought from the answer; "none" when the template has no thought."""
    template = checkpoint.tokenizer.chat_template or ""
    return "deepseek_r1" if "<think>" in template or "</think>" in template else "none"
