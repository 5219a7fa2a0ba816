"""Hub ids: pinned to a commit, resumed after a cut, offline when told so, and every failure one sentence, soon."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from packager.checkpoint.checkpoint import open_checkpoint
from packager.core.progress import Silent
from tests.real.hub_server import COMMIT, Hub, serving
from tests.unit.tiny import tiny_checkpoint

SHARD = "model-00002-of-00003.safetensors"
# The library reads its environment when it is imported, so every opening is a process of its own.
CHILD = """
import json, sys
from pathlib import Path
from packager.checkpoint.checkpoint import open_checkpoint
from packager.core.errors import PackagerError
from packager.core.progress import Silent
ref, revision, cache = sys.argv[1:]
try:
    found = open_checkpoint(ref, revision=revision or None, progress=Silent(), cache=Path(cache))
    print(json.dumps({"name": found.name, "kind": found.origin.kind, "id": found.origin.id, "digest": found.digest,
                      "revision": found.origin.revision, "path": str(found.path)}))
except PackagerError as error:
    print(json.dumps(error.as_dict()))
"""


class Opener:
    def __init__(self, place: Path, environment: dict[str, str]) -> None:
        self.place, self.environment = place, environment
        self.seconds = 0.0

    def __call__(self, ref: str, *, revision: str = "", **environment: str) -> dict[str, Any]:
        kept = {key: value for key, value in self.environment.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", CHILD, ref, revision, str(self.place / "cache")],
            env={**kept, "HF_HOME": str(self.place / "hf"), **environment},
            cwd=self.place,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        self.seconds = time.monotonic() - start
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""  # no progress bars, warnings or tracebacks of the library
        found: dict[str, Any] = json.loads(done.stdout)
        return found


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = tiny_checkpoint(tmp_path / "source", shard_bytes=4000)
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"x" * 1000)
    with serving(Hub(folder)) as running:
        yield running


@pytest.fixture
def opened(tmp_path: Path, root: Path) -> Opener:
    return Opener(tmp_path, {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"})


def test_a_hub_id_is_pinned_to_its_commit(hub: Hub, opened: Opener, tmp_path: Path) -> None:
    """org/name is fetched from HF_ENDPOINT, only what a checkpoint needs, and the origin names the commit."""
    found = opened("org/name", HF_ENDPOINT=hub.url)
    assert (found["kind"], found["id"], found["revision"], found["name"]) == ("hub", "org/name", COMMIT, "name")
    local = open_checkpoint(str(tmp_path / "source"), progress=Silent(), cache=tmp_path / "cache")
    assert found["digest"] == local.digest
    assert not any("onnx" in request for request in hub.asked if "resolve" in request)
    assert opened("org/name", revision=COMMIT, HF_ENDPOINT=hub.url)["path"] == found["path"]


def test_a_broken_line_is_taken_up_again(opened: Opener, tmp_path: Path) -> None:
    """A download that breaks off half way goes on from there in the same run, and the result is whole."""
    # The library counts in chunks of 10 MB, so the file must be larger than two of them.
    with serving(Hub(tiny_checkpoint(tmp_path / "large", intermediate_size=130_000))) as hub:
        hub.cut = {"model.safetensors": 1}
        found = opened("org/name", HF_ENDPOINT=hub.url)
        fetched = [request for request in hub.asked if request.startswith("GET") and "model.safetensors" in request]
    assert len(fetched) == 2 and int(fetched[1].partition("bytes=")[2].rstrip("-")) > 10_000_000
    local = open_checkpoint(str(tmp_path / "large"), progress=Silent(), cache=tmp_path / "cache")
    assert found["digest"] == local.digest


def test_a_run_that_was_cut_off_keeps_what_is_complete(hub: Hub, opened: Opener) -> None:
    """When the line stays down the error says what to do; the next run fetches only the file that was not complete."""
    hub.cut = {SHARD: 99}
    cut = opened("org/name", HF_ENDPOINT=hub.url)
    assert cut["kind"] == "network" and "did not deliver org/name" in cut["what"] and "run again" in cut["fix"]
    hub.cut, hub.asked = {}, []
    assert opened("org/name", HF_ENDPOINT=hub.url)["revision"] == COMMIT
    fetched = [request for request in hub.asked if request.startswith("GET") and "resolve" in request]
    assert len(fetched) == 1 and SHARD in fetched[0]


def test_offline_takes_what_is_there(hub: Hub, opened: Opener) -> None:
    """HF_HUB_OFFLINE is honoured: nothing is asked, a complete copy is used, and a missing one is told."""
    missing = opened("org/name", HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    assert missing["kind"] == "network" and "HF_HUB_OFFLINE" in missing["what"] and hub.asked == []
    online = opened("org/name", HF_ENDPOINT=hub.url)
    hub.asked = []
    assert opened("org/name", HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1") == online
    assert hub.asked == []


def test_without_a_network_the_answer_comes_soon(opened: Opener) -> None:
    """No hub at the other end: one sentence within seconds, that names both readings of the id."""
    found = opened("org/name", HF_ENDPOINT="http://127.0.0.1:9")
    assert found["kind"] == "network" and found["exit_code"] == 8
    assert "no folder org/name" in found["why"] and "HF_ENDPOINT" in found["fix"]
    assert opened.seconds < 15


def test_what_the_hub_does_not_have_is_told(hub: Hub, opened: Opener) -> None:
    """An unknown model and an unknown revision are the user's errors, not the network's."""
    assert "no model org/other" in opened("org/other", HF_ENDPOINT=hub.url)["what"]
    found = opened("org/name", revision="v9", HF_ENDPOINT=hub.url)
    assert found["what"] == "org/name has no revision v9." and found["kind"] == "input"


def test_modelscope_missing_names_the_extra(opened: Opener, tmp_path: Path) -> None:
    """Without the library the error names the extra that brings it."""
    (tmp_path / "modelscope.py").write_text("raise ImportError('not here')")
    path = f"{tmp_path}{os.pathsep}{opened.environment['PYTHONPATH']}"
    found = opened("modelscope:org/name", PYTHONPATH=path)
    assert found["kind"] == "tool" and "packager[modelscope]" in found["fix"]


def test_modelscope_ids_are_fetched(hub: Hub, opened: Opener, tmp_path: Path) -> None:
    """modelscope:org/name comes through its own library: the same model, only what a checkpoint needs."""
    pytest.importorskip("modelscope")
    place = {"MODELSCOPE_ENDPOINT": hub.url, "MODELSCOPE_CACHE": str(tmp_path / "ms")}
    found = opened("modelscope:org/name", **place)
    assert (found["kind"], found["id"], found["revision"]) == ("modelscope", "org/name", "master")
    local = open_checkpoint(str(tmp_path / "source"), progress=Silent(), cache=tmp_path / "cache")
    assert found["digest"] == local.digest
    assert not any("onnx" in request for request in hub.asked)
    missing = opened("modelscope:org/other", **place)
    assert missing["kind"] == "input" and "no model org/other" in missing["what"]


def test_modelscope_without_a_network_answers_soon(opened: Opener, tmp_path: Path) -> None:
    """No ModelScope at the other end: one sentence, within seconds."""
    pytest.importorskip("modelscope")
    place = {"MODELSCOPE_ENDPOINT": "http://127.0.0.1:9", "MODELSCOPE_CACHE": str(tmp_path / "ms")}
    found = opened("modelscope:org/name", **place)
    assert found["kind"] == "network" and "ModelScope did not deliver" in found["what"]
    assert opened.seconds < 30
