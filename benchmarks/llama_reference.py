"""llama.cpp's own quantizer, compiled from the pinned sources, for comparisons: the packager itself never needs it.

``reference_python`` compiles llama-cpp-python once into an environment of its own. That environment's Python then runs
this file: ``llama_reference.py JOB.json``, with {"source", "output", "file_type", "threads", "imatrix": .npz or null}
to quantize a GGUF file by ``llama_model_quantize``, or with {"matrix": .npz, "kinds": {name: number}, "output": .npz}
to quantize the array "rows" by ``ggml_quantize_chunk`` to every type, without and with the importances "columns".
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUFFER = 256 << 20  # bytes of rows held in memory at once; llama.cpp's own default is 8 GiB


def reference_python(folder: Path) -> Path:
    """The Python of an environment with the compiled llama-cpp-python, made in ``folder`` when it is not there. It
    needs a C++ compiler and a package index, and takes minutes. Raises CalledProcessError when pip fails.
    """
    sys.path.insert(0, str(ROOT))
    from packager.formats.gguf.llamacpp import SDIST_SHA256, VERSION

    python, wheels = folder / "venv/bin/python", folder / "wheels"
    if (folder / "done").exists():
        return python
    folder.mkdir(parents=True, exist_ok=True)
    venv.create(folder / "venv", with_pip=True, clear=True)
    pin = folder / "pin.txt"
    pin.write_text(f"llama-cpp-python=={VERSION} --hash=sha256:{SDIST_SHA256}\n", encoding="utf-8")
    pip: list[str | Path] = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    compiling: list[str | Path] = ["wheel", "--no-deps", "--no-binary", "llama-cpp-python", "-r", pin, "-w", wheels]
    subprocess.run([*pip, *compiling], check=True, env={**os.environ, "CMAKE_ARGS": "-DLLAVA_BUILD=OFF"})
    subprocess.run([*pip, "install", *wheels.glob("llama_cpp_python-*.whl")], check=True)
    (folder / "done").touch()
    return python


def run_reference(python: Path, job: dict[str, Any], folder: Path) -> int:
    """Run a job with the reference's Python; its exit status. What it prints goes to folder/reference.log."""
    file = folder / "reference.json"
    file.write_text(json.dumps(job), encoding="utf-8")
    with (folder / "reference.log").open("wb") as log:
        return subprocess.run(
            [python, Path(__file__), file], stdout=log, stderr=subprocess.STDOUT, check=False
        ).returncode


def quantize_file(job: dict[str, Any]) -> int:
    """llama.cpp's exit status: 0, or 1 when it refuses."""
    import llama_cpp
    import numpy as np

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.max_buf_size = job["file_type"], job["threads"], BUFFER
    alive = []  # ctypes keeps no reference to what a struct points at
    if job["imatrix"]:
        with np.load(job["imatrix"], allow_pickle=False) as stored:
            rows = {name: np.ascontiguousarray(stored[name], dtype=np.float32) for name in sorted(stored.files)}
        table = (llama_cpp.llama_model_imatrix_data * (len(rows) + 1))()
        for slot, (name, row) in zip(table, rows.items(), strict=False):
            text = name.encode()
            slot.name, slot.size = text, row.size
            slot.data = row.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            alive += [text, row]
        params.imatrix = ctypes.cast(table, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    return int(llama_cpp.llama_model_quantize(job["source"].encode(), job["output"].encode(), ctypes.byref(params)))


def quantize_chunks(job: dict[str, Any]) -> int:
    """Write "NAME" and "NAME+matrix" for every type; without a matrix only those that ggml takes so."""
    from importlib.util import find_spec

    import numpy as np

    package = find_spec("llama_cpp")
    assert package is not None and package.origin is not None, "llama-cpp-python is not installed here"
    library = ctypes.CDLL(str(Path(package.origin).parent / "lib/libggml-base.so"))
    number = ctypes.c_int64
    chunk = library.ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, number, number, number, ctypes.c_void_p)
    demands = library.ggml_quantize_requires_imatrix
    demands.restype, demands.argtypes = ctypes.c_bool, (ctypes.c_int,)
    with np.load(job["matrix"], allow_pickle=False) as stored:
        rows, columns = stored["rows"], stored["columns"]
    made: dict[str, Any] = {}
    for name, kind in job["kinds"].items():
        for suffix, pointer in (("", None), ("+matrix", columns.ctypes.data)):
            if pointer is None and demands(kind):
                continue
            out = np.zeros(4 * rows.size, np.uint8)
            size = chunk(kind, rows.ctypes.data, out.ctypes.data, 0, *rows.shape, pointer)
            made[name + suffix] = out[:size]
    np.savez(job["output"], **made)
    return 0


def main() -> int:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    return quantize_chunks(job) if "matrix" in job else quantize_file(job)


if __name__ == "__main__":
    sys.exit(main())
