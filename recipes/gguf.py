"""GGUF for llama.cpp and Ollama: converted, checked against its source, quantized, and scored through the runtime that
ships.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from packager.errors import GateFailed
from packager.gates import Thresholds
from packager.gguf_sizes import estimate_gguf, wants_imatrix
from packager.llamacpp import NUMPY_TYPES, compiled
from packager.recipe import Artifact, Estimate, Job, Need, Recipe
from packager.store import RECORD, code_digest

if TYPE_CHECKING:
    from packager.checkpoint import Checkpoint
    from packager.reference import Samples
    from packager.scoring import Scored
    from packager.store import Cost, Step
    from packager.target import Target

SCORE_CACHE = 1 << 30  # bytes resident while a file is scored: the map of a larger one is dropped and read again


@dataclass(frozen=True)
class Options:
    quant: Literal["F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_XS"] = field(
        default="Q8_0", metadata={"doc": "llama.cpp's quantization type"}
    )
    context: int = field(
        default=4096, metadata={"doc": "tokens each conversation can hold (prompt and answer)", "min": 1}
    )
    slots: int = field(default=4, metadata={"doc": "conversations answered at the same time", "min": 1})
    kv_type: Literal["f16", "q8_0"] = field(default="f16", metadata={"doc": "type of the key/value cache"})
    imatrix: Literal["auto", "on", "off"] = field(
        default="auto", metadata={"doc": "importance matrix from the calibration data; auto: for types below Q6"}
    )


# mean KL divergence (nats) and top-1 agreement that a small model (135 M parameters) keeps with some room; larger ones
# keep more (docs/explanation/fidelity.md has the measurements)
KEPT = {
    "F16": (0.001, 0.995),
    "BF16": (0.005, 0.98),
    "Q8_0": (0.05, 0.92),
    "Q6_K": (0.08, 0.9),
    "Q5_K_M": (0.15, 0.85),
    "Q4_K_M": (0.3, 0.78),
    "IQ4_XS": (0.5, 0.7),
    "Q4_0": (0.7, 0.65),
}


def thresholds(options: Options) -> Thresholds:
    """What a quant must keep; behaviour is the same for all: what was taught is what is shipped for."""
    kl, top1 = KEPT[options.quant]
    return Thresholds(max_kl=kl, min_top1=top1)


def base_type(checkpoint: Checkpoint) -> str:
    """The unquantized type that holds the checkpoint's own numbers."""
    return {"BF16": "BF16", "F16": "F16"}.get(checkpoint.dtype, "F32")


def exact_type(job: Job, whole: Path, exact: Path) -> str:
    """The type in which the unquantized model was run against its source."""
    return base_type(job.checkpoint) if exact == whole else "F16"


def with_imatrix(options: Options) -> bool:
    """Whether this build gathers an importance matrix; only the compiled quantizer can use one."""
    return compiled() and wants_imatrix(options.quant, options.imatrix)


def why_not(checkpoint: Checkpoint, target: Target, options: Options) -> str | None:
    from packager.architectures import FAMILIES

    family = FAMILIES.get(checkpoint.architecture)
    if family is None or not family.gguf:
        return (
            f"the gguf recipe serves decoder language models, and {checkpoint.architecture} is none that the "
            f"pinned llama.cpp "
            "converts; use the recipe for its kind."
        )
    if options.quant not in NUMPY_TYPES and not compiled():
        return (
            f"{options.quant} needs llama.cpp's compiled quantizer, which is not installed; "
            'install the extra with pip install "packager[llamacpp]", or set quant=Q8_0, which needs no compiler.'
        )
    if options.imatrix == "on" and not compiled():
        return (
            "an importance matrix needs the compiled quantizer; "
            'install the extra "packager[llamacpp]" or set imatrix=auto.'
        )
    if options.context > checkpoint.shape.context:
        return (
            f"a context of {options.context} tokens is more than the {checkpoint.shape.context} the model "
            f"was made for; "
            f"set context={checkpoint.shape.context} or less."
        )
    return None


def estimate(checkpoint: Checkpoint, target: Target, options: Options) -> Estimate:
    return estimate_gguf(
        checkpoint,
        target,
        quant=options.quant,
        context=options.context,
        slots=options.slots,
        kv_type=options.kv_type,
        imatrix=with_imatrix(options),
        head="Q8_0" if options.quant == "Q4_0" and not compiled() else None,  # as quantize_numpy.py writes it
    )


def build(job: Job, options: Options) -> Artifact:
    from packager import llamacpp, ollama
    from packager.fidelity import compare, require_equal
    from packager.gates import measure, require_kept
    from packager.reference import make_samples, source_scores
    from packager.scoring import require_contract

    steps: list[Step] = []
    whole = _unquantized(job, steps)
    samples = make_samples(job) if job.verify or with_imatrix(options) else None
    source = None
    report: dict[str, Any] = {}
    if job.verify and samples:
        source, step = source_scores(job, samples)
        steps += [samples.step, step]
        exact = _exact_form(job, whole, steps)
        found = _score(job, exact, "unquantized", samples, steps)
        require_contract(job, samples, found, "the GGUF's own tokenizer")
        score = compare(source, found.distributions, samples.targets)
        require_equal(score, "the unquantized GGUF")
        report["unquantized"] = {"run_as": exact_type(job, whole, exact), **score.as_dict()}
        report["prompts_equal"] = len(samples.prompts)

    model, quantizer = _quantized(job, options, whole, samples, steps)
    types = llamacpp.tensor_types(model)
    _require_changed(options.quant, types)
    report["tensor_types"] = types
    if job.verify and samples and source is not None:
        found = _score(job, model, "quantized", samples, steps)
        fidelity = measure(samples, source, found.distributions)
        limits = thresholds(options).changed(job.limits)
        report["fidelity"] = fidelity.as_dict(limits)
        require_kept(
            fidelity,
            limits,
            f"the {options.quant} GGUF",
            "Choose a larger quant; a small one keeps more with --calibration and the fine-tuning pairs.",
        )

    files = {"model.gguf": model, **_tokenizer_files(job)}
    extra = ollama.make(job, model, options.context, steps) if job.target.name == "ollama" else {}
    return Artifact(
        format="gguf",
        files=files,
        run=_run(job, options, model),
        report=report,
        extra=extra,
        provenance={
            "quantizer": quantizer,
            "converter": llamacpp.CONVERTER,
            "checkpoint": job.checkpoint.digest,
            "calibration": job.calibration.digest if job.calibration else None,
            "imatrix": with_imatrix(options),
            "verified": job.verify,
            "options": asdict(options),
            "steps": {step.name: step.key for step in steps},
        },
        costs=tuple(
            {"step": s.name, "seconds": round(s.seconds, 2), "peak_rss_bytes": s.peak_rss_bytes, "reused": s.reused}
            for s in steps
        ),
    )


def _unquantized(job: Job, steps: list[Step]) -> Path:
    from packager import llamacpp

    kind = base_type(job.checkpoint)

    def make(folder: Path, cost: Cost) -> None:
        llamacpp.convert(job.checkpoint.path, job.checkpoint.name, kind, folder / "model.gguf", job.progress, cost)

    step = job.store.step(
        "gguf-convert",
        {
            "checkpoint": job.checkpoint.digest,
            "name": job.checkpoint.name,
            "type": kind,
            "converter": llamacpp.SDIST_SHA256,
            "code": _code(),
        },
        make,
        progress=job.progress,
    )
    steps.append(step)
    return step.path / "model.gguf"


def _quantized(job: Job, options: Options, whole: Path, samples: Samples | None, steps: list[Step]) -> tuple[Path, str]:
    """The shipped file and the name of what wrote it."""
    if options.quant == base_type(job.checkpoint):
        return whole, "none: the checkpoint's own type"
    matrix = _imatrix(job, whole, samples, steps) if samples and with_imatrix(options) else None
    made = _as_type(job, whole, options.quant, matrix, steps)
    if options.quant in NUMPY_TYPES - {"Q4_0"}:
        return made / "model.gguf", "llama.cpp's type, the same bytes from gguf-py and from llama.cpp"
    return made / "model.gguf", (made / "quantizer.txt").read_text(encoding="utf-8")


def _as_type(job: Job, whole: Path, kind: str, matrix: Path | None, steps: list[Step]) -> Path:
    """The folder of ``whole`` written as another type."""
    from packager import llamacpp

    # F16 goes through gguf-py, which sees a weight that F16 cannot hold; else the compiled one, where it is there, is
    # faster
    use_compiled = compiled() and kind != "F16"

    def make(folder: Path, cost: Cost) -> None:
        said = llamacpp.quantize(
            whole, kind, folder / "model.gguf", job.progress, cost, imatrix=matrix, use_compiled=use_compiled
        )
        (folder / "quantizer.txt").write_text(said, encoding="utf-8")

    inputs = {
        "source": whole.parent.name,
        "type": kind,
        "converter": llamacpp.SDIST_SHA256,
        "imatrix": matrix.parent.name if matrix else None,
        "code": _code(),
        "numpy": not use_compiled and kind == "Q4_0",  # only there do the two differ: the head's type
    }
    step = job.store.step("gguf-quantize", inputs, make, progress=job.progress)
    steps.append(step)
    return step.path


def _exact_form(job: Job, whole: Path, steps: list[Step]) -> Path:
    """The file that is run against the source.

    llama.cpp's BF16 arithmetic on a CPU rounds activations to 8 bits of mantissa: on SmolLM2 its mean KL divergence is
    20 times that of the same weights in F16 (docs/explanation), enough to hide a small fault. So a BF16 file is run in
    F16, unless F16 cannot hold its weights.
    """
    from packager.tools import ChildFailed

    if base_type(job.checkpoint) != "BF16":
        return whole
    try:
        return _as_type(job, whole, "F16", None, steps) / "model.gguf"
    except ChildFailed as error:
        if "cannot hold" not in error.output:
            raise
        job.progress.note("a weight is too large for F16: the unquantized GGUF is checked in BF16, which is coarser")
        return whole


def _code() -> str:
    """Changes with the programs that write GGUF files."""
    from packager import llamacpp
    from packager.tools import CHILDREN

    return code_digest(Path(llamacpp.__file__), CHILDREN / "quantize_numpy.py", CHILDREN / "quantize_llama.py")


def _imatrix(job: Job, whole: Path, samples: Samples, steps: list[Step]) -> Path:
    from packager import llamacpp
    from packager.reference import input_squares

    squares, source = input_squares(job, samples)
    steps += [samples.step, source] if not job.verify else [source]
    architecture = llamacpp.architecture(whole)

    def make(folder: Path, cost: Cost) -> None:
        import numpy as np

        with np.load(squares, allow_pickle=False) as stored:
            names = llamacpp.imatrix_names(list(stored.files), architecture, job.checkpoint.shape.layers)
            np.savez(folder / "imatrix.npz", **{name: stored[module] for module, name in sorted(names.items())})

    step = job.store.step("imatrix", {"squares": source.key, "architecture": architecture}, make, progress=job.progress)
    steps.append(step)
    return step.path / "imatrix.npz"


def _score(job: Job, model: Path, what: str, samples: Samples, steps: list[Step]) -> Scored:
    """Score a GGUF through the engine that serves it."""
    from packager.scoring import score
    from packager.tools import version_of

    tokenizer = _tokenizer_files(job)
    run = {
        **_run(job, Options(), model),
        "model": str(model),
        "context": 1024,
        "slots": 1,
        **{key: str(tokenizer[Path(name).name]) for key, name in _tokenizer_paths(job.checkpoint).items()},
    }
    found, step = score(
        job,
        run,
        samples,
        what=f"the {what} GGUF",
        inputs={"model": model.parent.name, "engine": version_of("xllamacpp")},
        max_rss_bytes=SCORE_CACHE,
    )
    steps.append(step)
    return found


def _require_changed(quant: str, types: Mapping[str, int]) -> None:
    """A quantization that left every tensor as it was is an error, whatever the tool's exit status."""
    full = {"F32", "F16", "BF16"}
    if quant not in full and not set(types) - full:
        raise GateFailed(
            f"the GGUF was to be {quant}, but no tensor of it is quantized ({', '.join(types)}).",
            why="No row of the model fits the type's block size.",
            fix="Choose another quant, or F16.",
        )


def _tokenizer_paths(checkpoint: Checkpoint) -> dict[str, str]:
    paths = {"tokenizer": "model/tokenizer.json"}
    if checkpoint.tokenizer.chat_template is not None:
        paths["chat_template"] = "model/chat_template.jinja"
    return paths


def _tokenizer_files(job: Job) -> dict[str, Path]:
    """tokenizer.json, its settings, and the chat template as a file wherever the checkpoint keeps it."""
    checkpoint = job.checkpoint
    template = checkpoint.tokenizer.chat_template

    def make(folder: Path, cost: Cost) -> None:
        import shutil

        for name in ("tokenizer.json", "tokenizer_config.json"):
            if (checkpoint.path / name).is_file():
                shutil.copyfile(checkpoint.path / name, folder / name)
        if template is not None:
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")

    step = job.store.step("tokenizer-files", {"checkpoint": checkpoint.digest}, make, progress=job.progress)
    return {path.name: path for path in sorted(step.path.iterdir()) if path.name != RECORD}


def _run(job: Job, options: Options, model: Path) -> dict[str, Any]:
    tokenizer = job.checkpoint.tokenizer
    size = estimate(job.checkpoint, job.target, options)
    return {
        "engine": "llamacpp",
        "model": "model/model.gguf",
        "tokenizer": "model/tokenizer.json",
        "chat_template": None,
        **_tokenizer_paths(job.checkpoint),
        "special_tokens": dict(tokenizer.special_tokens),
        "bos_id": tokenizer.bos_id,
        "add_bos": tokenizer.add_bos,
        "stop_ids": sorted(tokenizer.stop_ids),
        "sampling": dict(tokenizer.sampling),
        "context": options.context,
        "slots": options.slots,
        "threads": 0,
        "flash_attention": True,
        "kv_type": options.kv_type,
        "gpu_layers": 0,
        "read_per_token_bytes": size.read_per_token_bytes,
        "model_bytes": model.stat().st_size,
    }


def _needs() -> Sequence[Need]:
    return (
        Need("torch", "packager"),
        Need("transformers", "packager"),
        Need("xllamacpp", "packager"),
        Need("gguf", "packager"),
    )


RECIPE = Recipe(
    name="gguf",
    summary="one GGUF file for llama.cpp and Ollama, served on the CPU through xllamacpp",
    format="gguf",
    options=Options,
    needs=tuple(_needs()),
    why_not=why_not,
    estimate=estimate,
    build=build,
    thresholds=thresholds,
)
