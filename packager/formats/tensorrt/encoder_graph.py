"""An encoder's strongly typed ONNX for TensorRT: float16, with INT8 for chosen layers.

In a strongly typed network the file's types are the precision: TensorRT has no flag for it and chooses nothing. All
tensors are float16 except the softmax, which is float32 between two Casts, and LayerNormalization, which computes in
float32 by its ``stash_type``; the output is float32.

An INT8 layer uses TensorRT's explicit quantization ("Working with Quantized Types", TensorRT documentation): a
QuantizeLinear and DequantizeLinear pair with one scale before the product (all layers that read one activation share
it), and weights stored as 8-bit integers with one scale for each output, both symmetric. When calibration shows it to
be better, the activation is first multiplied by one number for each input, which reduces outlier channels, and the
weights contain its inverse (SmoothQuant, Xiao et al. 2022, arXiv 2211.10438).

The exporter's attention mask (ranges, a gather of booleans, [batch, 1, length, length]) becomes one of [batch, 1, 1,
length], which masks the padding of each text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packager.core.errors import InputError
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

# The newest opset of JetPack 6.2's TensorRT 10.3 (its ONNX parser reads 9 to 20); the graph needs nothing of 21.
OPSET, IR_VERSION = 20, 9
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
# Added to a masked score. float32's least is infinite in float16, and softmax of a row of infinities is NaN.
MASKED = -30000.0
HALF_MAX = 65504.0
LIMIT = 127  # largest magnitude of an 8-bit integer; -128 is not used, for symmetry
LEAST_SCALE = 1e-6  # the scale of a row of zeros: small, and still accurate in float16


@dataclass(frozen=True)
class Group:
    """An activation and the layers that read it. name: the common prefix of their names. weights: the matrices' names,
    in the graph's order.
    """

    name: str
    weights: tuple[str, ...]


@dataclass(frozen=True)
class Rounding:
    """The rounding of a group's activation. scale: of one step. smooth: factors [inputs] of the activation's channels
    before rounding, by which the weights are divided; None for none.
    """

    scale: float
    smooth: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Typed:
    """The tensors of a file. bytes_by_type, count_by_type: by ONNX type. int8: number of matrices in 8 bits."""

    bytes_by_type: Mapping[str, int]
    count_by_type: Mapping[str, int]
    int8: int


def groups(skeleton: Path) -> tuple[Group, ...]:
    """All layers of an exported graph that can be rounded: products of an activation and a parameter."""
    import onnx

    graph = onnx.load(str(skeleton), load_external_data=False).graph
    readers: dict[str, list[str]] = {}
    for activation, weight in _products(list(graph.node), _parameters(graph)):
        readers.setdefault(activation, []).append(weight)
    return tuple(Group(_common(weights), tuple(weights)) for weights in readers.values())


def _common(weights: Sequence[str]) -> str:
    parts = [weight.removesuffix(".weight").split(".") for weight in weights]
    if len(parts) == 1:
        return ".".join(parts[0])
    shared = []
    for names in zip(*parts, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)


def _parameters(graph: onnx.GraphProto) -> set[str]:
    return {value.name for value in graph.input} - set(INPUTS)


def _products(nodes: Sequence[onnx.NodeProto], parameters: set[str]) -> list[tuple[str, str]]:
    """(activation, weight) of every MatMul by the transpose of a parameter that no other node reads."""
    turned = {n.output[0]: n.input[0] for n in nodes if n.op_type == "Transpose" and n.input[0] in parameters}
    readers: dict[str, int] = {}
    for node in nodes:
        for name in node.input:
            readers[turned.get(name, name)] = readers.get(turned.get(name, name), 0) + 1
    return [
        (node.input[0], turned[node.input[1]])
        for node in nodes
        if node.op_type == "MatMul" and node.input[1] in turned and readers[turned[node.input[1]]] == 2
    ]


def write(skeleton: Path, checkpoint: Checkpoint, folder: Path, rounded: Mapping[str, Rounding]) -> None:
    """Write ``model.onnx`` and ``model.onnx.data`` into ``folder``; rounded: by the group's name. The same inputs give
    the same bytes. Raises InputError for a weight that float16 cannot hold.
    """
    import onnx
    from onnx import TensorProto, helper

    model = onnx.load(str(skeleton), load_external_data=False)
    graph = model.graph
    parameters = _parameters(graph)
    writer = _Writer(
        checkpoint,
        parameters,
        {
            weight: rounded[group.name]
            for group in groups(skeleton)
            if group.name in rounded
            for weight in group.weights
        },
    )
    constants = [_half(constant) for constant in graph.initializer]
    ends = {output.name for output in graph.output}
    nodes = writer.rewrite(_shorter_mask(list(graph.node), constants, ends))
    for output in graph.output:
        nodes += _as_float32(nodes, output)
    kept = [value for value in graph.input if value.name not in parameters]
    used = {name for node in nodes for name in node.input}
    name_dimensions(kept, list(graph.output))
    constants = [constant for constant in (*constants, *writer.constants) if constant.name in used]
    for entries, fresh in ((graph.node, nodes), (graph.input, kept), (graph.initializer, constants)):
        del entries[:]
        entries.extend(fresh)
    del graph.value_info[:]
    remove_metadata(model)
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", OPSET))
    model.ir_version = IR_VERSION
    for output in graph.output:
        output.type.tensor_type.elem_type = TensorProto.FLOAT
    offsets, total = layout(writer.parts)
    with (folder / DATA).open("wb") as file:
        file.truncate(total)
    for part in writer.parts:
        store(checkpoint.path, folder / DATA, part, offsets[part.name], writer.stored)
        graph.initializer.append(external(part, offsets[part.name]))
    (folder / MODEL).write_bytes(model.SerializeToString(deterministic=True))


def _half(constant: onnx.TensorProto) -> onnx.TensorProto:
    """A float32 constant of the graph as float16; other types unchanged."""
    import numpy as np
    from onnx import TensorProto, numpy_helper

    if constant.data_type != TensorProto.FLOAT:
        return constant
    value = np.clip(numpy_helper.to_array(constant), -HALF_MAX, HALF_MAX).astype("<f2")
    return numpy_helper.from_array(value, constant.name)


def _shorter_mask(
    nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto], outputs: set[str]
) -> list[onnx.NodeProto]:
    """The graph with its attention mask computed from attention_mask alone, when it has the exporter's form Where(mask,
    0, least), and without the nodes that only the old mask needed. A graph of another form is returned unchanged.
    """
    import numpy as np
    from onnx import TensorProto, numpy_helper

    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    softmaxed = {node.input[0] for node in nodes if node.op_type == "Softmax"}
    masks = [
        node
        for node in nodes
        if node.op_type == "Where"
        and node.output[0] in readers
        and all(r.op_type == "Add" and r.output[0] in softmaxed for r in readers[node.output[0]])
    ]
    if len(masks) != 1:
        return nodes
    (mask,) = masks
    constants += [
        numpy_helper.from_array(np.array(1, "<f2"), "mask.one"),
        numpy_helper.from_array(np.array(MASKED, "<f2"), "mask.least"),
        numpy_helper.from_array(np.array([1, 2], "<i8"), "mask.axes"),
    ]
    fresh = [
        make_node("Cast", ["attention_mask"], "mask.kept", to=TensorProto.FLOAT16),
        make_node("Sub", ["mask.one", "mask.kept"], "mask.left"),
        make_node("Mul", ["mask.left", "mask.least"], "mask.flat"),
        make_node("Unsqueeze", ["mask.flat", "mask.axes"], mask.output[0]),
    ]
    return _alive([*fresh, *(node for node in nodes if node is not mask)], outputs)


def _alive(nodes: list[onnx.NodeProto], outputs: set[str]) -> list[onnx.NodeProto]:
    """The nodes on which the outputs depend, in their order."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted & set(node.output):
            wanted |= set(node.input)
            kept.append(node)
    return kept[::-1]


def _as_float32(nodes: list[onnx.NodeProto], output: onnx.ValueInfoProto) -> list[onnx.NodeProto]:
    """Rename the computed output, and return the nodes of a float32 copy under its own name."""
    from onnx import TensorProto

    name = output.name
    for node in nodes:
        for entries in (node.input, node.output):
            for place, entry in enumerate(entries):
                if entry == name:
                    entries[place] = f"{name}.half"
    cast = make_node("Cast", [f"{name}.half"], name, to=TensorProto.FLOAT)
    cast.name = f"Cast:{name}:float32"  # the renamed node keeps its own name
    return [cast]


class _Writer:
    """Rewrites the graph with float16 parameters, INT8 layers and a float32 softmax."""

    def __init__(self, checkpoint: Checkpoint, parameters: set[str], rounded: Mapping[str, Rounding]) -> None:
        self.checkpoint, self.parameters, self.rounded = checkpoint, parameters, rounded
        self.parts: list[Part] = []
        self.constants: list[onnx.TensorProto] = []
        self._made: set[str] = set()

    def rewrite(self, nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
        products = dict((weight, activation) for activation, weight in _products(nodes, self.parameters))
        turned = {n.output[0]: n.input[0] for n in nodes if n.op_type == "Transpose" and n.input[0] in products}
        rewritten: list[onnx.NodeProto] = []
        for node in nodes:
            weight = turned.get(node.input[1], "") if node.op_type == "MatMul" else ""
            if node.op_type == "Transpose" and node.input[0] in self.rounded:
                continue  # the matrix is stored transposed
            if weight in self.rounded:
                rewritten += self._product(node, weight)
            elif node.op_type == "Softmax":
                rewritten += self._softmax(node)
            else:
                rewritten.append(self._plain(node))
        used = {name for node in rewritten for name in node.input}
        for name in sorted((self.parameters - set(self.rounded)) & used):
            source = source_of(self.checkpoint, name)
            self.parts.append(Part(name, "<f2", source.shape, source, "half"))
        return rewritten

    def _plain(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """The node with float32 replaced by float16 in its attributes."""
        from onnx import TensorProto

        if node.op_type == "Cast":
            for attribute in node.attribute:
                if attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                    attribute.i = TensorProto.FLOAT16
        elif node.op_type in ("ConstantOfShape", "Constant"):
            for attribute in node.attribute:
                if attribute.name == "value":
                    attribute.t.CopyFrom(_half(attribute.t))
        return node

    def _softmax(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        from onnx import TensorProto

        inner, outer = node.input[0], node.output[0]
        node.input[0], node.output[0] = f"{inner}.wide", f"{outer}.wide"
        return [
            make_node("Cast", [inner], f"{inner}.wide", to=TensorProto.FLOAT),
            node,
            make_node("Cast", [f"{outer}.wide"], outer, to=TensorProto.FLOAT16),
        ]

    def _product(self, node: onnx.NodeProto, weight: str) -> list[onnx.NodeProto]:
        source = source_of(self.checkpoint, weight)
        outputs, inputs = source.shape
        self.parts += [
            Part(f"{weight}.q8", "|i1", (inputs, outputs), source, f"int8:{weight}", transposed=True),
            Part(f"{weight}.scale", "<f2", (outputs,), source, f"scale:{weight}"),
        ]
        self._constant("int8.zero", "|i1", 0)
        fresh, activation = self._activation(node.input[0], self.rounded[weight])
        out = node.output[0]
        return [
            *fresh,
            make_node("DequantizeLinear", [f"{weight}.q8", f"{weight}.scale"], f"{weight}.half", axis=1),
            make_node("MatMul", [activation, f"{weight}.half"], out),
        ]

    def _activation(self, name: str, rounding: Rounding) -> tuple[list[onnx.NodeProto], str]:
        """(nodes, name) of the activation quantized and dequantized, made once for all layers that read it."""
        if name in self._made:
            return [], f"{name}.rounded"
        self._made.add(name)
        nodes, before = [], name
        if rounding.smooth is not None:
            self._constant(f"{name}.smooth", "<f2", rounding.smooth)
            nodes, before = [make_node("Mul", [name, f"{name}.smooth"], f"{name}.even")], f"{name}.even"
        self._constant(f"{name}.scale", "<f2", rounding.scale)
        scaled = [f"{name}.scale", "int8.zero"]
        return [
            *nodes,
            make_node("QuantizeLinear", [before, *scaled], f"{name}.q8"),
            make_node("DequantizeLinear", [f"{name}.q8", *scaled], f"{name}.rounded"),
        ], f"{name}.rounded"

    def _constant(self, name: str, kind: str, value: Any) -> None:
        import numpy as np
        from onnx import numpy_helper

        if not any(constant.name == name for constant in self.constants):
            self.constants.append(numpy_helper.from_array(np.array(value, dtype=kind), name))

    def stored(self, rows: NDArray[Any], part: Part) -> NDArray[Any]:
        """The stored form of some rows of a weight [rows, inputs]. Raises InputError for a value beyond float16."""
        import numpy as np

        role, _, weight = part.role.partition(":")
        if role == "half":
            if rows.size and not float(np.abs(rows).max()) <= HALF_MAX:
                raise InputError(
                    f"The tensor {part.name} has a value that float16 cannot hold: above {HALF_MAX:.0f}, or NaN.",
                    why="TensorRT's engine computes in float16 here; the value would become infinite.",
                    fix="Use the recipe onnx_int8, which keeps such tensors in float32.",
                )
            return rows
        smooth = self.rounded[weight].smooth
        even = rows / np.asarray(smooth, "<f2").astype(np.float32) if smooth is not None else rows
        scale: NDArray[Any] = np.maximum(np.abs(even).max(axis=1) / LIMIT, LEAST_SCALE).astype("<f2")
        if role == "scale":
            return scale
        whole: NDArray[Any] = np.clip(np.rint(even / scale.astype(np.float32)[:, None]), -LIMIT, LIMIT).astype(np.int8)
        return whole


def read_back(folder: Path) -> Typed:
    """The types of the file's tensors, read from the file."""
    held = tensors_of(folder / MODEL)
    return Typed(*totals(held), sum(kind == "INT8" and dimensions == 2 for kind, _, dimensions in held))
