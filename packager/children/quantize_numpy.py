"""Quantizes a GGUF file with gguf-py's own numpy quantizers: ``quantize_numpy.py JOB.json``.

JOB.json: {"source", "output", "type": "F16"|"BF16"|"Q8_0"|"Q4_0", "head_type", "file_type": int, "threads": int}.
The layout (key order, tensor order by layer then name) is llama-quantize's, so that equal tensors make equal files.
Runs with the gguf-py of the pinned llama.cpp first on its path. Prints ``{"done", "total"}`` lines, bytes of float32.
"""

from __future__ import annotations

import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np

BLOCKS = 1 << 14  # blocks of 32 a chunk: 2 MB of float32 stays in the second-level cache
REPLACED = ("general.quantization_version", "general.file_type")


def order(name: str) -> tuple[int, str]:
    layer = re.match(r"blk\.(\d+)\.", name)
    return (int(layer[1]) if layer else -1, name)


def wanted_type(tensor: Any, kind: str, head_kind: str, tied: bool) -> Any:
    """The type a tensor gets: norms, biases and 1-D tensors stay; the head (or the tied embedding) has its own."""
    if len(tensor.shape) < 2 or "norm" in tensor.name or not tensor.name.endswith("weight"):
        return tensor.tensor_type
    is_head = tensor.name == "output.weight" or (tied and tensor.name == "token_embd.weight")
    wanted = gguf.GGMLQuantizationType[head_kind if is_head else kind]
    block = gguf.GGML_QUANT_SIZES[wanted][0]
    if int(tensor.shape[0]) % block:
        return gguf.GGMLQuantizationType.F16
    return wanted


def as_float(tensor: Any, start: int, stop: int) -> Any:
    """Elements start:stop of a float tensor as float32 (read through the memory map, so only these are touched)."""
    flat = tensor.data.reshape(-1)
    if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
        halves = flat.view(np.uint16)[start:stop]
        return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return flat[start:stop].astype(np.float32)


def convert(kind: Any, values: Any) -> bytes:
    if kind == gguf.GGMLQuantizationType.F32:
        return bytes(values.tobytes())
    if kind == gguf.GGMLQuantizationType.F16:
        with np.errstate(over="ignore"):
            halves = values.astype(np.float16)
        if not np.isfinite(halves).all():
            raise SystemExit(f"F16 cannot hold a weight of {np.abs(values).max():.6g}; the largest it has is 65504")
        return bytes(halves.tobytes())
    return (
        bytes(gguf.quants.quantize(values.reshape(1, -1), kind).tobytes())
        if kind == gguf.GGMLQuantizationType.BF16
        else blocks_of(kind, values)
    )


def blocks_of(kind: Any, values: Any) -> bytes:
    codec = {gguf.GGMLQuantizationType.Q8_0: gguf.quants.Q8_0, gguf.GGMLQuantizationType.Q4_0: gguf.quants.Q4_0}[kind]
    return bytes(codec.quantize_blocks(values.reshape(-1, codec.block_size)).tobytes())


def main(job: dict[str, Any]) -> None:
    reader = gguf.GGUFReader(job["source"])
    tensors = sorted(reader.tensors, key=lambda tensor: order(tensor.name))
    tied = not any(tensor.name == "output.weight" for tensor in tensors)
    kinds = {t.name: wanted_type(t, job["type"], job["head_type"], tied) for t in tensors}
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    writer = gguf.GGUFWriter(job["output"], fields["general.architecture"].contents())
    for name, field in fields.items():
        if name in REPLACED or name == "general.architecture":
            continue
        writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(job["file_type"])
    for tensor in tensors:
        kind = kinds[tensor.name]
        shape = [int(n) for n in reversed(tensor.shape)]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        count = int(np.prod(shape))
        in_bytes = kind not in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)  # numpy has no such type
        writer.add_tensor_info(
            tensor.name,
            gguf.quants.quant_shape_to_byte_shape(shape, kind) if in_bytes else shape,
            np.dtype(np.uint8) if in_bytes else np.dtype(np.float32 if size == 4 else np.float16),
            count // block * size,
            raw_dtype=kind,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    out = writer.fout[0]
    writer.write_padding(out, out.tell())
    total = sum(int(np.prod(t.shape)) * 4 for t in tensors)
    done = 0
    with ThreadPoolExecutor(job["threads"]) as pool:
        for tensor in tensors:
            count = int(np.prod(tensor.shape))
            kind = kinds[tensor.name]
            if kind == tensor.tensor_type:
                out.write(np.ascontiguousarray(tensor.data).tobytes())
                written = tensor.n_bytes
            else:
                step = BLOCKS * 32
                spans = [(start, min(start + step, count)) for start in range(0, count, step)]
                written = 0
                for group in range(0, len(spans), 4 * job["threads"]):  # a bounded number of chunks in memory
                    part = spans[group : group + 4 * job["threads"]]
                    for data in pool.map(lambda s, t=tensor, k=kind: convert(k, as_float(t, *s)), part):
                        out.write(data)
                        written += len(data)
            writer.write_padding(out, written)
            done += count * 4
            print(json.dumps({"done": done, "total": total}), flush=True)
    writer.close()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
