"""The training template: how conversations were rendered when the model was fine-tuned.

LLaMA-Factory's formats are data (data/training_templates.toml, with their source). It encodes a conversation piece by
piece and joins the ids; this module does the same, because a tokenizer could merge across a border between pieces. A
Jinja file is rendered by transformers' apply_chat_template (workers/samples.py). The only owner of yaml.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from packager.core.errors import InputError, UsageError, closest

DATA = Path(__file__).parent / "data" / "training_templates.toml"
THOUGHT = ("<think>\n", "\n</think>\n\n")
MARKS = re.compile(r"(\{bos\}|\{eos\})")
RUN_FILES = (".yaml", ".yml")

Piece = tuple[Literal["text", "bos", "eos"], str]


@dataclass(frozen=True)
class Slots:
    """A LLaMA-Factory format; data/training_templates.toml documents each field.

    thinking: its ``enable_thinking``; unless it is true, an empty thought is part of the prompt.
    """

    user: str = "{content}"
    assistant: str = "{content}{eos}"
    system: str = "{content}"
    prefix: str = ""
    default_system: str = ""
    merged: bool = False
    reasoning: bool = False
    last: str = ""
    stops: tuple[str, ...] = ()
    replaces_eos: bool = False
    thinking: bool | None = True

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> list[Piece] | None:
        """The prompt before the answer; None for an order of roles that LLaMA-Factory cannot train on."""
        system, talk = self._split(messages)
        if len(talk) % 2 == 0 or not _alternates(talk):
            return None
        parts: list[Piece] = []
        for number, message in enumerate(talk):
            content = message["content"]
            if message["role"] == "assistant" and self.reasoning:
                content = without_thought(content)
            parts += self._turn(number, message["role"], content, system)
        return parts + ([("text", "".join(THOUGHT))] if self.reasoning and not self.thinking else [])

    def answer(self, content: str) -> list[Piece]:
        """The answer that training expects after ``prompt``, its end included."""
        parts: list[Piece] = []
        if self.reasoning and self.thinking is False:
            content = without_thought(content)
        if self.reasoning and self.thinking and not _thinks(content):
            parts.append(("text", "".join(THOUGHT)))
        return [*parts, *pieces(self.assistant, content), *pieces(self.last)]

    def conversation(self, messages: Sequence[Mapping[str, str]]) -> list[Piece] | None:
        """A whole conversation as a training sample: every answer with its thought; None as for ``prompt``."""
        system, talk = self._split(messages)
        if len(talk) % 2 or not _alternates(talk):
            return None
        parts: list[Piece] = []
        for number, message in enumerate(talk):
            content = message["content"]
            if message["role"] == "assistant" and self.reasoning:
                if self.thinking is False:
                    content = without_thought(content)
                if not _thinks(content):
                    parts.append(("text", "".join(THOUGHT)))
            parts += self._turn(number, message["role"], content, system)
        return parts + pieces(self.last)

    def ends(self) -> list[Piece]:
        """The pieces after an answer's text: the end that the model learned."""
        return pieces(self.assistant.partition("{content}")[2]) + pieces(self.last)

    def _split(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, Sequence[Mapping[str, str]]]:
        if messages and messages[0]["role"] == "system":
            return messages[0]["content"] or self.default_system, messages[1:]
        return self.default_system, messages

    def _turn(self, number: int, role: str, content: str, system: str) -> list[Piece]:
        parts: list[Piece] = []
        if number == 0:
            parts += pieces(self.prefix)
            if system and self.merged:
                content = "".join(text for _, text in pieces(self.system, system)) + content
            elif system:
                parts += pieces(self.system, system)
        return parts + pieces(self.user if role == "user" else self.assistant, content)


@dataclass(frozen=True)
class Training:
    """A training template. name: the user's name or file name. slots: LLaMA-Factory's; or jinja: the text of a chat
    template.
    """

    name: str
    slots: Slots | None = None
    jinja: str | None = None

    @property
    def digest(self) -> str:
        """SHA-256 over everything that determines the ids."""
        return hashlib.sha256(json.dumps(self.as_job(), sort_keys=True).encode()).hexdigest()

    def as_job(self) -> dict[str, Any]:
        """The JSON form that workers/samples.py reads with ``from_job``."""
        slots = None if self.slots is None else {**self.slots.__dict__, "stops": list(self.slots.stops)}
        return {"name": self.name, "slots": slots, "jinja": self.jinja}


def from_job(job: Mapping[str, Any]) -> Training:
    """The inverse of Training.as_job."""
    slots = job["slots"]
    return Training(job["name"], slots and Slots(**{**slots, "stops": tuple(slots["stops"])}), job["jinja"])


@cache
def known() -> dict[str, Slots]:
    """LLaMA-Factory's templates by name."""
    table = tomllib.loads(DATA.read_text(encoding="utf-8"))
    return {name: Slots(**{**fields, "stops": tuple(fields.get("stops", ()))}) for name, fields in table.items()}


def load(ref: str) -> Training:
    """A LLaMA-Factory name, a YAML file of a training run (its ``template:``), or a file with a Jinja chat template.

    Raises UsageError for a name that is not known, InputError for a file that cannot be read or holds no template.
    """
    if ref in known():
        return Training(ref, known()[ref])
    path = Path(ref).expanduser()
    if not path.is_file():
        if "/" in ref or path.suffix:
            raise InputError(f"the template file {ref} is not there.", fix="Give --template a name or a file.")
        raise UsageError(
            f"the training template {ref!r} is not known.{closest(ref, list(known()))}",
            fix="`packager templates` lists the names; a Jinja file or the run's own YAML works too.",
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the template file {path} cannot be read: {error}.", fix="Give a UTF-8 file.") from error
    if path.suffix.lower() in RUN_FILES:
        return _of_run(path, text)
    if not text.strip() or "{" not in text:
        raise InputError(
            f"{path} is no chat template: nothing in it is Jinja.",
            fix="Give the .jinja file, or the training run's .yaml.",
        )
    return Training(path.name, jinja=text)


def _of_run(path: Path, text: str) -> Training:
    """The template of a LLaMA-Factory run's YAML file, with the run's own default system prompt and thinking."""
    import yaml

    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = f" (line {place.line + 1})" if place else ""
        raise InputError(f"{path} is not YAML{where}.", fix="Give the file that started the training.") from error
    name = settings.get("template") if isinstance(settings, Mapping) else None
    if not isinstance(name, str):
        raise InputError(
            f"{path} names no template.",
            why="LLaMA-Factory then uses the tokenizer's own, which is also checked without --template.",
            fix="Leave --template out, or give the name.",
        )
    if name not in known():
        raise UsageError(
            f"{path} was trained with the template {name!r}, which is not known.{closest(name, list(known()))}",
            fix="Give a Jinja file that renders as that template does.",
        )
    slots = known()[name]
    if isinstance(settings.get("default_system"), str):
        slots = replace(slots, default_system=settings["default_system"])
    if "enable_thinking" in settings:
        slots = replace(slots, thinking=settings["enable_thinking"])
    return Training(name, slots)


def pieces(format: str, content: str = "") -> list[Piece]:
    """A format as the pieces that are encoded separately: texts with the content in them, BOS, EOS; no empty texts."""
    parts: list[Piece] = []
    room = True  # only the first {content} is replaced: the same text inside a message stays as it is
    for part in MARKS.split(format):
        if part == "{bos}":
            parts.append(("bos", ""))
        elif part == "{eos}":
            parts.append(("eos", ""))
        else:
            text = part.replace("{content}", content, 1) if room else part
            room = room and "{content}" not in part
            if text:
                parts.append(("text", text))
    return parts


def encode(
    parts: Sequence[Piece], tokenize: Callable[[str], Sequence[int]], bos: int | None, eos: int | None
) -> list[int]:
    """Token ids: every text encoded separately, without the special tokens that the tokenizer would add."""
    ids: list[int] = []
    special = {"bos": bos, "eos": eos}
    for kind, text in parts:
        if kind == "text":
            ids += tokenize(text)
        elif (token := special[kind]) is not None:
            ids.append(token)
    return ids


def without_thought(content: str) -> str:
    """An answer as it is rendered in a later prompt: without its thought."""
    return re.sub(f"{re.escape(THOUGHT[0])}.*?{re.escape(THOUGHT[1])}", "", content, flags=re.DOTALL).lstrip("\n")


def _thinks(content: str) -> bool:
    return any(word.strip() in content for word in THOUGHT)


def _alternates(talk: Sequence[Mapping[str, str]]) -> bool:
    return all(message["role"] == ("user", "assistant")[number % 2] for number, message in enumerate(talk))


def as_jinja(slots: Slots) -> str:
    """A chat template that renders prompts as these slots do, for a checkpoint that was trained with them."""

    def expression(format: str, content: str) -> str:
        parts = []
        for part in re.split(r"(\{bos\}|\{eos\}|\{content\})", format):
            name = {"{bos}": "bos_token", "{eos}": "eos_token", "{content}": content}.get(part)
            if name or part:
                parts.append(name or json.dumps(part, ensure_ascii=False))
        return " ~ ".join(parts) or '""'

    def written(format: str, content: str) -> str:
        return f"{{{{ {expression(format, content)} }}}}" if format else ""

    default = json.dumps(slots.default_system, ensure_ascii=False)
    head = (
        '{% set ns = namespace(system="") %}'
        '{% if messages[0]["role"] == "system" %}{% set ns.system = messages[0]["content"] %}{% endif %}'
        f"{{% if not ns.system %}}{{% set ns.system = {default} %}}{{% endif %}}"
    )
    system = written(slots.system, "ns.system")
    first = "" if slots.merged else f"{{% if ns.system %}}{system}{{% endif %}}"
    content = 'message["content"]'
    user = written(slots.user, content)
    if slots.merged:
        merged = f"({expression(slots.system, 'ns.system')} ~ {content} if ns.system else {content})"
        user = written(slots.user, merged) + '{% set ns.system = "" %}'
    answer = written(slots.assistant, "content")
    kept = (
        f'{{% set content = {content} %}}{{% if "</think>" in content %}}'
        '{% set content = content.split("</think>")[-1].lstrip("\\n") %}{% endif %}'
        if slots.reasoning
        else f"{{% set content = {content} %}}"
    )
    return (
        f"{head}{written(slots.prefix, '')}{first}{{% for message in messages %}}"
        f'{{% if message["role"] == "user" %}}{user}'
        f'{{% elif message["role"] == "assistant" %}}{kept}{answer}{{% endif %}}{{% endfor %}}'
    )
