"""What a chat template does at the edges of a conversation, found by rendering one in jinja's sandbox."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

_ANSWER = "THE-ANSWER-OF-THE-PROBE"
_SYSTEM = "THE-SYSTEM-PROMPT-OF-THE-PROBE"
DAY = datetime(2026, 1, 1)  # the date in a template is fixed wherever texts are compared


@dataclass(frozen=True)
class Probe:
    """What was found.

    turn_end: the token that follows an assistant's answer, None when there is none. writes_bos: the text starts with
    the BOS token. system: what becomes of a system message. marks: the added tokens that stand around the turns, in
    order. error: why the template could not be rendered, "" when it could.
    """

    turn_end: str | None = None
    writes_bos: bool = False
    system: Literal["kept", "ignored", "refused"] = "kept"
    marks: tuple[str, ...] = ()
    error: str = ""


def renderer(template: str, special_tokens: Mapping[str, str | None]) -> Callable[[list[dict[str, str]], bool], str]:
    """``render(messages, add_generation_prompt)`` for a chat template, in the environment that transformers renders
    with.

    Trimmed blocks, loop controls, tojson, raise_exception, strftime_now; nothing the template says can reach files or
    Python objects. special_tokens: the variables bos_token, eos_token… Whatever the template raises passes through.
    """
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        import json

        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = DAY.strftime
    variables = {name: value or "" for name, value in special_tokens.items()}
    compiled = environment.from_string(template)

    def render(messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return compiled.render(
            messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **variables
        )

    return render


def probe(template: str, special_tokens: Mapping[str, str | None], tokens: Iterable[str]) -> Probe:
    """Render one question and one answer and look at what surrounds them.

    special_tokens: the variables bos_token, eos_token… of the template. tokens: all added tokens of the tokenizer.
    """
    messages = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": _ANSWER}]
    try:
        render = renderer(template, special_tokens)
        text = render(messages, False)
    except Exception as error:  # a template is a program: it may fail in any way, and all of them are its own fault
        return Probe(error=f"{type(error).__name__}: {error}")
    bos = special_tokens.get("bos_token")
    _, answered, tail = text.rpartition(_ANSWER)
    found = sorted((tail.index(token), -len(token), token) for token in tokens if token and token in tail)
    turn_end = found[0][2] if answered and found else None
    marks = sorted({token for token in tokens if token and token in text}, key=lambda token: (text.index(token), token))
    return Probe(
        turn_end=turn_end,
        writes_bos=bool(bos) and text.startswith(str(bos)),
        system=_of_system(render, messages),
        marks=tuple(marks),
    )


def _of_system(
    render: Callable[[list[dict[str, str]], bool], str], messages: list[dict[str, str]]
) -> Literal["kept", "ignored", "refused"]:
    try:
        text = render([{"role": "system", "content": _SYSTEM}, *messages], False)
    except Exception:  # as above: a template refuses in its own way
        return "refused"
    return "kept" if _SYSTEM in text else "ignored"
