"""GGUF for llama.cpp and Ollama: converted, checked against its source, quantized, and scored through the runtime that
ships.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from packager.core.errors import GateFailed
from packager.formats.gguf.llamacpp import NUMPY_TYPES, library
from packager.formats.gguf.sizes import estimate_gguf, predict
from packager.formats.gguf.steps import as_type, base_type, exact_form, imatrix, said, unquantized
from packager.formats.gguf.types import DEMANDING, QUANTS, demands_imatrix, wants_imatrix
from packager.formats.tokenizer_files import tokenizer_files
from packager.metrics.thresholds import Thresholds
from packager.recipe import Artifact, Estimate, Job, Run, ServingOptions, provenance

if TYPE_CHECKING:
    from packager.checkpoint.checkpoint import Checkpoint
    from packager.core.store import Step
    from packager.fidelity.artifact import Candidate
    from packager.fidelity.samples import Samples
    from packager.formats.int4.tuning import Tuned
    from packager.target import Target

GROUP = 32  # inputs that share a scale in Q4_0
DECODE_RATE = 8e9  # bytes of weights a second that two cores decode with (SmolLM2 Q8_0: 14e9)
SCORE_CACHE = 1 << 30  # bytes resident while a file is scored: the map of a larger one is dropped and read again


class Options(ServingOptions, Protocol):
    """The recipe's options that are read here."""

    @property
    def quant(self) -> str: ...
    @property
    def kv_type(self) -> str: ...
    @property
    def imatrix(self) -> str: ...
    @property
    def tune(self) -> str: ...


# mean KL divergence (nats) and top-1 agreement that a small model (135 M parameters) keeps with some room; larger ones
# keep more (docs/explanation/fidelity.md has the measurements)
KEPT = {
    "F16": (0.001, 0.995),
    "BF16": (0.005, 0.98),
    "Q8_0": (0.05, 0.88),
    "Q6_K": (0.1, 0.85),
    "Q5_K_M": (0.25, 0.78),
    "Q5_K_S": (0.3, 0.75),
    "Q4_K_M": (0.5, 0.66),
    "Q4_K_S": (0.6, 0.6),
    "IQ4_NL": (0.8, 0.58),
    "Q4_0": (1.0, 0.55),
    "IQ4_XS": (0.8, 0.58),
    "Q3_K_M": (1.5, 0.5),
    "IQ3_M": (1.5, 0.5),
    "IQ3_S": (2.0, 0.4),
    "Q2_K": (3.0, 0.3),
    "IQ2_M": (3.0, 0.3),
}


def thresholds(options: Options) -> Thresholds:
    """What a quant must keep; behaviour is the same for all: what was taught is what is shipped for."""
    kl, top1 = KEPT[options.quant]
    return Thresholds(max_kl=kl, min_top1=top1)


def exact_type(job: Job, whole: Path, exact: Path) -> str:
    """The type in which the unquantized model was run against its source."""
    return base_type(job.checkpoint) if exact == whole else "F16"


def with_tuning(options: Options) -> bool:
    """Whether the integers are tuned instead of rounded."""
    return options.tune in ("quick", "full")


def with_imatrix(options: Options) -> bool:
    """Whether this build gathers an importance matrix; only ggml's own quantizers can use one."""
    return library() is not None and not with_tuning(options) and wants_imatrix(options.quant, options.imatrix)


def why_not(checkpoint: Checkpoint, target: Target, options: Options) -> str | None:
    from packager.checkpoint.families import FAMILIES

    family = FAMILIES.get(checkpoint.architecture)
    if family is None or not family.gguf:
        return (
            f"the gguf recipe serves decoder language models, and {checkpoint.architecture} is none that the "
            f"pinned llama.cpp "
            "converts; use the recipe for its kind."
        )
    if library() is None and (options.quant not in NUMPY_TYPES or options.imatrix == "on"):
        what = options.quant if options.quant not in NUMPY_TYPES else "an importance matrix"
        return (
            f"{what} needs the C functions of xllamacpp's library, which its Windows wheel does not export; build on "
            "Linux or macOS, or set quant=Q8_0 and imatrix=auto."
        )
    if with_tuning(options):
        from packager.formats.int4.tuning import ragged

        if options.quant != "Q4_0" or options.imatrix == "on":
            return (
                f"tuned integers are Q4_0's own and leave no room for an importance matrix; set quant=Q4_0 and "
                f"imatrix=auto, or tune=none for {options.quant}."
            )
        if uneven := ragged(checkpoint, GROUP):
            return f"Q4_0 has blocks of {GROUP}, which do not divide {uneven}; set tune=none or quant=Q8_0."
    if QUANTS[options.quant].base in DEMANDING and not with_imatrix(options):
        for tensor in predict(checkpoint, options.quant, imatrix=False).tensors:
            if demands_imatrix(tensor.name, tensor.type):
                return (
                    f"{options.quant} makes {tensor.name} {tensor.type}, which llama.cpp writes with an importance "
                    "matrix only; set imatrix=auto, or quant=Q2_K."
                )
    if options.context > checkpoint.shape.context:
        return (
            f"a context of {options.context} tokens is more than the {checkpoint.shape.context} the model "
            f"was made for; "
            f"set context={checkpoint.shape.context} or less."
        )
    return None


def estimate(checkpoint: Checkpoint, target: Target, options: Options) -> Estimate:
    other_head = options.quant == "Q4_0" and (with_tuning(options) or library() is None)
    found = estimate_gguf(
        checkpoint,
        target,
        quant=options.quant,
        context=options.context,
        slots=options.slots,
        kv_type=options.kv_type,
        imatrix=with_imatrix(options),
        head="Q8_0" if other_head else None,  # as llamacpp.quantize writes it
    )
    gpu = target.gpu
    if gpu is not None and gpu.architecture.startswith("sm_") and not target.on_gpu("gguf"):
        idle = f"llama.cpp's wheel is a CPU build: the {gpu.name} GPU stays idle until a CUDA build lies in wheels/."
        found = replace(found, notes=(*found.notes, idle))
    if not with_tuning(options):
        return found
    from packager.formats.int4.tuning import costs

    ram, seconds = costs(checkpoint, options.tune)
    return replace(found, build_ram_bytes=max(found.build_ram_bytes, ram), seconds=round(found.seconds + seconds, 1))


@dataclass(frozen=True)
class _Shipped:
    """The file that ships, what wrote it, and its tensors by type."""

    model: Path
    quantizer: str
    tuned: Tuned | None
    types: Mapping[str, int]


def build(job: Job, options: Options) -> Artifact:
    """Convert, prove, quantize, prove again. Raises GateFailed, InputError or ToolError."""
    from packager.fidelity.gate import Exact, Subject, prove
    from packager.formats.gguf import llamacpp, ollama
    from packager.formats.gguf.contract import require_carried

    steps: list[Step] = []
    whole = functools.cache(lambda: unquantized(job, steps))

    def exact() -> Exact:
        file = exact_form(job, whole(), steps)
        return Exact(_candidate(job, options, file, "the unquantized GGUF"), exact_type(job, whole(), file))

    def ship(samples: Samples | None) -> tuple[_Shipped, Candidate]:
        tuned = _tuned(job, options, samples, steps)
        model, quantizer = _quantized(job, options, whole(), samples, tuned, steps)
        types = llamacpp.tensor_types(model)
        _require_changed(options.quant, types)
        form = _candidate(job, options, model, f"the {options.quant} GGUF")
        return _Shipped(model, quantizer, tuned, types), form

    subject = Subject(
        tokenizer="the GGUF's own tokenizer",
        context=options.context,
        thresholds=thresholds(options),
        fix="Choose a larger quant; a small one keeps more with --calibration and the fine-tuning pairs.",
        ship=ship,
        exact=exact,
        calibrated=with_imatrix(options) or with_tuning(options),
        carried=lambda samples, scored, form: require_carried(job, samples, Path(form.run.model), scored.vocabulary),
    )
    proof = prove(job, subject, steps)
    made = proof.made
    report = {**proof.report, "tensor_types": made.types}
    if made.tuned:
        report["int4"] = made.tuned.as_dict()
    extra: dict[str, Path] = {}
    if job.target.name == "ollama":
        extra, notes = ollama.make(job, made.model, options.context, steps)
        if "contract" in report:
            report["contract"]["notes"] += notes
    return Artifact(
        format="gguf",
        files={"model.gguf": made.model, **tokenizer_files(job)},
        run=_run(job, options, made.model),
        report=report,
        extra=extra,
        provenance=provenance(
            job,
            options,
            steps,
            quantizer=made.quantizer,
            converter=llamacpp.CONVERTER,
            imatrix=with_imatrix(options),
        ),
        costs=tuple(step.cost() for step in steps),
    )


def _tuned(job: Job, options: Options, samples: Samples | None, steps: list[Step]) -> Tuned | None:
    """The integers that go into Q4_0 blocks as they are; None where the quantizer rounds."""
    if not with_tuning(options):
        return None
    from packager.formats.int4.tuning import tune

    tuned = tune(job, samples, budget=options.tune, group=GROUP)
    steps.append(tuned.step)
    return tuned


def _quantized(
    job: Job, options: Options, whole: Path, samples: Samples | None, tuned: Tuned | None, steps: list[Step]
) -> tuple[Path, str]:
    """The shipped file and the name of what wrote it."""
    if options.quant == base_type(job.checkpoint):
        return whole, "none: the checkpoint's own type"
    matrix = imatrix(job, whole, samples, steps) if samples and with_imatrix(options) else None
    made = as_type(job, whole, options.quant, matrix, steps, tuned)
    if tuned:
        return made / "model.gguf", f"{tuned.method}; embedding and head by {said(made)}"
    if options.quant in NUMPY_TYPES - {"Q4_0"}:
        return made / "model.gguf", "llama.cpp's type, the same bytes from gguf-py and from llama.cpp"
    return made / "model.gguf", said(made)


def _candidate(job: Job, options: Options, model: Path, what: str) -> Candidate:
    """A GGUF as the engine that serves it opens it."""
    from packager.core.processes import version_of
    from packager.fidelity.artifact import Candidate

    run = _run(job, options, model)
    return Candidate(
        what,
        replace(run.here(model, tokenizer_files(job)), kv_type="f16"),  # an exact cache: the weights are compared
        {"model": model.parent.name, "engine": version_of("xllamacpp")},
        seconds_a_token=model.stat().st_size / DECODE_RATE,
        max_rss_bytes=SCORE_CACHE,
    )


def _require_changed(quant: str, types: Mapping[str, int]) -> None:
    """A quantization that left every tensor as it was is an error, whatever the tool's exit status."""
    full = {"F32", "F16", "BF16"}
    if quant not in full and not set(types) - full:
        raise GateFailed(
            f"the GGUF was to be {quant}, but no tensor of it is quantized ({', '.join(types)}).",
            why="No row of the model fits the type's block size.",
            fix="Choose another quant, or F16.",
        )


def _run(job: Job, options: Options, model: Path) -> Run:
    size = estimate(job.checkpoint, job.target, options)
    return Run.of(
        job.checkpoint,
        "llamacpp",
        "model/model.gguf",
        options,
        read_per_token_bytes=size.read_per_token_bytes,
        model_bytes=model.stat().st_size,
        flash_attention=True,
        kv_type=options.kv_type,
        gpu_layers=0,
    )
