"""The allow-list of runtime files: what a listed file imports is listed too, so a bundle never lacks a module."""

from __future__ import annotations

import pytest

from packager.bundle.assemble import RUNTIME_ENGINES, runtime_files
from packager.catalog import runtimes_folder
from tests.unit.syntax import imports


@pytest.mark.parametrize("engine", RUNTIME_ENGINES)
def test_what_a_listed_file_imports_is_listed(engine: str) -> None:
    """Every ``runtimes.x`` that a shipped file imports, at its top or inside a function, ships with it."""
    listed = set(runtime_files(engine))
    for name in sorted(listed):
        for module in imports(f"runtimes/{name}"):
            parts = module.split(".")
            if parts[0] == "runtimes" and len(parts) > 1 and (runtimes_folder() / f"{parts[1]}.py").is_file():
                assert f"{parts[1]}.py" in listed, f"{name} imports {module}, which no bundle carries"
