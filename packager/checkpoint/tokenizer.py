"""The special tokens, chat template and sampling defaults of a checkpoint, and where its files disagree about them.

The files are read as transformers 5 reads them: only the post-processor of tokenizer.json decides whether plain text
gets a BOS (``add_bos_token`` in tokenizer_config.json is ignored), and chat_template.jinja takes precedence over a
template in tokenizer_config.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packager.checkpoint.chat_template import Probe, probe
from packager.core.errors import InputError

SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)
_NAMES = ("bos", "eos", "pad", "unk")


@dataclass(frozen=True)
class TokenizerFacts:
    """The tokenizer's special tokens and settings, without its vocabulary.

    add_bos: encoding plain text puts BOS first. vocab_size: highest id + 1. stop_ids: every id that ends an answer,
    sorted. sampling: defaults from generation_config.json (only its keys). agreement: one sentence for each
    disagreement between tokenizer, template, config and generation config; empty when they agree. remarks: one sentence
    for each thing that the chat template cannot do. marks: the added tokens that it puts around turns; the same text
    typed by a user is tokenized to them too.
    """

    tokenizer_class: str
    bos: str | None
    eos: str | None
    pad: str | None
    unk: str | None
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    unk_id: int | None
    add_bos: bool
    vocab_size: int
    chat_template: str | None
    sampling: Mapping[str, float]
    stop_ids: tuple[int, ...]
    turn_end: str | None
    template_writes_bos: bool
    agreement: tuple[str, ...]
    remarks: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()

    @property
    def special_tokens(self) -> dict[str, str]:
        """The template's variables bos_token, eos_token, pad_token and unk_token, without those that are not set."""
        pairs = {"bos_token": self.bos, "eos_token": self.eos, "pad_token": self.pad, "unk_token": self.unk}
        return {name: token for name, token in pairs.items() if token is not None}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises InputError when it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(
            f"{path.name} is not valid JSON.", why=f"{error} in {path}.", fix="Copy or download the file again."
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"{path.name} is not a JSON object.", why=f"It holds a {type(value).__name__} ({path}).")
    return value


def _optional(folder: Path, name: str) -> dict[str, Any]:
    return read_json(folder / name) if (folder / name).is_file() else {}


def read_tokenizer(folder: Path, config: Mapping[str, Any]) -> TokenizerFacts:
    """Facts of the tokenizer in a checkpoint folder; config is its config.json.

    Raises InputError when tokenizer.json is missing (with how to make it) or malformed.
    """
    tokenizer = _tokenizer_json(folder)
    settings = _optional(folder, "tokenizer_config.json")
    generation = _optional(folder, "generation_config.json")
    ids = token_ids(tokenizer, settings, folder)
    by_id = {number: token for token, number in ids.items()}
    names, remarks = _special_tokens(folder, settings, config, by_id)
    added = [str(entry.get("content")) for entry in tokenizer.get("added_tokens") or []]
    template = read_template(folder, settings)
    variables = {f"{name}_token": names[name] for name in _NAMES}
    seen = probe(template, variables, added) if template is not None else Probe()
    number = {name: ids.get(names[name] or "") for name in _NAMES}
    for name in _NAMES:
        if names[name] is not None and number[name] is None:
            remarks.append(f"The tokenizer's {name.upper()} token {names[name]} is not in its vocabulary.")
    add_bos = _prepends(tokenizer.get("post_processor"), names["bos"])
    ends = {
        "config.json": _id_set(config.get("eos_token_id")),
        "generation_config.json": _id_set(generation.get("eos_token_id")),
        "the tokenizer": _id_set(number["eos"]),
    }
    turn_end_id = ids.get(seen.turn_end or "")
    remarks += _about_eos(ends, turn_end_id, by_id) + _about_bos(config, settings, number["bos"], by_id, add_bos, seen)
    if seen.error:
        remarks.append(f"The chat template cannot be rendered ({seen.error}).")
    return TokenizerFacts(
        tokenizer_class=str(settings.get("tokenizer_class") or "unknown"),
        bos=names["bos"],
        eos=names["eos"],
        pad=names["pad"],
        unk=names["unk"],
        bos_id=number["bos"],
        eos_id=number["eos"],
        pad_id=number["pad"],
        unk_id=number["unk"],
        add_bos=add_bos,
        vocab_size=max(by_id, default=-1) + 1,
        chat_template=template,
        sampling=_sampling(generation),
        stop_ids=tuple(sorted(set().union(*ends.values(), _id_set(turn_end_id)))),
        turn_end=seen.turn_end,
        template_writes_bos=seen.writes_bos,
        agreement=tuple(remarks),
        remarks=tuple(_about_template(template, seen)),
        marks=seen.marks,
    )


def _about_template(template: str | None, seen: Probe) -> list[str]:
    """One sentence for each thing that a chat template cannot do."""
    remarks = []
    if seen.system == "ignored":
        remarks.append("The chat template ignores system messages: a system prompt is lost without a word.")
    if seen.system == "refused":
        remarks.append("The chat template refuses system messages: a request with one gets an error.")
    if template is not None and not seen.error and seen.turn_end is None:
        remarks.append(
            "The chat template ends an answer with no token of its own: only what the model itself learnt to write "
            "(EOS) stops generation."
        )
    return remarks


def _tokenizer_json(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer.json"
    if path.is_file():
        return read_json(path)
    other = [name for name in ("tokenizer.model", "vocab.json", "vocab.txt") if (folder / name).is_file()]
    convert = (
        "Convert it once with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes "
        "tokenizer.json."
        if other
        else "Copy the tokenizer files of the base model into the folder."
    )
    raise InputError(
        f"{folder} has no tokenizer.json.",
        why=f"It has only {', '.join(other)}." if other else "It has no tokenizer at all.",
        fix=convert,
    )


def token_ids(tokenizer: Mapping[str, Any], settings: Mapping[str, Any], folder: Path) -> dict[str, int]:
    """Every token's id, from tokenizer.json (BPE, WordPiece, WordLevel or Unigram) and the tokens added later."""
    try:
        vocabulary = tokenizer["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: [piece, score] in id order
            ids = {str(piece): number for number, (piece, _) in enumerate(vocabulary)}
        else:
            ids = {str(token): int(number) for token, number in vocabulary.items()}
        ids |= {str(entry["content"]): int(entry["id"]) for entry in tokenizer.get("added_tokens") or []}
        for number, entry in (settings.get("added_tokens_decoder") or {}).items():
            ids.setdefault(str(entry["content"]), int(number))
        ids |= {str(token): int(number) for token, number in _optional(folder, "added_tokens.json").items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            "tokenizer.json is not a tokenizer's file.",
            why=f"Its vocabulary cannot be read ({error!r}).",
            fix="Copy or download it again.",
        ) from error
    return ids


def read_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The chat template: chat_template.jinja, or the legacy places (a string, or a list with one named default)."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for template in (_optional(folder, "chat_template.json").get("chat_template"), settings.get("chat_template")):
        if isinstance(template, str):
            return template
        if isinstance(template, list):
            named = {str(entry.get("name")): entry.get("template") for entry in template if isinstance(entry, dict)}
            if isinstance(named.get("default"), str):
                return str(named["default"])
    return None


def _special_tokens(
    folder: Path, settings: Mapping[str, Any], config: Mapping[str, Any], by_id: Mapping[int, str]
) -> tuple[dict[str, str | None], list[str]]:
    """Names of BOS, EOS, PAD and UNK: tokenizer_config, then special_tokens_map, then (EOS only) config.json's id."""
    legacy = _optional(folder, "special_tokens_map.json")
    names: dict[str, str | None] = {}
    remarks = []
    for name in _NAMES:
        key = f"{name}_token"
        token = settings.get(key, legacy.get(key))
        if isinstance(token, dict):  # an AddedToken as a JSON object
            token = token.get("content")
        names[name] = token if isinstance(token, str) else None
    stated = _id_set(config.get("eos_token_id"))
    if names["eos"] is None and stated and min(stated) in by_id:
        names["eos"] = by_id[min(stated)]
        remarks.append(f"The tokenizer names no EOS; {names['eos']} is taken from config.json.")
    return names, remarks


def _prepends(processor: Any, bos: str | None) -> bool:
    """Whether tokenizer.json's post-processor puts BOS before plain text."""
    if not isinstance(processor, dict) or bos is None:
        return False
    if processor.get("type") == "Sequence":
        return any(_prepends(inner, bos) for inner in processor.get("processors") or [])
    if processor.get("type") == "TemplateProcessing":
        first = (processor.get("single") or [{}])[0]
        return bool(first.get("SpecialToken", {}).get("id") == bos)
    if processor.get("type") in ("RobertaProcessing", "BertProcessing"):
        return bool((processor.get("cls") or [None])[0] == bos)
    return False


def _id_set(value: Any) -> frozenset[int]:
    if isinstance(value, bool) or value is None:
        return frozenset()
    if isinstance(value, int):
        return frozenset({value})
    return frozenset(item for item in value if isinstance(item, int)) if isinstance(value, list) else frozenset()


def _named(ids: frozenset[int], by_id: Mapping[int, str]) -> str:
    return ", ".join(f"{number} ({by_id.get(number, 'not in the vocabulary')})" for number in sorted(ids))


def _about_eos(ends: Mapping[str, frozenset[int]], turn_end: int | None, by_id: Mapping[int, str]) -> list[str]:
    stated = {place: ids for place, ids in ends.items() if ids}
    remarks = []
    if len(set(stated.values())) > 1:
        parts = "; ".join(f"{place} says {_named(ids, by_id)}" for place, ids in stated.items())
        remarks.append(f"The end of a text differs: {parts}. Generation stops at any of them.")
    if not stated:
        remarks.append("Neither tokenizer nor config names an EOS token.")
    if turn_end is not None and turn_end not in frozenset().union(*ends.values()):
        remarks.append(
            f"The chat template ends an answer with {_named(frozenset({turn_end}), by_id)}, "
            "which is no EOS of tokenizer or config; it is added to the stop tokens."
        )
    return remarks


def _about_bos(
    config: Mapping[str, Any],
    settings: Mapping[str, Any],
    bos_id: int | None,
    by_id: Mapping[int, str],
    add_bos: bool,
    seen: Probe,
) -> list[str]:
    remarks = []
    stated = _id_set(config.get("bos_token_id"))
    if stated and bos_id is not None and stated != {bos_id}:
        own = _named(frozenset({bos_id}), by_id)
        remarks.append(f"BOS differs: config.json says {_named(stated, by_id)}, the tokenizer {own}.")
    configured = settings.get("add_bos_token")
    if isinstance(configured, bool) and bos_id is not None and configured != add_bos:
        does = "adds" if add_bos else "does not add"
        remarks.append(
            f"tokenizer_config.json says add_bos_token {str(configured).lower()}, but tokenizer.json {does} BOS; "
            "transformers 5 follows tokenizer.json."
        )
    if add_bos and seen.writes_bos:
        remarks.append("Template and tokenizer both write BOS: a rendered prompt is tokenized without adding one.")
    return remarks


def _sampling(generation: Mapping[str, Any]) -> dict[str, float]:
    """Sampling defaults; of a config without sampling only those that also affect greedy decoding."""
    keys = SAMPLING_KEYS if generation.get("do_sample") else ("repetition_penalty",)
    values = {key: generation.get(key) for key in keys}
    return {
        key: value for key, value in values.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }
