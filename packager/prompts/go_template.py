"""Renders the subset of Go templates that packager and LLaMA-Factory write into Ollama's Modelfiles.

Ollama is not run. The module evaluates the constructs that both write (range over .Messages, if / else if / else on a
role or a value, .Content, .Role, .System, quoted text) as Go's text/template and Ollama's template package define them,
and refuses all others, so that its text equals Ollama's. Ollama first joins adjacent messages of one role with a blank
line and all system messages into .System (template/template.go, collate).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

ACTION = re.compile(r"\{\{(-?)\s*(.*?)\s*(-?)\}\}", re.DOTALL)


class NotUnderstood(ValueError):
    """The template uses a construct that is not evaluated here; the message names it."""


@dataclass(frozen=True)
class _Node:
    """kind: text, value, if or range. parts: of an if (condition, body); the last condition may be empty (else)."""

    kind: str
    text: str = ""
    body: tuple[_Node, ...] = ()
    parts: tuple[tuple[str, tuple[_Node, ...]], ...] = ()


def render(template: str, messages: Sequence[Mapping[str, str]], system: str = "") -> str:
    """The prompt for these messages. system: the Modelfile's own SYSTEM, for a conversation without one.

    Raises NotUnderstood.
    """
    if system and not any(message["role"] == "system" for message in messages):
        messages = [{"role": "system", "content": system}, *messages]
    joined: list[dict[str, str]] = []
    for message in messages:
        if joined and joined[-1]["role"] == message["role"]:
            joined[-1]["content"] += "\n\n" + message["content"]
        else:
            joined.append({"role": message["role"], "content": message["content"]})
    whole = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    nodes, end = _parse(list(_tokens(template)))
    if end is not None:
        raise NotUnderstood(f"{{{{ {end} }}}} without a beginning")
    return "".join(_evaluate(nodes, joined, whole, None))


def _tokens(template: str) -> Iterator[tuple[bool, str]]:
    """(is an action, its text) for each part; trim markers remove the white space beside them."""
    place, trim = 0, False
    for match in ACTION.finditer(template):
        text = template[place : match.start()]
        text = text.lstrip() if trim else text
        yield False, text.rstrip() if match[1] else text
        yield True, match[2]
        place, trim = match.end(), bool(match[3])
    rest = template[place:]
    yield False, rest.lstrip() if trim else rest


def _parse(tokens: list[tuple[bool, str]]) -> tuple[tuple[_Node, ...], str | None]:
    """(nodes up to the action that ends this level, that action); removes the parsed tokens from the list."""
    nodes: list[_Node] = []
    while tokens:
        action, text = tokens.pop(0)
        if not action:
            if text:
                nodes.append(_Node("text", text))
        elif text == "end" or text == "else" or text.startswith("else if "):
            return tuple(nodes), text
        elif text == "range .Messages":
            body, end = _parse(tokens)
            if end != "end":
                raise NotUnderstood("a range without an end")
            nodes.append(_Node("range", body=body))
        elif text.startswith("if "):
            parts: list[tuple[str, tuple[_Node, ...]]] = []
            condition: str | None = text.removeprefix("if ")
            while True:
                body, end = _parse(tokens)
                parts.append((condition or "", body))
                if end is None:
                    raise NotUnderstood("an if without an end")
                if end == "end":
                    break
                condition = end.removeprefix("else if ") if end != "else" else ""
            nodes.append(_Node("if", parts=tuple(parts)))
        else:
            nodes.append(_Node("value", text))
    return tuple(nodes), None


def _evaluate(
    nodes: Sequence[_Node], messages: Sequence[Mapping[str, str]], system: str, message: Mapping[str, str] | None
) -> Iterator[str]:
    for node in nodes:
        if node.kind == "text":
            yield node.text
        elif node.kind == "value":
            yield _value(node.text, system, message)
        elif node.kind == "range":
            for each in messages:
                yield from _evaluate(node.body, messages, system, each)
        else:
            for condition, body in node.parts:
                if not condition or _holds(condition, system, message):
                    yield from _evaluate(body, messages, system, message)
                    break


def _value(text: str, system: str, message: Mapping[str, str] | None) -> str:
    if re.fullmatch(r'"(?:[^"\\]|\\.)*"', text):
        return str(json.loads(text))
    if message is not None and text in (".Content", ".Role"):
        return message[text[1:].lower()]
    if text == "$.System" or (message is None and text == ".System"):
        return system
    raise NotUnderstood(f"{{{{ {text} }}}}")


def _holds(condition: str, system: str, message: Mapping[str, str] | None) -> bool:
    if match := re.fullmatch(r"(eq|ne) (\S+) (\"[^\"]*\")", condition):
        same = _value(match[2], system, message) == json.loads(match[3])
        return bool(same) == (match[1] == "eq")
    if condition.startswith("not "):
        return not _value(condition.removeprefix("not ").strip(), system, message)
    return bool(_value(condition, system, message))
