"""The GPTQ checkpoint format, as vLLM and transformers load it: packed from tuned integers, and read back.

A linear module becomes ``qweight`` (int32, (inputs / 8, rows): bits 4k … 4k+3 of word i hold input 8i + k), ``qzeros``
(int32, (groups, rows / 8), the zero point less one, packed alike), ``scales`` (float16, (groups, rows)) and ``g_idx``
(int32, each input's group). Symmetric, no act-order: the one kind that vLLM loads with groups. Layout as AutoGPTQ's
first version wrote it (``checkpoint_format: gptq``). Embedding, head, norms and biases stay 16 bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packager.errors import InputError
from packager.safetensors_io import (
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
from packager.tuning import ZERO, linear_modules

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from packager.checkpoint import Checkpoint
    from packager.tuning import Tuned

SHARD_BYTES = 4 << 30
WORD = 8  # integers in one int32
PARTS = ("g_idx", "qweight", "qzeros", "scales")
BESIDE = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
LARGEST = 65504.0  # of float16


def quantization_config(group: int, method: str) -> dict[str, Any]:
    """What config.json says of the quantization."""
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": group,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "meta": {"quantizer": ["packager"], "method": method},
    }


def specs(checkpoint: Checkpoint, modules: dict[str, tuple[int, int]], group: int) -> list[Spec]:
    """Every tensor of the file, by name; modules: the quantized ones with (rows, inputs)."""
    found = []
    for name, info in checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        if module not in modules:
            found.append(Spec(name, "F16", info.shape))
            continue
        rows, inputs = info.shape
        shapes = {
            "g_idx": ("I32", (inputs,)),
            "qweight": ("I32", (inputs // WORD, rows)),
            "qzeros": ("I32", (inputs // group, rows // WORD)),
            "scales": ("F16", (inputs // group, rows)),
        }
        found += [Spec(f"{module}.{part}", *shapes[part]) for part in PARTS]
    return sorted(found, key=lambda spec: spec.name)


def write(checkpoint: Checkpoint, tuned: Tuned, folder: Path) -> None:
    """Write the whole checkpoint folder: weights, config, tokenizer. Raises InputError for a weight beyond float16."""
    modules = linear_modules(checkpoint)
    shards = plan_shards(specs(checkpoint, modules, tuned.group), SHARD_BYTES)
    for name, shard in zip(shard_names(len(shards)), shards, strict=True):
        write_file(folder / name, shard, (_data(checkpoint, tuned, spec) for spec in shard))
    write_index(folder, shards)
    config = {key: value for key, value in checkpoint.config.items() if key not in ("torch_dtype", "dtype")}
    config |= {"dtype": "float16", "quantization_config": quantization_config(tuned.group, tuned.method)}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for file in BESIDE:
        if (checkpoint.path / file).is_file():
            shutil.copyfile(checkpoint.path / file, folder / file)
    template = checkpoint.tokenizer.chat_template
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")


def _data(checkpoint: Checkpoint, tuned: Tuned, spec: Spec) -> Iterator[bytes]:
    import numpy as np

    module, _, part = spec.name.rpartition(".")
    if part == "g_idx":
        yield (np.arange(spec.shape[0], dtype="<i4") // tuned.group).astype("<i4").tobytes()
    elif part == "qzeros":
        yield np.full(spec.shape, sum((ZERO - 1) << 4 * k for k in range(WORD)), dtype="<i4").tobytes()
    elif part == "qweight":
        yield pack(tuned.read(module)[0].T).tobytes()
    elif part == "scales" and spec.name not in checkpoint.tensors:
        yield np.ascontiguousarray(tuned.read(module)[1].T).tobytes()
    else:
        info = checkpoint.tensors[spec.name]
        for begin, end in row_chunks(info):
            values = to_float32(read_rows(checkpoint.path, info, begin, end), info.dtype)
            if values.size and float(np.abs(values).max()) > LARGEST:
                raise InputError(
                    f"{spec.name} holds {np.abs(values).max():.6g}, more than float16 can (65504).",
                    why="GPTQ keeps what it does not quantize in 16 bits.",
                    fix="Use the gguf recipe for this checkpoint.",
                )
            yield from_float32(values, "F16").tobytes()


def pack(values: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Integers 0…15, (8n, columns), as int32 words (n, columns): row 8i + k in bits 4k … 4k+3 of word i."""
    import numpy as np

    words = np.zeros((values.shape[0] // WORD, values.shape[1]), np.uint32)
    for k in range(WORD):
        words |= values[k::WORD].astype(np.uint32) << np.uint32(4 * k)
    return words.view(np.int32)


def unpack(words: NDArray[np.int32]) -> NDArray[np.uint8]:
    """The integers that ``pack`` packed."""
    import numpy as np

    found = np.empty((words.shape[0] * WORD, words.shape[1]), np.uint8)
    for k in range(WORD):
        found[k::WORD] = (words.view(np.uint32) >> np.uint32(4 * k)) & np.uint32(15)
    return found


def dequantize(folder: Path, module: str) -> NDArray[np.float32]:
    """The weight (rows, inputs) that a loader computes from a module's four tensors. Raises KeyError."""
    import numpy as np
    from safetensors import safe_open

    names = [f"{module}.{part}" for part in PARTS]
    for file in sorted(folder.glob("*.safetensors")):
        if names[1] in read_header(file):
            with safe_open(file, framework="np") as stored:
                group_of, words, zeros, scales = (stored.get_tensor(name) for name in names)
            zero = unpack(np.ascontiguousarray(zeros.T)).T.astype(np.float32) + 1
            weight = (unpack(words).astype(np.float32) - zero[group_of]) * scales.astype(np.float32)[group_of]
            found: NDArray[np.float32] = np.ascontiguousarray(weight.T)
            return found
    raise KeyError(module)
