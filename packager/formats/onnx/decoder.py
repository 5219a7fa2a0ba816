"""Decoder language models in ONNX for onnxruntime: the graph proven on the checkpoint's own weights, then packed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from packager.core.errors import GateFailed
from packager.core.store import code_digest
from packager.formats.onnx import decoder_cuda, decoder_graph, matrices, rope
from packager.formats.tokenizer_files import tokenizer_files, tokenizer_paths
from packager.metrics.thresholds import Thresholds
from packager.recipe import Artifact, Estimate, Job, ServingOptions, provenance
from packager.tensors import rounding

if TYPE_CHECKING:
    import onnx

    from packager.checkpoint.checkpoint import Checkpoint
    from packager.core.store import Cost, Step
    from packager.fidelity.artifact import Scored
    from packager.fidelity.source import Samples
    from packager.formats.int4.tuning import Tuned
    from packager.target import Target

BLOCK = 32  # inputs that share a scale: int8 at 32 has half the KL of 64, and int4 shares its tuning with Q4_0 and GPTQ
MODEL = "model.onnx"
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
# Python, onnxruntime, FastAPI and the tokenizer, and a prompt's logits and hidden states (measured: SmolLM2)
OVERHEAD = 150 << 20
METHOD = "int8, rounded to nearest, symmetric, blocks of {block}"


class Options(ServingOptions, Protocol):
    """What is read of the recipe's options."""

    @property
    def bits(self) -> int: ...
    @property
    def provider(self) -> str: ...
    @property
    def tune(self) -> str: ...


def why_not(checkpoint: Checkpoint, target: Target, options: Options) -> str | None:
    """None, or one sentence."""
    other = "use the gguf recipe for this model"
    if reason := decoder_graph.why_not(checkpoint):
        return f"{reason}; {other}."
    config = checkpoint.config
    act = config.get("hidden_activation") or config.get("hidden_act") or ACTIVATIONS[0]
    if act not in ACTIVATIONS and checkpoint.family.model_type not in decoder_graph.GEMMAS:
        return f"its activation {act} has no ONNX graph here (known: {', '.join(ACTIVATIONS)}); {other}."
    for name, info in checkpoint.tensors.items():
        if len(info.shape) == 2 and info.shape[1] % BLOCK:
            return f"{name} has {info.shape[1]} inputs, and blocks of {BLOCK} do not divide them; {other}."
    if options.context > checkpoint.shape.context:
        return (
            f"a context of {options.context} tokens is more than the {checkpoint.shape.context} the model was made "
            f"for; set context={checkpoint.shape.context} or less."
        )
    if options.provider == "cuda":
        return decoder_cuda.why_not(checkpoint, target)
    return None


def _packed_bytes(checkpoint: Checkpoint, bits: int) -> tuple[int, int]:
    """Bytes of all packed matrices, and scales in all."""
    total = scales = 0
    for name, info in checkpoint.tensors.items():
        if len(info.shape) == 2:
            whole = not name.startswith("model.layers.")
            total += info.elements * (8 if whole else bits) // 8
            scales += info.elements // BLOCK
    return total + 2 * scales, scales


def estimate(checkpoint: Checkpoint, target: Target, options: Options) -> Estimate:
    """Sizes from the headers; the box holds scales in float32 and the key/value cache too."""
    shape = checkpoint.shape
    packed, scales = _packed_bytes(checkpoint, options.bits)
    # nodes; norms in float32; cosines and sines, half a head's width each
    rotated = rope.dims(checkpoint.config, shape.head_dim)
    graph = (4_500 + 8 * shape.hidden) * shape.layers + 4 * options.context * rotated
    embedding = 0 if shape.tied else shape.vocab * shape.hidden * (BLOCK + 2) // BLOCK
    cuda = options.provider == "cuda"
    seconds = 20 + checkpoint.weight_bytes / (5e6 if cuda else 1.2e8)  # float16 is slow to score on a processor
    ram = 900 << 20
    if options.bits == 4:
        from packager.formats.int4.tuning import costs

        more, longer = costs(checkpoint, options.tune if options.tune != "auto" else "none")
        ram, seconds = max(ram, more), seconds + longer
    if cuda:
        middle = shape.vocab * shape.hidden // BLOCK
        return decoder_cuda.estimate(
            checkpoint, target, options, weights=packed + middle, read=packed - embedding, ram=ram, seconds=seconds
        )
    return Estimate(
        artifact_bytes=packed + graph,
        build_ram_bytes=ram,
        build_disk_bytes=2 * packed + 2 * graph,
        load_bytes=packed + 4 * scales,
        kv_bytes=2 * shape.layers * shape.kv_heads * shape.head_dim * 4 * options.context * options.slots,
        overhead_bytes=OVERHEAD + 2 * 4 * shape.vocab * options.slots,
        read_per_token_bytes=packed - embedding,
        context=options.context,
        slots=options.slots,
        seconds=round(seconds, 1),
    )


def thresholds(options: Options) -> Thresholds:
    """What a language model of 135 M parameters keeps; larger ones keep more."""
    return Thresholds(max_kl=0.05, min_top1=0.88) if options.bits == 8 else Thresholds(max_kl=1.0, min_top1=0.55)


def build(job: Job, options: Options) -> Artifact:
    """Prove the graph, pack the weights, score what ships. Raises GateFailed."""
    from packager.fidelity import answers
    from packager.fidelity.artifact import measure, require_contract
    from packager.fidelity.source import make_samples, source_scores
    from packager.metrics.distributions import compare, require_equal
    from packager.metrics.thresholds import require_kept

    steps: list[Step] = []
    four = options.bits == 4
    samples = make_samples(job) if job.verify or four else None
    cuda = options.provider == "cuda"
    report: dict[str, Any] = {"provider": decoder_cuda.facts()} if cuda else {}
    source = None
    if job.verify and samples:
        source, step = source_scores(job, samples)
        steps += [samples.step, step]
        exact = _exact(job, options)
        steps.append(exact)
        found = _score(job, exact, "the unquantized ONNX graph", samples, steps, {"optimized": False})
        said = require_contract(job, samples, found, "the ONNX folder's tokenizer")
        report["contract"] = {**samples.contract(), "notes": [*samples.notes, *said]}
        score = compare(source, found.distributions, samples.targets)
        require_equal(score, "the unquantized ONNX graph")
        report["unquantized"] = {"run_as": f"{job.checkpoint.dtype} weights, float32 arithmetic", **score.as_dict()}
        report["prompts_equal"] = len(samples.prompts)
    tuned = None
    if four:
        from packager.formats.int4.tuning import tune

        tuned = tune(job, samples, budget=options.tune, group=BLOCK)
        steps.append(tuned.step)
        report["int4"] = tuned.as_dict()
    packed = _packed(job, options, tuned)
    steps.append(packed)
    report["operators"] = require_packed(packed.path / MODEL, job.checkpoint, options.bits)
    if job.verify and samples and source is not None:
        settings = {"device": "cpu"} if cuda else {}
        found = _score(job, packed, "the ONNX model", samples, steps, settings, _engine(options))
        fidelity = measure(samples, source, found.distributions)
        limits = thresholds(options).changed(job.limits)
        report["fidelity"] = {**fidelity.as_dict(limits), **({"scored": decoder_cuda.SCORED_BY} if cuda else {})}
        advice = "Give the fine-tuning pairs with --calibration." if four else "Report the model: eight bits lost it."
        require_kept(fidelity, limits, f"the INT{options.bits} ONNX model", advice)
        if cuda:  # a token takes seconds there: the answers' own scores say whether they are kept
            report["fidelity"]["answers_not_asked"] = decoder_cuda.NOT_ASKED
        else:
            report["fidelity"]["answers"] = answers.report(job, found, samples, "the ONNX model", steps)
    files = {name: packed.path / name for name in (MODEL, matrices.DATA)}
    method = METHOD.format(block=BLOCK)
    return Artifact(
        format="onnx",
        files={**files, **tokenizer_files(job)},
        run=_run(job, options, packed.path),
        report=report,
        provenance=provenance(
            job, options, steps, quantizer=f"{tuned.method}; embedding and head {method}" if tuned else method
        ),
        costs=tuple(step.cost() for step in steps),
        gpu=decoder_cuda.gpu_needs(estimate(job.checkpoint, job.target, options)) if cuda else None,
    )


def _engine(options: Options) -> str:
    return "ort_cuda" if options.provider == "cuda" else "ort"


def _code() -> str:
    return code_digest(*(Path(str(module.__file__)) for module in (decoder_graph, matrices, rope)), Path(__file__))


def _inputs(job: Job, options: Options) -> dict[str, object]:
    from packager.core.processes import version_of

    return {
        "checkpoint": job.checkpoint.digest,
        "context": options.context,
        "onnx": version_of("onnx"),
        "code": _code(),
    }


def _exact(job: Job, options: Options) -> Step:
    """The graph over the checkpoint's own files, which are linked beside it: nothing is copied or rounded."""

    def make(folder: Path, cost: Cost) -> None:
        with job.progress.step("writing the ONNX graph"):
            weights = matrices.Exact(job.checkpoint)
            _save(decoder_graph.Decoder(job.checkpoint, weights, options.context).model(), folder / MODEL)
            for name in sorted({info.file for info in job.checkpoint.tensors.values()}):
                matrices.link(job.checkpoint.path / name, folder)

    return job.store.step("onnx-exact", _inputs(job, options), make, progress=job.progress)


def _packed(job: Job, options: Options, tuned: Tuned | None) -> Step:
    """What ships."""
    checkpoint = job.checkpoint

    def make(folder: Path, cost: Cost) -> None:
        with (
            (folder / matrices.DATA).open("wb") as file,
            job.progress.step(f"packing INT{options.bits} ONNX", float(checkpoint.weight_bytes), "B") as task,
        ):
            graph: decoder_graph.Decoder
            if options.provider == "cuda":
                halves = decoder_cuda.HalfPacked(checkpoint, file, BLOCK, tuned, task.advance)
                graph = decoder_cuda.HalfDecoder(checkpoint, halves, options.context)
            else:
                weights = matrices.Packed(checkpoint, file, BLOCK, tuned, task.advance)
                graph = decoder_graph.Decoder(checkpoint, weights, options.context)
            _save(graph.model(), folder / MODEL)

    inputs = {**_inputs(job, options), "bits": options.bits, "block": BLOCK, "tuned": tuned.step.key if tuned else None}
    if options.provider == "cuda":
        inputs["cuda"] = code_digest(*(Path(str(module.__file__)) for module in (decoder_cuda, rounding)))
    return job.store.step("onnx-packed", inputs, make, progress=job.progress)


def _save(model: onnx.ModelProto, path: Path) -> None:
    path.write_bytes(model.SerializeToString(deterministic=True))


def require_packed(path: Path, checkpoint: Checkpoint, bits: int) -> dict[str, int]:
    """What multiplies and what is looked up in a graph, read back from its file. Raises GateFailed when a matrix that
    was to be packed is not.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    found: Counter[str] = Counter()
    for node in model.graph.node:
        width = next((attribute.i for attribute in node.attribute if attribute.name == "bits"), None)
        if width is not None or "MatMul" in node.op_type or node.op_type == "Gemm":
            found[f"{node.op_type} {width} bits" if width else f"{node.op_type} float"] += 1
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    for tensor in model.graph.initializer:
        wide = len(tensor.dims) == 2 and tensor.data_type in floats and tensor.dims[1] == checkpoint.shape.hidden
        if wide and tensor.dims[0] > 1:
            raise GateFailed(f"{tensor.name} of the ONNX model was to be INT{bits} and is not.", fix="Do not ship it.")
    layers = sum(count for name, count in found.items() if name == f"MatMulNBits {bits} bits")
    if any(name.endswith("float") for name in found) or layers < checkpoint.shape.layers * 4:
        raise GateFailed(
            f"the ONNX model was to be INT{bits}, but it multiplies by {', '.join(sorted(found)) or 'nothing'}.",
            fix="Do not ship it; report the architecture.",
        )
    return dict(sorted(found.items()))


def _run(job: Job, options: Options, folder: Path) -> dict[str, Any]:
    size = estimate(job.checkpoint, job.target, options)
    return {
        "engine": _engine(options),
        "model": f"model/{MODEL}",
        **tokenizer_paths(job.checkpoint),
        **job.checkpoint.tokenizer.as_run(),
        "context": options.context,
        "slots": options.slots,
        "threads": 0,
        "read_per_token_bytes": size.read_per_token_bytes,
        "model_bytes": sum((folder / name).stat().st_size for name in (MODEL, matrices.DATA)),
        **({"settings": {"host_bytes": decoder_cuda.HOST_BYTES}} if options.provider == "cuda" else {}),
    }


def _score(
    job: Job, model: Step, what: str, samples: Samples, steps: list[Step], settings: Mapping[str, Any],
    engine: str = "ort",
) -> Scored:  # fmt: skip
    """Score a folder through the engine that serves it. settings: of the engine; where they say that the graph is not
    optimized, weights are cast while they are used: folding would hold all of them in float32.
    """
    from packager.core.processes import version_of
    from packager.fidelity.artifact import score

    run: Mapping[str, Any] = {
        "engine": engine,
        "model": str(model.path / MODEL),
        **{key: str(path) for key, path in _boxed(job).items()},
        **job.checkpoint.tokenizer.as_run(),
        "context": 1024,
        "slots": 1,
        "settings": dict(settings),
    }
    version = version_of("onnxruntime")
    found, step = score(
        job, run, samples, what=what, inputs={"model": model.key, "engine": version}, max_rss_bytes=1 << 30
    )
    steps.append(step)
    return found


def _boxed(job: Job) -> dict[str, Path]:
    files = tokenizer_files(job)
    return {key: files[Path(name).name] for key, name in tokenizer_paths(job.checkpoint).items() if name}
