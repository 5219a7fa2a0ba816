"""The quantizing child: layout, order and padding of the file, exact widening, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

gguf = pytest.importorskip("gguf")

from packager.formats.gguf import llamacpp  # noqa: E402 - gguf may be missing
from packager.workers import quantize as child  # noqa: E402

TYPES = gguf.GGMLQuantizationType
LIBRARY = llamacpp.library()
needs_library = pytest.mark.skipif(LIBRARY is None, reason="this system's xllamacpp exports no C functions")
VALUES = np.random.default_rng(7).standard_normal((6, 256)).astype(np.float32)


def bits(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """float32 cut to bf16."""
    return (np.ascontiguousarray(values).view(np.uint32) >> 16).astype("<u2")


def job(folder: Path, to: dict[str, str], **changed: Any) -> dict[str, Any]:
    """A source file of three tensors after four bytes that stand for a key-value pair, and the job that converts it."""
    parts = {"norm.weight": ("F32", VALUES[0]), "a.weight": ("BF16", bits(VALUES)), "b.weight": ("F32", VALUES[1:4])}
    (folder / "source").write_bytes(b"pair" + b"".join(values.tobytes() for _, values in parts.values()))
    tensors, start = [], 4
    for name, (kind, values) in parts.items():
        tensors.append({"name": name, "shape": list(values.shape[::-1]), "type": kind, "start": start})
        tensors[-1] |= {"to": to.get(name, kind), "demands_imatrix": False}
        start += values.nbytes
    found = {"source": str(folder / "source"), "output": str(folder / "out"), "threads": 2, "file_type": 7}
    found |= {"library": str(LIBRARY) if LIBRARY else None, "imatrix": None, "pairs": [[0, 4]], "tensors": tensors}
    return found | changed


def written(folder: Path) -> bytes:
    return (folder / "out").read_bytes()


def test_constants_are_those_of_gguf_py() -> None:
    """The child writes them by itself, so that it starts without gguf-py."""
    assert (child.VERSION, child.QUANTIZATION_VERSION) == (gguf.GGUF_VERSION, gguf.GGML_QUANT_VERSION)
    assert gguf.GGUF_DEFAULT_ALIGNMENT == child.ALIGNMENT
    for kind in TYPES:
        if kind.name in child.NUMBERS and kind.name != "Q8_1":  # never stored; gguf-py counts its scales as float32
            assert (child.NUMBERS[kind.name], child.BLOCKS[kind.name]) == (kind.value, gguf.GGML_QUANT_SIZES[kind])


def test_tensors_are_padded_and_stand_where_the_header_says(tmp_path: Path) -> None:
    """Pairs as they were, then version and file type, then each tensor at a multiple of 32."""
    child.main(job(tmp_path, {"a.weight": "BF16"}))
    data = written(tmp_path)
    assert data.startswith(b"GGUF\3\0\0\0\3\0\0\0\0\0\0\0\3\0\0\0\0\0\0\0pair\x1c\0\0\0\0\0\0\0general.quantization")
    body = data[len(data) - 1024 - 3072 - 3072 :]
    assert body == VALUES[0].tobytes() + bits(VALUES).tobytes() + VALUES[1:4].tobytes()
    assert (len(data) - len(body)) % 32 == 0


def test_progress_ends_with_every_weight(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes of float32, whatever the stored type."""
    child.main(job(tmp_path, {}))
    total = 4 * (256 + 6 * 256 + 3 * 256)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"done": total, "total": total}


@needs_library
def test_many_small_tasks_give_the_bytes_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are independent: neither the threads nor the size of a task shows in the file."""
    child.main(job(tmp_path, {"a.weight": "Q4_K", "b.weight": "Q6_K"}, threads=1))
    whole = written(tmp_path)
    monkeypatch.setattr(child, "CHUNK", 256)
    child.main(job(tmp_path, {"a.weight": "Q4_K", "b.weight": "Q6_K"}, threads=3))
    assert written(tmp_path) == whole


def test_bf16_is_widened_exactly() -> None:
    """The sixteen bits are the upper half of a float32, zeros and denormal numbers included."""
    exact = np.array([1.0, -2.5, 3.140625, -0.0, 2.0**-130, 3.3e38], np.float32)
    assert child.to_float32(bits(exact), "BF16").tobytes() == bits(exact).astype(np.uint32).__lshift__(16).tobytes()
    assert child.to_float32(bits(exact[:3]), "BF16").tolist() == [1.0, -2.5, 3.140625]


@needs_library
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_ggml_and_gguf_py_write_the_same_blocks(kind: str) -> None:
    """Where the library has no C functions the file is the same."""
    ours = child.ggml_encoder(str(LIBRARY))(kind, VALUES, None)
    assert ours.tobytes() == child.numpy_encoder()(kind, VALUES, None).tobytes()


@needs_library
@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "IQ4_NL", "Q3_K", "Q2_K"])
def test_what_comes_back_is_near(kind: str) -> None:
    """gguf-py reads ggml's blocks; the error shrinks with the bits."""
    data = child.ggml_encoder(str(LIBRARY))(kind, VALUES, None)
    back = gguf.quants.dequantize(data.reshape(len(VALUES), -1), TYPES[kind])
    size = 8 * child.BLOCKS[kind][1] / child.BLOCKS[kind][0]
    assert np.linalg.norm(back - VALUES) < 2.2 ** (1 - size) * 3 * np.linalg.norm(VALUES)


@needs_library
def test_importance_goes_to_its_columns(tmp_path: Path) -> None:
    """A column that matters more is met better; a tensor that the matrix does not name is quantized without one."""
    columns = np.full(256, 1e-3, np.float32)
    columns[::8] = 10
    np.savez(tmp_path / "matrix.npz", **{"b.weight": columns})
    asked = job(tmp_path, {"a.weight": "IQ4_NL", "b.weight": "IQ4_NL"})
    child.main(asked)
    plain = written(tmp_path)
    child.main(asked | {"imatrix": str(tmp_path / "matrix.npz")})
    found = written(tmp_path)
    size, fill = 3 * 256 // 32 * 18, 16
    assert plain[: -size - fill] == found[: -size - fill]
    errors = [np.abs(_back(data[-size - fill : -fill]) - VALUES[1:4])[:, ::8].mean() for data in (plain, found)]
    assert errors[1] < 0.8 * errors[0]


def _back(blocks: bytes) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = gguf.quants.dequantize(np.frombuffer(blocks, np.uint8).reshape(3, -1), TYPES.IQ4_NL)
    return found


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        (np.ones(128, np.float32), "has 128 columns for b.weight, which has 256"),
        (np.full(256, np.nan, np.float32), "a value for b.weight that is no finite number"),
    ],
)
def test_a_matrix_of_another_model_is_refused(columns: np.ndarray[Any, Any], says: str, tmp_path: Path) -> None:
    """Neither cut nor filled up, as llama.cpp does."""
    np.savez(tmp_path / "matrix.npz", **{"b.weight": columns})
    with pytest.raises(SystemExit, match=says):
        child.main(job(tmp_path, {"b.weight": "Q8_0"}, imatrix=str(tmp_path / "matrix.npz")))


def test_a_type_that_demands_a_matrix_gets_none_without(tmp_path: Path) -> None:
    """llama.cpp calls what would come out garbage."""
    asked = job(tmp_path, {"b.weight": "IQ2_S"})
    asked["tensors"][2]["demands_imatrix"] = True
    with pytest.raises(SystemExit, match=r"b\.weight as IQ2_S needs an importance matrix"):
        child.main(asked)


def test_a_weight_that_f16_cannot_hold_is_refused() -> None:
    """Infinity would be written without a word; it is an error that names the weight."""
    with pytest.raises(SystemExit, match="F16 cannot hold a weight of 70000"):
        child.as_type("F16", np.array([[1.0, 70000.0]], np.float32), None, child.numpy_encoder())


@needs_library
def test_a_scale_that_overflows_is_refused() -> None:
    """Q8_0's scales are float16: 1e30 / 127 is none."""
    with pytest.raises(SystemExit, match="a block of Q8_0 would hold a scale that is no finite number"):
        child.ggml_encoder(str(LIBRARY))("Q8_0", np.full((1, 32), 1e30, np.float32), None)


def test_gguf_py_says_what_it_cannot_write() -> None:
    """The plan refuses it first; a job that comes all the same is not written wrongly."""
    encode = child.numpy_encoder()
    with pytest.raises(SystemExit, match="gguf-py cannot write Q4_K"):
        encode("Q4_K", VALUES, None)
    with pytest.raises(SystemExit, match="cannot write Q4_0 with an importance matrix"):
        encode("Q4_0", VALUES, VALUES[0])


def test_a_library_without_the_functions_is_named(tmp_path: Path) -> None:
    """An xllamacpp of another make is one sentence, not a traceback."""
    (tmp_path / "xllamacpp.abi3.so").write_bytes(b"no library")
    with pytest.raises(SystemExit, match=r"xllamacpp\.abi3\.so does not export llama.cpp's quantizers"):
        child.ggml_encoder(str(tmp_path / "xllamacpp.abi3.so"))


def test_a_source_that_is_cut_off_is_named(tmp_path: Path) -> None:
    """Half a copy of the unquantized file."""
    asked = job(tmp_path, {"b.weight": "Q8_0"})
    (tmp_path / "source").write_bytes((tmp_path / "source").read_bytes()[:-8])
    with pytest.raises(SystemExit, match=r"b\.weight is cut off in the source file"):
        child.main(asked)


HEADS, HEAD, INPUTS = 4, 6, 64


def tuned(folder: Path, group: int) -> tuple[dict[str, Any], np.ndarray[Any, Any]]:
    """A tuned module of q's shape as workers/tune.py stores it, and the weights that it stands for."""
    random = np.random.default_rng(3)
    integers = random.integers(0, 16, (HEADS * HEAD, INPUTS), dtype=np.uint8)
    scales = (random.standard_normal((HEADS * HEAD, INPUTS // group)) / 50).astype(np.float16)
    save_file({"m.q": integers[:, 0::2] | (integers[:, 1::2] << 4), "m.scales": scales}, folder / "layer.safetensors")
    weights = (integers.astype(np.float32) - 8) * np.repeat(scales.astype(np.float32), group, axis=1)
    return {"file": str(folder / "layer.safetensors"), "module": "m", "group": group, "heads": HEADS}, weights


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("interleaved", [False, True])
def test_tuned_integers_are_packed_as_they_are(group: int, interleaved: bool, tmp_path: Path) -> None:
    """gguf-py reads back the very numbers, in the row order of the GGUF, from a source that is only near them."""
    spec, weights = tuned(tmp_path, group)
    if interleaved:
        weights = weights.reshape(HEADS, 2, HEAD // 2, INPUTS).swapaxes(1, 2).reshape(weights.shape)
    source = weights * np.random.default_rng(4).uniform(0.9, 1.1, weights.shape).astype(np.float32)
    data = child.tuned_blocks(spec, source, "blk.0.attn_q.weight")
    back = gguf.quants.dequantize(np.frombuffer(data, np.uint8).reshape(len(weights), -1), TYPES.Q4_0)
    assert np.array_equal(back, weights)


def test_tuned_integers_of_another_model_are_refused(tmp_path: Path) -> None:
    """Weights that are near the source's in no order of rows, a shape that is not the tensor's, another type."""
    spec, weights = tuned(tmp_path, 32)
    with pytest.raises(SystemExit, match="not those of the GGUF"):
        child.tuned_blocks(spec, weights[::-1], "blk.0.attn_q.weight")
    with pytest.raises(SystemExit, match=r"blk\.0\.attn_q\.weight is"):
        child.tuned_blocks(spec, weights[1:], "blk.0.attn_q.weight")
    with pytest.raises(SystemExit, match=r"a\.weight was tuned, but the GGUF has no such tensor"):
        child.main(job(tmp_path, {"a.weight": "Q8_0"}, tuned={"a.weight": spec}))
