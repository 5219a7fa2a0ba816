"""Writes an encoder's tensors as ONNX external data, and removes the exporting machine's metadata from its graph.

The weights are in ``model.onnx.data`` beside ``model.onnx``. A writer lists its tensors as Parts, ``layout`` computes
their offsets, and ``store`` writes one from the checkpoint's safetensors, some rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packager.core.errors import InputError
from packager.tensors.safetensors import TensorInfo, read_rows, row_chunks, to_float32

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from packager.checkpoint.checkpoint import Checkpoint

MODEL, DATA = "model.onnx", "model.onnx.data"
ALIGN = 4096  # bytes: alignment of each tensor, so that it can be mapped separately


@dataclass(frozen=True)
class Part:
    """One tensor of the data file. kind: numpy's dtype, little-endian. source: the checkpoint's tensor. role: the
    writer's name for what is stored of it. block: inputs that share a scale, 0 for none. transposed: rows of the source
    are written as columns.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    source: TensorInfo
    role: str
    block: int = 0
    transposed: bool = False


Stored = Callable[["NDArray[Any]", Part], "NDArray[Any]"]


def source_of(checkpoint: Checkpoint, name: str) -> TensorInfo:
    """The checkpoint's tensor for a parameter of transformers' model. Raises InputError when it is missing.

    Checkpoints differ in the prefix before the encoder's names; BERT's first ones call a layer norm's weight gamma.
    """
    old = {"weight": "gamma", "bias": "beta"}
    head, _, last = name.rpartition(".")
    spellings = [name, f"{head}.{old.get(last, last)}"] if "LayerNorm" in head or "layer_norm" in head else [name]
    for spelling in spellings:
        for prefix in checkpoint.family.prefixes:
            for candidate in (prefix + spelling, spelling.removeprefix(prefix) if prefix else spelling):
                if candidate in checkpoint.tensors:
                    return checkpoint.tensors[candidate]
    raise InputError(
        f"The tensor {name} of a {checkpoint.architecture} is missing.",
        why="The weights are of another model than config.json says, or the head was never trained.",
        fix="Save the model again with save_pretrained, and compare config.json's architectures.",
    )


def make_node(kind: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    """A node with one output, named after it."""
    from onnx import helper

    return helper.make_node(kind, inputs, [output], name=f"{kind}:{output}", **attributes)


def name_dimensions(inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]) -> None:
    """Name the dimensions without a fixed size "batch" and "length"."""
    for value in (*inputs, *outputs):
        names = ("batch", "length")
        for dimension, name in zip(value.type.tensor_type.shape.dim, names, strict=False):
            if not dimension.HasField("dim_value"):
                dimension.dim_param = name


def remove_metadata(model: onnx.ModelProto) -> None:
    """Remove metadata and doc strings, which contain stack traces and file names of the exporting machine."""
    graph = model.graph
    for holder in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del holder.metadata_props[:]
        holder.doc_string = ""


def layout(parts: list[Part]) -> tuple[dict[str, int], int]:
    """(offset of each tensor in the data file, the file's size), bytes."""
    import math

    import numpy as np

    offsets, end = {}, 0
    for part in parts:
        offsets[part.name] = end = -(-end // ALIGN) * ALIGN
        end += math.prod(part.shape) * np.dtype(part.kind).itemsize
    return offsets, end


def external(part: Part, offset: int) -> onnx.TensorProto:
    """The graph's entry for a part: its type, shape and place in the data file."""
    import math

    import numpy as np
    from onnx import TensorProto, helper

    kind = np.dtype(part.kind)
    tensor = TensorProto(name=part.name, data_type=helper.np_dtype_to_tensor_dtype(kind), dims=part.shape)
    tensor.data_location = TensorProto.EXTERNAL
    size = math.prod(part.shape) * kind.itemsize
    for key, value in (("location", DATA), ("offset", offset), ("length", size)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def store(source: Path, data: Path, part: Part, offset: int, stored: Stored) -> None:
    """Write one tensor, a few million elements at a time. stored: float32 rows of its source -> the stored rows.
    Raises the errors of stored, and OSError.
    """
    import numpy as np

    if 0 in part.shape:
        return
    goal = np.memmap(data, dtype=part.kind, mode="r+", offset=offset, shape=part.shape or (1,))
    for begin, end in row_chunks(part.source):
        rows = to_float32(read_rows(source, part.source, begin, end), part.source.dtype)
        if part.transposed:
            goal[:, begin:end] = stored(rows, part).T
        elif part.shape:
            goal[begin:end] = stored(rows, part)
        else:
            goal[0] = rows
    goal.flush()
    del goal


def tensors_of(model: Path) -> list[tuple[str, int, int]]:
    """(type's name, bytes, number of dimensions) of every tensor of an ONNX file, without reading its data."""
    import math

    import onnx
    from onnx import TensorProto, helper

    held = onnx.load(str(model), load_external_data=False).graph.initializer
    return [
        (
            TensorProto.DataType.Name(tensor.data_type),
            math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize,
            len(tensor.dims),
        )
        for tensor in held
    ]


def totals(held: Iterable[tuple[str, int, int]]) -> tuple[dict[str, int], dict[str, int]]:
    """(bytes, number of tensors) by type, types in alphabetical order."""
    sizes: dict[str, int] = {}
    counts: dict[str, int] = {}
    for kind, size, _ in sorted(held):
        sizes[kind] = sizes.get(kind, 0) + size
        counts[kind] = counts.get(kind, 0) + 1
    return sizes, counts
