"""Read and check a GGUF file's header with bounded reads; no tensor is loaded, and no value is trusted unchecked.

Layout as in ggml's docs/gguf.md: magic, version, counts, key-value pairs, tensor infos, then aligned tensor data.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from packager.tensors.ggml_types import TYPES

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MOST_PAIRS, MOST_TENSORS, MOST_DIMS = 100_000, 1_000_000, 4


class BadHeader(ValueError):
    """The header cannot be read; the message gives the place and the reason."""


@dataclass(frozen=True)
class Tensor:
    """offset: from the start of the tensor data, bytes. shape: ggml order, the fastest dimension first."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """version: of the format. data_start: file offset of the tensor data. size: of the file, bytes. spans: the file
    offsets [begin, end) of each key-value pair.
    """

    version: int
    architecture: str
    alignment: int
    data_start: int
    size: int
    tensors: tuple[Tensor, ...]
    pairs: int
    values: dict[str, object] = field(default_factory=dict)
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)

    def problems(self) -> list[str]:
        """Tensors that overlap, are not aligned, or lie outside the file (a truncated copy)."""
        problems, end = [], 0
        for tensor in sorted(self.tensors, key=lambda item: item.offset):
            if tensor.offset % self.alignment:
                problems.append(f"tensor {tensor.name} is not aligned to {self.alignment} bytes")
            if tensor.offset < end:
                problems.append(f"tensor {tensor.name} overlaps the one before it")
            end = tensor.offset + tensor.nbytes
            if self.data_start + end > self.size:
                problems.append(
                    f"tensor {tensor.name} ends at byte {self.data_start + end}, "
                    f"but the file has only {self.size} bytes: it is cut off"
                )
        if not self.tensors:
            problems.append("it holds no tensor")
        names = [tensor.name for tensor in self.tensors]
        if len(set(names)) != len(names):
            problems.append("a tensor name is there twice")
        return problems

    def type_counts(self) -> dict[str, int]:
        """Tensor type -> number of tensors."""
        counts: dict[str, int] = {}
        for tensor in self.tensors:
            counts[tensor.type] = counts.get(tensor.type, 0) + 1
        return dict(sorted(counts.items()))


class _Reader:
    def __init__(self, stream: BinaryIO, size: int) -> None:
        self.stream, self.size = stream, size

    def take(self, count: int) -> bytes:
        if count > self.size - self.stream.tell():
            raise BadHeader(f"it ends inside its header, at byte {self.size}")
        return self.stream.read(count)

    def skip(self, count: int) -> None:
        if count > self.size - self.stream.tell():
            raise BadHeader(f"it ends inside its header, at byte {self.size}")
        self.stream.seek(count, 1)

    def number(self, code: str) -> int:
        return int(struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0])

    def text(self) -> str:
        try:
            return self.take(self.number("Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadHeader(f"a name at byte {self.stream.tell()} is not UTF-8") from error

    def value(self, kind: int) -> object:
        """A scalar or a string; an array is skipped and gives its length."""
        if kind in SCALARS:
            return struct.unpack(f"<{SCALARS[kind]}", self.take(struct.calcsize(f"<{SCALARS[kind]}")))[0]
        if kind == STRING:
            return self.take(self.number("Q")).decode("utf-8", "replace")
        if kind != ARRAY:
            raise BadHeader(f"unknown value type {kind} at byte {self.stream.tell()}")
        inner, count = self.number("I"), self.number("Q")
        if inner in SCALARS:
            self.skip(count * struct.calcsize(f"<{SCALARS[inner]}"))
        elif inner == STRING:
            for _ in range(count):
                self.skip(self.number("Q"))
        else:
            raise BadHeader(f"an array of type {inner} at byte {self.stream.tell()}")
        return count


def read_header(path: Path) -> Header:
    """Read the header. Raises OSError, and BadHeader, whose message is a sentence that continues the file's name."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        reader = _Reader(stream, size)
        magic = reader.take(4) if size >= 4 else b""
        if magic != b"GGUF":
            raise BadHeader(f"its first bytes are {magic!r} instead of b'GGUF'")
        version = reader.number("I")
        if version not in (2, 3):
            raise BadHeader(f"GGUF version {version} is unknown (2 and 3 are)")
        count, pairs = reader.number("Q"), reader.number("Q")
        if count > MOST_TENSORS or pairs > MOST_PAIRS:
            raise BadHeader(f"{count} tensors and {pairs} values are not plausible")
        values, spans = {}, {}
        for _ in range(pairs):
            begin = stream.tell()
            key = reader.text()
            values[key] = reader.value(reader.number("I"))
            spans[key] = (begin, stream.tell())
        tensors = tuple(_tensor(reader) for _ in range(count))
        alignment = values.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise BadHeader(f"an alignment of {alignment!r} is not a power of two")
        start = math.ceil(stream.tell() / alignment) * alignment
    architecture = str(values.get("general.architecture", ""))
    return Header(version, architecture, alignment, start, size, tensors, pairs, values, spans)


def _tensor(reader: _Reader) -> Tensor:
    name, dims = reader.text(), reader.number("I")
    if not 1 <= dims <= MOST_DIMS:
        raise BadHeader(f"tensor {name} has {dims} dimensions")
    shape = tuple(reader.number("Q") for _ in range(dims))
    kind, offset = reader.number("I"), reader.number("Q")
    if kind not in TYPES:
        raise BadHeader(f"tensor {name} has the unknown type {kind}")
    label, block, nbytes = TYPES[kind]
    if shape[0] % block:
        raise BadHeader(f"tensor {name} has rows of {shape[0]}, which {label} cannot hold (blocks of {block})")
    return Tensor(name, shape, label, offset, math.prod(shape) // block * nbytes)
