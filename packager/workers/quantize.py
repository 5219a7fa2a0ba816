"""Writes an unquantized GGUF file with other tensor types: ``quantize.py JOB.json``.

The blocks are ggml's own: ``ggml_quantize_chunk`` of the library that the xllamacpp wheel brings, called through ctypes
in several threads (the call frees Python's lock). Without such a library gguf-py writes Q8_0 and Q4_0. BF16 and F16 are
numpy's in both cases: ggml would write infinity for a weight that F16 cannot hold.

JOB.json: {"source", "output", "threads": int, "file_type": int, "library": path or null, "imatrix": path or null,
"pairs": [[first byte, end], …] of the key-value pairs to keep, "tensors": [{"name", "shape" (fastest first), "type",
"start", "to": ggml type, "demands_imatrix": bool}, …] in the order of the file}; bytes and starts are the source's.
The .npz of "imatrix" holds for each tensor name the mean squared input of every column (float32). "tuned" (may be
missing): tensor name -> {"file", "module", "group", "heads"}: where workers/tune.py put integers and scales that this
tensor's Q4_0 blocks are to hold; heads is 0 where a converter never reorders the rows.

The layout is llama-quantize's, so that equal tensors make equal files. Pairs are copied as they stand: decoding a
vocabulary of 150 000 tokens to write it again takes gguf-py half a minute. Tensors are read and written a few hundred
thousand weights at a time. Prints ``{"done", "total"}`` lines, bytes of float32.
"""

from __future__ import annotations

import ctypes
import json
import math
import struct
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from packager.tensors.ggml_types import BLOCKS, TYPES
from packager.tensors.safetensors import from_float32, to_float32

Array = np.ndarray[Any, Any]
Encode = Callable[[str, Array, Array | None], Array]

CHUNK = 1 << 18  # weights a task: 1 MB of float32 stays in the second-level cache
TASKS = 4  # tasks in memory for each thread
ALIGNMENT = 32
VERSION, QUANTIZATION_VERSION = 3, 2  # of the GGUF format, and of ggml's block layouts (ggml.h: GGML_QNT_VERSION)
UINT32 = 4  # GGUF's number for the type of a value
NUMBERS = {name: number for number, (name, _, _) in TYPES.items()}
REPORTS = 200  # progress lines a file
FURTHEST = 0.5  # of tuned weights from the source's, relative: rounding to 4 bits is near 0.1, another order above 1


def ggml_encoder(library: str) -> Encode:
    """ggml's quantizers in a shared library. Raises SystemExit when it does not export them."""
    try:
        functions = ctypes.CDLL(library)
        chunk, validate = functions.ggml_quantize_chunk, functions.ggml_validate_row_data
    except (OSError, AttributeError) as error:
        raise SystemExit(f"{Path(library).name} does not export llama.cpp's quantizers: {error}") from error
    number = ctypes.c_int64
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, number, number, number, ctypes.c_void_p)
    validate.restype, validate.argtypes = ctypes.c_bool, (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)

    def encode(kind: str, rows: Array, matrix: Array | None) -> Array:
        weights, size = BLOCKS[kind]
        out = np.empty(rows.size // weights * size, np.uint8)
        columns = None if matrix is None else matrix.ctypes.data
        written = chunk(NUMBERS[kind], rows.ctypes.data, out.ctypes.data, 0, *rows.shape, columns)
        if written != out.size:
            raise SystemExit(f"ggml wrote {written} bytes of {kind}, {out.size} were due")
        if not validate(NUMBERS[kind], out.ctypes.data, out.size):
            raise SystemExit(f"a block of {kind} would hold a scale that is no finite number")
        return out

    return encode


def numpy_encoder() -> Encode:
    """gguf-py's quantizers, for Q8_0 and Q4_0; they take no importance matrix. The bytes are ggml's."""
    import gguf

    codecs = {"Q8_0": gguf.quants.Q8_0, "Q4_0": gguf.quants.Q4_0}

    def encode(kind: str, rows: Array, matrix: Array | None) -> Array:
        if kind not in codecs or matrix is not None:
            raise SystemExit(f"gguf-py cannot write {kind}{' with an importance matrix' if matrix is not None else ''}")
        blocks: Array = codecs[kind].quantize_blocks(rows.reshape(-1, 32))
        return blocks

    return encode


def as_type(kind: str, rows: Array, matrix: Array | None, encode: Encode) -> Array:
    """float32 rows (rows, columns) as bytes of a ggml type. Raises SystemExit for a weight that F16 cannot hold."""
    if kind == "F32":
        return rows
    if kind not in ("F16", "BF16"):
        return encode(kind, rows, matrix)
    stored = from_float32(rows, kind)
    if kind == "F16" and not np.isfinite(stored).all():
        raise SystemExit(f"F16 cannot hold a weight of {np.abs(rows).max():.6g}; the largest it has is 65504")
    return stored


def read_rows(source: str, tensor: Mapping[str, Any], begin: int, end: int) -> Array:
    """Rows of an unquantized tensor as they are stored. They are read, not mapped: a map would count as our memory."""
    kind = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[tensor["type"]]
    row = tensor["shape"][0]
    offset = tensor["start"] + begin * row * np.dtype(kind).itemsize
    found = np.fromfile(source, kind, (end - begin) * row, offset=offset)
    if found.size != (end - begin) * row:
        raise SystemExit(f"{tensor['name']} is cut off in the source file")
    return found.reshape(-1, row)


def convert(
    source: str, tensor: Mapping[str, Any], begin: int, end: int, matrix: Array | None, encode: Encode
) -> Array:
    """Rows ``begin`` to ``end`` of a tensor as bytes of the type that it is to have."""
    stored = read_rows(source, tensor, begin, end)
    if tensor["to"] == tensor["type"]:
        return stored
    return as_type(tensor["to"], to_float32(stored, tensor["type"]), matrix, encode)


def load_matrix(path: str | None) -> dict[str, Array]:
    """The importance matrix: tensor name -> a float32 number for each column. Raises SystemExit for one that is no
    finite number.
    """
    if path is None:
        return {}
    with np.load(path, allow_pickle=False) as stored:
        found = {name: np.ascontiguousarray(stored[name], np.float32) for name in stored.files}
    for name, values in found.items():
        if not np.isfinite(values).all():
            raise SystemExit(f"the importance matrix has a value for {name} that is no finite number")
    return found


def columns_of(tensor: Mapping[str, Any], matrix: Mapping[str, Array]) -> Array | None:
    """The importance of a tensor's columns, None where the matrix has none. Raises SystemExit as llama.cpp does: for
    another number of columns, and where the type demands a matrix.
    """
    name, row = tensor["name"], tensor["shape"][0]
    found = matrix.get(name)
    if found is not None and found.size != row:
        if name != "token_embd.weight":  # a look-up has no inputs
            raise SystemExit(f"the importance matrix has {found.size} columns for {name}, which has {row}")
        found = None
    if found is None and tensor["demands_imatrix"]:
        raise SystemExit(f"{name} as {tensor['to']} needs an importance matrix, and there is none for it")
    return found


def tuned_blocks(spec: Mapping[str, Any], values: Array, name: str) -> bytes:
    """Tuned integers and scales as Q4_0 blocks, values: the source's float32 weights (rows, inputs).

    A block (ggml-common.h) is a float16 scale and 16 bytes: elements 0…15 in the low halves, 16…31 in the high ones;
    a weight is scale · (integer - 8). llama.cpp's converter interleaves the halves of every head of q and k for some
    families: the order is the one in which the tuned weights are near the source's, and there has to be one.
    """
    from safetensors import safe_open

    with safe_open(spec["file"], framework="np") as stored:
        packed, scales = stored.get_tensor(f"{spec['module']}.q"), stored.get_tensor(f"{spec['module']}.scales")
    rows, half = packed.shape
    integers = np.empty((rows, half * 2), np.uint8)
    integers[:, 0::2], integers[:, 1::2] = packed & 15, packed >> 4
    scales = np.repeat(scales, spec["group"] // 32, axis=1)
    orders = [np.arange(rows)]
    if spec["heads"]:
        orders.append(np.arange(rows).reshape(spec["heads"], 2, -1).swapaxes(1, 2).reshape(-1))
    if (rows, half * 2) != values.shape:
        raise SystemExit(f"{name} is {values.shape} in the GGUF and {(rows, half * 2)} among the tuned layers")
    for order in orders:
        wide = np.repeat(scales[order].astype(np.float32), 32, axis=1)
        away = (integers[order].astype(np.float32) - 8) * wide - values
        if np.linalg.norm(away) < FURTHEST * np.linalg.norm(values):
            break
    else:
        raise SystemExit(f"{name}: the tuned weights are not those of the GGUF, in any known order of rows")
    blocks = integers[order].reshape(-1, 32)
    whole = np.empty((len(blocks), 18), np.uint8)
    whole[:, :2] = scales[order].astype("<f2").reshape(-1, 1).view(np.uint8)
    whole[:, 2:] = blocks[:, :16] | (blocks[:, 16:] << 4)
    return whole.tobytes()


def padded(size: int) -> int:
    """``size`` rounded up to the alignment of tensor data."""
    return math.ceil(size / ALIGNMENT) * ALIGNMENT


def header(job: Mapping[str, Any], source: BinaryIO) -> bytes:
    """Everything before the tensor data, as ggml's docs/gguf.md lays it out."""
    pairs = []
    for start, stop in job["pairs"]:
        source.seek(start)
        pairs.append(source.read(stop - start))
    values = {"general.quantization_version": QUANTIZATION_VERSION, "general.file_type": job["file_type"]}
    pairs += [text(key) + struct.pack("<II", UINT32, value) for key, value in values.items()]
    infos, offset = [], 0
    for tensor in job["tensors"]:
        shape, kind = tensor["shape"], tensor["to"]
        place = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, NUMBERS[kind], offset)
        infos.append(text(tensor["name"]) + place)
        offset += padded(size_as(shape, kind))
    start = struct.pack("<4sIQQ", b"GGUF", VERSION, len(infos), len(pairs))
    whole = start + b"".join(pairs) + b"".join(infos)
    return whole.ljust(padded(len(whole)), b"\0")


def text(value: str) -> bytes:
    """A string as GGUF stores it: its length in bytes, then UTF-8."""
    return struct.pack("<Q", len(value.encode())) + value.encode()


def size_as(shape: list[int], kind: str) -> int:
    """Bytes of a tensor of this shape in a type."""
    weights, size = BLOCKS[kind]
    return math.prod(shape) // weights * size


class Writer:
    """The output file. It takes parts of tensors in order and counts what is done."""

    def __init__(self, file: BinaryIO, total: int) -> None:
        self.file, self.total = file, total
        self.done = self.reported = 0

    def write(self, part: Any, weights: int, fill: int) -> None:
        """weights: how many the part holds. fill: zero bytes after it, for the alignment of the next tensor."""
        self.file.write(part)
        self.file.write(bytes(fill))
        self.done += 4 * weights
        if self.done == self.total or self.done - self.reported >= self.total / REPORTS:
            self.reported = self.done
            print(json.dumps({"done": self.done, "total": self.total}), flush=True)


def spans(tensor: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Row ranges of about CHUNK weights that cover a tensor."""
    row, rows = tensor["shape"][0], math.prod(tensor["shape"][1:])
    step = max(1, CHUNK // row)
    for begin in range(0, rows, step):
        yield begin, min(rows, begin + step)


def main(job: dict[str, Any]) -> None:
    """Write the file of a job. A tensor's tasks and the next tensor's overlap, so no thread waits for a small one."""
    tensors, tuned, source = job["tensors"], job.get("tuned") or {}, job["source"]
    kinds = {tensor["name"]: tensor["to"] for tensor in tensors}
    if missing := [name for name in tuned if kinds.get(name) != "Q4_0"]:
        raise SystemExit(f"{missing[0]} was tuned, but the GGUF has no such tensor that can be Q4_0")
    encode = ggml_encoder(job["library"]) if job["library"] else numpy_encoder()
    matrix = load_matrix(job["imatrix"])
    waiting: deque[tuple[Future[Array], int, int]] = deque()
    with (
        Path(source).open("rb") as before,
        Path(job["output"]).open("wb") as out,
        ThreadPoolExecutor(job["threads"]) as pool,
    ):
        writer = Writer(out, sum(math.prod(tensor["shape"]) * 4 for tensor in tensors))

        def write_until(left: int) -> None:
            while len(waiting) > left:
                task, weights, fill = waiting.popleft()
                writer.write(task.result().data, weights, fill)

        out.write(header(job, before))
        for tensor in tensors:
            row, rows = tensor["shape"][0], math.prod(tensor["shape"][1:])
            size = size_as(tensor["shape"], tensor["to"])
            if tensor["name"] in tuned:
                write_until(0)  # it takes the whole tensor: one at a time
                values = to_float32(read_rows(source, tensor, 0, rows), tensor["type"])
                blocks = tuned_blocks(tuned[tensor["name"]], values, tensor["name"])
                writer.write(blocks, row * rows, padded(size) - size)
                continue
            columns = columns_of(tensor, matrix) if tensor["to"] != tensor["type"] else None
            for begin, end in spans(tensor):
                task = pool.submit(convert, source, tensor, begin, end, columns, encode)
                waiting.append((task, row * (end - begin), padded(size) - size if end == rows else 0))
                write_until(TASKS * job["threads"] - 1)
        write_until(0)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
