"""What a user installs: the wheel works alone and claims one import name; set-up refuses a CUDA build of torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.unit.tiny import tiny_checkpoint

pytestmark = pytest.mark.real

NOT_SOURCE = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "out")


def run(*argv: str | Path, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in argv], cwd=cwd, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that the checkout gets no build folder."""
    copy = tmp_path_factory.mktemp("source") / "packager"
    shutil.copytree(ROOT, copy, ignore=NOT_SOURCE)
    out = tmp_path_factory.mktemp("wheel")
    done = run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", out, copy, cwd=out)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_holds_everything_that_is_read_at_run_time(wheel: Path) -> None:
    """Every file of packager/, recipes/, runtimes/ and targets/ is in it, under one import name."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"packager"}
    for folder, place in (
        ("packager", "packager"),
        ("recipes", "packager/recipes"),
        ("runtimes", "packager/runtimes"),
        ("targets", "packager/targets"),
    ):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith("."):
                assert f"{place}/{path.relative_to(ROOT / folder).as_posix()}" in names
    assert "packager/locks/box-llamacpp.lock" in names


def test_an_installed_wheel_finds_its_targets_and_recipes(wheel: Path, tmp_path: Path) -> None:
    """Installed into an empty environment away from the checkout, the command line has every target and recipe."""
    venv = tmp_path / "venv"
    assert run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path).returncode == 0
    python = venv / "bin/python"
    asked = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path)
    place = Path(asked.stdout.strip())
    pip = [sys.executable, "-m", "pip", "--python", python]
    done = run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    # Its dependencies are lent by this environment; a plain path line brings the packages, not the editable packager.
    (place / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    found = run(venv / "bin/packager", "targets", "--json", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    wanted = sorted(path.stem for path in (ROOT / "targets").glob("*.toml"))
    assert sorted(target["name"] for target in json.loads(found.stdout)["targets"]) == wanted
    assert run(venv / "bin/packager", "recipes", "show", "gguf", cwd=tmp_path).returncode == 0
    where = run(python, "-c", "import packager; print(packager.__file__)", cwd=tmp_path).stdout
    assert str(venv) in where
    # a recipe and a target of one's own, by their paths, far from any checkout
    pages = {"gguf_as_it_is.py": ("add-a-recipe", "python"), "kiosk.toml": ("add-a-target", "toml")}
    for name, (page, language) in pages.items():
        text = (ROOT / "docs" / "how-to" / f"{page}.md").read_text(encoding="utf-8")
        (tmp_path / name).write_text(text.split(f"```{language}\n")[1].split("```")[0], encoding="utf-8")
    tiny_checkpoint(tmp_path / "model")
    own = ["--target", "./kiosk.toml", "--recipe", "./gguf_as_it_is.py", "--set", "context=32"]
    planned = run(venv / "bin/packager", "plan", "./model", *own, "--json", cwd=tmp_path)
    assert planned.returncode == 0, planned.stdout + planned.stderr
    plan = json.loads(planned.stdout)
    assert (plan["target"], plan["recipe"], plan["refusals"]) == ("kiosk", "gguf_as_it_is", [])


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the index's own torch is a CPU build")
def test_set_up_stops_where_no_cpu_build_of_torch_can_be_had(tmp_path: Path) -> None:
    """With no CPU wheel to be found set-up says so and what to do, takes nothing else, and next time goes on there."""
    for name in ("scripts", "locks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=NOT_SOURCE)
    for name in ("setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "packager").mkdir()
    shutil.copy(ROOT / "packager/__init__.py", tmp_path / "packager")
    env = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    env |= {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
    for _ in range(2):
        done = run(sys.executable, "scripts/prepare.py", "build", cwd=tmp_path, env=env)
        assert done.returncode == 1
        assert "pip finds no CPU build of PyTorch" in done.stderr
        assert "PIP_FIND_LINKS" in done.stderr
        assert not list((tmp_path / ".venv").glob("lib/python*/site-packages/torch"))
    assert "environment for Python" not in done.stdout
