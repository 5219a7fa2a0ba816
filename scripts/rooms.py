"""The layers of the packages, the imports that break them, and their drawing: python scripts/rooms.py.

A room is a folder or a file of ``packager/``, ``runtimes/`` or ``recipes/``. It imports only rooms of lower layers;
rooms of one layer do not import each other.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

# Each line is a layer; the first is the lowest.
LAYERS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "build machine": (
        ("packager.core",),
        ("packager.tensors", "packager.metrics"),
        ("packager.checkpoint", "packager.target"),
        ("packager.prompts",),
        ("packager.recipe", "packager.workers"),
        ("packager.planning",),
        ("packager.bundle",),
        ("packager.fidelity",),
        ("packager.formats.tokenizer_files", "packager.formats.by_kind"),
        ("packager.formats.int4",),
        ("packager.formats.gguf", "packager.formats.onnx", "packager.formats.edge_llm"),
        ("packager.formats.tensorrt", "packager.build"),
        ("packager.cli", "recipes"),
        ("packager.__main__",),
    ),
    "box": (
        ("runtimes.files", "runtimes.manifest"),
        ("runtimes.process", "runtimes.engine"),
        ("runtimes.preflight",),
        ("runtimes.decoding", "runtimes.bench"),
        ("runtimes.engines",),
        ("runtimes.server", "runtimes.evaluate", "runtimes.install"),
        ("runtimes.__main__",),
    ),
}
# Rooms of different layers that must not import each other either: (importer, imported).
APART = (
    ("packager.build", "packager.formats"),
    ("packager.cli", "packager.formats"),
    ("packager.formats.tensorrt", "packager.formats.gguf"),
    ("packager.formats.tensorrt", "packager.formats.edge_llm"),
    ("recipes", "packager.build"),
)


class Climb(NamedTuple):
    """An import that the layers do not allow. line: of the importing file."""

    importer: str
    line: int
    imported: str

    def __str__(self) -> str:
        return f"{self.importer.replace('.', '/')}.py:{self.line} imports {self.imported}"


def floors() -> dict[str, tuple[str, int]]:
    """Room -> (side, floor from 0)."""
    return {
        room: (side, number) for side, layers in LAYERS.items() for number, layer in enumerate(layers) for room in layer
    }


def room_of(module: str) -> str | None:
    """The innermost room of a dotted module name; None for a package's own __init__."""
    known = floors()
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in known:
            return ".".join(parts[:length])
    return None


def sources(root: Path = ROOT) -> dict[str, Path]:
    """Dotted module name -> file, for every module of the three folders."""
    files: dict[str, Path] = {}
    for folder in ("packager", "recipes", "runtimes"):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def imported(path: Path, modules: Mapping[str, Path]) -> Iterator[tuple[str, int]]:
    """(module, line) for every import of one of ``modules`` in a file, also inside functions and for the type checker
    only.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                name = inner if inner in modules else node.module
                if name in modules:
                    yield name, node.lineno


def climbs(root: Path = ROOT) -> list[Climb]:
    """All imports from a higher layer, from another room of the same layer, or from the other side."""
    known, modules, wrong = floors(), sources(root), []
    for module, path in modules.items():
        here = room_of(module)
        for name, line in imported(path, modules):
            there = room_of(name)
            if here is None or there is None or here == there:
                continue
            (side, floor), (other, lower) = known[here], known[there]
            apart = any(here.startswith(one) and there.startswith(two) for one, two in APART)
            if side != other or lower >= floor or apart:
                wrong.append(Climb(module, line, name))
    return wrong


def homeless(root: Path = ROOT) -> list[str]:
    """Modules without a room: a new folder needs a layer."""
    files = {module: path for module, path in sources(root).items() if path.name != "__init__.py"}
    return [module for module in files if room_of(module) is None]


def about(room: str, root: Path = ROOT) -> str:
    """The first sentence of a room's docstring."""
    place = root / room.replace(".", "/")
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    if not file.is_file():
        return "One module a way to build; the file name is the identifier."
    text = " ".join((ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.;]) (?=[A-Z`])", text)[0].rstrip(".")


def drawing(root: Path = ROOT) -> str:
    """The rooms as text, the highest layer first."""
    lines: list[str] = []
    for side, layers in LAYERS.items():
        lines += [f"{side}", ""]
        for layer in reversed(layers):
            for place, room in enumerate(layer):
                path = room.replace(".", "/")
                name = f"{path}/" if (root / path).is_dir() else f"{path}.py"
                lines.append(f"  {'|' if place else ' '} {name:36}{about(room, root)}")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def tree(root: Path = ROOT) -> str:
    """The tree of folders two levels deep, with the number of modules in each."""
    lines = []
    for top in ("packager", "recipes", "runtimes"):
        lines.append(f"{top}/")
        for path in sorted((root / top).iterdir(), key=lambda path: (path.is_file(), path.name)):
            if path.is_dir() and any(path.rglob("*.py")):
                lines.append(f"  {path.name + '/':16}{len(list(path.rglob('*.py'))) - 1} modules")
            elif path.suffix == ".py" and path.name != "__init__.py":
                lines.append(f"  {path.name}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(tree())
    print(drawing())
    for climb in climbs():
        print(climb)
