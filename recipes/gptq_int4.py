"""GPTQ int4 for vLLM and transformers: integers tuned layer by layer, the very ones that a Q4_0 GGUF of them holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from packager.errors import GateFailed
from packager.gates import Thresholds
from packager.gguf_sizes import kv_cache_bytes
from packager.recipe import Artifact, Estimate, Job, Need, Recipe
from packager.store import RECORD, code_digest

if TYPE_CHECKING:
    from packager.checkpoint import Checkpoint
    from packager.store import Cost, Step
    from packager.target import Target

# What vLLM takes beside weights and KV cache: CUDA's context and the activations of a profiling run. An assumption.
RUNTIME_BYTES = 3 << 29
SCORED = "by dequantized weights in float32, not by the serving engine"


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


def thresholds(options: Options) -> Thresholds:
    """Four bits in groups cost a model of 135 M parameters this much at most; larger ones keep more."""
    return Thresholds(max_kl=1.0, min_top1=0.55)


def why_not(checkpoint: Checkpoint, target: Target, options: Options) -> str | None:
    from packager.tuning import linear_modules, ragged

    if checkpoint.family.kind != "decoder":
        return f"gptq_int4 serves decoder language models, and {checkpoint.architecture} is none; use another recipe."
    if uneven := ragged(checkpoint, options.group):
        fitting = [str(size) for size in (128, 64, 32) if not ragged(checkpoint, size)]
        way = f"set group={' or '.join(fitting)}" if fitting else "use the gguf recipe with quant=Q8_0"
        return f"groups of {options.group} do not divide {uneven}, and no loader takes ragged ones; {way}."
    for name, (rows, _) in linear_modules(checkpoint).items():
        if rows % 8:
            return f"{name} has {rows} outputs, and GPTQ packs eight to a word; use the gguf recipe."
    if options.context > checkpoint.shape.context:
        return (
            f"a context of {options.context} tokens is more than the {checkpoint.shape.context} the model was made "
            f"for; set context={checkpoint.shape.context} or less."
        )
    return None


def weight_bytes(checkpoint: Checkpoint, group: int) -> int:
    """Bytes of all tensors that will be written."""
    from packager.gptq import specs
    from packager.tuning import linear_modules

    modules = linear_modules(checkpoint)
    if any(inputs % group or rows % 8 for rows, inputs in modules.values()):  # refused; a figure is shown all the same
        return checkpoint.parameters // 2
    return sum(spec.nbytes for spec in specs(checkpoint, modules, group))


def estimate(checkpoint: Checkpoint, target: Target, options: Options) -> Estimate:
    from packager.tuning import costs

    shape = checkpoint.shape
    size = weight_bytes(checkpoint, options.group)
    embedding = 0 if shape.tied else 2 * shape.vocab * shape.hidden  # one row of it is read, unless it is the head
    ram, seconds = costs(checkpoint, options.tune)
    return Estimate(
        artifact_bytes=size,
        build_ram_bytes=ram,
        build_disk_bytes=3 * size,
        load_bytes=size,
        kv_bytes=kv_cache_bytes(shape.layers, shape.kv_heads, shape.head_dim, options.context, options.slots, "f16"),
        overhead_bytes=RUNTIME_BYTES,
        read_per_token_bytes=size - embedding,
        context=options.context,
        slots=options.slots,
        seconds=round(seconds + 60, 1),
        notes=(f"The fidelity score is taken {SCORED}.",),
    )


def build(job: Job, options: Options) -> Artifact:
    from packager import gptq, tuning
    from packager.gates import measure, require_kept
    from packager.reference import dequantized_scores, make_samples, source_scores

    steps: list[Step] = []
    samples = make_samples(job) if job.verify or options.tune != "none" else None
    if samples:
        steps.append(samples.step)
    tuned = tuning.tune(job, samples, budget=options.tune, group=options.group)
    steps.append(tuned.step)

    def make(folder: Path, cost: Cost) -> None:
        with job.progress.step("packing as GPTQ"):
            gptq.write(job.checkpoint, tuned, folder)

    inputs = {
        "checkpoint": job.checkpoint.digest,
        "tuned": tuned.step.key,
        "code": code_digest(Path(gptq.__file__), Path(tuning.__file__)),
    }
    packed = job.store.step("gptq", inputs, make, progress=job.progress)
    steps.append(packed)
    report: dict[str, Any] = {"int4": {**tuned.as_dict(), **_read_back(packed.path, job.checkpoint)}}
    if job.verify and samples:
        source, step = source_scores(job, samples)
        found, other = dequantized_scores(job, samples, packed)
        steps += [step, other]
        fidelity = measure(samples, source, found)
        limits = thresholds(options).changed(job.limits)
        report["fidelity"] = {**fidelity.as_dict(limits), "scored": SCORED}
        require_kept(fidelity, limits, "the GPTQ model", "Give the fine-tuning pairs with --calibration, or tune=full.")
    files = {path.name: path for path in sorted(packed.path.iterdir()) if path.name != RECORD}
    return Artifact(
        format="gptq",
        files=files,
        run=_run(job, options, files),
        report=report,
        provenance={
            "quantizer": tuned.method,
            "checkpoint": job.checkpoint.digest,
            "calibration": job.calibration.digest if job.calibration else None,
            "verified": job.verify,
            "options": asdict(options),
            "steps": {step.name: step.key for step in steps},
        },
        costs=tuple(step.cost() for step in steps),
    )


def _read_back(folder: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """Bits a weight that the file really spends, from its headers. Raises GateFailed when a module is not int4."""
    from packager.safetensors_io import read_header
    from packager.tuning import linear_modules

    found = {name: info for file in sorted(folder.glob("*.safetensors")) for name, info in read_header(file).items()}
    modules = linear_modules(checkpoint)
    weights = sum(rows * inputs for rows, inputs in modules.values())
    packed = 0
    for name, (rows, inputs) in modules.items():
        words = found.get(f"{name}.qweight")
        if f"{name}.weight" in found or words is None or words.nbytes * 2 != rows * inputs:
            raise GateFailed(f"{name} was to be int4 and is not.", fix="Do not ship it; report the architecture.")
        packed += sum(found[f"{name}.{part}"].nbytes for part in ("qweight", "qzeros", "scales", "g_idx"))
    return {"modules": len(modules), "bits_per_weight": round(8 * packed / weights, 3)}


def _run(job: Job, options: Options, files: Mapping[str, Path]) -> dict[str, Any]:
    weights = [name for name in files if name.endswith(".safetensors")]
    size = estimate(job.checkpoint, job.target, options)
    return {
        "engine": "vllm",
        "model": f"model/{weights[0]}",
        "tokenizer": "model/tokenizer.json",
        "chat_template": "model/chat_template.jinja" if "chat_template.jinja" in files else None,
        **job.checkpoint.tokenizer.as_run(),
        "context": options.context,
        "slots": options.slots,
        "threads": 0,
        "dtype": "float16",
        "read_per_token_bytes": size.read_per_token_bytes,
        "model_bytes": sum(files[name].stat().st_size for name in weights),
    }


RECIPE = Recipe(
    name="gptq_int4",
    summary="GPTQ int4 (symmetric, no act-order) for vLLM, tuned layer by layer",
    format="gptq",
    options=Options,
    needs=(Need("torch", "packager"), Need("transformers", "packager")),
    why_not=why_not,
    estimate=estimate,
    build=build,
    thresholds=thresholds,
)
