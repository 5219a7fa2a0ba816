"""A recipe's options: parsed from the target and from ``--set key=value``, and listed for the reference."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from packager.core.errors import UsageError, closest

if TYPE_CHECKING:
    from packager.recipe import Options, Recipe
    from packager.target import Target

_MISSING = dataclasses.MISSING


def parse_options(recipe: Recipe[Options], target: Target, sets: Sequence[str]) -> Options:
    """An instance of ``recipe.options``: its defaults, then the target's, then ``key=value`` texts; the last wins.

    Raises UsageError for an unknown key (with the nearest one), a value of the wrong type or a missing value.
    """
    fields = {field.name: field for field in dataclasses.fields(recipe.options)}
    hints = typing.get_type_hints(recipe.options)
    values: dict[str, Any] = {}
    for key, value in target.options.get(recipe.name, {}).items():
        origin = f"target {target.name}, [options.{recipe.name}]"
        _known(key, fields, recipe, origin)
        text = str(value).lower() if isinstance(value, bool) else str(value)
        values[key] = _read(hints[key], text, f"{key} in {origin}")
    for entry in sets:
        key, equals, text = entry.partition("=")
        key = key.strip()
        if not equals:
            raise UsageError(f'--set {entry} has no "=".', fix=f"Write --set {key}=VALUE.")
        _known(key, fields, recipe, f"--set {entry}")
        values[key] = _read(hints[key], text.strip(), f"--set {key}")
    for name, field in fields.items():
        if name not in values and field.default is _MISSING and field.default_factory is _MISSING:
            raise UsageError(
                f"the recipe {recipe.name} needs a value for {name}.", fix=f"Add --set {name}={_type(hints[name])}."
            )
        least = field.metadata.get("min")
        if least is not None and name in values and values[name] is not None and values[name] < least:
            raise UsageError(f"{name}={values[name]} is too small.", fix=f"Set {name} to {least} or more.")
    return recipe.options(**values)


def options_keys(recipe: Recipe[Any]) -> list[tuple[str, str, Any, str]]:
    """(key, type, default, meaning) of every option, for ``recipes show`` and the reference."""
    hints = typing.get_type_hints(recipe.options)
    rows = []
    for field in dataclasses.fields(recipe.options):
        default = field.default if field.default is not _MISSING else None
        if field.default_factory is not _MISSING:
            default = field.default_factory()
        rows.append((field.name, _type(hints[field.name]), default, str(field.metadata.get("doc", ""))))
    return rows


def _known(key: str, fields: Mapping[str, Any], recipe: Recipe[Any], origin: str) -> None:
    if key not in fields:
        raise UsageError(
            f'{origin}: the recipe {recipe.name} has no option "{key}".{closest(key, list(fields))}',
            fix=f"Its options are {', '.join(fields) or 'none'}.",
        )


def _split(kind: Any) -> tuple[Any, bool]:
    """The type without ``| None``, and whether None is allowed."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        parts = [part for part in typing.get_args(kind) if part is not type(None)]
        return parts[0], True
    return kind, False


def _type(kind: Any) -> str:
    plain, optional = _split(kind)
    names = {str: "text", int: "integer", float: "number", bool: "true|false"}
    text = (
        "|".join(map(str, typing.get_args(plain)))
        if typing.get_origin(plain) is Literal
        else names.get(plain, str(plain))
    )
    return text + ("|none" if optional else "")


def _read(kind: Any, text: str, where: str) -> Any:
    plain, optional = _split(kind)
    if optional and text.lower() == "none":
        return None
    if typing.get_origin(plain) is Literal:
        for choice in typing.get_args(plain):
            if str(choice).lower() == text.lower():
                return choice
    elif plain is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    elif plain is str:
        return text
    elif plain is int and re.fullmatch(r"[+-]?\d{1,18}", text):
        return int(text)
    elif plain is float and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", text):
        return float(text)
    choices = [str(choice) for choice in typing.get_args(plain)]
    raise UsageError(f'{where} is "{text}".{closest(text, choices)}', fix=f"It can be: {_type(kind)}.")
