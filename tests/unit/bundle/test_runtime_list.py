"""The allow-list of runtime files: what a listed file imports is listed too, so a bundle never lacks a module."""

from __future__ import annotations

import pytest

from packager.bundle.engines import ENGINES, runtime_files
from packager.planning.catalog import runtimes_folder
from tests.unit.syntax import imports


@pytest.mark.parametrize("engine", ENGINES)
def test_what_a_listed_file_imports_is_listed(engine: str) -> None:
    """Every ``runtimes.x`` that a shipped file imports, at its top or inside a function, ships with it."""
    listed = set(runtime_files(engine))
    for name in sorted(listed):
        for module in imports(f"runtimes/{name}"):
            place = "/".join(module.split(".")[1:])
            for file in (f"{place}.py", f"{place}/__init__.py"):
                if module.startswith("runtimes.") and (runtimes_folder() / file).is_file():
                    assert file in listed, f"{name} imports {module}, which no bundle carries"
