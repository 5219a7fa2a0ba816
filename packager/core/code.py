"""The code that a step's result depends on: the source of the function that makes it, the import closure of everything
that the function names or receives, the workers that it starts, and the versions of the libraries that these import.

It is derived from the sources, not listed by hand. A changed helper, or another version of a library, changes the key,
so no step made by an older program is reused.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import NamedTuple, TypedDict

from packager.core.folders import PACKAGE

WORKERS = PACKAGE / "workers"


class Parsed(NamedTuple):
    """A source file. imports: name -> the dotted modules that imports anywhere in the file bind it to.
    definitions: functions and classes at any depth, and assignments at the top level.
    """

    tree: ast.Module
    imports: Mapping[str, frozenset[str]]
    definitions: Mapping[str, tuple[ast.stmt, ...]]


class Program(TypedDict):
    """The code of a step. code: a digest. libraries: name -> version."""

    code: str
    libraries: dict[str, str]


def describe(make: Callable[..., object]) -> Program:
    """The code and the libraries of everything that a step's ``make`` runs."""
    function = _plain(make)
    file = Path(function.__code__.co_filename)
    if not file.is_file():  # from the prompt or ``python -c``: there is no source to read
        return {"code": hashlib.sha256(function.__code__.co_code).hexdigest()[:24], "libraries": {}}
    own, starts, outside = _reached(file, function.__code__.co_firstlineno)
    for value in (cell.cell_contents for cell in function.__closure__ or () if _filled(cell)):
        starts |= set(_handed(value))
    files, more = _closure(frozenset(starts))
    digest = hashlib.sha256(own.encode())
    for path in sorted(files, key=_name):
        digest.update(f"{_name(path)}\0".encode() + path.read_bytes() + b"\0")
    libraries = {name: installed for name in sorted(outside | more) if (installed := _version(name))}
    return {"code": digest.hexdigest()[:24], "libraries": libraries}


def libraries_of(script: Path) -> frozenset[str]:
    """The outside modules that a file imports, directly or through the package."""
    return _closure(frozenset([script]))[1]


def _plain(make: Callable[..., object]) -> types.FunctionType:
    """The function behind a partial or a method."""
    while isinstance(make, functools.partial):
        make = make.func
    function = getattr(make, "__func__", make)
    if not isinstance(function, types.FunctionType):
        raise TypeError(f"a step is made by a function, not by {make!r}")
    return function


def _filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:  # a variable of the enclosing function that is assigned later
        return False
    return True


def _handed(value: object) -> Iterator[Path]:
    """Files of code that ``make`` receives as values without naming them: functions, and classes of dataclasses, given
    directly or as the fields of a dataclass (a container format holds packing functions; a Job holds the checkpoint,
    whose class defines the tensors).
    """
    values = [value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        values += [getattr(value, field.name) for field in dataclasses.fields(value)]
    for one in values:
        while isinstance(one, functools.partial):
            one = one.func
        if isinstance(one, types.FunctionType):
            path = Path(one.__code__.co_filename)
        elif dataclasses.is_dataclass(one) and (defined_in := _file(type(one).__module__)) is not None:
            path = defined_in
        else:
            continue
        if path.is_relative_to(PACKAGE):
            yield path


def _reached(file: Path, line: int) -> tuple[str, set[Path], set[str]]:
    """(text of all definitions in a file that the function at ``line`` reaches, the package's files that these name,
    outside libraries). The whole file when no function begins there (a lambda).
    """
    parsed = _parsed(file)
    begin = [
        node
        for nodes in parsed.definitions.values()
        for node in nodes
        if isinstance(node, ast.FunctionDef) and line in (node.lineno, *(one.lineno for one in node.decorator_list))
    ]
    if not begin:
        starts, outside = _named(parsed, parsed.tree)
        return ast.unparse(parsed.tree), starts, outside
    waiting: list[ast.stmt] = list(begin[:1])
    seen: dict[int, ast.stmt] = {}
    starts, outside = set(), set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen[id(node)] = node
        files, libraries = _named(parsed, node)
        starts |= files
        outside |= libraries
        names = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
        waiting += [other for name in names for other in parsed.definitions.get(name, ())]
    text = "\n".join(ast.unparse(node) for node in sorted(seen.values(), key=lambda node: node.lineno))
    return text, starts, outside


def _named(parsed: Parsed, node: ast.AST) -> tuple[set[Path], set[str]]:
    """The package's files, workers included, and the outside libraries that the names inside a node refer to."""
    names = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
    modules = {module for name in names for module in parsed.imports.get(name, ())}
    for inner in ast.walk(node):
        modules |= {module for _, module in _bound(inner)}
    return _by_owner(modules, _workers(node))


def _by_owner(modules: set[str], workers: set[Path]) -> tuple[set[Path], set[str]]:
    """Dotted modules, split into files of the package (``workers`` added) and names of outside libraries."""
    files = {path for module in modules if (path := _file(module)) is not None}
    tops = {module.partition(".")[0] for module in modules}
    return files | workers, {top for top in tops if top != "packager" and top not in sys.stdlib_module_names}


@functools.cache
def _closure(starts: frozenset[Path]) -> tuple[frozenset[Path], frozenset[str]]:
    """Every file of the package that ``starts`` import, directly or not and at any depth of code, and the libraries."""
    waiting, files, outside = set(starts), set[Path](), set[str]()
    while waiting:
        path = waiting.pop()
        files.add(path)
        parsed = _parsed(path)
        modules = {module for modules in parsed.imports.values() for module in modules}
        imported, libraries = _by_owner(modules, _workers(parsed.tree))
        outside |= libraries
        waiting |= imported - files
    return frozenset(files), frozenset(outside)


@functools.cache
def _parsed(path: Path) -> Parsed:
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    imports: dict[str, set[str]] = {}
    definitions: dict[str, list[ast.stmt]] = {}
    for node in _executed(tree):
        for name, module in _bound(node):
            imports.setdefault(name, set()).add(module)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            definitions.setdefault(node.name, []).append(node)
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in (inner for one in targets for inner in ast.walk(one) if isinstance(inner, ast.Name)):
                definitions.setdefault(target.id, []).append(node)
    return Parsed(
        tree,
        {name: frozenset(modules) for name, modules in imports.items()},
        {name: tuple(nodes) for name, nodes in definitions.items()},
    )


def _executed(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below one, except those under ``if TYPE_CHECKING``."""
    for inner in ast.iter_child_nodes(node):
        if isinstance(inner, ast.If) and isinstance(inner.test, ast.Name) and inner.test.id == "TYPE_CHECKING":
            continue
        yield inner
        yield from _executed(inner)


def _bound(node: ast.AST) -> Iterator[tuple[str, str]]:
    """(name, dotted module) of an import statement. ``from a import b`` may bind the module a.b, or a name of a."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.asname or alias.name.partition(".")[0], alias.name
    elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            yield alias.asname or alias.name, inner if _file(inner) is not None else node.module


def _workers(node: ast.AST) -> set[Path]:
    """The files of ``WORKERS / "name.py"`` expressions: programs that run as child processes."""
    return {
        WORKERS / inner.right.value
        for inner in ast.walk(node)
        if isinstance(inner, ast.BinOp)
        and isinstance(inner.left, ast.Name)
        and inner.left.id == "WORKERS"
        and isinstance(inner.right, ast.Constant)
        and isinstance(inner.right.value, str)
    }


@functools.cache
def _file(module: str) -> Path | None:
    """The file of one of the package's modules; None for any other module."""
    if module.partition(".")[0] != "packager":
        return None
    place = PACKAGE.parent.joinpath(*module.split("."))
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


def _name(path: Path) -> str:
    """A file's name in the digest: independent of where the package is installed."""
    return path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else path.name


@functools.cache
def _version(module: str) -> str:
    """The installed version of the distribution that provides a module; "" when none is installed."""
    for name in (module, *_distributions().get(module, ())):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return ""


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    return packages_distributions()
