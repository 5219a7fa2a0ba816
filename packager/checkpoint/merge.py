"""Merges a LoRA adapter into its base with numpy, tensor by tensor, a chunk of rows at a time.

The arithmetic is peft's (``LoraLayer.merge``): W + scale·(B·A) in float32, rounded once to the base's dtype.
Memory depends on the chunk of rows, not on the model; the result is a normal Hugging Face folder.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packager.checkpoint.checkpoint import Checkpoint, slug
from packager.checkpoint.lora import EMBEDDING, HEAD, Adapter, Change, Fit, check_fit, open_adapter, plan_changes
from packager.checkpoint.origin import CONFIG_FILES
from packager.checkpoint.tokenizer import TOKENIZER_FILES, read_json, token_ids
from packager.core.errors import InputError
from packager.core.progress import Progress
from packager.tensors.safetensors import (
    Spec,
    TensorInfo,
    from_float32,
    read_rows,
    row_chunks,
    shard_names,
    to_float32,
    write_file,
    write_index,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Adapter", "check_fit", "merge", "merged_name", "open_adapter"]


def merged_name(checkpoint: Checkpoint, adapter: Adapter) -> str:
    """The merged model's name, without "lora" and "adapter": smollm2 + persona-lora = smollm2-persona."""
    words = [word for word in adapter.name.replace("_", "-").split("-") if word not in ("lora", "adapter")]
    return slug("-".join([checkpoint.name, *words]))


def merge(checkpoint: Checkpoint, adapter: Adapter, out: Path, progress: Progress) -> None:
    """Write the merged checkpoint to the folder ``out`` (new or empty), all or nothing.

    Raises InputError when the adapter does not fit, changes nothing, gives NaN, or has another tokenizer.
    """
    fit = plan_changes(adapter, checkpoint)
    vocabulary = _merged_tokenizer(checkpoint, adapter, fit)
    part = out.with_name(f".{out.name}.part-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        _write_weights(checkpoint, adapter, fit, part, progress)
        _copy_files(checkpoint, fit, part, vocabulary)
        part.replace(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_weights(checkpoint: Checkpoint, adapter: Adapter, fit: Fit, part: Path, progress: Progress) -> None:
    shards: dict[str, list[Spec]] = {}
    for name, tensor in checkpoint.tensors.items():
        rows = (fit.vocab,) if name in (EMBEDDING, HEAD) else tensor.shape[:1]
        shards.setdefault(tensor.file, []).append(Spec(name, tensor.dtype, (*rows, *tensor.shape[1:])))
    embedding = checkpoint.tensors.get(EMBEDDING)
    if fit.untie and HEAD not in checkpoint.tensors and embedding is not None:
        spec = Spec(HEAD, embedding.dtype, (fit.vocab, embedding.shape[1]))
        shards[max(shards)].append(spec)
    files = sorted(shards)
    total = sum(spec.nbytes for specs in shards.values() for spec in specs)
    worker = _Merger(checkpoint, adapter, fit)
    with progress.step("Merging the adapter", total=total, unit="B") as task:

        def reported(spec: Spec) -> Iterator[memoryview]:
            for rows in worker.rows(spec):
                task.advance(rows.nbytes)
                yield rows.reshape(-1).view("u1").data

        for file, name in zip(files, shard_names(len(files)), strict=True):
            write_file(part / name, shards[file], (reported(spec) for spec in shards[file]))
    write_index(part, [shards[file] for file in files])
    if worker.changed == 0:
        raise InputError(
            f"The adapter {adapter.name} changes nothing: every merged weight equals the base's.",
            why="Its lora_B is zero (never trained), or its numbers vanish when rounded to the base's data type.",
            fix="Give the adapter that the training wrote last; a base in float32 keeps smaller changes.",
        )
    share = worker.changed / max(1, worker.touched)
    progress.note(f"Merged {len(fit.changes)} tensors of {adapter.name}; {share:.1%} of their elements changed.")


class _Merger:
    """Computes merged rows. touched and changed count elements of the tensors that the adapter changes."""

    def __init__(self, checkpoint: Checkpoint, adapter: Adapter, fit: Fit) -> None:
        self.checkpoint, self.adapter, self.fit = checkpoint, adapter, fit
        self.touched = self.changed = 0

    def rows(self, spec: Spec) -> Iterator[NDArray[Any]]:
        """The merged tensor in its stored form, rows at a time."""
        base = self.checkpoint.tensors.get(spec.name) or self.checkpoint.tensors[EMBEDDING]
        change = self.fit.changes.get(spec.name)
        if change is None and not self.fit.untie and self.checkpoint.shape.tied and spec.name == HEAD:
            change = self.fit.changes.get(EMBEDDING)  # a stored copy of the tied output layer changes with it
        factors = self._factors(change) if change else None
        for begin, end in row_chunks(spec):
            if change is None or factors is None:
                yield read_rows(self.checkpoint.path, base, begin, end)
            else:
                yield self._merged(spec, base, change, factors, begin, end)

    def _factors(self, change: Change) -> dict[str, NDArray[np.float32]]:
        named = {"a": change.lora_a, "b": change.lora_b, "bias": change.bias, "magnitude": change.magnitude}
        return {
            key: to_float32(read_rows(self.adapter.weights, tensor), tensor.dtype)
            for key, tensor in named.items()
            if tensor is not None
        }

    def _merged(
        self,
        spec: Spec,
        base: TensorInfo,
        change: Change,
        factors: Mapping[str, NDArray[np.float32]],
        begin: int,
        end: int,
    ) -> NDArray[Any]:
        import numpy as np

        before = read_rows(self.checkpoint.path, base, begin, end)
        if change.replace is not None:
            stored = read_rows(self.adapter.weights, change.replace, begin, end)
            same = change.replace.dtype == base.dtype
            after = stored if same else from_float32(to_float32(stored, change.replace.dtype), base.dtype)
        else:
            after = before
        if "a" in factors or "bias" in factors:
            weights = to_float32(after, base.dtype)
            scale = np.float32(change.scale)
            if "bias" in factors:
                weights += factors["bias"][begin:end] * scale
            else:
                weights += _delta(change, factors, begin, end, base.dtype)
            if "magnitude" in factors:  # DoRA: each row gets the trained length
                length = np.linalg.norm(weights, axis=1).astype(np.float32)
                weights *= (factors["magnitude"].reshape(-1)[begin:end] / length)[:, None]
            after = from_float32(weights, base.dtype)
        if not np.isfinite(to_float32(after, base.dtype)).all():
            raise InputError(
                f"Merging makes NaN or infinity in {spec.name}.",
                why=(
                    "The adapter's training diverged, its file is damaged, or the sum is too large for the base's data "
                    "type."
                ),
                fix="Take an earlier adapter checkpoint.",
            )
        self.touched += after.size
        self.changed += int((after != before).sum()) if after.shape == before.shape else after.size
        return after


def _delta(
    change: Change, factors: Mapping[str, NDArray[np.float32]], begin: int, end: int, dtype: str
) -> NDArray[np.float32]:
    import numpy as np

    scale = np.float32(change.scale)
    if not change.embedding:
        product: NDArray[np.float32] = factors["b"][begin:end] @ factors["a"]
        product *= scale
        return product
    product = np.ascontiguousarray((factors["b"] @ factors["a"][:, begin:end]).T)
    product *= scale
    return to_float32(from_float32(product, dtype), dtype)


def _merged_tokenizer(checkpoint: Checkpoint, adapter: Adapter, fit: Fit) -> dict[str, Path]:
    """The tokenizer files of the merged model: the adapter's when it has a tokenizer.json, else the base's.

    The adapter's chat template, with which it was trained, replaces the base's even without a tokenizer.json.
    Raises InputError when a token has another id than in the base, or an id has no embedding row.
    """
    files = {name: checkpoint.path / name for name in TOKENIZER_FILES if (checkpoint.path / name).is_file()}
    brought = {name: adapter.path / name for name in adapter.tokenizer_files}
    if "tokenizer.json" not in brought:
        if "chat_template.jinja" in brought:
            files["chat_template.jinja"] = brought["chat_template.jinja"]
        return files
    base = _ids(checkpoint.path)
    own = _ids(adapter.path)
    for token, number in base.items():
        if own.get(token, number) != number:
            raise InputError(
                f"The adapter's tokenizer gives {token!r} the id {own[token]}, the base's gives it {number}.",
                why="The adapter was trained with another tokenizer than this base has.",
                fix="Give the base model the adapter was trained on.",
            )
    highest = max(own.values(), default=0)
    if highest >= fit.vocab:
        missing = next(token for token, number in own.items() if number == highest)
        raise InputError(
            f"The adapter's tokenizer adds {missing!r} with the id {highest}, the model has only {fit.vocab} rows.",
            why="Tokens were added in training, but the resized embedding was not saved with the adapter.",
            fix="Train with modules_to_save [embed_tokens, lm_head], or save the merged model from the training.",
        )
    if "chat_template.jinja" in files and "chat_template.jinja" not in brought:
        settings = read_json(brought["tokenizer_config.json"]) if "tokenizer_config.json" in brought else {}
        if "chat_template" not in settings:
            brought["chat_template.jinja"] = files["chat_template.jinja"]
    return brought


def _ids(folder: Path) -> dict[str, int]:
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    return token_ids(read_json(folder / "tokenizer.json"), settings, folder)


def _copy_files(checkpoint: Checkpoint, fit: Fit, part: Path, tokenizer: Mapping[str, Path]) -> None:
    for name in CONFIG_FILES:
        if (checkpoint.path / name).is_file():
            (part / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(checkpoint.path / name, part / name)
    for name, source in tokenizer.items():
        shutil.copyfile(source, part / name)
    changed: dict[str, Any] = {}
    if fit.untie:
        changed["tie_word_embeddings"] = False
    if fit.vocab != checkpoint.shape.vocab:
        changed["vocab_size"] = fit.vocab
    if changed:
        text = json.dumps({**checkpoint.config, **changed}, indent=2, ensure_ascii=False) + "\n"
        (part / "config.json").write_text(text, encoding="utf-8")
