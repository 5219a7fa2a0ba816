"""Quantizes a GGUF file with gguf-py's own numpy quantizers: ``quantize_numpy.py JOB.json``.

JOB.json: {"source", "output", "type": "F16"|"BF16"|"Q8_0"|"Q4_0", "head_type", "file_type": int, "threads": int,
"pairs": [[first byte, end], …] of the key-value pairs to keep, "tensors": [{"name", "shape" (fastest first), "type",
"start", "bytes"}, …]}; bytes and starts are those of the source file. "tuned" (may be missing): tensor name ->
{"file", "module", "group", "heads"}: where workers/tune.py put integers and scales that this tensor's Q4_0 blocks are
to hold; heads is 0 where a converter never reorders the rows.
The layout (key order, tensor order by layer then name) is llama-quantize's, so that equal tensors make equal files.
Pairs are copied as they stand: decoding a vocabulary of 150 000 tokens to write it again takes gguf-py half a minute.
Runs with the gguf-py of the pinned llama.cpp first on its path. Prints ``{"done", "total"}`` lines, bytes of float32.
"""

from __future__ import annotations

import json
import math
import mmap
import re
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors import safe_open

BLOCKS = 1 << 14  # blocks of 32 a chunk: 2 MB of float32 stays in the second-level cache
ALIGNMENT = 32
UINT32 = 4  # GGUF's number for the type of a value
FURTHEST = 0.5  # of tuned weights from the source's, relative: rounding to 4 bits is near 0.1, another order above 1
Types = gguf.GGMLQuantizationType


def order(name: str) -> tuple[int, str]:
    layer = re.match(r"blk\.(\d+)\.", name)
    return (int(layer[1]) if layer else -1, name)


def wanted_type(tensor: dict[str, Any], kind: str, head_kind: str, tied: bool) -> Any:
    """The type a tensor gets: norms, biases and 1-D tensors stay; the head (or the tied embedding) has its own."""
    name: str = tensor["name"]
    if len(tensor["shape"]) < 2 or "norm" in name or not name.endswith("weight"):
        return Types[tensor["type"]]
    is_head = name == "output.weight" or (tied and name == "token_embd.weight")
    wanted = Types[head_kind if is_head else kind]
    return Types.F16 if tensor["shape"][0] % gguf.GGML_QUANT_SIZES[wanted][0] else wanted


def as_float(data: Any, kind: Any, start: int, stop: int) -> Any:
    """Elements start:stop of a float tensor's bytes as float32 (through the memory map: only these are touched)."""
    if kind == Types.BF16:
        return (data.view("<u2")[start:stop].astype(np.uint32) << np.uint32(16)).view(np.float32)
    return data.view({Types.F32: "<f4", Types.F16: "<f2"}[kind])[start:stop].astype(np.float32)


def convert(kind: Any, values: Any) -> bytes:
    if kind == Types.F32:
        return bytes(values.tobytes())
    if kind == Types.F16:
        with np.errstate(over="ignore"):
            halves = values.astype(np.float16)
        if not np.isfinite(halves).all():
            raise SystemExit(f"F16 cannot hold a weight of {np.abs(values).max():.6g}; the largest it has is 65504")
        return bytes(halves.tobytes())
    return (
        bytes(gguf.quants.quantize(values.reshape(1, -1), kind).tobytes())
        if kind == Types.BF16
        else blocks_of(kind, values)
    )


def blocks_of(kind: Any, values: Any) -> bytes:
    codec = {Types.Q8_0: gguf.quants.Q8_0, Types.Q4_0: gguf.quants.Q4_0}[kind]
    return bytes(codec.quantize_blocks(values.reshape(-1, codec.block_size)).tobytes())


def tuned_blocks(spec: dict[str, Any], values: Any, name: str) -> bytes:
    """Tuned integers and scales as Q4_0 blocks, values: the source's float32 weights (rows, inputs).

    A block (ggml-common.h) is a float16 scale and 16 bytes: elements 0…15 in the low halves, 16…31 in the high ones;
    a weight is scale · (integer - 8). llama.cpp's converter interleaves the halves of every head of q and k for some
    families: the order is the one in which the tuned weights are near the source's, and there has to be one.
    """
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
    return math.ceil(size / ALIGNMENT) * ALIGNMENT


def header(job: dict[str, Any], source: Any, tensors: list[dict[str, Any]], kinds: dict[str, Any]) -> bytes:
    """Everything before the tensor data, as ggml's docs/gguf.md lays it out."""
    pairs = [source[start:stop].tobytes() for start, stop in job["pairs"]]
    values = {"general.quantization_version": gguf.GGML_QUANT_VERSION, "general.file_type": job["file_type"]}
    pairs += [text(key) + struct.pack("<II", UINT32, value) for key, value in values.items()]
    infos, offset = [], 0
    for tensor in tensors:
        shape, kind = tensor["shape"], kinds[tensor["name"]]
        infos.append(text(tensor["name"]) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset))
        offset += padded(size_as(shape, kind))
    start = struct.pack("<4sIQQ", b"GGUF", gguf.GGUF_VERSION, len(tensors), len(pairs))
    whole = start + b"".join(pairs) + b"".join(infos)
    return whole.ljust(padded(len(whole)), b"\0")


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def size_as(shape: list[int], kind: Any) -> int:
    """Bytes of a tensor of this shape in a type."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // int(block) * int(size)


def main(job: dict[str, Any]) -> None:
    with Path(job["source"]).open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    source: Any = np.frombuffer(mapped, np.uint8)
    tensors = sorted(job["tensors"], key=lambda tensor: order(tensor["name"]))
    tied = not any(tensor["name"] == "output.weight" for tensor in tensors)
    tuned = job.get("tuned") or {}
    kinds = {t["name"]: wanted_type(t, job["type"], job["head_type"], tied) for t in tensors}
    if missing := [name for name in tuned if kinds.get(name) != Types.Q4_0]:
        raise SystemExit(f"{missing[0]} was tuned, but the GGUF has no such tensor that can be Q4_0")
    total = sum(math.prod(tensor["shape"]) * 4 for tensor in tensors)
    done = 0
    with Path(job["output"]).open("wb") as out, ThreadPoolExecutor(job["threads"]) as pool:
        out.write(header(job, source, tensors, kinds))
        for tensor in tensors:
            count, kind, before = math.prod(tensor["shape"]), kinds[tensor["name"]], Types[tensor["type"]]
            data: Any = source[tensor["start"] : tensor["start"] + tensor["bytes"]]
            written = 0
            if tensor["name"] in tuned:
                values = as_float(data, before, 0, count).reshape(tensor["shape"][::-1])
                written = out.write(tuned_blocks(tuned[tensor["name"]], values, tensor["name"]))
            elif kind == before:
                written = out.write(data)
            else:
                step = BLOCKS * 32
                spans = [(start, min(start + step, count)) for start in range(0, count, step)]
                for group in range(0, len(spans), 4 * job["threads"]):  # a bounded number of chunks in memory
                    part = spans[group : group + 4 * job["threads"]]
                    for made in pool.map(lambda s, d=data, b=before, k=kind: convert(k, as_float(d, b, *s)), part):
                        written += out.write(made)
            out.write(bytes(padded(written) - written))
            done += count * 4
            if hasattr(mmap, "MADV_DONTNEED"):  # pages that were read count as ours until they are dropped
                mapped.madvise(mmap.MADV_DONTNEED)
            print(json.dumps({"done": done, "total": total}), flush=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
