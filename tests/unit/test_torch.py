"""A build says which torch it needs; the wheel asks for none, so that no install changes somebody's environment."""

from __future__ import annotations

import configparser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from packager.build import OLDEST_TORCH, _require_torch
from packager.core.errors import ToolError
from tests.conftest import ROOT


@pytest.mark.parametrize("found", ["2.5.1+cu118", "1.13.1"])
def test_a_torch_that_is_too_old_is_named(found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any work, with the version that is there and the one that is needed."""
    info = tmp_path / f"torch-{found}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {found}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ToolError) as caught:
        _require_torch()
    assert f"needs torch {OLDEST_TORCH} or newer; this environment has {found}." in caught.value.what


def test_the_wheel_asks_for_torch_of_any_version() -> None:
    """A range would take the torch of an environment away for another, with another CUDA."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = [line for line in config["options"]["install_requires"].splitlines() if line and not line.startswith("#")]
    assert [str(wanted) for wanted in map(Requirement, lines) if wanted.name == "torch"] == ["torch"]
