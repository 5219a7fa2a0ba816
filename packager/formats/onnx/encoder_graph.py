"""Writes an encoder's ONNX file from its exported graph and the checkpoint's tensors, in float32 or in 8 bits.

The weights are in ``model.onnx.data`` beside ``model.onnx`` (ONNX external data), so the writer holds a few rows of one
tensor at a time and the box maps the file. In 8 bits every linear layer's weight has one scale for each output (per
channel) or for each 64 inputs (blocks), every embedding table one for each row; layer norms, biases and the heads of
classifiers stay in float32.

``speed``: standard operators only. An activation is rounded to 8 bits with its own scale and offset for every token
(LLM.int8(), Dettmers et al. 2022, "vector-wise"), multiplied as integers, and scaled back. onnxruntime's
quantize_dynamic has one scale for a whole batch: a text's vector then depends on the other texts of its batch
(measured: a difference of 0.03 in MiniLM's components), and an outlier affects all of them (cosine 0.992). Weights use
seven of the eight bits: x86 processors without VNNI add pairs of products in 16 bits, which 255 × 127 × 2 would
overflow (onnxruntime's "reduce_range").

``fidelity``: onnxruntime's MatMulNBits, weights in blocks of 64 in all eight bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from packager.formats.onnx.external_data import (
    DATA,
    MODEL,
    Part,
    external,
    layout,
    make_node,
    name_dimensions,
    remove_metadata,
    source_of,
    store,
    tensors_of,
    totals,
)

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from packager.checkpoint.checkpoint import Checkpoint

Form = Literal["float32", "speed", "fidelity"]

BLOCKS = (64, 32, 16)  # inputs that share a scale: the first that divides a layer's inputs
ROW_LIMIT, BLOCK_LIMIT = 63, 127  # largest magnitude of a stored weight
SMALL = 1024  # elements: a smaller tensor is not counted among the weights


@dataclass(frozen=True)
class Written:
    """The tensors of a file: bytes and number by ONNX type ("INT8", "FLOAT"). rounded: number of matrices in 8 bits."""

    bytes_by_type: Mapping[str, int]
    count_by_type: Mapping[str, int]
    rounded: int


def block_for(inputs: int) -> int | None:
    """The block size that divides a layer's inputs; None when none does."""
    return next((size for size in BLOCKS if inputs % size == 0), None)


def fill(skeleton: Path, checkpoint: Checkpoint, folder: Path, form: Form) -> None:
    """Write ``model.onnx`` and ``model.onnx.data`` into ``folder``. The same inputs give the same bytes."""
    import onnx

    model = onnx.load(str(skeleton), load_external_data=False)
    graph = model.graph
    parameters = {value.name for value in graph.input} - {"input_ids", "attention_mask", "token_type_ids"}
    writer = _Writer(checkpoint, form)
    nodes = writer.rewrite(list(graph.node), parameters)
    kept = [value for value in graph.input if value.name not in parameters]
    name_dimensions(kept, list(graph.output))
    for entries, fresh in ((graph.node, nodes), (graph.input, kept)):
        del entries[:]
        entries.extend(fresh)
    del graph.value_info[:]
    remove_metadata(model)
    if any(node.domain == "com.microsoft" for node in nodes):
        model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    offsets, total = layout(writer.parts)
    with (folder / DATA).open("wb") as file:
        file.truncate(total)
    for part in writer.parts:
        store(checkpoint.path, folder / DATA, part, offsets[part.name], _transformed)
        graph.initializer.append(external(part, offsets[part.name]))
    graph.initializer.extend(writer.constants)
    (folder / MODEL).write_bytes(model.SerializeToString(deterministic=True))


class _Writer:
    """Replaces the graph's products with and look-ups in parameters by those with the stored tensors."""

    def __init__(self, checkpoint: Checkpoint, form: Form) -> None:
        self.checkpoint, self.form = checkpoint, form
        self.parts: list[Part] = []
        self.constants: list[onnx.TensorProto] = []
        self.rounded: dict[str, str] = {}  # an activation -> the name its rounded form begins with

    def rewrite(self, nodes: list[onnx.NodeProto], parameters: set[str]) -> list[onnx.NodeProto]:
        turned = {
            node.output[0]: node.input[0]
            for node in nodes
            if node.op_type == "Transpose" and node.input[0] in parameters
        }
        readers: dict[str, list[str]] = {}
        for node in nodes:
            for name in node.input:
                readers.setdefault(turned.get(name, name), []).append(node.op_type)
        rewritten: list[onnx.NodeProto] = []
        quantized: set[str] = set()
        for node in nodes:
            weight = turned.get(node.input[1]) if node.op_type == "MatMul" else None
            table = node.input[0] if node.op_type == "Gather" and node.input[0] in parameters else None
            if self.form != "float32" and weight is not None and set(readers[weight]) == {"Transpose", "MatMul"}:
                rewritten += self._product(node, weight)
                quantized.add(weight)
            elif self.form != "float32" and table is not None and set(readers[table]) == {"Gather"}:
                rewritten += self._look_up(node, table)
                quantized.add(table)
            else:
                rewritten.append(node)
        rewritten = [node for node in rewritten if not (node.op_type == "Transpose" and node.input[0] in quantized)]
        used = {name for node in rewritten for name in node.input}
        for name in sorted((parameters - quantized) & used):
            source = source_of(self.checkpoint, name)
            self.parts.append(Part(name, "<f4", source.shape, source, "float"))
        return rewritten

    def _product(self, node: onnx.NodeProto, weight: str) -> list[onnx.NodeProto]:
        source = source_of(self.checkpoint, weight)
        outputs, inputs = source.shape
        if self.form == "fidelity":
            block = block_for(inputs)
            assert block is not None, "the plan refuses inputs that no block divides"
            blocks = inputs // block
            self.parts += [
                Part(f"{weight}.q8", "|u1", (outputs, blocks, block), source, "blocks", block),
                Part(f"{weight}.scale", "<f4", (outputs, blocks), source, "scale_blocks", block),
            ]
            return [
                make_node(
                    "MatMulNBits",
                    [node.input[0], f"{weight}.q8", f"{weight}.scale"],
                    node.output[0],
                    domain="com.microsoft",
                    K=inputs,
                    N=outputs,
                    bits=8,
                    block_size=block,
                    accuracy_level=4,  # activations in 8 bits too, a block of 64 at a time
                )
            ]
        self.parts += [
            Part(f"{weight}.q8", "|i1", (inputs, outputs), source, "rows_transposed", transposed=True),
            Part(f"{weight}.scale", "<f4", (outputs,), source, "scale_columns"),
            Part(f"{weight}.sums", "<f4", (outputs,), source, "sums"),
        ]
        before, fresh = self._activation(node.input[0])
        out = node.output[0]
        # (scale · q + least) W  =  scale · (q W8) · scale_W  +  least · (sum of W's column)
        return [
            *fresh,
            make_node("MatMulInteger", [f"{before}.q8", f"{weight}.q8"], f"{out}.integer"),
            make_node("Cast", [f"{out}.integer"], f"{out}.float", to=1),
            make_node("Mul", [f"{out}.float", f"{before}.scale"], f"{out}.scaled"),
            make_node("Mul", [f"{out}.scaled", f"{weight}.scale"], f"{out}.product"),
            make_node("Mul", [f"{before}.least", f"{weight}.sums"], f"{out}.offset"),
            make_node("Add", [f"{out}.product", f"{out}.offset"], out),
        ]

    def _activation(self, name: str) -> tuple[str, list[onnx.NodeProto]]:
        """The rounded form of an activation, made once for all layers that read it."""
        if name in self.rounded:
            return name, []
        self.rounded[name] = name
        self._constant("last.axis", "<i8", [-1])
        self._constant("levels", "<f4", 1 / 255)
        self._constant("least.scale", "<f4", 1e-20)
        self._constant("one", "<f4", 1.0)
        self._constant("zero", "|u1", 0)
        return name, [
            make_node("ReduceMin", [name, "last.axis"], f"{name}.least", keepdims=1),
            make_node("ReduceMax", [name, "last.axis"], f"{name}.most", keepdims=1),
            make_node("Sub", [f"{name}.most", f"{name}.least"], f"{name}.range"),
            make_node("Mul", [f"{name}.range", "levels"], f"{name}.step"),
            make_node("Max", [f"{name}.step", "least.scale"], f"{name}.scale"),
            make_node("Sub", [name, f"{name}.least"], f"{name}.shifted"),
            make_node("Div", [f"{name}.shifted", f"{name}.scale"], f"{name}.levels"),
            make_node("QuantizeLinear", [f"{name}.levels", "one", "zero"], f"{name}.q8"),
        ]

    def _look_up(self, node: onnx.NodeProto, table: str) -> list[onnx.NodeProto]:
        source = source_of(self.checkpoint, table)
        if not any(part.name == f"{table}.q8" for part in self.parts):
            self.parts += [
                Part(f"{table}.q8", "|i1", source.shape, source, "rows"),
                Part(f"{table}.scale", "<f4", (source.shape[0], 1), source, "scale_rows"),
            ]
        out, ids = node.output[0], node.input[1]
        return [
            make_node("Gather", [f"{table}.q8", ids], f"{out}.q8", axis=0),
            make_node("Gather", [f"{table}.scale", ids], f"{out}.scale", axis=0),
            make_node("Cast", [f"{out}.q8"], f"{out}.float", to=1),
            make_node("Mul", [f"{out}.float", f"{out}.scale"], out),
        ]

    def _constant(self, name: str, kind: str, value: Any) -> None:
        import numpy as np
        from onnx import numpy_helper

        if not any(constant.name == name for constant in self.constants):
            self.constants.append(numpy_helper.from_array(np.array(value, dtype=kind), name))


def _transformed(rows: NDArray[Any], part: Part) -> NDArray[Any]:
    """The stored form, by ``part.role``, of some rows of a weight [rows, inputs]."""
    import numpy as np

    stored: NDArray[Any]
    if part.role == "float":
        return rows
    limit = {"rows": 127, "scale_rows": 127, "blocks": BLOCK_LIMIT, "scale_blocks": BLOCK_LIMIT}.get(
        part.role, ROW_LIMIT
    )
    grouped = rows.reshape(len(rows), -1, part.block) if part.block else rows
    scale = np.abs(grouped).max(axis=-1, keepdims=True) / np.float32(limit)
    scale[scale == 0] = 1
    if part.role.startswith("scale"):
        stored = scale.reshape(len(rows), *part.shape[1:])
        return stored
    whole = np.rint(grouped / scale)
    if part.role == "sums":
        stored = (whole.sum(axis=-1, dtype=np.float64, keepdims=True) * scale).astype(np.float32)[:, 0]
    elif part.role == "blocks":
        stored = (whole + 128).astype(np.uint8)
    else:
        stored = whole.astype(np.int8)
    return stored


def read_back(folder: Path) -> Written:
    """The types of the file's tensors, read from the file."""
    held = tensors_of(folder / MODEL)
    rounded = sum(kind in ("INT8", "UINT8") and dimensions > 1 for kind, _, dimensions in held)
    return Written(*totals(held), rounded)


def linear_inputs(checkpoint: Checkpoint) -> Iterator[tuple[str, int]]:
    """(name, number of inputs) of every matrix of the encoder's layers, for the plan."""
    for name, tensor in checkpoint.tensors.items():
        if len(tensor.shape) == 2 and "embeddings" not in name and ".layer." in name:
            yield name, tensor.shape[1]
