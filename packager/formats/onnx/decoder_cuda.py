"""A decoder as an ONNX graph for onnxruntime's CUDA provider: float16 between the operators, the same packed integers.

The types follow from onnxruntime's CUDA kernels (docs/OperatorKernels.md there): GroupQueryAttention has only float16
and bfloat16, and a T4 has no bfloat16. MatMulNBits and GatherBlockQuantized take uint8 with float16 scales; norms,
QuickGelu and the others take float16. Every node has a CUDA kernel, so a session can refuse any other provider
(runtimes/engines/onnxruntime/cuda.py). The graph also runs on the CPU, where the build machine scores it.

Inputs as in decoder_graph, except ``wanted`` (kept,), the indices of the tokens that get logits: a Gather stays on the
GPU, while a Slice reads its bounds from main memory. Caches and logits are float16.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from packager.checkpoint.families import kv_cache_bytes
from packager.formats.onnx import rope
from packager.formats.onnx.decoder_graph import GEMMAS, IR_VERSION, MICROSOFT, OPSET, PAST, PRESENT, Decoder
from packager.formats.onnx.graph import Graph, value_info
from packager.formats.onnx.matrices import DATA, EMBEDDING, Packed, Place
from packager.recipe import Estimate

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from packager.checkpoint.checkpoint import Checkpoint
    from packager.target import Target

CAPABILITY = (7, 5)  # the oldest GPU with machine code in the wheel's libonnxruntime_providers_cuda.so
# the first driver for CUDA 13, with which onnxruntime-gpu is built from 1.27 on
DRIVER = "580.65.06"
VERSION = "1.31.1"  # locks/box-ort_cuda.in pins it; the newest on the package index
# cuDNN and cuFFT are loaded only by operators that use them (from 1.28 and 1.29 on), and no operator here does
WHEEL_BYTES, WHEELS_BYTES = 256_000_000, 582_000_000  # for each Python, and CUDA's libraries for all (measured)
DEQUANTIZED_ROWS = 32768  # rows of a large matrix that MatMulNBits dequantizes at once for a product of many rows
# CUDA's context, cuBLAS's workspace, the arena's rounding: an assumption, not measured on a T4.
DEVICE_BYTES = 1 << 30
# Python, FastAPI, the tokenizer, and CUDA's and cuBLAS's host memory: an assumption.
HOST_BYTES = 2 << 30


PROVIDER = "CUDAExecutionProvider"
SCORED_BY = "onnxruntime on the build machine's processor, in float16, not on a GPU"


class Options(Protocol):
    """The recipe's options that this module reads."""

    @property
    def context(self) -> int: ...
    @property
    def slots(self) -> int: ...


def why_not(checkpoint: Checkpoint, target: Target) -> str | None:
    """None, or one sentence why provider=cuda cannot serve this model on the target, and what can."""
    gpu, other = target.gpu, "leave provider=cpu."
    digits = re.fullmatch(r"sm_(\d+)(\d)", gpu.architecture) if gpu else None
    if gpu is None or digits is None:
        return f"provider=cuda needs an NVIDIA GPU, and {target.title} has none in its target file; {other}"
    if (target.system, target.machine, gpu.memory) != ("linux", "x86_64", "discrete"):
        return (
            f"provider=cuda is for cards with memory of their own under Linux on x86-64 (onnxruntime-gpu {VERSION} "
            f"with CUDA 13), and {target.title} is not such a box; {other}"
        )
    if (int(digits[1]), int(digits[2])) < CAPABILITY:
        least = ".".join(map(str, CAPABILITY))
        return (
            f"onnxruntime-gpu {VERSION} has machine code from compute capability {least} on, and the {gpu.name} has "
            f"{digits[1]}.{digits[2]}; {other}"
        )
    if checkpoint.family.model_type in GEMMAS:
        return (
            f"the activations of {checkpoint.architecture} leave float16's range, and attention has no other type on "
            f"{gpu.name}; {other}"
        )
    return None


def scratch_bytes(checkpoint: Checkpoint, context: int, slots: int) -> int:
    """Bytes of one operator's scratch memory: a matrix dequantized to float16 for a prompt's product, or keys and
    values of every slot repeated for each query head (attention without FlashAttention, which needs SM 8.0).
    """
    shape = checkpoint.shape
    widest = max(
        2 * min(info.shape[0], DEQUANTIZED_ROWS) * info.shape[1]
        for info in checkpoint.tensors.values()
        if len(info.shape) == 2
    )
    repeated = 2 * 2 * shape.heads * shape.head_dim * context * slots if shape.heads != shape.kv_heads else 0
    return max(widest, repeated)


def estimate(
    checkpoint: Checkpoint, target: Target, options: Options, *, weights: int, read: int, ram: int, seconds: float
) -> Estimate:
    """Sizes from the headers. weights: bytes of the data file. read: bytes of it read for a token. ram, seconds: of
    the build.
    """
    shape = checkpoint.shape
    # nodes; norms; cosines and sines, half a head's width each
    rotated = rope.dims(checkpoint.config, shape.head_dim)
    graph = (4_500 + 4 * shape.hidden) * shape.layers + 2 * options.context * rotated
    cache = kv_cache_bytes(shape.layers, shape.kv_heads, shape.head_dim, options.context, options.slots, "f16")
    own = DEVICE_BYTES + scratch_bytes(checkpoint, options.context, options.slots)
    pythons = sum(int(version.partition(".")[2]) >= 11 for version in target.python)  # the Pythons of the wheel
    added = WHEELS_BYTES + pythons * WHEEL_BYTES
    return Estimate(
        artifact_bytes=weights + graph,
        build_ram_bytes=ram,
        build_disk_bytes=2 * (weights + graph),
        load_bytes=weights,
        kv_bytes=cache,
        overhead_bytes=own + 2 * shape.vocab * options.slots,
        read_per_token_bytes=read,
        context=options.context,
        slots=options.slots,
        seconds=round(seconds, 1),
        notes=(
            f"Computed on the GPU by onnxruntime {VERSION}: generated, not executed here. The fidelity score is taken "
            f"of the same file by {SCORED_BY}.",
            f"CUDA's own share of the GPU's memory is an assumption ({DEVICE_BYTES / 2**30:.1f} GiB, and "
            f"{(own - DEVICE_BYTES) / 2**30:.2f} GiB for the largest operator). A driver {DRIVER} or newer is all that "
            "the box needs of CUDA.",
            f"The wheels of onnxruntime-gpu and CUDA's libraries make the bundle about {added / 1e9:.1f} GB larger.",
        ),
        gpu=True,
    )


def gpu_needs(size: Estimate) -> dict[str, Any]:
    """The required GPU, for the manifest."""
    return {
        "capability": ".".join(map(str, CAPABILITY)),
        "count": 1,
        "bytes": size.load_bytes + size.kv_bytes + size.overhead_bytes,
        "driver_min": DRIVER,
    }


def facts() -> dict[str, Any]:
    """The provider's entry in the manifest."""
    return {"name": PROVIDER, "onnxruntime": VERSION, "executed": False}


class HalfGraph(Graph):
    """A graph that stores float32 constants as float16. Raises ValueError for one beyond float16's range."""

    def constant(self, name: str, value: NDArray[Any]) -> str:
        import numpy as np

        if value.dtype != np.float32:
            return super().constant(name, value)
        from packager.tensors.rounding import half

        return super().constant(name, half(value, name))


class HalfPacked(Packed):
    """Packed matrices for products in float16: scales as stored, with explicit zero points."""

    product: Mapping[str, Any] = {}  # no accuracy_level: activations stay float16, on the GPU and on the CPU

    def embedding(self, graph: Graph, ids: str) -> str:
        from onnx import TensorProto

        place = self._place((EMBEDDING,))
        table = graph.external(
            f"{EMBEDDING}.rows",
            TensorProto.UINT8,
            (place.rows, place.inputs),
            DATA,
            place.integers,
            place.rows * place.inputs,
        )
        # without zero points this operator's first CUDA kernels used 0, not 128
        middle = graph.external(
            f"{EMBEDDING}.middle",
            TensorProto.UINT8,
            (place.rows, place.inputs // self.block),
            DATA,
            self._middle(place),
            place.rows * place.inputs // self.block,
        )
        return graph.add(
            "GatherBlockQuantized",
            [table, ids, self._scales(graph, EMBEDDING, place), middle],
            domain=MICROSOFT,
            bits=place.bits,
            block_size=self.block,
            gather_axis=0,
            quantize_axis=1,
        )

    def _scales(self, graph: Graph, name: str, place: Place) -> str:
        return self._stored_scales(graph, name, place)

    def _middle(self, place: Place) -> int:
        """Write a matrix's zero points, 128 for each of its blocks, and return their offset."""
        begin = self._aligned()
        self.file.write(bytes([1 << (place.bits - 1)]) * (place.rows * place.inputs // self.block))
        return begin


class HalfDecoder(Decoder):
    """Writes the float16 graph of one checkpoint. context: length of the position tables, tokens."""

    def __init__(self, checkpoint: Checkpoint, weights: HalfPacked, context: int) -> None:
        super().__init__(checkpoint, weights, context)
        self.graph = HalfGraph()

    def model(self) -> onnx.ModelProto:
        """The finished model; its bytes depend only on the checkpoint and the weights' places."""
        from onnx import TensorProto, helper

        graph, shape = self.graph, self.shape
        inputs = [
            value_info("input_ids", TensorProto.INT64, ["batch", "tokens"]),
            value_info("seqlens_k", TensorProto.INT32, ["batch"]),
            value_info("total_length", TensorProto.INT32, []),
            value_info("wanted", TensorProto.INT64, ["logits_kept"]),
        ]
        outputs = [value_info("logits", TensorProto.FLOAT16, ["batch", "logits_kept", shape.vocab])]
        cache: list[str | int] = ["batch", shape.kv_heads, "capacity", shape.head_dim]
        for index in range(shape.layers):
            for part in ("key", "value"):
                inputs.append(value_info(PAST.format(index, part), TensorProto.FLOAT16, cache))
                outputs.append(value_info(PRESENT.format(index, part), TensorProto.FLOAT16, cache))
        self._body()
        made = helper.make_graph(graph.nodes, "decoder", inputs, outputs, list(graph.initializers.values()))
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(made, opset_imports=opsets, ir_version=IR_VERSION, producer_name="packager")

    def _logits(self, x: str) -> str:
        return self.weights.head(self.graph, self.graph.add("Gather", [x, "wanted"], axis=1))
