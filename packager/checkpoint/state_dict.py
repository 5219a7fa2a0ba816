"""Converts ``.bin`` and ``.pth`` state dicts to safetensors without running code from a pickle. The only owner of
torch.load.

torch reads them with weights_only=True (no code) and mmap=True (no copy in memory); a file that torch refuses is
refused here. The result is stored in our cache under the digest of its sources.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packager.checkpoint.origin import CONFIG_FILES
from packager.checkpoint.tokenizer import TOKENIZER_FILES, read_json
from packager.core.errors import InputError, ToolError
from packager.core.hashing import combined_digest, file_digest
from packager.core.progress import Progress
from packager.tensors.safetensors import CHUNK_ELEMENTS, Spec, shard_names, write_file, write_index

if TYPE_CHECKING:
    from torch import Tensor

PICKLES = (".bin", ".pth", ".pt")
INDEX = "pytorch_model.bin.index.json"
_NAMES = {"torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}
# Keys under which training loops put the model's state dict.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_HOW = "Convert it where you trust it: load the model with transformers and call save_pretrained(FOLDER)."


def find(folder: Path) -> list[Path]:
    """The state dict files of a folder: pytorch_model.bin, the shards of its index, or its only .bin, .pth or .pt file.

    [] when there is none or more than one. Raises InputError when the index lists a file that is missing.
    """
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        names = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
                raise InputError(f"{INDEX} names {name!r}, which is not in {folder}.", fix="Copy the folder again.")
        return [folder / name for name in names]
    if (folder / "pytorch_model.bin").is_file():
        return [folder / "pytorch_model.bin"]
    # trainers save these beside the model; they are not weights
    others = {"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scheduler.bin", "scaler.pt"}
    pickles = [path for path in sorted(folder.glob("*")) if path.suffix in PICKLES and path.name not in others]
    return pickles if len(pickles) == 1 else []


def convert(folder: Path, weights: Path | None, *, cache: Path, progress: Progress) -> Path:
    """A folder of safetensors with the configs and tokenizer of ``folder``, made from its state dict once.

    weights: the file to convert, None for the folder's own (``find``). Raises InputError when the file could run code,
    is not a state dict, or has no config beside it; ToolError without torch.
    """

    files = [weights] if weights is not None else find(folder)
    names = [name for name in (*CONFIG_FILES, *TOKENIZER_FILES) if (folder / name).is_file()]
    if "config.json" not in names:
        raise InputError(
            f"{folder} has weights but no config.json.",
            why="A state dict holds numbers only; the architecture has to be known.",
            fix="Copy config.json and the tokenizer files of the base model into the folder.",
        )
    sources = [*files, *(folder / name for name in names)]

    def make(part: Path) -> None:
        tied = bool(read_json(folder / "config.json").get("tie_word_embeddings"))
        shards = []
        for path, name in zip(files, shard_names(len(files)), strict=True):
            shards.append(_write(_load(path), part / name, path, tied, progress))
        write_index(part, shards)
        for name in names:
            (part / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, part / name)

    return _cached(sources, make, cache)


def convert_file(path: Path, name: str, *, cache: Path, progress: Progress) -> Path:
    """A folder with one pickled state dict, converted to the safetensors file ``name``. Raises as ``convert``."""

    def make(part: Path) -> None:
        _write(_load(path), part / name, path, False, progress)

    return _cached([path], make, cache)


def _cached(sources: Iterable[Path], make: Callable[[Path], None], cache: Path) -> Path:
    digest = combined_digest((path.name, file_digest(path, cache)) for path in sources)
    done = cache / "state_dicts" / digest[:32]
    if done.is_dir():
        return done
    done.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=done.parent, prefix=".part-"))
    try:
        make(part)
        if not done.is_dir():  # another process may have been first
            part.replace(done)
    except OSError:
        if not done.is_dir():
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return done


def _load(path: Path) -> Mapping[str, Tensor]:
    try:
        import torch
    except ImportError as error:
        raise ToolError(
            f"Reading {path.name} needs torch, which is not installed.",
            fix="Install torch (CPU is enough), or give the checkpoint as safetensors.",
        ) from error
    import pickle  # only for the name of the error that torch's restricted unpickler raises

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line), "")
        raise InputError(
            f"{path.name} holds more than tensors, and loading it could run code. It was not loaded.",
            why=reason.strip()[:300],
            fix=_HOW,
        ) from error
    except (RuntimeError, ValueError, EOFError, OSError) as error:
        raise InputError(
            f"{path.name} is not a state dict that torch can read without a copy in memory.",
            why=str(error).splitlines()[0][:300] if str(error) else type(error).__name__,
            fix=_HOW,
        ) from error
    return _tensors(path, loaded)


def _tensors(path: Path, loaded: Any) -> dict[str, Tensor]:
    """The state dict itself, without a training loop's wrapper and common prefixes. Raises InputError."""
    import torch

    for key in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    if not isinstance(loaded, Mapping) or not loaded:
        raise InputError(f"{path.name} holds a {type(loaded).__name__}, not a state dict.", fix=_HOW)
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise InputError(
                f"{path.name} is not a state dict: its entry {name!r} is a {type(value).__name__}, not a tensor.",
                fix=_HOW,
            )
    for prefix in ("module.", "_orig_mod."):  # DataParallel and torch.compile
        if all(name.startswith(prefix) for name in loaded):
            loaded = {name.removeprefix(prefix): value for name, value in loaded.items()}
    return dict(loaded)


def _write(tensors: Mapping[str, Tensor], out: Path, source: Path, tied: bool, progress: Progress) -> list[Spec]:
    kept = {name: tensor for name, tensor in tensors.items() if not (tied and name == "lm_head.weight")}
    specs = []
    for name, tensor in kept.items():
        dtype = _NAMES.get(str(tensor.dtype))
        if dtype is None and not tensor.is_floating_point():
            continue  # integer buffers (position_ids): every loader computes them
        if dtype is None:
            raise InputError(f"{source.name}: tensor {name} has the data type {tensor.dtype}.", fix=_HOW)
        specs.append(Spec(name, dtype, tuple(tensor.shape)))
    with progress.step(f"Converting {source.name}", total=sum(spec.nbytes for spec in specs), unit="B") as task:

        def chunks(tensor: Tensor) -> Iterator[memoryview]:
            import torch

            flat = tensor.detach().contiguous().reshape(-1)
            for start in range(0, flat.numel(), CHUNK_ELEMENTS):
                data = flat[start : start + CHUNK_ELEMENTS].view(torch.uint8).numpy().data
                task.advance(data.nbytes)
                yield data

        write_file(out, specs, (chunks(kept[spec.name]) for spec in specs))
    return specs
