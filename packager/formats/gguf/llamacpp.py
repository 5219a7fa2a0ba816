"""Sole owner of llama.cpp: its converter and gguf-py (from one hash-pinned sdist) and its quantizer.

The sdist of llama-cpp-python carries the converter of the very commit its quantizer is built from. The converter and
the numpy quantizers run from there without anything being compiled; the extra ``llamacpp`` adds the compiled quantizer
for the K- and IQ-types.
"""

from __future__ import annotations

import compileall
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from packager.core.errors import InputError, PackagerError, ToolError
from packager.core.pip import pip
from packager.core.processes import WORKERS, ChildFailed, follow, has_module, last_words, run_python, version_of
from packager.core.progress import Progress
from packager.core.store import Cost, cache_root, fetched_once
from packager.tensors.gguf_header import BadHeader, Header, read_header

VERSION = "0.3.36"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
CONVERTER = f"llama.cpp of llama-cpp-python {VERSION} (sdist sha256 {SDIST_SHA256[:16]})"
WANTED = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/gguf/", "LICENSE")

# llama_ftype numbers (include/llama.h), also written as general.file_type
FILE_TYPES: Mapping[str, int] = {
    "F16": 1,
    "Q4_0": 2,
    "Q8_0": 7,
    "Q5_K_M": 17,
    "Q4_K_M": 15,
    "Q6_K": 18,
    "IQ4_XS": 30,
    "BF16": 32,
}
REPLACED = ("general.quantization_version", "general.file_type")  # by a quantizer, as the last pairs
NUMPY_TYPES = frozenset({"F16", "BF16", "Q8_0", "Q4_0"})  # proven byte-identical to llama.cpp's in tests/real


def compiled() -> bool:
    """Whether llama.cpp's compiled quantizer (the extra ``llamacpp``) is installed in the pinned version."""
    return has_module("llama_cpp") and version_of("llama-cpp-python") == VERSION


def sources(progress: Progress) -> Path:
    """The folder of the pinned llama.cpp sources (converter and gguf-py), fetched once into the cache.

    Raises NetworkError when the sdist cannot be had, ToolError when it is not what was pinned.
    """
    final = cache_root() / "tools" / f"llama.cpp-{VERSION}-{SDIST_SHA256[:12]}"

    def fill(work: Path) -> None:
        _unpack(_download(work), work / "tree")
        compileall.compile_dir(work / "tree", quiet=2)  # where PYTHONDONTWRITEBYTECODE is set: once, not a run

    return fetched_once(final, "fetching the llama.cpp converter (76 MB, once)", fill, progress)


def _download(work: Path) -> Path:
    pin = work / "pin.txt"
    pin.write_text(f"llama-cpp-python=={VERSION} --hash=sha256:{SDIST_SHA256}\n", encoding="utf-8")
    pip(
        ["download", "--no-binary", "llama-cpp-python", "-d", work, "-r", pin],
        what="the llama.cpp converter",
        wrong="the llama-cpp-python sdist of the package index is not the pinned one.",
        by_hand=f"llama_cpp_python-{VERSION}.tar.gz",
    )
    found = sorted(work.glob("llama_cpp_python-*.tar.gz"))
    if not found:
        raise ToolError("pip downloaded no llama-cpp-python sdist.")
    return found[0]


def _unpack(archive: Path, tree: Path) -> None:
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts[3:]  # llama_cpp_python-X/vendor/llama.cpp/…
            inner = "/".join(parts)
            if member.isfile() and any(
                inner == want or (want.endswith("/") and inner.startswith(want)) for want in WANTED
            ):
                member.name = inner
                tar.extract(member, tree, filter="data")


def convert(checkpoint: Path, name: str, kind: str, output: Path, progress: Progress, cost: Cost) -> None:
    """Write the checkpoint as one unquantized GGUF of type ``kind`` ("F16" or "BF16", "F32").

    Raises InputError when llama.cpp has no converter for the architecture or its tokenizer, ToolError when it fails.
    """
    tree = sources(progress)
    arguments: list[str | Path] = [tree, checkpoint, "--outfile", output, "--outtype", kind.lower()]
    arguments += ["--model-name", name]
    total = float(sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")))
    try:
        with progress.step(f"converting to GGUF {kind}", total, "B") as task:
            seen = 0.0

            def on_line(line: str) -> None:
                nonlocal seen
                if line.startswith("Writing:") and "%|" in line:  # tqdm's bar
                    done = float(line.split("%|")[0].rsplit(":", 1)[1]) / 100 * total
                    task.advance(done - seen)
                    seen = done

            ran = run_python(WORKERS / "convert.py", arguments, name="the llama.cpp converter", on_line=on_line)
    except ChildFailed as error:
        raise _conversion_error(error) from error
    cost.saw(ran.peak_rss_bytes)


def _conversion_error(error: ChildFailed) -> PackagerError:
    text = error.output
    if "is not supported" in text or "not supported" in last_words(text):
        return InputError(
            "llama.cpp's converter does not know this architecture.",
            why=last_words(text),
            fix="Choose another recipe; `packager recipes` lists them.",
        )
    if "pre-tokenizer was not recognized" in text:
        return InputError(
            "llama.cpp does not know this checkpoint's pre-tokenizer.",
            why="The tokenizer.json differs from that of every model family llama.cpp supports, so its tokens "
            "would come out wrong.",
            fix="Use the base model's own tokenizer files if the fine-tune did not change them.",
        )
    return error


def quantize(
    source: Path,
    kind: str,
    output: Path,
    progress: Progress,
    cost: Cost,
    *,
    imatrix: Path | None = None,
    tuned: Mapping[str, Mapping[str, object]] | None = None,
    use_compiled: bool,
) -> str:
    """Write ``source`` (an unquantized GGUF) as type ``kind``; returns the name of the quantizer that did it.

    tuned: GGUF tensor name -> {"file", "module", "group", "heads"} of integers that a Q4_0 tensor is to hold (see
    workers/quantize_numpy.py); only gguf-py's side can take them. Raises ToolError when the quantizer fails or the
    type needs the compiled one.
    """
    threads = os.cpu_count() or 1
    job: dict[str, Any] = {
        "source": str(source),
        "output": str(output),
        "file_type": FILE_TYPES[kind],
        "threads": threads,
    }
    if use_compiled:
        job["imatrix"] = str(imatrix) if imatrix else None
        follow(WORKERS / "quantize_llama.py", job, f"quantizing to {kind}", progress, cost, work=output.parent)
        return f"llama.cpp ({CONVERTER})"
    if kind not in NUMPY_TYPES:
        raise ToolError(
            f"{kind} needs llama.cpp's compiled quantizer.",
            fix='Install the extra: pip install "packager[llamacpp]", or choose quant=Q8_0.',
        )
    tree = sources(progress)
    header = _header(source)
    job["pairs"] = [list(span) for key, span in header.spans.items() if key not in REPLACED]
    job["tensors"] = [
        {"name": t.name, "shape": t.shape, "type": t.type, "start": header.data_start + t.offset, "bytes": t.nbytes}
        for t in header.tensors
    ]
    # llama.cpp makes the head of a Q4_0 file Q6_K, which gguf-py cannot write: Q8_0 is the nearest it can, and better
    job |= {"type": kind, "head_type": "Q8_0" if kind == "Q4_0" else kind, "tuned": dict(tuned or {})}
    total = 4.0 * source.stat().st_size / 2
    follow(
        WORKERS / "quantize_numpy.py",
        job,
        f"packing tuned integers as {kind}" if tuned else f"quantizing to {kind}",
        progress,
        cost,
        work=output.parent,
        total=total,
        path=(tree / "gguf-py",),
        unit="B",
    )
    return f"gguf-py ({CONVERTER})"


def tensor_types(path: Path) -> dict[str, int]:
    """How many tensors of each GGML type a GGUF file really has, read from its header."""
    return _header(path).type_counts()


def architecture(path: Path) -> str:
    """llama.cpp's name for the architecture of a GGUF file."""
    return _header(path).architecture


def _header(path: Path) -> Header:
    try:
        return read_header(path)
    except BadHeader as error:
        raise ToolError(f"llama.cpp wrote a GGUF file that cannot be read: {error}.", why=f"It is {path}.") from error


def imatrix_names(modules: list[str], family: str, layers: int) -> dict[str, str]:
    """GGUF tensor name for each Hugging Face module name, by gguf-py's own table; unknown modules are left out."""
    import gguf

    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[family]
    table = gguf.get_tensor_name_map(arch, layers)
    names = {module: table.get_name(module) for module in modules}
    return {module: f"{name}.weight" for module, name in names.items() if name}
