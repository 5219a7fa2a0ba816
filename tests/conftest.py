"""What both rings share: no test touches the user's store, and everything under tests/real carries the marker
``real``.
"""

from __future__ import annotations

import lzma
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


def pytest_configure(config: pytest.Config) -> None:
    # a runner started in the background has SIGINT ignored, and children would inherit that: tests of Ctrl-C need it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "real: runs real tools on real checkpoints (minutes)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The unit ring goes first: it must not find torch imported by the other one."""
    real = ROOT / "tests" / "real"
    for item in items:
        if item.path.is_relative_to(real):
            item.add_marker("real")
    items.sort(key=lambda item: item.get_closest_marker("real") is not None)


@pytest.fixture(scope="session", autouse=True)
def own_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Every build of a test, in this process or a child, goes to a store of the session."""
    before = {key: os.environ.get(key) for key in ("PACKAGER_STORE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    folder = tmp_path_factory.mktemp("store")
    os.environ.update(PACKAGER_STORE=str(folder), HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    yield folder
    for key, value in before.items():
        if value is None:
            del os.environ[key]
        else:
            os.environ[key] = value


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def r1_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer, chat template and config of DeepSeek-R1-Distill-Qwen, unpacked."""
    folder = tmp_path_factory.mktemp("r1-distill-qwen")
    for file in sorted((ROOT / "tests" / "data" / "r1-distill-qwen").iterdir()):
        if file.suffix == ".xz":
            (folder / file.stem).write_bytes(lzma.decompress(file.read_bytes()))
        else:
            shutil.copyfile(file, folder / file.name)
    return folder
