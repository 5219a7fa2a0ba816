"""Properties of a chat template (end of turn, BOS, system messages), read from a rendering in jinja's sandbox."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

_ANSWER = "THE-ANSWER-OF-THE-PROBE"
_SYSTEM = "THE-SYSTEM-PROMPT-OF-THE-PROBE"
DAY = datetime(2026, 1, 1)  # the date of strftime_now, fixed so that rendered texts can be compared


@dataclass(frozen=True)
class Probe:
    """The properties of one template.

    turn_end: the token that follows an assistant's answer, None when there is none. writes_bos: the text starts with
    the BOS token. system: what happens to a system message. marks: the added tokens around the turns, in the order of
    the text. error: why the template could not be rendered, "" when it could.
    """

    turn_end: str | None = None
    writes_bos: bool = False
    system: Literal["kept", "ignored", "refused"] = "kept"
    marks: tuple[str, ...] = ()
    error: str = ""


def renderer(template: str, special_tokens: Mapping[str, str | None]) -> Callable[[list[dict[str, str]], bool], str]:
    """``render(messages, add_generation_prompt)`` for a chat template, in the same jinja environment as transformers.

    Trimmed blocks, loop controls, tojson, raise_exception, strftime_now; the sandbox gives no access to files or Python
    internals. special_tokens: the variables bos_token, eos_token… Errors of the template pass through.
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
    """Render one question and one answer and read what surrounds them.

    special_tokens: the variables bos_token, eos_token… of the template. tokens: all added tokens of the tokenizer.
    """
    messages = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": _ANSWER}]
    try:
        render = renderer(template, special_tokens)
        text = render(messages, False)
    except Exception as error:  # a template is a program and can raise any error
        return Probe(error=f"{type(error).__name__}: {error}")
    bos = special_tokens.get("bos_token")
    _, answered, tail = text.rpartition(_ANSWER)
    after = sorted((tail.index(token), -len(token), token) for token in tokens if token and token in tail)
    turn_end = after[0][2] if answered and after else None
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
    except Exception:  # as above: a template can refuse with any error
        return "refused"
    return "kept" if _SYSTEM in text else "ignored"
