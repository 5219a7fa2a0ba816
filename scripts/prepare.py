"""Makes .venv in this checkout from the locks: python scripts/prepare.py build | demo | test. Standard library only.

Every finished step stores its key (the digest of its inputs) in .venv/prepared.json: a warm run only compares keys, a
failed one resumes with the failed step, and a changed lock repeats its own step. A killed step may have left half a
package, which uv and pip treat as installed, so .venv is then made again (downloads are cached).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from packages import HAS_PIP, LOCKED, LOG, PYTHON, ROOT, VENV, install, install_torch
from steps import Step, Stopped, locked, run

RECORD = VENV / "prepared.json"
# Every child process of a build imports these: 14 s without bytecode, 6 s with it. Later runs may be unable to write it
# (PYTHONDONTWRITEBYTECODE in an image, a read-only checkout).
HEAVY = {
    "build": ("torch", "transformers.models.llama.modeling_llama", "transformers.models.auto.tokenization_auto",
              "gguf", "xllamacpp", "fastapi", "uvicorn", "huggingface_hub", "jsonschema", "packager.cli.main"),
    "demo": ("openai",),
    "test": ("peft", "pytest"),
}  # fmt: skip


def digest(*paths: str) -> str:
    """SHA-256 over files of the checkout, by their content."""
    total = hashlib.sha256()
    for path in paths:
        total.update((ROOT / path).read_bytes() + b"\0")
    return total.hexdigest()


def compile_imports(modules: tuple[str, ...]) -> None:
    """Import modules once, so that their bytecode is written."""
    step = Step("bytecode of the imported modules")
    script = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"
    without = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": ""}
    code, tail = run([PYTHON, "-c", script, *modules], env=without, log=LOG)
    step.done("done" if code == 0 else "failed")
    if code:
        why = (tail.splitlines() or ["no reason given"])[-1]
        raise Stopped("the installed packages cannot be imported.", why, f"see {LOG}; `rm -rf {VENV}` begins anew.")


class Due(NamedTuple):
    """One step, due when its key differs from the recorded one. installs: whether it changes .venv."""

    name: str
    key: str
    action: Callable[[], object]
    installs: bool = True


def from_lock(name: str, title: str) -> Due:
    """Install a whole lock."""
    path = f"locks/{name}.lock"
    return Due(name, digest(path), lambda: install(title, [*LOCKED, "-r", ROOT / path]))


def steps(stage: str) -> list[Due]:
    """The steps of a stage, in order."""
    editable: list[str | Path] = ["install", "--no-deps", "--no-build-isolation", "--editable", ROOT]
    project = digest("setup.cfg", "pyproject.toml", "packager/__init__.py")
    due = [
        Due("torch", digest("locks/torch-cpu.lock"), install_torch),
        from_lock("build", "packages"),
        Due("project", project, lambda: install("packager itself", editable)),
    ]
    before = due[0].key + due[1].key
    due.append(Due("bytecode", before, lambda: compile_imports(HEAVY["build"]), installs=False))
    if stage in ("demo", "test"):
        due.append(from_lock("demo", "SmolLM2, the demo's model"))
        due.append(Due("bytecode, demo", due[-1].key, lambda: compile_imports(HEAVY["demo"]), installs=False))
    if stage == "test":
        due.append(from_lock("test-data", "MiniLM, the encoders' model"))
        due.append(from_lock("test", "test tools"))
        due.append(Due("bytecode, test", due[-1].key, lambda: compile_imports(HEAVY["test"]), installs=False))
    return due


def read_record() -> dict[str, Any] | None:
    """The record of finished steps; None when the environment is missing, moved or of another Python."""
    try:
        record = json.loads(RECORD.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or not {"root", "python", "steps", "unfinished"} <= record.keys():
        return None
    same = (record["root"], record["python"]) == (str(ROOT), sys.version)
    return record if same and PYTHON.exists() else None


def write_record(record: dict[str, Any]) -> None:
    partial = RECORD.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1), encoding="utf-8")
    partial.replace(RECORD)


def create() -> dict[str, Any]:
    """Make an empty environment and return its record. An old one of ours is removed. Raises Stopped when .venv is
    something else.
    """
    if VENV.exists() and not RECORD.exists() and any(VENV.iterdir()):
        raise Stopped(
            f"{VENV} is there already and was not made by this set-up.",
            "it may be yours, so it is not touched.",
            "rename or remove it, then run the same command again.",
        )
    VENV.mkdir(exist_ok=True)
    record: dict[str, Any] = {"root": str(ROOT), "python": sys.version, "steps": {}, "unfinished": "environment"}
    write_record(record)  # first, so that the folder is known as ours when the rest is interrupted
    for old in VENV.iterdir():
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        elif old != RECORD:
            old.unlink()
    step = Step(f"environment for Python {platform.python_version()}")
    code, tail = run([sys.executable, "-m", "venv", "--without-pip", VENV], log=LOG)
    if code == 0 and not HAS_PIP:
        code, tail = run([PYTHON, "-m", "ensurepip"], log=LOG)
    if code:
        raise Stopped(
            "the virtual environment could not be made.",
            (tail.splitlines() or ["venv gave no reason"])[-1],
            "Debian and Ubuntu keep this part of Python in a package of its own: apt install python3-venv.",
        )
    step.done()
    record["unfinished"] = ""
    write_record(record)
    return record


def prepare(stage: str) -> None:
    record = read_record()
    made = record["steps"] if record else {}
    broken = record is None or bool(record["unfinished"])
    due = [step for step in steps(stage) if broken or made.get(step.name) != step.key]
    if not due:
        return
    start = time.monotonic()
    print(f"set-up for `make {stage}` (the first time takes minutes, later runs none):", flush=True)
    if record is None or broken:
        record = create()
    for step in due:
        record["steps"].pop(step.name, None)
        record["unfinished"] = step.name if step.installs else ""
        write_record(record)
        try:
            step.action()
            record["steps"][step.name] = step.key
        finally:
            if not isinstance(sys.exception(), KeyboardInterrupt):
                record["unfinished"] = ""
                write_record(record)
    print(f"set-up done in {time.monotonic() - start:.0f} s", flush=True)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    stage = sys.argv[1] if len(sys.argv) == 2 else ""
    if stage not in ("build", "demo", "test"):
        print("usage: python scripts/prepare.py build | demo | test", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, interrupt)
    # A virtual environment or PYTHONPATH of the caller must not leak into this one.
    for name in ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_USER", "PIP_REQUIRE_VIRTUALENV"):
        os.environ.pop(name, None)
    try:
        with locked(Path(__file__)):  # a second set-up waits, then has nothing to do
            prepare(stage)
    except Stopped as reason:
        reason.show()
        return 1
    except KeyboardInterrupt:
        print("\nset-up interrupted; the same command goes on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
