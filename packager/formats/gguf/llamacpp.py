"""Sole owner of llama.cpp on the build machine: its converter and gguf-py (from one hash-pinned sdist), and the
quantizers of its ggml (in the library of the xllamacpp wheel).

Nothing is compiled. The sdist of llama-cpp-python carries the converter. The wheel's library exports ggml's C functions
on Linux and macOS (read there with nm: ``ggml_quantize_chunk``, ``ggml_validate_row_data``); Windows' extension module
exports its init alone, so there gguf-py writes the few types that it can.
"""

from __future__ import annotations

import compileall
import math
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from packager.core.errors import InputError, PackagerError, ToolError
from packager.core.pip import pip
from packager.core.processes import WORKERS, ChildFailed, follow, last_words, run_python, version_of
from packager.core.progress import Progress
from packager.core.store import Cost, cache_root, fetched_once
from packager.formats.gguf.types import QUANTS, Unquantized, choose_types, demands_imatrix, of_header
from packager.tensors.gguf_header import BadHeader, Header, read_header

VERSION = "0.3.36"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
CONVERTER = f"llama.cpp of llama-cpp-python {VERSION} (sdist sha256 {SDIST_SHA256[:16]})"
WANTED = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/gguf/", "LICENSE")

REPLACED = ("general.quantization_version", "general.file_type")  # by a quantizer, as the last pairs
# What gguf-py writes with the bytes of llama.cpp's quantizer (tests/real/test_quantizers.py).
NUMPY_TYPES = frozenset({"F16", "BF16", "Q8_0", "Q4_0"})


def library() -> Path | None:
    """The library of the installed xllamacpp wheel whose C functions can be called; None where there is none."""
    from importlib.util import find_spec

    package = find_spec("xllamacpp")
    folders = [Path(folder) for folder in package.submodule_search_locations or ()] if package else []
    return next((file for folder in folders for file in sorted(folder.glob("xllamacpp*.so"))), None)


def quantizer(with_library: bool) -> str:
    """The name and version of what makes the blocks."""
    if with_library:
        return f"ggml of xllamacpp {version_of('xllamacpp')}"
    return f"gguf-py of {CONVERTER}"


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
    library: Path | None,
    imatrix: Path | None = None,
    tuned: Mapping[str, Mapping[str, object]] | None = None,
    chosen: Mapping[str, str] | None = None,
) -> None:
    """Write ``source`` (an unquantized GGUF) as ``kind``, a key of QUANTS.

    library: the one with ggml's quantizers; None: gguf-py's. imatrix: an .npz, see workers/quantize.py. tuned: GGUF
    tensor name -> {"file", "module", "group", "heads"} of integers that a Q4_0 tensor is to hold. chosen: types by
    tensor name that go before llama.cpp's rule. Raises ToolError when the quantizer fails or cannot write a type.
    """
    header = _header(source)
    # The head of a Q4_0 file is Q6_K by llama.cpp's rule, which gguf-py cannot write: Q8_0 is the nearest it can, and
    # better. Tuned integers are for who wants to keep what was taught, and get the better head everywhere.
    head = "Q8_0" if kind == "Q4_0" and (tuned or library is None) else None
    tensors = {tensor.name: tensor for tensor in header.tensors}
    try:
        wanted = choose_types(
            [Unquantized(tensor.name, tensor.shape[::-1], tensor.type) for tensor in header.tensors],
            kind,
            of_header(header),
            imatrix=imatrix is not None,
            head=head,
            chosen=chosen,
        )
    except ValueError as error:
        raise ToolError(f"{source.name} cannot be quantized: {error}.") from error
    if library is None and (other := sorted(set(wanted.values()) - NUMPY_TYPES - {"F32"})):
        raise ToolError(
            f"{other[0]} needs the C functions of xllamacpp's library, and this one exports none.",
            why="Its Windows wheel is built that way.",
            fix="Build on Linux or macOS, or choose quant=Q8_0.",
        )
    job: dict[str, Any] = {
        "source": str(source),
        "output": str(output),
        "threads": os.cpu_count() or 1,
        "file_type": QUANTS[kind].file_type,
        "library": str(library) if library else None,
        "imatrix": str(imatrix) if imatrix else None,
        "pairs": [list(span) for key, span in header.spans.items() if key not in REPLACED],
        "tensors": [
            {
                "name": name,
                "shape": tensors[name].shape,
                "type": tensors[name].type,
                "start": header.data_start + tensors[name].offset,
                "to": to,
                "demands_imatrix": demands_imatrix(name, to),
            }
            for name, to in wanted.items()
        ],
        "tuned": dict(tuned or {}),
    }
    path = [WORKERS.parent.parent]
    if library is None:
        path.append(sources(progress) / "gguf-py")
    follow(
        WORKERS / "quantize.py",
        job,
        f"packing tuned integers as {kind}" if tuned else f"quantizing to {kind}",
        progress,
        cost,
        work=output.parent,
        total=4.0 * sum(math.prod(tensor.shape) for tensor in header.tensors),
        path=path,
        unit="B",
    )


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
