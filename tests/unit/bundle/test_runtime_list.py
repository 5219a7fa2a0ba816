"""The allow-list of runtime files: what a listed file imports is listed too, so a bundle never lacks a module."""

from __future__ import annotations

import ast

import pytest

from packager.bundle.assemble import RUNTIME_ENGINES, runtime_files
from packager.catalog import runtimes_folder


@pytest.mark.parametrize("engine", RUNTIME_ENGINES)
def test_what_a_listed_file_imports_is_listed(engine: str) -> None:
    """Every ``runtimes.x`` that a shipped file imports, at its top or inside a function, ships with it."""
    listed = set(runtime_files(engine))
    for name in sorted(listed):
        for node in ast.walk(ast.parse((runtimes_folder() / name).read_text(encoding="utf-8"))):
            modules = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            for module in modules:
                if module.startswith("runtimes."):
                    assert f"{module.split('.')[1]}.py" in listed, f"{name} imports {module}, which no bundle carries"
