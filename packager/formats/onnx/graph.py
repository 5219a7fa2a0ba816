"""An ONNX graph under construction, and the interface to its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray


class Graph:
    """Nodes and initializers. Names are the tensors' own or numbered in order: the same calls give the same bytes."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self._count = 0

    def add(
        self, operator: str, inputs: Sequence[str], *, outputs: Sequence[str] = (), domain: str = "", **attributes: Any
    ) -> str:
        """Append a node and return the name of its first output."""
        from onnx import helper

        self._count += 1
        names = list(outputs) or [f"{operator}.{self._count}"]
        node = helper.make_node(operator, list(inputs), names, name=f"{operator}:{self._count}", domain=domain)
        node.attribute.extend(helper.make_attribute(key, attributes[key]) for key in sorted(attributes))
        self.nodes.append(node)
        return names[0]

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """A small tensor stored in the graph; a name that exists is kept."""
        if name not in self.initializers:
            from onnx import numpy_helper

            self.initializers[name] = numpy_helper.from_array(value, name)
        return name

    def external(self, name: str, kind: int, shape: Sequence[int], file: str, start: int, length: int) -> str:
        """A tensor whose bytes are in a file beside the graph. kind: onnx.TensorProto's number. start, length: in
        bytes.
        """
        from onnx import TensorProto

        if name not in self.initializers:
            tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
            for key, value in (("location", file), ("offset", start), ("length", length)):
                entry = tensor.external_data.add()
                entry.key, entry.value = key, str(value)
            self.initializers[name] = tensor
        return name


class Weights(Protocol):
    """The source of a graph's matrices."""

    def embedding(self, graph: Graph, ids: str) -> str:
        """Rows of the embedding, (batch, tokens, hidden)."""
        ...

    def linear(self, graph: Graph, x: str, modules: Sequence[str]) -> str:
        """x times the modules' transposed weights without bias, their outputs concatenated."""
        ...

    def head(self, graph: Graph, x: str) -> str:
        """The logits, (batch, tokens, vocabulary)."""
        ...

    def vector(self, name: str) -> NDArray[np.float32]:
        """A small tensor (norm, bias) by its checkpoint name."""
        ...


def value_info(name: str, kind: int, shape: Sequence[str | int]) -> onnx.ValueInfoProto:
    from onnx import helper

    return helper.make_tensor_value_info(name, kind, list(shape))
