"""The matrices of a strongly typed ONNX decoder: float16, or int8 by output row with a DequantizeLinear.

With strong typing TensorRT computes in the types of the file. Rows are read a few at a time and written in the
checkpoint's order; the graph transposes them, which a compiler folds away. Matrices with the same input are stored one
after the other and are one product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from packager.formats.onnx.graph import Graph
from packager.formats.onnx.matrices import ALIGNED, DATA, EMBEDDING, Base
from packager.tensors.rounding import by_row, half
from packager.tensors.safetensors import read_rows, row_chunks, to_float32

if TYPE_CHECKING:
    from packager.checkpoint.checkpoint import Checkpoint

METHOD = "int8, rounded to nearest, symmetric, one float16 scale an output row; computed in float16"


@dataclass(frozen=True)
class Place:
    """A matrix in the data file. begin, scales: offsets of its values and of its rows' scales (None for float16)."""

    rows: int
    inputs: int
    begin: int
    scales: int | None


class Half(Base):
    """Matrices, written to ``file`` when a graph first uses them; a second graph uses the same places.

    bits: 16, or 8 for the layers' matrices (embedding and head stay float16). wrote: called with the number of
    checkpoint bytes that are done. Raises ValueError for a weight that is not finite or beyond float16's range.
    """

    def __init__(self, checkpoint: Checkpoint, file: IO[bytes], bits: int, wrote: Callable[[int], None]) -> None:
        super().__init__(checkpoint)
        self.file, self.bits, self.wrote = file, bits, wrote
        self.places: dict[str, Place] = {}

    def embedding(self, graph: Graph, ids: str) -> str:
        return graph.add("Gather", [self._half(graph, EMBEDDING, self._place((EMBEDDING,))), ids])

    def linear(self, graph: Graph, x: str, modules: Sequence[str]) -> str:
        place, name = self._place(tuple(modules)), "+".join(modules)
        weight = self._eight(graph, name, place) if place.scales is not None else self._half(graph, name, place)
        return graph.add("MatMul", [x, graph.add("Transpose", [weight], perm=[1, 0])])

    def head(self, graph: Graph, x: str) -> str:
        return self.linear(graph, x, (self.head_module,))

    def _half(self, graph: Graph, name: str, place: Place) -> str:
        from onnx import TensorProto

        return graph.external(
            f"{name}.weight",
            TensorProto.FLOAT16,
            (place.rows, place.inputs),
            DATA,
            place.begin,
            2 * place.rows * place.inputs,
        )

    def _eight(self, graph: Graph, name: str, place: Place) -> str:
        from onnx import TensorProto

        assert place.scales is not None
        integers = graph.external(
            f"{name}.integers",
            TensorProto.INT8,
            (place.rows, place.inputs),
            DATA,
            place.begin,
            place.rows * place.inputs,
        )
        scales = graph.external(
            f"{name}.scales", TensorProto.FLOAT16, (place.rows,), DATA, place.scales, 2 * place.rows
        )
        return graph.add("DequantizeLinear", [integers, scales], axis=0)

    def _place(self, modules: tuple[str, ...]) -> Place:
        name = "+".join(modules)
        if name not in self.places:
            eight = self.bits == 8 and modules[0] not in (EMBEDDING, self.head_module)
            rows, begin, scales = 0, self._aligned(), []
            for module in modules:
                info = self.info(module)
                rows += info.shape[0]
                for first, last in row_chunks(info):
                    values = to_float32(read_rows(self.checkpoint.path, info, first, last), info.dtype)
                    if eight:
                        integers, row_scales = by_row(values)
                        self.file.write(integers.tobytes())
                        scales.append(row_scales.tobytes())
                    else:
                        self.file.write(half(values, module).tobytes())
                self.wrote(info.nbytes)
            after = self._aligned() if eight else None
            self.file.write(b"".join(scales))
            self.places[name] = Place(rows, self.info(modules[0]).shape[1], begin, after)
        return self.places[name]

    def _aligned(self) -> int:
        self.file.write(b"\0" * (-self.file.tell() % ALIGNED))
        return self.file.tell()
