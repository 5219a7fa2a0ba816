"""The sources as Python reads them, each file once a session: for tests of what may stand in them."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator

from tests.conftest import ROOT


@functools.cache
def parsed(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), name)


@functools.cache
def nodes(name: str) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(parsed(name)))


@functools.cache
def imports(name: str, *, top_only: bool = False) -> frozenset[str]:
    """Modules that a file imports, as dotted names; those under TYPE_CHECKING are for the type checker only."""
    modules: set[str] = set()
    for node in statements(parsed(name), top_only=top_only):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            modules.add(node.module)
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(modules)


def statements(block: ast.AST, *, top_only: bool = False) -> Iterator[ast.AST]:
    """Every statement inside one, at any depth; top_only: not those of functions, which run later."""
    for part in ("body", "orelse", "finalbody", "handlers", "cases"):
        for node in getattr(block, part, ()):
            if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                continue
            if top_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            yield node
            yield from statements(node, top_only=top_only)


def dotted(node: ast.expr) -> str:
    """ "torch.load" of an expression that is only names; "" of any other."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (before := dotted(node.value)):
        return f"{before}.{node.attr}"
    return ""
