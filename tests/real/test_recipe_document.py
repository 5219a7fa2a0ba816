"""The recipe of docs/how-to/add-a-recipe.md, from the page to an answer of the installed bundle."""

from __future__ import annotations

import http.client
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.serving import started
from packager.core.store import Store
from tests.conftest import ROOT

pytestmark = pytest.mark.real
PAGE = ROOT / "docs" / "how-to" / "add-a-recipe.md"


def blocks(language: str) -> list[str]:
    """The page's code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_the_page_leads_to_a_served_answer(smollm2: Path, store: Store, tmp_path: Path) -> None:
    """Every command of the page in its order: shown, planned, built with verification, installed, served, asked."""
    (tmp_path / "gguf_as_it_is.py").write_text(blocks("python")[0], encoding="utf-8")
    shutil.copytree(smollm2, tmp_path / "my-model", copy_function=os.link)  # a link to the folder would have its name
    commands, (request,) = blocks("console")[0].splitlines(), blocks("console")[1].splitlines()
    env = {**os.environ, "PACKAGER_STORE": str(store.root), "PYTHONPATH": str(ROOT)}
    for line in commands[:-1]:
        words = shlex.split(line)
        program = [sys.executable, "-m", "packager"] if words[0] == "packager" else [str(tmp_path / words[0])]
        argv = [*program, *words[1:]]
        done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    manifest = json.loads(
        (tmp_path / "out/my-model-desktop_linux_x86_64-gguf_as_it_is/manifest.json").read_text(encoding="utf-8")
    )
    assert manifest["provenance"]["verified"] and manifest["report"]["prompts_equal"] > 10
    serve, asked = shlex.split(commands[-1]), shlex.split(request)
    path, body = asked[1].partition(":8000")[2], asked[asked.index("-d") + 1]
    with started([str(tmp_path / serve[0]), "--port", "0"]) as (port, _):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        answer = json.loads(connection.getresponse().read())
    assert answer["choices"][0]["message"]["content"].strip()
