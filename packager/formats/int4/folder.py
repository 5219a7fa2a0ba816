"""Writes a checkpoint folder with int4 linear layers, as GPTQ or AWQ.

Both store, for a linear module, ``qweight`` and ``qzeros`` (int32, eight integers in a word) and ``scales`` (float16,
(groups, outputs)); a ``Form`` defines the layout. Embedding, head, norms and biases are float16.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packager.core.errors import GateFailed, InputError
from packager.formats.int4.tuning import linear_modules
from packager.tensors.safetensors import (
    Spec,
    from_float32,
    plan_shards,
    read_header,
    read_rows,
    row_chunks,
    shard_names,
    to_float32,
    write_file,
    write_index,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from numpy.typing import NDArray

    from packager.checkpoint.checkpoint import Checkpoint
    from packager.formats.int4.tuning import Tuned

SHARD_BYTES = 4 << 30
WORD = 8  # integers in one int32
LARGEST = 65504.0  # float16's largest number

Shapes = dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Form:
    """One format. name: its ``quant_method``. shapes: (rows, inputs, group) -> type and shape of a module's tensors.
    data: bytes of one of them, from (its name, integers (rows, inputs), scales (rows, groups), group). config: (group,
    method) -> config.json's ``quantization_config``. weight: (rows, inputs) float32 from a module's tensors.
    """

    name: str
    title: str
    shapes: Callable[[int, int, int], Shapes]
    data: Callable[[str, NDArray[np.uint8], NDArray[np.float16], int], bytes]
    config: Callable[[int, str], dict[str, Any]]
    weight: Callable[[Mapping[str, Any]], NDArray[np.float32]]

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of a module's tensors."""
        return tuple(sorted(self.shapes(WORD, WORD, WORD)))


def specs(form: Form, checkpoint: Checkpoint, modules: Mapping[str, tuple[int, int]], group: int) -> list[Spec]:
    """All tensors to write, sorted by name. modules: the quantized ones with (rows, inputs)."""
    tensors = []
    for name, info in checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        if module in modules:
            tensors += [Spec(f"{module}.{part}", *kind) for part, kind in form.shapes(*modules[module], group).items()]
        else:
            tensors.append(Spec(name, "F16", info.shape))
    return sorted(tensors, key=lambda spec: spec.name)


def write(form: Form, checkpoint: Checkpoint, tuned: Tuned, beside: Iterable[Path], folder: Path) -> None:
    """Write the folder: weights, config.json, and copies of ``beside`` (tokenizer and template).

    Raises InputError for a weight beyond float16.
    """
    modules = linear_modules(checkpoint)
    tensors = specs(form, checkpoint, modules, tuned.group)
    _write(tensors, lambda spec: _data(form, checkpoint, tuned, spec), folder)
    _finish(checkpoint, {"quantization_config": form.config(tuned.group, tuned.method)}, beside, folder)


def write_half(checkpoint: Checkpoint, beside: Iterable[Path], folder: Path) -> None:
    """Write the same folder with every tensor in float16 and none quantized. Raises InputError as ``write``."""
    tensors = sorted(
        (Spec(name, "F16", info.shape) for name, info in checkpoint.tensors.items()), key=lambda spec: spec.name
    )
    _write(tensors, lambda spec: _half(checkpoint, spec.name, "The engine computes"), folder)
    _finish(checkpoint, {}, beside, folder)


def _write(tensors: list[Spec], data: Callable[[Spec], Iterator[bytes]], folder: Path) -> None:
    shards = plan_shards(tensors, SHARD_BYTES)
    for name, shard in zip(shard_names(len(shards)), shards, strict=True):
        write_file(folder / name, shard, (data(spec) for spec in shard))
    write_index(folder, shards)


def _finish(checkpoint: Checkpoint, more: Mapping[str, Any], beside: Iterable[Path], folder: Path) -> None:
    config = {key: value for key, value in checkpoint.config.items() if key not in ("torch_dtype", "dtype")}
    config |= {"dtype": "float16", **more}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for file in beside:
        shutil.copyfile(file, folder / file.name)


def _data(form: Form, checkpoint: Checkpoint, tuned: Tuned, spec: Spec) -> Iterator[bytes]:
    if spec.name not in checkpoint.tensors:
        module, _, part = spec.name.rpartition(".")
        yield form.data(part, *tuned.read(module), tuned.group)
        return
    yield from _half(checkpoint, spec.name, f"{form.title} stores unquantized tensors")


def _half(checkpoint: Checkpoint, name: str, why: str) -> Iterator[bytes]:
    """A tensor's bytes in float16. why: the error's reason up to "in 16 bits"."""
    import numpy as np

    info = checkpoint.tensors[name]
    for begin, end in row_chunks(info):
        values = to_float32(read_rows(checkpoint.path, info, begin, end), info.dtype)
        if values.size and float(np.abs(values).max()) > LARGEST:
            raise InputError(
                f"{name} holds {np.abs(values).max():.6g}, beyond float16's range (65504).",
                why=f"{why} in 16 bits.",
                fix="Use the gguf recipe for this checkpoint.",
            )
        yield from_float32(values, "F16").tobytes()


def words(values: NDArray[np.uint8], order: tuple[int, ...] = tuple(range(WORD))) -> NDArray[np.int32]:
    """Integers 0…15, (rows, 8n), as int32 words (rows, n): integer k of a word in the four bits from 4·order[k] on."""
    import numpy as np

    packed = np.zeros((values.shape[0], values.shape[1] // WORD), np.uint32)
    for k, place in enumerate(order):
        packed |= values[:, k::WORD].astype(np.uint32) << np.uint32(4 * place)
    return packed.view(np.int32)


def integers(packed: NDArray[np.int32], order: tuple[int, ...] = tuple(range(WORD))) -> NDArray[np.uint8]:
    """The integers that ``words`` packed."""
    import numpy as np

    values = np.empty((packed.shape[0], packed.shape[1] * WORD), np.uint8)
    for k, place in enumerate(order):
        values[:, k::WORD] = (packed.view(np.uint32) >> np.uint32(4 * place)) & np.uint32(15)
    return values


def dequantize(form: Form, folder: Path, module: str) -> NDArray[np.float32]:
    """The weight (rows, inputs) that a loader computes from a module's tensors. Raises KeyError."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        if f"{module}.{form.parts[-1]}" in read_header(file):
            with safe_open(file, framework="np") as stored:
                return form.weight({part: stored.get_tensor(f"{module}.{part}") for part in form.parts})
    raise KeyError(module)


def read_back(form: Form, folder: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """The files' bits per weight, from their headers. Raises GateFailed when a module is not int4."""
    stored = {name: info for file in sorted(folder.glob("*.safetensors")) for name, info in read_header(file).items()}
    modules = linear_modules(checkpoint)
    weights = sum(rows * inputs for rows, inputs in modules.values())
    packed = 0
    for name, (rows, inputs) in modules.items():
        kept = stored.get(f"{name}.qweight")
        if f"{name}.weight" in stored or kept is None or kept.nbytes * 2 != rows * inputs:
            raise GateFailed(f"{name} is not int4 in the files.", fix="Do not ship it; report the architecture.")
        packed += sum(stored[f"{name}.{part}"].nbytes for part in form.parts)
    return {"modules": len(modules), "bits_per_weight": round(8 * packed / weights, 3)}
