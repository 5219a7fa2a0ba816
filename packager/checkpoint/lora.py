"""A peft LoRA adapter: its configuration, and the changes it makes to a base checkpoint.

Formats: plain LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023), DoRA on linear layers (Liu et al. 2024), rank and
alpha patterns, trained biases, ``modules_to_save`` and embeddings. A setting whose merge would differ from the trained
model is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packager.checkpoint.checkpoint import Checkpoint, slug
from packager.checkpoint.tokenizer import TOKENIZER_FILES, read_json
from packager.core.errors import InputError
from packager.core.hashing import combined_digest, file_digest, hash_file
from packager.core.progress import Progress, Silent
from packager.tensors.safetensors import FLOAT_DTYPES, TensorInfo, read_header

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
PREFIX = "base_model.model."

# Settings of peft.LoraConfig that change the merge and are not implemented here.
_UNSUPPORTED = {
    "alora_invocation_tokens": "activated LoRA works only on a part of the prompt and cannot be merged",
    "arrow_config": "Arrow routes between adapters at run time",
    "layer_replication": "the adapter adds layers",
    "target_parameters": "the adapter changes parameters that are not linear layers (mixture of experts)",
    "trainable_token_indices": "single embedding rows were trained",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QA-LoRA belongs to a quantized base",
}
# These initialisations change the base's weights; the saved adapter only fits that changed base.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter folder.

    weights: the folder with the safetensors (the adapter's own, or a converted copy). tensors: by their saved names.
    targets: the names of the modules that it changes ("q_proj"), sorted. base_model: base_model_name_or_path of its
    config. tokenizer_files: those in its folder. size: of its tensors, bytes.
    """

    path: Path
    name: str
    config: Mapping[str, Any]
    weights: Path
    tensors: Mapping[str, TensorInfo]
    digest: str
    rank: int
    alpha: float
    dora: bool
    targets: tuple[str, ...]
    base_model: str
    tokenizer_files: tuple[str, ...]
    size: int

    def scale(self, module: str) -> float:
        """The factor of B·A for a module: alpha / r, or alpha / sqrt(r) for rsLoRA, with peft's rules for patterns."""
        rank = _by_pattern(self.config.get("rank_pattern"), module, self.rank)
        alpha = _by_pattern(self.config.get("alpha_pattern"), module, self.alpha)
        return float(alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank))

    def module_rank(self, module: str) -> int:
        return int(_by_pattern(self.config.get("rank_pattern"), module, self.rank))


def _by_pattern(patterns: Any, module: str, default: float) -> float:
    for pattern, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return float(value)
        except (re.error, TypeError, ValueError) as error:
            raise InputError(
                f"{CONFIG} has a rank or alpha pattern that cannot be used: {pattern!r}: {value!r} ({error}).",
                fix="Save the adapter again with peft.",
            ) from error
    return default


@dataclass
class Change:
    """The change of one base tensor: ``replace`` takes its place (if set), then scale·B·A is added.

    magnitude: DoRA's. bias: a trained vector, times scale, added. embedding: A and B belong to an embedding, whose
    delta is (B·A) transposed and rounded to the base's dtype before it is added, as peft does.
    """

    replace: TensorInfo | None = None
    lora_a: TensorInfo | None = None
    lora_b: TensorInfo | None = None
    bias: TensorInfo | None = None
    magnitude: TensorInfo | None = None
    scale: float = 1.0
    embedding: bool = False


@dataclass
class Fit:
    """changes: by base tensor name. untie: embedding and output layer become two tensors. vocab: rows of the merged
    embedding. notes: sentences for the user.
    """

    changes: dict[str, Change] = field(default_factory=dict)
    untie: bool = False
    vocab: int = 0
    notes: list[str] = field(default_factory=list)


def open_adapter(path: Path | str, *, cache: Path | None = None, progress: Progress | None = None) -> Adapter:
    """Read and check an adapter folder; reads no weights except to hash them.

    cache: our cache folder; without it an ``adapter_model.bin`` is refused, because it must be converted first.
    Raises InputError when a file is missing or a setting is not supported.
    """
    folder = Path(path).expanduser()
    if not (folder / CONFIG).is_file():
        raise InputError(
            f"{folder} is not an adapter: it has no {CONFIG}." if folder.is_dir() else f"There is no folder {folder}.",
            fix="Give the folder that peft's or LLaMA-Factory's training wrote.",
        )
    config = read_json(folder / CONFIG)
    _check_supported(config)
    weights = folder
    if not (folder / WEIGHTS).is_file():
        weights = _converted(folder, cache, progress or Silent())
    tensors = read_header(weights / WEIGHTS)
    for tensor in tensors.values():
        if tensor.dtype not in FLOAT_DTYPES:
            raise InputError(f"The adapter's tensor {tensor.name} has the data type {tensor.dtype}, not a float.")
    kept = tuple(name for name in TOKENIZER_FILES if (folder / name).is_file())
    names = {CONFIG: folder / CONFIG, WEIGHTS: weights / WEIGHTS} | {name: folder / name for name in kept}
    digest = combined_digest((name, file_digest(at, cache) if cache else hash_file(at)) for name, at in names.items())
    modules = {_split(name)[0].rsplit(".", 1)[-1] for name in tensors if "lora_" in name}
    return Adapter(
        path=folder,
        name=slug(folder.resolve().name),
        config=config,
        weights=weights,
        tensors=tensors,
        digest=digest,
        rank=int(config["r"]),
        alpha=float(config["lora_alpha"]),
        dora=bool(config.get("use_dora")),
        targets=tuple(sorted(modules)),
        base_model=str(config.get("base_model_name_or_path") or ""),
        tokenizer_files=kept,
        size=sum(tensor.nbytes for tensor in tensors.values()),
    )


def _converted(folder: Path, cache: Path | None, progress: Progress) -> Path:
    pickled = folder / "adapter_model.bin"
    if not pickled.is_file():
        raise InputError(f"{folder} has no {WEIGHTS}.", fix="Copy the whole folder that the training wrote.")
    if cache is None:
        raise InputError(f"{pickled} is a pickle.", fix=f"Save the adapter as {WEIGHTS} (safe_serialization=True).")
    from packager.checkpoint import state_dict

    return state_dict.convert_file(pickled, WEIGHTS, cache=cache, progress=progress)


def _check_supported(config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(
            f"The adapter is of the type {kind}; only LORA can be merged here.",
            fix="Merge it with peft (merge_and_unload), save the model and package that folder.",
        )
    for key, why in _UNSUPPORTED.items():
        if config.get(key):
            raise InputError(
                f"The adapter uses {key}, which is not supported.",
                why=f"In it, {why}.",
                fix="If peft can merge it (merge_and_unload), save the merged model and package that folder.",
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGED_BASE):
        raise InputError(
            f"The adapter was initialised with {start}, which changes the base model's own weights.",
            why="Added to the original base it gives another model than the one trained.",
            fix=(
                "Save it with path_initial_model_for_weight_conversion (peft), or merge it in training and package "
                "that."
            ),
        )
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise InputError(f"{CONFIG}: {key} is {value!r}, not a positive number.", fix="Save the adapter with peft.")


_PARTS = re.compile(
    r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.default)?(?:\.(weight|bias))?$"
)


def _split(name: str) -> tuple[str, str]:
    """(module, part) of a saved name, ('model.layers.0.self_attn.q_proj', 'lora_B.bias'); part '' for a full tensor."""
    name = name.removeprefix(PREFIX)
    match = _PARTS.search(name)
    if match:
        return name[: match.start()], match[1] + (".bias" if match[2] == "bias" else "")
    name = re.sub(r"\.(base_layer|modules_to_save(\.default)?)\.", ".", name)
    return name, ""


def check_fit(adapter: Adapter, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Compare every tensor of the adapter with the base. Returns notes; raises InputError for the first misfit."""
    return tuple(plan_changes(adapter, checkpoint).notes)


def plan_changes(adapter: Adapter, checkpoint: Checkpoint) -> Fit:
    """The changes to the base's tensors. Raises InputError with the first tensor that does not fit."""
    fit = Fit(vocab=checkpoint.shape.vocab)
    for saved in sorted(adapter.tensors):
        tensor = adapter.tensors[saved]
        module, part = _split(saved)
        if ".original_module." in saved:  # the untrained copy that old peft versions saved beside a trained module
            continue
        if part in ("", "lora_B.bias"):
            target = _base_name(module if not part else f"{module}.bias", saved, checkpoint)
        else:
            target = _base_name(f"{module}.weight", saved, checkpoint)
        change = fit.changes.setdefault(target, Change())
        if part:
            change.scale = adapter.scale(module)
        _place(change, part, tensor)
    for target, change in fit.changes.items():
        _check_shapes(target, change, adapter, checkpoint)
    _check_vocabulary(fit, checkpoint)
    if not fit.changes:
        raise InputError(f"The adapter {adapter.path} holds no tensors.", fix="Copy the folder again.")
    _about_base(fit, adapter, checkpoint)
    return fit


def _place(change: Change, part: str, tensor: TensorInfo) -> None:
    if part == "":
        change.replace = tensor
    elif part == "lora_B.bias":
        change.bias = tensor
    elif part == "lora_magnitude_vector":
        change.magnitude = tensor
    elif part.endswith("_A"):
        change.lora_a = tensor
        change.embedding = part == "lora_embedding_A"
    else:
        change.lora_b = tensor


def _base_name(name: str, saved: str, checkpoint: Checkpoint) -> str:
    for candidate in (name, f"model.{name}"):  # the second for adapters trained on the model without its head
        if candidate in checkpoint.tensors:
            return candidate
    if name == HEAD and checkpoint.shape.tied:
        return HEAD
    raise InputError(
        f"The adapter does not fit {checkpoint.name}: the base has no {name}.",
        why=f"The adapter's tensor {saved} belongs to it, so the adapter was trained on another model.",
        fix="Give the base model the adapter was trained on.",
    )


def _base_shape(target: str, checkpoint: Checkpoint) -> tuple[int, ...]:
    return checkpoint.tensors[target if target in checkpoint.tensors else EMBEDDING].shape


def _misfit(adapter: Adapter, tensor: TensorInfo, expected: tuple[int, ...], base: str) -> InputError:
    named = f" The adapter names {adapter.base_model} as its base." if adapter.base_model else ""
    return InputError(
        f"The adapter does not fit: {tensor.name} has the shape {list(tensor.shape)}, expected {list(expected)}.",
        why=f"The base tensor {base} sets that shape.{named}",
        fix="Give the base model the adapter was trained on.",
    )


def _check_shapes(target: str, change: Change, adapter: Adapter, checkpoint: Checkpoint) -> None:
    shape = _base_shape(target, checkpoint)
    if change.replace is not None and change.replace.shape != shape:
        grown = target in (EMBEDDING, HEAD) and change.replace.shape[1:] == shape[1:]
        if not grown or change.lora_a is not None:
            raise _misfit(adapter, change.replace, shape, target)
    if change.bias is not None and change.bias.shape != shape:
        raise _misfit(adapter, change.bias, shape, target)
    if (change.lora_a is None) != (change.lora_b is None):
        only = change.lora_a or change.lora_b
        raise InputError(f"The adapter is incomplete: {only and only.name} has no partner.", fix="Copy it again.")
    if change.lora_a is None or change.lora_b is None:
        if change.magnitude is not None:
            raise InputError(f"The adapter is incomplete: {change.magnitude.name} has no lora_A.", fix="Copy it again.")
        return
    rank = adapter.module_rank(target.removesuffix(".weight"))
    rows, columns = shape if not change.embedding else (shape[1], shape[0])
    for tensor, expected in ((change.lora_a, (rank, columns)), (change.lora_b, (rows, rank))):
        if tensor.shape != expected:
            raise _misfit(adapter, tensor, expected, target)
    if change.magnitude is not None:
        if change.embedding:
            raise InputError(
                "The adapter uses DoRA on the embedding, which is not supported.",
                fix="Merge it with peft (merge_and_unload), save the model and package that folder.",
            )
        if math.prod(change.magnitude.shape) != rows:
            raise _misfit(adapter, change.magnitude, (rows,), target)
    elif adapter.dora and not change.embedding:
        raise InputError(
            f"The adapter says it is DoRA, but {target} has no lora_magnitude_vector.", fix="Copy it again."
        )


def _check_vocabulary(fit: Fit, checkpoint: Checkpoint) -> None:
    """Set ``fit.vocab`` and ``fit.untie``. Raises InputError when embedding and output layer get different rows."""
    both = [fit.changes.get(name) for name in (EMBEDDING, HEAD)]
    if not any(both):
        return
    rows = [change.replace.shape[0] if change and change.replace else checkpoint.shape.vocab for change in both]
    fit.untie = checkpoint.shape.tied
    fit.vocab = rows[0]
    if rows[0] != rows[1]:
        if not (checkpoint.shape.tied and fit.changes.get(HEAD) is None):
            raise InputError(
                f"The adapter resizes the vocabulary to {rows[0]} in the embedding but {rows[1]} in lm_head.",
                fix="Save the adapter with both (save_embedding_layers=True), or merge it in training.",
            )
        fit.untie = False  # only the resized embedding was saved: the tied output layer follows it


def _about_base(fit: Fit, adapter: Adapter, checkpoint: Checkpoint) -> None:
    named = re.split(r"[/\\]", adapter.base_model.rstrip("/\\"))[-1]
    if named and slug(named) != slug(checkpoint.origin.id.rsplit("/", 1)[-1]):
        fit.notes.append(
            f"The adapter names {adapter.base_model} as its base, the checkpoint is {checkpoint.origin.id}; all "
            f"shapes fit."
        )
    if fit.untie:
        fit.notes.append(
            "The adapter changes one of the tied embeddings: the merged model has both, untied, as trained."
        )
    if fit.vocab != checkpoint.shape.vocab:
        fit.notes.append(f"The adapter resizes the vocabulary from {checkpoint.shape.vocab} to {fit.vocab} rows.")
