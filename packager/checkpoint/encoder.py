"""How an encoder is used, from its JSON files: embedder or classifier, pooling, labels, maximum length.

Embedders follow sentence-transformers' files (modules.json, 1_Pooling/config.json, sentence_bert_config.json,
config_sentence_transformers.json); without them, mean pooling without normalisation, as sentence-transformers does with
a plain checkpoint. Classifiers follow config.json as transformers' text-classification pipeline does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from packager.checkpoint.tokenizer import read_json
from packager.core.errors import InputError

if TYPE_CHECKING:
    from packager.checkpoint.checkpoint import Checkpoint

Pooling = Literal["mean", "cls", "max", "mean_sqrt_len"]
Scores = Literal["softmax", "sigmoid", "none"]

POOLING_FOLDER = "1_Pooling"
# sentence-transformers' keys and ours
_POOLING_KEYS: Mapping[str, Pooling] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
}
_KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")
NO_LIMIT = 1_000_000  # tokenizers without a limit have 1e30
NO_HEAD = ("ForMaskedLM",)  # the head that predicts tokens is left out; the encoder embeds


@dataclass(frozen=True)
class EncoderFacts:
    """task: "embed" or "classify". max_length: most tokens of a text, special ones included. token_types: the model has
    token type ids. pad_id: the padding token of a batch.

    Embedders: pooling, normalize; origin: one sentence on where they come from; lower_case: texts are lower-cased
    first; prompt: the prefix of every text. Classifiers: labels by id; scores: the function from logits to scores.
    """

    task: Literal["embed", "classify"]
    max_length: int
    token_types: bool
    pad_id: int
    origin: str
    pooling: Pooling = "mean"
    normalize: bool = False
    lower_case: bool = False
    prompt: str = ""
    labels: tuple[str, ...] = ()
    scores: Scores = "softmax"

    def settings(self) -> dict[str, Any]:
        """The manifest's ``run.settings``: what the box needs to use the model as it was trained."""
        common = {"token_types": self.token_types, "pad_id": self.pad_id, "origin": self.origin}
        if self.task == "classify":
            return {**common, "labels": list(self.labels), "scores": self.scores}
        return {
            **common,
            "pooling": self.pooling,
            "normalize": self.normalize,
            "lower_case": self.lower_case,
            "prompt": self.prompt,
        }


def read_encoder(checkpoint: Checkpoint, *, longest: int, pooling: Pooling | None = None) -> EncoderFacts:
    """The facts of one checkpoint. longest: the user's bound on max_length. pooling: overrides the files.

    Raises InputError; the plan shows its sentences as refusals.
    """
    folder, config = checkpoint.path, checkpoint.config
    classifier = checkpoint.architecture.endswith("ForSequenceClassification")
    if checkpoint.architecture.endswith("ForTokenClassification"):
        raise InputError(
            f"{checkpoint.architecture} labels single tokens, which no endpoint here serves.",
            fix="Package a sequence classifier or an embedder.",
        )
    settings = _optional(folder, "sentence_bert_config.json")
    bound = min(longest, _positions(config, checkpoint.shape.context), _stated_length(folder, settings))
    pad = checkpoint.tokenizer.pad_id if checkpoint.tokenizer.pad_id is not None else config.get("pad_token_id")
    base = EncoderFacts(
        task="embed",
        max_length=bound,
        token_types=int(config.get("type_vocab_size") or 0) > 1,
        pad_id=pad if isinstance(pad, int) else 0,
        origin="No modules.json: mean pooling without normalisation, as sentence-transformers has it then.",
    )
    if classifier:
        labels, scores = _labels(config)
        origin = f"Labels and scores ({scores}) as config.json has them."
        return replace(base, task="classify", origin=origin, labels=labels, scores=scores)
    modules = _modules(folder)
    facts = replace(
        base,
        normalize="Normalize" in modules,
        lower_case=bool(settings.get("do_lower_case")),
        prompt=_prompt(folder),
    )
    if pooling is not None:
        return replace(facts, pooling=pooling, origin=f"Pooling as set ({pooling}).")
    if "Pooling" in modules:
        origin = f"Pooling and normalisation as modules.json and {POOLING_FOLDER} have them."
        return replace(facts, pooling=_pooling(folder), origin=origin)
    return facts


def _optional(folder: Path, name: str) -> dict[str, Any]:
    return read_json(folder / name) if (folder / name).is_file() else {}


def _positions(config: Mapping[str, Any], stated: int) -> int:
    """Tokens that the position embedding covers; RoBERTa's positions begin after the padding id."""
    if str(config.get("model_type")) in ("roberta", "xlm-roberta"):
        padding = config.get("pad_token_id", 1)
        return stated - int(padding if isinstance(padding, int) else 1) - 1
    return stated


def _stated_length(folder: Path, settings: Mapping[str, Any]) -> int:
    """sentence-transformers' max_seq_length, else the tokenizer's own limit, else NO_LIMIT."""
    tokenizer = _optional(folder, "tokenizer_config.json")
    for value in (settings.get("max_seq_length"), tokenizer.get("model_max_length")):
        if isinstance(value, int | float) and not isinstance(value, bool) and 2 < value < NO_LIMIT:
            return int(value)
    return NO_LIMIT


def _modules(folder: Path) -> list[str]:
    """The last parts of modules.json's types; [] without the file. Raises InputError for an unknown module."""
    path = folder / "modules.json"
    if not path.is_file():
        return []
    import json

    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        modules = [(str(entry["type"]).rpartition(".")[2], str(entry["path"])) for entry in listed]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError("modules.json is not a list of sentence-transformers' modules.", why=repr(error)) from error
    for name, place in modules:
        expected = {"Transformer": "", "Pooling": POOLING_FOLDER}.get(name, place)
        if name not in _KNOWN_MODULES or place != expected:
            raise InputError(
                f"modules.json has the module {name} at {place!r}, which is not served here.",
                why=f"Known are {', '.join(_KNOWN_MODULES)}, the pooling in {POOLING_FOLDER}.",
                fix="Package a model without it.",
            )
    if [name for name, _ in modules] not in (["Transformer"], ["Transformer", "Pooling"], [*_KNOWN_MODULES]):
        raise InputError(f"modules.json has its modules in an unknown order: {', '.join(name for name, _ in modules)}.")
    return [name for name, _ in modules]


def _pooling(folder: Path) -> Pooling:
    config = _optional(folder, f"{POOLING_FOLDER}/config.json")
    if not config:
        raise InputError(f"modules.json names {POOLING_FOLDER}, but {POOLING_FOLDER}/config.json is missing.")
    named = config.get("pooling_mode")  # later releases write the mode's name
    modes: list[str] = [named] if isinstance(named, str) else list(named or [])
    flags = [key for key, on in config.items() if key.startswith("pooling_mode_") and on]
    modes = modes or [_POOLING_KEYS.get(key, key) for key in flags]
    if config.get("include_prompt") is False and _prompt(folder):
        raise InputError("The pooling leaves the default prompt's tokens out, which is not served here.")
    known: dict[str, Pooling] = {mode: mode for mode in _POOLING_KEYS.values()}
    if len(modes) != 1 or modes[0] not in known:
        raise InputError(
            f"{POOLING_FOLDER}/config.json sets {' with '.join(modes) or 'no pooling'}, which is not served here.",
            why=f"Known are {', '.join(known)}, one at a time.",
            fix="Set another pooling only if the model was trained for it: --set pooling=mean.",
        )
    return known[modes[0]]


def _prompt(folder: Path) -> str:
    """config_sentence_transformers.json's default prompt, which encode() puts before every text; "" without one."""
    config = _optional(folder, "config_sentence_transformers.json")
    name, prompts = config.get("default_prompt_name"), config.get("prompts")
    prompt = prompts.get(name) if isinstance(prompts, dict) and isinstance(name, str) else None
    return prompt if isinstance(prompt, str) else ""


def _labels(config: Mapping[str, Any]) -> tuple[tuple[str, ...], Scores]:
    """Label names by id and the function from logits to scores, as in transformers' text-classification pipeline
    (pipelines/text_classification.py): sigmoid for several labels or one, none for a regression, else softmax.
    """
    named = config.get("id2label")
    count = config.get("num_labels", len(named) if isinstance(named, dict) and named else 2)
    if isinstance(named, dict) and named:
        try:
            by_id = {int(key): str(value) for key, value in named.items()}
        except ValueError as error:
            raise InputError(f"config.json: id2label has a key that is no number ({error}).") from error
        if sorted(by_id) != list(range(len(by_id))):
            raise InputError(
                f"config.json: id2label has the ids {sorted(by_id)}, not 0 to {len(by_id) - 1}.",
                fix="Number the labels without holes, as the model's outputs are.",
            )
        labels = tuple(by_id[number] for number in range(len(by_id)))
    else:
        labels = tuple(f"LABEL_{number}" for number in range(int(count)))
    problem = config.get("problem_type")
    if problem == "regression":
        return labels, "none"
    return labels, "sigmoid" if problem == "multi_label_classification" or len(labels) == 1 else "softmax"
