"""Reading and writing safetensors without loading weights: headers, memory maps, streamed files.

The format (https://github.com/huggingface/safetensors#format): eight bytes little-endian header length, a JSON
header ``{name: {"dtype", "shape", "data_offsets": [begin, end]}}`` with offsets counted from the header's end,
then the tensors' bytes without holes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packager.core.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Bytes per element. The types that this package cannot convert are listed so that an error can name them.
DTYPE_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
# The dtypes whose values this package reads; numpy has no bf16, so it is kept as its 16-bit pattern.
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
FLOAT_DTYPES = tuple(_NUMPY)
MAX_HEADER_BYTES = 100_000_000  # the reference implementation's own limit
CHUNK_ELEMENTS = 1 << 22  # elements in memory at once when a tensor is streamed: 16 MiB as float32


@dataclass(frozen=True)
class TensorInfo:
    """One tensor in a safetensors file.

    dtype: the safetensors name ("BF16"). file: the file's name inside the checkpoint folder. start: the offset of
    the first byte in that file. nbytes: its size.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    nbytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def _broken(path: Path, why: str) -> InputError:
    return InputError(
        f"{path.name} is not a readable safetensors file.",
        why=why,
        fix=f"Copy or download {path} again and compare its size with the source.",
    )


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file in file order, from its header alone.

    Raises InputError when the file is cut off (it names the first incomplete tensor) or the header is not valid.
    """
    size = path.stat().st_size
    if size < 8:
        raise _broken(path, f"It has {size} bytes; even the header's length takes 8.")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise _broken(path, f"Its first 8 bytes give a header of {length} bytes: this is another kind of file.")
        raw = file.read(length)
    if len(raw) < length:
        raise _broken(path, f"It is cut off inside its header: {size} bytes of at least {8 + length}.")
    try:
        header = json.loads(raw)
    except ValueError as error:
        raise _broken(path, f"Its header is not JSON ({error}).") from error
    if not isinstance(header, dict):
        raise _broken(path, "Its header is not a JSON object.")
    header.pop("__metadata__", None)
    tensors = [_entry(path, name, entry, 8 + length) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.start + tensor.nbytes))
    end = 8 + length
    for tensor in tensors:
        if tensor.start != end:
            raise _broken(path, f"Tensor {tensor.name} starts at byte {tensor.start}, the one before it ends at {end}.")
        end += tensor.nbytes
        if end > size:
            raise InputError(
                f"{path.name} is cut off: the header describes {8 + length + _data_bytes(tensors)} bytes, the file "
                f"has {size}.",
                why=f"Tensor {tensor.name} is the first that is not complete.",
                fix=f"Copy or download {path} again.",
            )
    if end != size:
        raise _broken(path, f"The header describes {end} bytes, the file has {size}: {size - end} are unaccounted for.")
    return {tensor.name: tensor for tensor in tensors}


def _data_bytes(tensors: Iterable[TensorInfo]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _entry(path: Path, name: str, entry: Any, base: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(int(n) for n in entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise _broken(path, f"The header's entry for tensor {name} is malformed ({error!r}).") from error
    if dtype not in DTYPE_BYTES:
        raise _broken(path, f"Tensor {name} has the data type {dtype}, which is not one of {', '.join(DTYPE_BYTES)}.")
    nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if min(shape, default=0) < 0 or begin < 0 or end - begin != nbytes:
        raise _broken(
            path, f"Tensor {name} of shape {list(shape)} needs {nbytes} bytes, its offsets give {end - begin}."
        )
    return TensorInfo(name, dtype, shape, path.name, base + int(begin), nbytes)


def read_rows(folder: Path, tensor: TensorInfo, begin: int = 0, end: int | None = None) -> NDArray[Any]:
    """Rows begin..end of a tensor (all of a vector) in its stored dtype, bf16 as uint16 patterns.

    Read, not mapped: mapped pages would count as resident memory of the build.
    """
    import numpy as np

    shape: tuple[int, ...] = ()
    if tensor.shape:
        end = tensor.shape[0] if end is None else min(end, tensor.shape[0])
        shape = (end - begin, *tensor.shape[1:])
    row = math.prod(tensor.shape[1:])
    kind = np.dtype(_NUMPY[tensor.dtype])
    offset = tensor.start + begin * row * kind.itemsize
    return np.fromfile(folder / tensor.file, kind, math.prod(shape), offset=offset).reshape(shape)


def row_chunks(tensor: TensorInfo | Spec, elements: int = CHUNK_ELEMENTS) -> Iterator[tuple[int, int]]:
    """Row ranges of about ``elements`` elements each that cover a tensor; a scalar is one row."""
    rows = tensor.shape[0] if tensor.shape else 1
    step = max(1, elements // max(1, math.prod(tensor.shape[1:])))
    for begin in range(0, rows, step):
        yield begin, min(rows, begin + step)


def to_float32(stored: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Stored values as float32 (a copy; exact for BF16 and F16, rounded for F64)."""
    import numpy as np

    if dtype == "BF16":
        wide = stored.astype(np.uint32)
        wide <<= np.uint32(16)
        return wide.view(np.float32)
    return stored.astype(np.float32)


def from_float32(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """float32 values rounded to nearest even into the stored form of ``dtype`` (bf16 as uint16 patterns)."""
    import numpy as np

    if dtype != "BF16":
        with np.errstate(over="ignore"):
            return values.astype(_NUMPY[dtype])
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits >> np.uint32(16)) & np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= np.uint32(16)
    patterns = rounded.astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():  # adding to a NaN's bits could carry it into infinity
        patterns[nan] = 0x7FC0
    return patterns


@dataclass(frozen=True)
class Spec:
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def header_bytes(specs: Sequence[Spec]) -> bytes:
    """The length field and header of a safetensors file of these tensors, in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    offset = 0
    for spec in specs:
        offsets = [offset, offset + spec.nbytes]
        header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": offsets}
        offset += spec.nbytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def write_file(path: Path, specs: Sequence[Spec], data: Iterable[Iterator[bytes | memoryview]]) -> None:
    """Write one safetensors file: the header, then each tensor's chunks in order, then fsync.

    specs: the tensors in file order. data: for each spec an iterator of byte chunks. Raises ValueError when a
    tensor yields another number of bytes than its spec says.
    """
    with path.open("wb") as file:
        file.write(header_bytes(specs))
        for spec, chunks in zip(specs, data, strict=True):
            written = 0
            for chunk in chunks:
                written += file.write(chunk)
            if written != spec.nbytes:
                raise ValueError(f"{spec.name}: {written} bytes written, {spec.nbytes} announced")
        file.flush()
        os.fsync(file.fileno())


def plan_shards(specs: Sequence[Spec], limit: int) -> list[list[Spec]]:
    """Split specs, in their order, into shards of at most ``limit`` bytes (a larger tensor gets its own)."""
    shards: list[list[Spec]] = [[]]
    room = limit
    for spec in specs:
        if shards[-1] and spec.nbytes > room:
            shards.append([])
            room = limit
        shards[-1].append(spec)
        room -= spec.nbytes
    return shards


def shard_names(count: int) -> list[str]:
    """The file names transformers gives to ``count`` shards."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_index(folder: Path, shards: Sequence[Sequence[Spec]]) -> None:
    """Write model.safetensors.index.json for several shards; nothing for a single file."""
    if len(shards) == 1:
        return
    names = shard_names(len(shards))
    total = sum(spec.nbytes for shard in shards for spec in shard)
    weight_map = {spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
