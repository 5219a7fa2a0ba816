"""Conversations to token ids, exactly as transformers' ``apply_chat_template(tokenize=True)`` makes them.

The template is rendered once and the text is tokenized once, without the tokenizer's own special tokens, so the only
BOS is the template's. Templates are not trusted: they run in jinja's immutable sandbox and get plain JSON values only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

from runtimes.decoding.tokenizer import open_tokenizer
from runtimes.manifest import ManifestError, Run

Message = Mapping[str, Any]


class TemplateRefused(Exception):
    """The template refuses this conversation; the text is the template's own message."""


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's text for training; here it renders its body only."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own interface

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class _Dict:
    """The ``dict`` of templates: it builds dictionaries; a class would be a way out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """The ``namespace`` of templates: without underscore names, so that Python's internals cannot be reached."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # jinja's own trick: ``namespace(self=…)`` must work too
        self, rest = args[0], args[1:]
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _Namespace._check(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: object) -> None:
        _Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a chat template may not store the name {name!r} in a namespace")


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja's own filter escapes HTML characters, which the training data does not
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def compile_template(source: str, now: Callable[[], datetime] = datetime.now) -> jinja2.Template:
    """The template in the environment of transformers (utils/chat_template_utils.py, 5.x). now: gives the date.
    Raises ManifestError.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: now().strftime(pattern)
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ManifestError(f"The chat template does not compile: {error}.") from None


class Prompts:
    """Renders and tokenizes; thread-safe. now: gives the date to templates that write one. Raises ManifestError."""

    def __init__(self, run: Run, now: Callable[[], datetime] = datetime.now) -> None:
        self._tokenizer = open_tokenizer(run.tokenizer)  # the engine's own, where it has one: 25 MB for 49,000 words
        self._template = None
        if run.chat_template is not None:
            self._template = compile_template(_read(run.chat_template), now)
        self._special = dict(run.special_tokens)
        self._bos = run.bos_id if run.add_bos else None

    @property
    def has_template(self) -> bool:
        return self._template is not None

    def render(self, messages: Sequence[Message]) -> str:
        """The text of a conversation with the assistant's turn opened. Raises TemplateRefused."""
        if self._template is None:
            raise TemplateRefused("this model has no chat template; use /v1/completions")
        # as in transformers: drop keys that hold None, which templates do not expect
        plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            return self._template.render(
                messages=plain, tools=None, documents=None, add_generation_prompt=True, **self._special
            )
        except jinja2.TemplateError as error:
            raise TemplateRefused(str(error)) from None
        except (TypeError, ValueError, KeyError, ArithmeticError, RecursionError) as error:
            raise TemplateRefused(f"the chat template failed on these messages: {error}") from None

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, the assistant's turn opened. Raises TemplateRefused."""
        return self.encode(self.render(messages))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens in it are recognised, none are added."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def plain(self, text: str) -> list[int]:
        """Token ids of a text to continue, as transformers' ``tokenizer(text)``: with BOS where it adds one."""
        ids = self.encode(text)
        return ids if self._bos is None else [self._bos, *ids]

    def vocabulary(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def token_ids(self) -> Callable[[str], int | None]:
        return self._tokenizer.token_to_id


def _read(path: Path) -> str:
    try:
        # newline="" keeps the file's own line ends: they are part of the prompt
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path.name} cannot be read: {error}.") from None
