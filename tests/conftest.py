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

from tests.system_packages import summary

ROOT = Path(__file__).resolve().parent.parent
# A file goes to one worker, whole: with these first, none is left alone with minutes of work at the end.
LONGEST = ("test_tune_persona", "test_gguf_build", "test_tensorrt", "test_encoder", "test_quantizers", "test_faults")
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


def pytest_configure(config: pytest.Config) -> None:
    # a runner started in the background has SIGINT ignored, and children would inherit that: tests of Ctrl-C need it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "real: runs real tools on real checkpoints (minutes)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The unit ring goes first: it must not find torch imported by the other one. Then what takes longest."""
    real = ROOT / "tests" / "real"
    for item in items:
        if item.path.is_relative_to(real):
            item.add_marker("real")
            item.add_marker("no_cover")  # tracing costs a third of the time; coverage is the unit ring's figure

    def rank(item: pytest.Item) -> int:
        if item.get_closest_marker("real") is None:
            return -1
        return LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST)

    items.sort(key=rank)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """Say at the very end what was not tested because this machine lacks a system package."""
    yield
    skipped = terminalreporter.stats.get("skipped", [])
    if line := summary([report.longrepr[2] for report in skipped if isinstance(report.longrepr, tuple)]):
        terminalreporter.write_line(line, yellow=True)


def shared_temp(factory: pytest.TempPathFactory) -> Path:
    """The run's folder: one for all of pytest-xdist's workers, so that what one built the others find."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def own_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Every build of a test, in this process or a child, goes to a store of the session."""
    folder = shared_temp(tmp_path_factory) / "store"
    folder.mkdir(exist_ok=True)
    # PyTorch's own index is a place of the internet: a test fetches only from pip's configured indexes
    own = {
        "PACKAGER_STORE": str(folder),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "PACKAGER_TORCH_INDEX": "",
    }
    before = {key: os.environ.get(key) for key in own}
    os.environ.update(own)
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
