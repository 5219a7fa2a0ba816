"""The matrices of an ONNX decoder: in the checkpoint's own files, or packed as integers beside the graph.

Packed matrices have the layout of onnxruntime's MatMulNBits and GatherBlockQuantized: (rows, blocks, bytes) unsigned,
zero point 128 or 8, one scale for ``block`` inputs. Scales are stored as float16, which halves their size, and cast
when a session is made; int4's are the tuned ones, bit for bit. A tied head uses the embedding's bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from packager.formats.onnx.decoder_graph import MICROSOFT
from packager.formats.onnx.graph import Graph
from packager.tensors.rounding import eight_bits
from packager.tensors.safetensors import TensorInfo, read_rows, row_chunks, to_float32

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from packager.checkpoint.checkpoint import Checkpoint
    from packager.formats.int4.tuning import Tuned

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
DATA = "model.onnx.data"
ALIGNED = 64  # bytes: alignment of a packed tensor
HEAD_ROWS = 16384  # rows of the exact head that are cast to float32 at once
ACCURACY = 4  # activations as int8 in blocks, the only fast kernels on a CPU: float32 took fifty times as long


class Base:
    """The part that both kinds of weights share."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def info(self, module: str) -> TensorInfo:
        return self.checkpoint.tensors[f"{module}.weight"]

    @property
    def head_module(self) -> str:
        return HEAD if f"{HEAD}.weight" in self.checkpoint.tensors and not self.checkpoint.shape.tied else EMBEDDING

    def vector(self, name: str) -> NDArray[np.float32]:
        """A small tensor by its checkpoint name, in float32."""
        info = self.checkpoint.tensors[name]
        return to_float32(read_rows(self.checkpoint.path, info), info.dtype)


class Exact(Base):
    """The checkpoint's own numbers, read from its own files and cast to float32 when they are used."""

    def embedding(self, graph: Graph, ids: str) -> str:
        rows = graph.add("Gather", [self._stored(graph, EMBEDDING), ids])
        return self._float(graph, rows, EMBEDDING)

    def linear(self, graph: Graph, x: str, modules: Sequence[str]) -> str:
        parts = []
        for module in modules:
            weight = self._float(graph, self._stored(graph, module), module)
            parts.append(graph.add("FusedMatMul", [x, weight], domain=MICROSOFT, transB=1))
        return parts[0] if len(parts) == 1 else graph.add("Concat", parts, axis=-1)

    def head(self, graph: Graph, x: str) -> str:
        rows = self.info(self.head_module).shape[0]
        parts = []
        for begin in range(0, rows, HEAD_ROWS):
            part = self._stored(graph, self.head_module, begin, min(begin + HEAD_ROWS, rows))
            weight = self._float(graph, part, self.head_module)
            parts.append(graph.add("FusedMatMul", [x, weight], domain=MICROSOFT, transB=1))
        return parts[0] if len(parts) == 1 else graph.add("Concat", parts, axis=-1)

    def _stored(self, graph: Graph, module: str, begin: int = 0, end: int | None = None) -> str:
        info = self.info(module)
        rows, columns = info.shape
        end = rows if end is None else end
        row = info.nbytes // rows
        name = f"{module}.weight" if (begin, end) == (0, rows) else f"{module}.weight.{begin}"
        start, length = info.start + begin * row, (end - begin) * row
        return graph.external(name, _kind(info.dtype), (end - begin, columns), info.file, start, length)

    def _float(self, graph: Graph, x: str, module: str) -> str:
        if self.info(module).dtype == "F32":
            return x
        from onnx import TensorProto

        return graph.add("Cast", [x], to=TensorProto.FLOAT)


def _kind(dtype: str) -> int:
    from onnx import TensorProto

    return {"F32": TensorProto.FLOAT, "F16": TensorProto.FLOAT16, "BF16": TensorProto.BFLOAT16}[dtype]


@dataclass(frozen=True)
class Place:
    """A packed matrix in the data file: where its integers and its scales begin."""

    rows: int
    inputs: int
    bits: int
    integers: int
    scales: int


class Packed(Base):
    """Integers, written to ``file`` when a graph first uses them; a second graph uses the same places.

    block: inputs that share a scale. tuned: int4 for the layers' matrices, None for int8. Embedding and head are int8.
    wrote: called with the number of checkpoint bytes that are done.
    """

    product: Mapping[str, Any] = {"accuracy_level": ACCURACY}  # MatMulNBits's attributes beside the matrix's own

    def __init__(
        self, checkpoint: Checkpoint, file: IO[bytes], block: int, tuned: Tuned | None, wrote: Callable[[int], None]
    ) -> None:
        super().__init__(checkpoint)
        self.file, self.block, self.tuned, self.wrote = file, block, tuned, wrote
        self.places: dict[str, Place] = {}

    def embedding(self, graph: Graph, ids: str) -> str:
        from onnx import TensorProto

        place = self._place((EMBEDDING,))
        # the same bytes as a tied head, in this operator's shape
        table = graph.external(
            f"{EMBEDDING}.rows",
            TensorProto.UINT8,
            (place.rows, place.inputs),
            DATA,
            place.integers,
            place.rows * place.inputs,
        )
        return graph.add(
            "GatherBlockQuantized",
            [table, ids, self._scales(graph, EMBEDDING, place)],
            domain=MICROSOFT,
            bits=place.bits,
            block_size=self.block,
            gather_axis=0,
            quantize_axis=1,
        )

    def linear(self, graph: Graph, x: str, modules: Sequence[str]) -> str:
        from onnx import TensorProto

        place, name = self._place(tuple(modules)), "+".join(modules)
        blocks, width = place.inputs // self.block, self.block * place.bits // 8
        integers = graph.external(
            f"{name}.integers",
            TensorProto.UINT8,
            (place.rows, blocks, width),
            DATA,
            place.integers,
            place.rows * blocks * width,
        )
        return graph.add(
            "MatMulNBits",
            [x, integers, self._scales(graph, name, place)],
            domain=MICROSOFT,
            K=place.inputs,
            N=place.rows,
            bits=place.bits,
            block_size=self.block,
            **self.product,
        )

    def head(self, graph: Graph, x: str) -> str:
        return self.linear(graph, x, (self.head_module,))

    def _scales(self, graph: Graph, name: str, place: Place) -> str:
        """The scales in the type of the products."""
        from onnx import TensorProto

        return graph.add("Cast", [self._stored_scales(graph, name, place)], to=TensorProto.FLOAT)

    def _stored_scales(self, graph: Graph, name: str, place: Place) -> str:
        from onnx import TensorProto

        blocks = place.inputs // self.block
        return graph.external(
            f"{name}.scales", TensorProto.FLOAT16, (place.rows, blocks), DATA, place.scales, 2 * place.rows * blocks
        )

    def _place(self, modules: tuple[str, ...]) -> Place:
        name = "+".join(modules)
        if name not in self.places:
            four = self.tuned is not None and modules[0] not in (EMBEDDING, HEAD)
            rows = sum(self.info(module).shape[0] for module in modules)
            inputs, scales = self.info(modules[0]).shape[1], []
            begin = self._aligned()
            for module in modules:
                for integers, scale in self._tuned(module) if four else self._eight(module):
                    self.file.write(integers.tobytes())
                    scales.append(scale.tobytes())
                self.wrote(self.info(module).nbytes)
            after = self._aligned()
            self.file.write(b"".join(scales))
            self.places[name] = Place(rows, inputs, 4 if four else 8, begin, after)
        return self.places[name]

    def _aligned(self) -> int:
        self.file.write(b"\0" * (-self.file.tell() % ALIGNED))
        return self.file.tell()

    def _eight(self, module: str) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        info = self.info(module)
        for begin, end in row_chunks(info):
            yield eight_bits(to_float32(read_rows(self.checkpoint.path, info, begin, end), info.dtype), self.block)

    def _tuned(self, module: str) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        assert self.tuned is not None
        integers, scales = self.tuned.read(module)
        yield integers[:, 0::2] | integers[:, 1::2] << 4, scales  # element 2j in the low half of byte j


def link(source: Path, folder: Path) -> None:
    """Hard-link the file ``source`` into ``folder``, or copy it when they are on different disks."""
    import shutil

    try:
        (folder / source.name).hardlink_to(source.resolve())
    except OSError:
        shutil.copyfile(source, folder / source.name)
