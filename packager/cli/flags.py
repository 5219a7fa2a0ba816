"""Flags that several verbs share, and the objects made from them: a Console, a Request, thresholds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from packager.cli.console import Console

Command = Callable[..., Any]

FILE = click.Path(path_type=Path)
SOURCE = (
    click.argument("checkpoint"),
    click.option("--adapter", type=FILE, help="A LoRA adapter folder (peft), merged into the base."),
    click.option("--revision", help="Branch, tag or commit of a hub id; the commit is pinned in the manifest."),
    click.option("--name", help="Name of the model in the bundle; default: the folder's or hub's name."),
)
REQUEST = (
    click.option("--target", required=True, help="Target name or a .toml file; see `packager targets`."),
    click.option("--recipe", help="Recipe name or a .py file; default: the target's."),
    click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="An option of the recipe; may be repeated."),
    click.option("--calibration", type=FILE, help="Text, or the fine-tuning pairs (alpaca or messages JSON)."),
    click.option(
        "--ask",
        metavar="all|N",
        callback=lambda _context, _option, text: _ask(text),
        help="How many of the fine-tuning pairs the artifact is asked again. Default: as many as five minutes allow.",
    ),
)
SHARE, COSINE = click.FloatRange(0, 1), click.FloatRange(-1, 1)
LIMITS: dict[str, tuple[click.FloatRange, str]] = {
    "max_kl": (click.FloatRange(0), "Most mean KL divergence from the source, in nats."),
    "min_top1": (SHARE, "Least share of positions with the source's best token."),
    "min_behaviour": (SHARE, "Least share of the fine-tuning pairs (--calibration) still answered word for word."),
    "min_cosine": (COSINE, "Embedders: least mean cosine to the source."),
    "min_rank": (COSINE, "Embedders: least rank correlation of similarities."),
    "min_agreement": (SHARE, "Classifiers: least share with the source's label."),
    "max_accuracy_loss": (
        SHARE,
        "Classifiers: most accuracy that may be lost on the labelled texts of --calibration.",
    ),
}


ALL = 1 << 30  # more pairs than any file has


def _ask(text: str | None) -> int | None:
    """The number in --ask; None without the flag. Raises click's BadParameter."""
    if text is None or text == "all":
        return None if text is None else ALL
    if not text.isascii() or not text.isdigit():
        raise click.BadParameter(f"{text!r} is neither a number nor all.")
    return int(text)


def _all(options: Sequence[Command], command: Command) -> Command:
    """The command with these options, in the order of --help."""
    for option in reversed(options):
        command = option(command)
    return command


def common(command: Command) -> Command:
    """--json and --quiet for every verb; the command gets a Console."""

    @click.option("--json", "json_mode", is_flag=True, help="One JSON document on stdout; progress stays on stderr.")
    @click.option("--quiet", "-q", is_flag=True, help="No progress.")
    @functools.wraps(command)
    def wrapper(*args: Any, json_mode: bool, quiet: bool, **kwargs: Any) -> Any:
        return command(*args, console=Console(json_mode=json_mode, quiet=quiet), **kwargs)

    return wrapper


def sourced(command: Command) -> Command:
    """The flags of the source model; the command gets checkpoint, adapter, revision and name."""
    return _all(SOURCE, command)


def requested(command: Command) -> Command:
    """The flags of the source model, the build and its data; the command gets a Request."""

    @functools.wraps(command)
    def wrapper(
        *args: Any,
        checkpoint: str,
        adapter: Path | None,
        revision: str | None,
        name: str | None,
        target: str,
        recipe: str | None,
        sets: tuple[str, ...],
        calibration: Path | None,
        ask: int | None,
        **kwargs: Any,
    ) -> Any:
        from packager.build import Request

        request = Request(checkpoint, target, recipe, adapter, revision, name, sets, calibration, ask=ask)
        return command(*args, request=request, **kwargs)

    return _all((*SOURCE, *REQUEST), wrapper)


def limited(command: Command) -> Command:
    """The flags of the thresholds; the command gets ``limits``, those that were given."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        given = {name: kwargs.pop(name) for name in LIMITS}
        return command(*args, limits={name: value for name, value in given.items() if value is not None}, **kwargs)

    options = [
        click.option(f"--{name.replace('_', '-')}", type=kind, help=text) for name, (kind, text) in LIMITS.items()
    ]
    return _all(options, wrapper)
