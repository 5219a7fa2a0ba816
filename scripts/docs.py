"""Writes docs/reference from the code: python scripts/docs.py [--check]. With --check it prints differences and fails.

The command line comes from click and argparse, exit codes from packager/core/errors.py, target keys from the
dataclasses that read them, recipe options from the recipes, the manifest from its JSON Schema: a change of any of them
that is not in the docs stops `make test`.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import click

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "docs/reference"
WIDTH = 100


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; bars inside cells are escaped."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def commands(command: click.Command, context: click.Context) -> Iterator[tuple[str, str]]:
    """(full name, help text) of a command and its subcommands, in order."""
    yield context.command_path, context.get_help()
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            yield from commands(below, click.Context(below, info_name=name, parent=context, **SETTINGS))


SETTINGS: dict[str, Any] = {"terminal_width": WIDTH, "max_content_width": WIDTH, "help_option_names": ["-h", "--help"]}


def command_line() -> str:
    from packager.cli.main import cli

    every = "Every verb takes `--json`: one document on standard output, progress on standard error."
    parts = ["# Command line", "", every, ""]
    for name, text in commands(cli, click.Context(cli, info_name="packager", **SETTINGS)):
        parts += [f"## {name}", "", "```text", *(line.rstrip() for line in text.splitlines()), "```", ""]
    return "\n".join(parts)


def exit_codes() -> str:
    from packager.core import errors

    rows = re.findall(r"^(\d+)\s{2,}(\S.*)$", errors.__doc__ or "", re.MULTILINE)
    kinds = {
        str(kind.exit_code): kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.PackagerError) and kind is not errors.PackagerError
    }
    unknown = set(kinds) - {code for code, _ in rows}
    assert not unknown, f"packager/core/errors.py: its docstring does not list the exit codes {sorted(unknown)}"
    lines = [(code, f"`{kinds[code].kind}`" if code in kinds else "", meaning) for code, meaning in rows]
    return "\n".join(
        [
            "# Exit codes",
            "",
            "Part of the interface: release pipelines branch on them. Every failure has three lines: what, why, and",
            'what to do. With `--json` it is `{"error": {"kind", "exit_code", "what", "why", "fix"}}` on stdout.',
            "",
            table(("code", "kind", "meaning"), lines),
        ]
    )


def targets() -> str:
    from packager.planning.catalog import load_target, target_names
    from packager.target import target_keys

    shipped = [load_target(name) for name in target_names()]
    devices = [(f"`{target.name}`", target.title, f"`{target.recipe}`") for target in shipped]
    keys = [(f"`{key}`", kind, meaning) for key, kind, meaning in target_keys()]
    return "\n".join(
        [
            "# Targets",
            "",
            "One TOML file a device in `targets/`; the file name is the target's name. Unknown keys are refused.",
            "",
            "## Shipped",
            "",
            table(("name", "device", "default recipe"), devices),
            "## Keys",
            "",
            table(("key", "type", "meaning"), keys),
            "How to add one: [how-to](../how-to/).",
            "",
        ]
    )


def recipes() -> str:
    from packager.planning.catalog import load_recipe, recipe_names
    from packager.planning.options import options_keys

    parts = ["# Recipes", "", "One module a recipe in `recipes/`; the file name is the recipe's name.", ""]
    for name in recipe_names():
        recipe = load_recipe(name)
        rows = [
            (f"`{key}`", values, "" if default is None else f"`{default}`", meaning)
            for key, values, default, meaning in options_keys(recipe)
        ]
        parts += [
            f"## {name}",
            "",
            f"{recipe.summary}. Format: {recipe.format}.",
            "",
            table(("--set key", "values", "default", "meaning"), rows),
        ]
        if recipe.needs:
            needs = [(f"`{need.module}`", need.brings, need.when or "always") for need in recipe.needs]
            parts += [table(("needs", "brought by", "for"), needs)]
    return "\n".join(parts)


def manifest() -> str:
    from packager.bundle import __file__ as package

    schema = json.loads((Path(package).parent / "schemas/manifest.schema.json").read_text(encoding="utf-8"))
    rows = list(schema_rows(schema, schema["$defs"], ""))
    return "\n".join(
        [
            "# manifest.json",
            "",
            schema["description"],
            "",
            "The JSON Schema is `packager/bundle/schemas/manifest.schema.json`. The same inputs give the same bytes:",
            "no file of a bundle contains times, host names or absolute paths; a build's time and memory are in",
            "`<bundle>.build.json` beside it.",
            "",
            table(("key", "type", "required", "meaning"), rows),
        ]
    )


def schema_rows(node: Mapping[str, Any], defs: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    """Rows for the properties of one object of the schema, and of the objects below them."""
    for name, inner in node.get("properties", {}).items():
        key = f"{prefix}{name}"
        required = "yes" if name in node.get("required", []) else ""
        yield f"`{key}`", schema_type(inner, defs), required, inner.get("description", "")
        if inner.get("type") == "array" and "properties" in inner["items"]:
            yield from schema_rows(inner["items"], defs, f"{key}[].")
        else:
            yield from schema_rows(inner, defs, f"{key}.")


NAMED = {"slug": "name", "minor": "version", "size": "integer", "count": "integer ≥ 1", "token": "token id"}


def schema_type(node: Mapping[str, Any], defs: Mapping[str, Any]) -> str:
    """One or two words for a schema node's type."""
    if "const" in node:
        return json.dumps(node["const"])
    if "enum" in node:
        return ", ".join(f"`{value}`" for value in node["enum"])
    if "anyOf" in node:
        return " or ".join(schema_type(part, defs) for part in node["anyOf"])
    if "$ref" in node:
        name = str(node["$ref"]).rpartition("/")[2]
        return NAMED.get(name, name)
    kinds = node.get("type", "any")
    if kinds == "array":
        return f"list of {schema_type(node['items'], defs)}" if "properties" not in node["items"] else "list"
    return " or ".join(kinds) if isinstance(kinds, list) else str(kinds)


class _Parser(Exception):
    """Carries the parser of a verb out of its main()."""


def on_the_box() -> str:
    """bin/check, bin/serve, bin/bench as tables: the layout of argparse's help depends on the Python version."""
    sys.path.insert(0, str(ROOT))
    from runtimes.__main__ import VERBS

    def stop(parser: argparse.ArgumentParser, *_: object) -> None:
        raise _Parser(parser)

    where = "`install.sh` puts three commands into `PREFIX/bin`. None of them needs a network."
    parts = ["# On the box", "", where, ""]
    for verb in ("check", "serve", "bench"):
        module, summary = VERBS[verb]
        with mock.patch.object(argparse.ArgumentParser, "parse_args", stop):
            try:
                importlib.import_module(f"runtimes.{module}").main([])
            except _Parser as carrier:
                parser: argparse.ArgumentParser = carrier.args[0]
        options = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
        rows = [
            (
                ", ".join(f"`{name}`" for name in option.option_strings),
                shown(option.default),
                (option.help or "") % {"default": option.default},
            )
            for option in options
            if option.dest != "bundle"
        ]
        sentence = f"{summary[0].upper()}{summary[1:]}."
        parts += [f"## bin/{verb}", "", sentence, "", table(("option", "default", "meaning"), rows)]
    return "\n".join(parts)


def shown(default: object) -> str:
    if isinstance(default, list | tuple):
        default = ",".join(map(str, default))
    return "" if default in (None, False) else f"`{default}`"


def refusals() -> str:
    """The preflight's results for the recorded boxes."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.refusals import markdown

    return "\n".join(
        [
            "# Preflight results",
            "",
            "Recorded boxes (`tests/unit/boxes`) against bundles, each row one run of the preflight;",
            "`python benchmarks/refusals.py` prints the same. The boxes were written from documentation and published",
            "records, not recorded by us on devices: `tests/unit/boxes/trees/README.md`.",
            "How to read it: [check a box](../how-to/check-a-box.md).",
            "",
            markdown(),
        ]
    )


def rooms() -> str:
    """The layers of the packages, from scripts/rooms.py and the docstrings of the folders."""
    from rooms import drawing, tree

    parts = [
        "# Rooms",
        "",
        "A room imports only rooms below it; rooms joined by `|` do not import each other. `scripts/rooms.py` names",
        "them from bottom to top, and `tests/unit/test_layout.py` fails on an import that climbs.",
        "",
        f"```text\n{drawing()}```",
        "",
        "Modules in each folder:",
        "",
        f"```text\n{tree()}```",
    ]
    return "\n".join(parts)


# Engines that this project's tests execute, on Linux and x86-64. Nothing with a GPU was executed.
EXECUTED = ("llamacpp", "ort", "ort_encoder", "transformers")
DEVICES = {
    "desktop_linux_x86_64": "Linux desktop",
    "desktop_windows_x86_64": "Windows desktop",
    "desktop_macos_arm64": "macOS desktop",
    "ollama": "Ollama",
    "t4": "T4 server",
    "jetson_orin_nano_8gb": "Jetson Orin",
    "jetson_thor": "Jetson Thor",
    "jetson_xavier_nx": "Jetson Xavier NX",
}
FORMS = (
    ("GGUF", "gguf", "llamacpp"),
    ("ONNX INT8 or INT4, language models", "onnx_int8", "ort"),
    ("ONNX INT8, embedders and classifiers", "onnx_int8", "ort_encoder"),
    ("GPTQ and AWQ int4", "gptq_int4", "transformers"),
    ("TensorRT", "tensorrt_engine", "tensorrt"),
    ("TensorRT Edge-LLM", "edge_llm", "edgellm"),
)


def formats_and_devices() -> str:
    """The front page's table: what was run here, what was generated and not executed."""
    from packager.planning.catalog import load_target

    rows = []
    for title, recipe, engine in FORMS:
        cells = []
        for name in DEVICES:
            target = load_target(name)
            if recipe not in target.recipes.supported:
                cells.append("–")
                continue
            served = "vllm" if engine == "transformers" and engine not in target.runtimes else engine
            here = (target.system, target.machine) == ("linux", "x86_64") and name != "ollama" and served in EXECUTED
            cells.append("**run here**" if here else "generated")
        rows.append((title, *cells))
    return table(("", *DEVICES.values()), rows)


def front_page(text: str) -> str:
    """README.md with its generated table."""
    begin, end = "<!-- formats and devices: scripts/docs.py -->\n", "<!-- end -->"
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n{formats_and_devices()}\n{end}{rest.partition(end)[2]}" if rest else text


PAGES = {
    "cli.md": command_line,
    "box.md": on_the_box,
    "exit-codes.md": exit_codes,
    "targets.md": targets,
    "recipes.md": recipes,
    "manifest.md": manifest,
    "refusals.md": refusals,
    "rooms.md": rooms,
}
NOTE = "<!-- Written by scripts/docs.py from the code (make docs). Do not edit. -->\n\n"


def main() -> int:
    check = sys.argv[1:] == ["--check"]
    pages = {REFERENCE / name: NOTE + make().rstrip() + "\n" for name, make in PAGES.items()}
    readme = ROOT / "README.md"
    pages[readme] = front_page(readme.read_text(encoding="utf-8"))
    stale = 0
    for path, wanted in pages.items():
        kept = path.read_text(encoding="utf-8") if path.exists() else ""
        if wanted == kept:
            continue
        stale += 1
        if check:
            lines = difflib.unified_diff(
                kept.splitlines(), wanted.splitlines(), f"{path.name} (kept)", f"{path.name} (code)", n=1
            )
            print("\n".join(line.rstrip() for line in list(lines)[:40]))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
    if check and stale:
        print(f"{stale} of {len(pages)} generated pages differ from the code: run `make docs` and commit them.")
        return 1
    print(f"{len(pages)} generated pages are as the code has them.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
