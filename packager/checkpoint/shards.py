"""The safetensors files of a folder that belong to the model, and the tensors in them, from the headers."""

from __future__ import annotations

from pathlib import Path

from packager.checkpoint.tokenizer import read_json
from packager.core.errors import InputError
from packager.tensors.safetensors import TensorInfo, read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of a folder from its safetensors headers, sorted by file and offset.

    Raises InputError for missing weights, a missing or superfluous shard, a wrong index and every broken file.
    """
    files = _weight_files(folder)
    if (folder / INDEX).is_file():
        return _indexed(folder, files)
    if not files:
        raise InputError(
            f"{folder} has no weights: there is no {SINGLE} and no {INDEX}.",
            fix="Copy the weights into the folder; a download may have been cut off.",
        )
    if files != [SINGLE]:
        raise InputError(
            f"{folder} has {len(files)} weight files but no {INDEX}."
            if SINGLE not in files
            else f"{folder} has {SINGLE} and also {', '.join(file for file in files if file != SINGLE)}.",
            why="The tensors of the model are ambiguous: two tools could read two different models.",
            fix=f"Copy {INDEX} from the source, or remove the files of the older save.",
        )
    return read_header(folder / SINGLE)


def _weight_files(folder: Path) -> list[str]:
    # the GGUF converter's own pattern; it leaves out other safetensors (an adapter's, Mistral's consolidated)
    return sorted(path.name for path in folder.glob("model*.safetensors"))


def _indexed(folder: Path, files: list[str]) -> dict[str, TensorInfo]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InputError(f"{INDEX} has no weight_map.", why="It names the file of each tensor.", fix="Copy it again.")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if Path(shard).name != shard:
            raise InputError(
                f"{INDEX} names the file {shard!r}, which is not in the folder itself.", fix="Do not use it."
            )
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(shards)} weight files are missing: {', '.join(missing[:3])}.",
            why=f"{INDEX} names them, {folder} does not have them; a copy or download was cut off.",
            fix="Copy or download the checkpoint again.",
        )
    extra = sorted(set(files) - set(shards))
    if extra:
        raise InputError(
            f"{extra[0]} is not named in {INDEX}.",
            why="It is left from another save; the GGUF converter would read it as part of this model.",
            fix="Remove it from the folder.",
        )
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        header = read_header(folder / shard)
        for name in header:
            if weight_map.get(name) != shard:
                says = f"places it in {weight_map[name]}" if name in weight_map else "does not name it"
                raise InputError(
                    f"Tensor {name} is in {shard}, but {INDEX} {says}.",
                    why="Index and weight files come from different saves.",
                    fix="Copy the folder again, or save the model again with save_pretrained.",
                )
        tensors |= header
    absent = sorted(set(weight_map) - set(tensors))
    if absent:
        raise InputError(
            f"{INDEX} places tensor {absent[0]} in {weight_map[absent[0]]}, which does not have it.",
            why=f"Index and weight files come from different saves ({len(absent)} such tensors).",
            fix="Copy the folder again, or save the model again with save_pretrained.",
        )
    return tensors
