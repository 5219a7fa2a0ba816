"""Our GGUF files beside those of llama.cpp's compiled quantizer, tensor by tensor, for every ``quant``.

    .venv/bin/python benchmarks/quantizers.py .demo/smollm2               # compiles llama.cpp first, once, in minutes
    .venv/bin/python benchmarks/quantizers.py .demo/smollm2 small --quants Q4_K_M IQ3_M
    .venv/bin/python benchmarks/quantizers.py --record types digests      # writes tests/data/gguf_types.json and
                                                                          # tests/data/ggml_digests.json anew
    .venv/bin/python benchmarks/quantizers.py --speed                     # weights a second of every type, no reference

CHECKPOINT may be "small" (benchmarks/random_qwen2.py) or a name of SHAPES: a made-up file in the shapes of a family.
The importance matrix is made up too: any will do, both sides get the same. Each row is one pair of runs on all cores:
ours is workers/quantize.py with the library of the xllamacpp wheel, theirs ``llama_model_quantize`` of the pinned
llama-cpp-python. "refused" means that the type demands an importance matrix and both sides say so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.llama_reference import reference_python, run_reference  # noqa: E402 - after the path
from packager.checkpoint.families import expected_tensors, find_family, read_shape  # noqa: E402
from packager.core.errors import ToolError  # noqa: E402
from packager.core.progress import Silent  # noqa: E402
from packager.core.store import Cost  # noqa: E402
from packager.formats.gguf import llamacpp  # noqa: E402
from packager.formats.gguf.sizes import gguf_name  # noqa: E402
from packager.formats.gguf.types import DEMANDING, QUANTS  # noqa: E402
from packager.tensors.ggml_types import BLOCKS, TYPES  # noqa: E402
from packager.tensors.gguf_header import Tensor, read_header  # noqa: E402
from packager.tensors.safetensors import from_float32  # noqa: E402
from packager.workers import quantize as child  # noqa: E402

DATA = ROOT / "tests" / "data"
# Families whose types differ: grouped queries, rows that 256 or 32 do not divide, tied heads, the 80 layers of a 70B
# (and of a 65B, which llama.cpp tells by its ungrouped heads), q, k and v in one tensor, four norms a layer.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2-grouped": {"family": "Qwen2", "layers": 28, "hidden": 256, "inner": 512, "heads": 8, "kv": 2, "tied": False},
    "qwen2-narrow": {"family": "Qwen2", "layers": 30, "hidden": 192, "inner": 512, "heads": 6, "kv": 6, "tied": True},
    "qwen2-odd": {"family": "Qwen2", "layers": 9, "hidden": 80, "inner": 160, "heads": 5, "kv": 5, "tied": False},
    "qwen2-80": {"family": "Qwen2", "layers": 80, "hidden": 256, "inner": 256, "heads": 8, "kv": 1, "tied": False},
    "llama-80": {"family": "Llama", "layers": 80, "hidden": 256, "inner": 256, "heads": 8, "kv": 2, "tied": False},
    "llama-65b": {"family": "Llama", "layers": 80, "hidden": 256, "inner": 256, "heads": 8, "kv": 8, "tied": False},
    "llama-pairs": {"family": "Llama", "layers": 17, "hidden": 512, "inner": 768, "heads": 8, "kv": 4, "tied": True},
    "phi3": {"family": "Phi3", "layers": 32, "hidden": 256, "inner": 512, "heads": 8, "kv": 8, "tied": False},
    "gemma3": {"family": "Gemma3", "layers": 26, "hidden": 256, "inner": 512, "heads": 4, "kv": 1, "tied": True},
}
WITH_VALUES = ("gemma3", "phi3", "qwen2-odd")  # the others hold zeros, which are quick: their types are the question
ROWS, COLUMNS = 6, 1024  # of the matrix whose blocks the tests compare
QUIET = Silent()


def config(size: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a shape."""
    family = size["family"]
    return {
        "architectures": [f"{family}ForCausalLM"],
        "model_type": "gemma3_text" if family == "Gemma3" else family.lower(),
        "hidden_size": size["hidden"],
        "intermediate_size": size["inner"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "num_key_value_heads": size["kv"],
        "head_dim": size["hidden"] // size["heads"],
        "vocab_size": 96,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": size["tied"],
    }


def numbers(count: int, seed: int) -> np.ndarray[Any, Any]:
    """float32 numbers between -1.5 and 1.5, most of them near 0, by integer arithmetic: the same on any machine."""
    parts = np.zeros(count, np.int64)
    for turn in range(3):
        bits = np.arange(count, dtype=np.uint32) * np.uint32(3) + np.uint32((seed * 0x9E3779B1 + turn) % (1 << 32))
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # the finalizer "lowbias32"
            bits = (bits ^ (bits >> np.uint32(shift))) * np.uint32(factor)
        parts += ((bits ^ (bits >> np.uint32(16))) & np.uint32(0xFFFF)).astype(np.int64) - (1 << 15)
    return (parts / (1 << 16)).astype(np.float32)


def sample() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Rows with a few outliers and a block of zeros, and the importance of their columns."""
    rows = numbers(ROWS * COLUMNS, 1).reshape(ROWS, COLUMNS) / np.float32(16)
    rows[:, ::97] *= np.float32(8)
    rows[1, :256] = 0
    return rows, np.abs(numbers(COLUMNS, 2)) ** 2 + np.float32(2**-20)


def made_up(name: str, path: Path) -> None:
    """A GGUF file in the shape ``name``, its matrices in bf16: llama.cpp's quantizer reads its header and tensors."""
    import gguf

    size = SHAPES[name]
    family = find_family(config(size))
    shape = read_shape(config(size), family)
    writer = gguf.GGUFWriter(path, size["family"].lower())
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_sliding_window(512)
    writer.add_layer_norm_rms_eps(1e-6)
    for seed, (old, dims) in enumerate(expected_tensors(config(size), family, shape).items()):
        count = int(np.prod(dims))
        values = (numbers(count, seed) if name in WITH_VALUES else np.zeros(count, np.float32)).reshape(dims)
        if len(dims) == 1:
            writer.add_tensor(gguf_name(old), values)
        else:
            stored = from_float32(values, "BF16").view(np.uint8)
            writer.add_tensor(gguf_name(old), stored, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def source_of(name: str, work: Path) -> Path:
    """The unquantized GGUF of a checkpoint folder, "small" or a shape."""
    path = work / f"{Path(name).name}.gguf"
    if name in SHAPES:
        made_up(name, path)
        return path
    checkpoint = Path(name)
    if name == "small":
        from benchmarks.random_qwen2 import make

        checkpoint = work / "small"
        if not checkpoint.exists():
            make(checkpoint, "small")
    llamacpp.convert(checkpoint, "model", "BF16", path, QUIET, Cost())
    return path


def importances(source: Path, path: Path) -> None:
    """A made-up importance matrix for every matrix but the embedding, which has no inputs."""
    matrices = [t for t in read_header(source).tensors if len(t.shape) > 1 and t.name != "token_embd.weight"]
    np.savez(path, **{t.name: np.abs(numbers(t.shape[0], at)) + 2**-20 for at, t in enumerate(matrices)})


def differing(ours: Path, theirs: Path) -> list[str]:
    """Names of the tensors whose type or bytes differ, or are in one file alone."""
    found = [dict(tensors(path)) for path in (ours, theirs)]
    return [name for name in found[0] | found[1] if found[0].get(name) != found[1].get(name)]


def tensors(path: Path) -> Iterator[tuple[str, tuple[str, str]]]:
    """Name, then type and digest, of each tensor of a GGUF file."""
    header = read_header(path)

    def digest(tensor: Tensor) -> str:
        data = np.memmap(path, np.uint8, "r", header.data_start + tensor.offset, (tensor.nbytes,))
        return hashlib.sha256(data.data).hexdigest()

    for tensor in header.tensors:
        yield tensor.name, (tensor.type, digest(tensor))


def whole(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pair(source: Path, quant: str, matrix: Path | None, python: Path, work: Path) -> tuple[str, Path | None, bool]:
    """A row of the table, the reference's file (None where both refuse), and whether the two are the same."""
    ours, theirs = work / "ours.gguf", work / "theirs.gguf"
    cost, start = Cost(), time.monotonic()
    label = f"{source.stem} | {quant} | {'with' if matrix else 'without'}"
    try:
        llamacpp.quantize(source, quant, ours, QUIET, cost, library=llamacpp.library(), imatrix=matrix)
        refusal = ""
    except ToolError as error:
        refusal = str(error.why)
    middle = time.monotonic()
    job = {"source": str(source), "output": str(theirs), "file_type": QUANTS[quant].file_type}
    job |= {"threads": os.cpu_count() or 1, "imatrix": str(matrix) if matrix else None}
    code = run_reference(python, job, work)
    took = f"{middle - start:.1f} s | {time.monotonic() - middle:.1f} s | {cost.peak_rss_bytes / 1e6:.0f} MB"
    if code or refusal:
        both = bool(code) and "needs an importance matrix" in refusal
        verdict = "refused" if both else f"ours: {refusal or 'written'}, theirs: exit status {code}"
        return f"| {label} | {verdict} | | | |", None, both
    names = differing(ours, theirs)
    same = whole(ours) == whole(theirs)
    count = len(read_header(ours).tensors)
    verdict = f"same file, {count} tensors" if same else f"{len(names)} of {count} tensors differ: {names[:3]}"
    return f"| {label} | {verdict} | {took} |", theirs, same


def by_role(found: Mapping[str, str]) -> dict[str, Any]:
    """Types of tensors as "role": type, or type -> layers where layers differ; norms and biases are left out."""
    roles: dict[str, dict[str, list[int]]] = {}
    for name, kind in found.items():
        parts = name.split(".")
        if parts[-1] != "weight" or "norm" in name:
            continue
        layer = int(parts[1]) if parts[0] == "blk" else -1
        roles.setdefault(".".join(parts[2:] if layer >= 0 else parts), {}).setdefault(kind, []).append(layer)
    return {role: next(iter(kinds)) if len(kinds) == 1 else kinds for role, kinds in roles.items()}


def record_types(python: Path, work: Path) -> bool:
    """Write what the reference chose for every shape; whether our files were the same."""
    found: dict[str, Any] = {}
    equal = True
    for name in SHAPES:
        source, matrix = source_of(name, work), work / "matrix.npz"
        importances(source, matrix)
        types: dict[str, Any] = {}
        for quant in QUANTS:
            for how, given in (("without", None), ("with", matrix)):
                row, theirs, same = pair(source, quant, given, python, work)
                print(row, flush=True)
                equal = equal and same
                header = read_header(theirs) if theirs else None
                chosen = by_role({t.name: t.type for t in header.tensors}) if header else None
                types.setdefault(quant, {})[how] = chosen
        found[name] = {"config": config(SHAPES[name]), "types": types}
    write(DATA / "gguf_types.json", found, depth=4)
    return equal


def record_digests(python: Path, work: Path) -> None:
    """Write the digests of the reference's blocks of sample() in every type that it can quantize to."""
    rows, columns = sample()
    np.savez(work / "rows.npz", rows=rows, columns=columns)
    kinds = {name: number for number, (name, _, _) in TYPES.items() if name not in NOT_FOR_WEIGHTS}
    job = {"matrix": str(work / "rows.npz"), "kinds": kinds, "output": str(work / "chunks.npz")}
    assert run_reference(python, job, work) == 0, (work / "reference.log").read_text(errors="replace")
    with np.load(work / "chunks.npz", allow_pickle=False) as made:
        digests = {name: hashlib.sha256(made[name].data).hexdigest() for name in made.files}
        for name in made.files:
            block, size = BLOCKS[name.partition("+")[0]]
            assert made[name].size == rows.size // block * size, name
    write(DATA / "ggml_digests.json", {"rows": hashlib.sha256(rows.data).hexdigest(), **digests}, depth=1)


def speed() -> None:
    """Print millions of weights a second on all cores, by type, without and with an importance matrix."""
    library = llamacpp.library()
    assert library is not None, "this system's xllamacpp exports no C functions"
    encode, threads = child.ggml_encoder(str(library)), os.cpu_count() or 1
    rows, columns = numbers(1 << 20, 1).reshape(512, 2048) / np.float32(16), np.abs(numbers(2048, 2))
    print(f"load {os.getloadavg()[0]:.1f} on {threads} cores\n\n| type | without | with |\n|---|---|---|")
    with ThreadPoolExecutor(threads) as pool:
        for name in [name for name in BLOCKS if name not in NOT_FOR_WEIGHTS]:
            found = []
            for matrix in (None, columns):
                if matrix is None and name in DEMANDING:
                    found.append("")
                    continue
                child.as_type(name, rows[:1], matrix, encode)  # the first call makes the type's tables
                start, done = time.monotonic(), 0
                while time.monotonic() - start < 2:
                    tasks = [pool.submit(child.as_type, name, rows[:128], matrix, encode) for _ in range(threads)]
                    done += sum(rows[:128].size for task in tasks if task.result().size)
                found.append(f"{done / (time.monotonic() - start) / 1e6:.1f}")
            print(f"| {name} | {' | '.join(found)} |", flush=True)


# Not what weights are stored in: numbers of activations, integers, and float64.
NOT_FOR_WEIGHTS = {"F32", "Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"}


def write(path: Path, value: dict[str, Any], depth: int) -> None:
    """JSON with one line for each entry at ``depth``."""

    def lines(value: Any, depth: int, indent: str) -> str:
        if depth == 0 or not isinstance(value, dict):
            return json.dumps(value)
        inner = indent + " "
        parts = [f"{inner}{json.dumps(key)}: {lines(item, depth - 1, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(parts) + f"\n{indent}}}"

    path.write_text(lines(value, depth, "") + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT")
    parser.add_argument("--quants", nargs="+", choices=list(QUANTS), default=list(QUANTS))
    parser.add_argument("--work", type=Path, default=Path(".demo/quantizers"), help="a folder for files of this run")
    parser.add_argument("--reference", type=Path, help="a Python with the pinned llama-cpp-python, if there is one")
    records = ("types", "digests")
    parser.add_argument("--record", nargs="+", choices=records, default=(), help="write what the tests compare with")
    parser.add_argument("--speed", action="store_true", help="print how fast each type is, and nothing else")
    given = parser.parse_args()
    if given.speed:
        speed()
        return 0
    given.work.mkdir(parents=True, exist_ok=True)
    work: Path = given.work.resolve()
    python = given.reference or reference_python(work / "reference")
    print("| model | quant | importance matrix | | ours | llama.cpp | our peak memory |\n|---|---|---|---|---|---|---|")
    equal = True
    for name in given.checkpoints:
        source, matrix = source_of(name, work), work / "matrix.npz"
        importances(source, matrix)
        for quant in given.quants:
            for using in (None, matrix):
                row, _, same = pair(source, quant, using, python, work)
                print(row, flush=True)
                equal = equal and same
        source.unlink()
    if "types" in given.record:
        equal = record_types(python, work) and equal
    if "digests" in given.record:
        record_digests(python, work)
    print("every pair is the same" if equal else "SOME PAIRS DIFFER")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
