"""A Checkpoint: the contents of a Hugging Face folder, hub id, ModelScope id or state dict, without its weights.

Only headers, configs and the tokenizer are parsed. Weights are read to compute ``digest`` (cached by size and time) and
by ``check_weights``. Inputs that would break a build later raise InputError here.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packager.checkpoint.families import IGNORED_SUFFIXES, Family, ModelShape, expected_tensors, find_family, read_shape
from packager.checkpoint.origin import MODEL_FILES, Origin
from packager.checkpoint.shards import INDEX, SINGLE, read_tensors
from packager.checkpoint.tokenizer import TokenizerFacts, read_json, read_tokenizer
from packager.core.errors import InputError, UsageError
from packager.core.hashing import combined_digest, file_digest
from packager.core.progress import Progress
from packager.tensors.safetensors import FLOAT_DTYPES, TensorInfo, read_rows, row_chunks

__all__ = [
    "Checkpoint",
    "ModelShape",
    "Origin",
    "TensorInfo",
    "TokenizerFacts",
    "check_weights",
    "file_digest",
    "open_checkpoint",
    "slug",
]

STATE_DICTS = (".bin", ".pth", ".pt")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that passed every check that needs no weights.

    path: the folder with safetensors. name: a slug, safe in file names. dtype: the safetensors name of most weight
    bytes. parameters: elements of all tensors, a tied output layer counted once. weight_bytes: bytes of all tensors.
    identity: computes ``digest``.
    """

    path: Path
    name: str
    origin: Origin
    architecture: str
    model_type: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    identity: Callable[[], str] = field(repr=False, compare=False)
    shape: ModelShape
    parameters: int
    dtype: str
    weight_bytes: int
    tokenizer: TokenizerFacts
    family: Family

    @property
    def digest(self) -> str:
        """SHA-256 over the names and digests of weights, configs and tokenizer files. The first call reads all files
        that are not in the digest cache; a plan needs only headers and does not call it.
        """
        return self.identity()


def slug(text: str) -> str:
    """A name for files and folders from any text: lower-case letters, digits, dots, dashes and underscores."""
    plain = "".join(char for char in unicodedata.normalize("NFKD", text) if not unicodedata.combining(char))
    return re.sub(r"[^a-z0-9._-]+", "-", plain.lower()).strip("-._")[:64].rstrip("-._") or "model"


def open_checkpoint(
    ref: str,
    *,
    revision: str | None = None,
    progress: Progress,
    cache: Path,
    name: str | None = None,
) -> Checkpoint:
    """Locate, check and describe a checkpoint.

    ref: a folder, a ``.bin``/``.pth`` file beside its config.json, a hub id ``org/name`` or ``modelscope:org/name``.
    revision: a branch, tag or commit of a hub. cache: our cache folder (digests, converted state dicts; hub
    downloads stay in the hub's own cache). name: overrides the name taken from ref.
    Raises InputError (not usable), NetworkError (not reachable), ToolError (modelscope not installed), UsageError.
    """
    if name is not None and slug(name) != name:
        raise UsageError(f"The name {name!r} is not safe in file names.", fix=f"Use for example --name {slug(name)}.")
    folder, origin = _locate(ref, revision, progress, cache)
    if not (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
        from packager.checkpoint import state_dict  # imported only when needed: it uses torch

        weights = Path(ref) if Path(ref).is_file() else None
        if weights or state_dict.find(folder):
            folder = state_dict.convert(folder, weights, cache=cache, progress=progress)
            if origin.kind == "folder":
                origin = Origin("state_dict", origin.id)
    return _read(folder, origin, name or slug(origin.id.rsplit("/", 1)[-1]), progress, cache)


def _locate(ref: str, revision: str | None, progress: Progress, cache: Path) -> tuple[Path, Origin]:
    path = Path(ref).expanduser()
    if path.exists():
        if revision is not None:
            raise UsageError(f"{ref} is a folder here; --revision is for hub ids.", fix="Leave --revision out.")
        if path.is_dir():
            return path, Origin("folder", path.resolve().name)
        if path.suffix in STATE_DICTS:
            return path.parent, Origin("state_dict", path.resolve().parent.name)
        raise InputError(
            f"{ref} is a file, not a checkpoint folder.",
            why="A checkpoint is a folder with config.json, tokenizer.json and safetensors.",
            fix=f"Give the folder: {path.parent}",
        )
    from packager.checkpoint import hub

    return hub.download(ref, revision=revision, progress=progress)


def _read(folder: Path, origin: Origin, name: str, progress: Progress, cache: Path) -> Checkpoint:
    if not (folder / "config.json").is_file():
        fix = "Give the folder that save_pretrained or the training tool wrote."
        if (folder / "adapter_config.json").is_file():
            fix = f"This is a LoRA adapter: give its base model as the checkpoint and --adapter {folder}."
        raise InputError(f"{folder} has no config.json, so it is not a checkpoint folder.", fix=fix)
    config = read_json(folder / "config.json")
    if config.get("quantization_config"):
        method = dict(config["quantization_config"]).get("quant_method", "an unnamed method")
        raise InputError(
            f"{folder.name} is already quantized ({method}).",
            why="Quantizing rounded weights a second time loses more than one quantization.",
            fix=(
                "Give the checkpoint in 16 or 32 bits it was made from (for LoRA on a quantized base: the original "
                "base)."
            ),
        )
    family = find_family(config)
    shape = read_shape(config, family)
    tensors = read_tensors(folder)
    _check_tensors(tensors, expected_tensors(config, family, shape), family)
    rows = _embedding_rows(tensors, family)
    if rows != shape.vocab:
        raise InputError(
            f"The embedding has {rows} rows, config.json says vocab_size {shape.vocab}.",
            why="Config and weights come from different models, or tokens were added without saving both.",
            fix=f"Save model and config together, or set vocab_size to {rows} if the weights are right.",
        )
    _check_known(tensors, config, family, shape)
    tokenizer = read_tokenizer(folder, config)
    if tokenizer.vocab_size > rows:
        raise InputError(
            f"The tokenizer's highest id is {tokenizer.vocab_size - 1}, the embedding has only {rows} rows.",
            why=(
                "Tokens were added to the tokenizer and the model was not resized, or the tokenizer is another model's."
            ),
            fix="Take the tokenizer the model was trained with, or call resize_token_embeddings and save again.",
        )
    files = {tensor.file for tensor in tensors.values()}
    return Checkpoint(
        path=folder,
        name=name,
        origin=origin,
        architecture=family.name,
        model_type=str(config.get("model_type") or family.model_type),
        config=config,
        tensors=tensors,
        identity=functools.cache(lambda: folder_digest(folder, files, progress, cache)),
        shape=shape,
        parameters=_parameters(tensors, shape),
        dtype=_main_dtype(tensors),
        weight_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        tokenizer=tokenizer,
        family=family,
    )


def _check_tensors(tensors: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, ...]], family: Family) -> None:
    """Raise InputError for a missing tensor, or one that is not a float of 16, 32 or 64 bits."""
    for tensor in tensors.values():
        if tensor.dtype not in FLOAT_DTYPES and not tensor.name.endswith(IGNORED_SUFFIXES):
            raise InputError(
                f"Tensor {tensor.name} has the data type {tensor.dtype}.",
                why=f"Weights are read in {', '.join(FLOAT_DTYPES)}; others belong to quantized checkpoints.",
                fix="Give the checkpoint in 16 or 32 bits it was made from.",
            )
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise InputError(
            f"{len(missing)} of the {len(expected)} tensors of a {family.name} are missing, the first is {missing[0]}.",
            why=(
                "config.json describes another model than the weights (layers, biases, tied embeddings), or the save "
                "is partial."
            ),
            fix="Compare config.json with the one of the base model; a LoRA adapter has to be given with --adapter.",
        )


def _check_known(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], family: Family, shape: ModelShape
) -> None:
    """Raise InputError for a tensor whose shape differs from the config's, or that the architecture does not have."""
    expected = expected_tensors(config, family, shape)
    for name, size in expected.items():
        if tensors[name].shape != size:
            raise InputError(
                f"Tensor {name} has the shape {list(tensors[name].shape)}, config.json implies {list(size)}.",
                why="config.json describes another model than the weights.",
                fix="Copy config.json from the model the weights came from.",
            )
    if not expected:
        return
    known = set(expected) | {"lm_head.weight"}
    unknown = [name for name in tensors if name not in known and not name.endswith(IGNORED_SUFFIXES)]
    if unknown:
        raise InputError(
            f"Tensor {unknown[0]} is not part of a {family.name} ({len(unknown)} such tensors).",
            why="config.json describes another model, or an adapter was saved into the checkpoint without merging.",
            fix="Save the merged model with save_pretrained, or give the adapter with --adapter.",
        )


def _embedding_rows(tensors: Mapping[str, TensorInfo], family: Family) -> int:
    if family.kind == "decoder":
        return tensors["model.embed_tokens.weight"].shape[0]
    for prefix in family.prefixes:
        embedding = tensors.get(f"{prefix}embeddings.word_embeddings.weight")
        if embedding is not None:
            return embedding.shape[0]
    raise InputError(
        f"The tensor embeddings.word_embeddings.weight of a {family.name} is missing.",
        why="config.json describes another model than the weights.",
        fix="Compare config.json with the one of the base model.",
    )


def _parameters(tensors: Mapping[str, TensorInfo], shape: ModelShape) -> int:
    total = sum(tensor.elements for name, tensor in tensors.items() if not name.endswith(IGNORED_SUFFIXES))
    return total - (tensors["lm_head.weight"].elements if shape.tied and "lm_head.weight" in tensors else 0)


def _main_dtype(tensors: Mapping[str, TensorInfo]) -> str:
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        sizes[tensor.dtype] += tensor.nbytes
    return sizes.most_common(1)[0][0]


def folder_digest(folder: Path, weights: set[str], progress: Progress, cache: Path) -> str:
    """The digest of weight files, index, configs and tokenizer files; other files of the folder are ignored."""
    names = [name for name in (*MODEL_FILES, INDEX, *sorted(weights)) if (folder / name).is_file()]
    total = sum((folder / name).stat().st_size for name in names)
    with progress.step("Reading the checkpoint's digest", total=total, unit="B") as task:
        return combined_digest((name, file_digest(folder / name, cache, task)) for name in names)


def check_weights(checkpoint: Checkpoint, progress: Progress) -> None:
    """Read every tensor once and refuse NaN and infinity, and an output layer that contradicts ``tied``.

    Holds a few MiB at a time. Raises InputError with the tensor's name and its first bad element.
    """
    import numpy as np

    # A float is NaN or infinite when all bits of its exponent are ones: no conversion is needed.
    exponents = {
        "BF16": ("<u2", 0x7F80),
        "F16": ("<u2", 0x7C00),
        "F32": ("<u4", 0x7F800000),
        "F64": ("<u8", 0x7FF << 52),
    }
    with progress.step("Checking the weights", total=checkpoint.weight_bytes, unit="B") as task:
        for tensor in checkpoint.tensors.values():
            if tensor.dtype not in exponents:
                task.advance(tensor.nbytes)
                continue
            kind, mask = exponents[tensor.dtype]
            for begin, end in row_chunks(tensor):
                part = read_rows(checkpoint.path, tensor, begin, end)
                bits = part.view(kind)
                bad = (bits & bits.dtype.type(mask)) == mask
                if bad.any():
                    place = [int(n) for n in np.unravel_index(int(bad.argmax()), part.shape)]
                    raise InputError(
                        f"Tensor {tensor.name} holds NaN or infinity, first at {[begin + place[0], *place[1:]]}.",
                        why="The training diverged or the file is damaged; such a model answers with noise.",
                        fix="Take an earlier training checkpoint, or copy the file again.",
                    )
                task.advance(part.nbytes)
    _check_tie(checkpoint)


def _check_tie(checkpoint: Checkpoint) -> None:
    head, embedding = (checkpoint.tensors.get(name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    if not checkpoint.shape.tied or head is None or embedding is None:
        return
    same = head.shape == embedding.shape and head.dtype == embedding.dtype
    if not same or any(
        (read_rows(checkpoint.path, head, *part) != read_rows(checkpoint.path, embedding, *part)).any()
        for part in row_chunks(head)
    ):
        raise InputError(
            "config.json ties lm_head to the embedding, but the two tensors differ.",
            why="Some programs would use one, some the other.",
            fix='Set "tie_word_embeddings": false in config.json if lm_head was trained on its own, else remove it.',
        )
