"""Decoder language models in ONNX for onnxruntime: the graph is proven on the checkpoint's weights, then packed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from packager.core.errors import GateFailed
from packager.formats.onnx import decoder_cuda, decoder_graph, matrices, rope
from packager.formats.tokenizer_files import tokenizer_files
from packager.metrics.thresholds import Thresholds
from packager.recipe import Artifact, Estimate, Job, Run, ServingOptions, provenance

if TYPE_CHECKING:
    import onnx

    from packager.checkpoint.checkpoint import Checkpoint
    from packager.core.store import Cost, Step
    from packager.fidelity.artifact import Candidate
    from packager.fidelity.samples import Samples
    from packager.formats.int4.tuning import Tuned
    from packager.target import Target

BLOCK = 32  # inputs that share a scale: int8 has half the KL of 64, and int4 shares its tuning with Q4_0 and GPTQ
MODEL = "model.onnx"
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
# Python, onnxruntime, FastAPI, the tokenizer, and a prompt's logits and hidden states (measured with SmolLM2)
OVERHEAD = 150 << 20
# Parameters per second when two cores decode; a CPU emulates the GPU's float16 kernels.
DECODE_RATE = {"ort": 2e9, "ort_cuda": 5e7}
METHOD = "int8, rounded to nearest, symmetric, blocks of {block}"


class Options(ServingOptions, Protocol):
    """The recipe's options that this module reads."""

    @property
    def bits(self) -> int: ...
    @property
    def provider(self) -> str: ...
    @property
    def tune(self) -> str: ...


def why_not(checkpoint: Checkpoint, target: Target, options: Options) -> str | None:
    """None, or one sentence why the recipe cannot build this checkpoint for the target."""
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
    """(bytes of all packed matrices, number of scales)."""
    total = scales = 0
    for name, info in checkpoint.tensors.items():
        if len(info.shape) == 2:
            whole = not name.startswith("model.layers.")
            total += info.elements * (8 if whole else bits) // 8
            scales += info.elements // BLOCK
    return total + 2 * scales, scales


def estimate(checkpoint: Checkpoint, target: Target, options: Options) -> Estimate:
    """Sizes from the headers; the box holds scales and the KV cache in float32."""
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
    """The limits of a language model of 135 M parameters; larger ones are closer to their source."""
    return Thresholds(max_kl=0.05, min_top1=0.88) if options.bits == 8 else Thresholds(max_kl=1.0, min_top1=0.55)


def build(job: Job, options: Options) -> Artifact:
    """Prove the graph, pack the weights, prove the packed model. Raises GateFailed."""
    from packager.fidelity.gate import Exact, Subject, prove

    steps: list[Step] = []
    four, cuda = options.bits == 4, options.provider == "cuda"

    def exact() -> Exact:
        graph = _exact(job, options)
        steps.append(graph)
        # not optimized: constant folding would hold all weights in float32
        form = _candidate(job, options, graph, "the unquantized ONNX graph", "ort", {"optimized": False})
        return Exact(form, f"{job.checkpoint.dtype} weights, float32 arithmetic")

    def ship(samples: Samples | None) -> tuple[tuple[Step, Tuned | None], Candidate]:
        tuned = None
        if four:
            from packager.formats.int4.tuning import tune

            tuned = tune(job, samples, budget=options.tune, group=BLOCK)
            steps.append(tuned.step)
        packed = _packed(job, options, tuned)
        steps.append(packed)
        what, settings = f"the INT{options.bits} ONNX model", {"device": "cpu"} if cuda else {}
        return (packed, tuned), _candidate(job, options, packed, what, _engine(options), settings)

    subject = Subject(
        tokenizer="the ONNX folder's tokenizer",
        context=options.context,
        thresholds=thresholds(options),
        fix="Give the fine-tuning pairs with --calibration." if four else "Report the model: eight bits lost it.",
        ship=ship,
        exact=exact,
        calibrated=four,
        scored_by=decoder_cuda.SCORED_BY if cuda else "",
    )
    proof = prove(job, subject, steps)
    packed, tuned = proof.made
    report = {**proof.report, "operators": require_packed(packed.path / MODEL, job.checkpoint, options.bits)}
    if cuda:
        report["provider"] = decoder_cuda.facts()
    if tuned:
        report["int4"] = tuned.as_dict()
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


def _exact(job: Job, options: Options) -> Step:
    """The graph on the checkpoint's own files, hard-linked beside it: no weight is copied or rounded."""

    def make(folder: Path, cost: Cost) -> None:
        with job.progress.step("writing the ONNX graph"):
            weights = matrices.Exact(job.checkpoint)
            _save(decoder_graph.Decoder(job.checkpoint, weights, options.context).model(), folder / MODEL)
            for name in sorted({info.file for info in job.checkpoint.tensors.values()}):
                matrices.link(job.checkpoint.path / name, folder)

    inputs = {"checkpoint": job.checkpoint.digest, "context": options.context}
    return job.store.step("onnx-exact", inputs, make, progress=job.progress)


def _packed(job: Job, options: Options, tuned: Tuned | None) -> Step:
    """The step with the packed model of the bundle."""
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

    inputs = {
        "checkpoint": checkpoint.digest,
        "context": options.context,
        "bits": options.bits,
        "provider": options.provider,
        "block": BLOCK,
        "tuned": tuned.step.key if tuned else None,
    }
    return job.store.step("onnx-packed", inputs, make, progress=job.progress)


def _save(model: onnx.ModelProto, path: Path) -> None:
    path.write_bytes(model.SerializeToString(deterministic=True))


def require_packed(path: Path, checkpoint: Checkpoint, bits: int) -> dict[str, int]:
    """The number of each product and look-up operator in a graph's file. Raises GateFailed when one is not packed."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    operators: Counter[str] = Counter()
    for node in model.graph.node:
        width = next((attribute.i for attribute in node.attribute if attribute.name == "bits"), None)
        if width is not None or "MatMul" in node.op_type or node.op_type == "Gemm":
            operators[f"{node.op_type} {width} bits" if width else f"{node.op_type} float"] += 1
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    for tensor in model.graph.initializer:
        wide = len(tensor.dims) == 2 and tensor.data_type in floats and tensor.dims[1] == checkpoint.shape.hidden
        if wide and tensor.dims[0] > 1:
            raise GateFailed(f"{tensor.name} of the ONNX model is not INT{bits}.", fix="Do not ship it.")
    layers = sum(count for name, count in operators.items() if name == f"MatMulNBits {bits} bits")
    if any(name.endswith("float") for name in operators) or layers < checkpoint.shape.layers * 4:
        raise GateFailed(
            f"the ONNX model is not INT{bits}: its products are {', '.join(sorted(operators)) or 'none'}.",
            fix="Do not ship it; report the architecture.",
        )
    return dict(sorted(operators.items()))


def _run(job: Job, options: Options, folder: Path) -> Run:
    size = estimate(job.checkpoint, job.target, options)
    return Run.of(
        job.checkpoint,
        _engine(options),
        f"model/{MODEL}",
        options,
        read_per_token_bytes=size.read_per_token_bytes,
        model_bytes=sum(path.stat().st_size for name in (MODEL, matrices.DATA) if (path := folder / name).is_file()),
        settings={"host_bytes": decoder_cuda.HOST_BYTES} if options.provider == "cuda" else {},
    )


def _candidate(
    job: Job, options: Options, model: Step, what: str, engine: str, settings: Mapping[str, Any]
) -> Candidate:
    """A folder with the engine that opens it on the CPU of this machine."""
    from packager.core.processes import version_of
    from packager.fidelity.artifact import Candidate

    run = _run(job, options, model.path).here(model.path / MODEL, tokenizer_files(job))
    return Candidate(
        what,
        replace(run, engine=engine, settings=dict(settings)),
        {"model": model.key, "engine": version_of("onnxruntime")},
        seconds_a_token=job.checkpoint.parameters / DECODE_RATE[engine],
        max_rss_bytes=1 << 30,
    )
