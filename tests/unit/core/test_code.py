"""A step's key follows the program that makes it: a changed helper is another key, whoever forgot to list it."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from packager.core import code
from tests.conftest import ROOT

# step: (file that makes it, helpers that it runs through and that hand-made lists had missed)
STEPS = {
    "merge": ("build.py", {"checkpoint/lora.py", "checkpoint/merge.py", "tensors/safetensors.py"}),
    "encoder-onnx": ("formats/onnx/encoder.py", {"tensors/safetensors.py", "formats/onnx/external_data.py"}),
    "typed-onnx": ("formats/tensorrt/encoder.py", {"tensors/safetensors.py", "formats/onnx/external_data.py"}),
    "onnx-packed": (
        "formats/onnx/decoder.py",
        {"tensors/safetensors.py", "checkpoint/families.py", "tensors/rounding.py", "formats/onnx/rope.py"},
    ),
    "half": ("formats/edge_llm.py", {"tensors/safetensors.py", "formats/int4/folder.py"}),
    "samples": ("fidelity/samples.py", {"workers/samples.py", "prompts/training_template.py"}),
    "tune": ("formats/int4/tuning.py", {"workers/tune.py", "workers/rounding.py", "workers/reference.py"}),
    "reference": ("fidelity/source.py", {"workers/reference.py"}),
    "gguf-convert": ("formats/gguf/steps.py", {"formats/gguf/llamacpp.py", "workers/convert.py"}),
    "tensorrt-engine": ("formats/tensorrt/compiler.py", {"workers/tensorrt_compile.py", "workers/fixed_addresses.py"}),
}


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the package, which keys are derived from."""
    place = tmp_path / "packager"
    shutil.copytree(ROOT / "packager", place, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(code, "PACKAGE", place)
    monkeypatch.setattr(code, "WORKERS", place / "workers")
    forget()
    yield place
    forget()


def forget() -> None:
    """Sources are read once a process; a test changes them."""
    for cached in (code._closure, code._parsed, code._file):
        cached.cache_clear()


def maker(file: Path, step: str) -> int:
    """The line of the function that makes a step: the last one before the call that names it."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    (call,) = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and any(isinstance(a, ast.Constant) and a.value == step for a in node.args)
    ]
    names = [argument.id for argument in call.args if isinstance(argument, ast.Name) and argument.id != "inputs"]
    lines = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == names[-1]]
    return max(line for line in lines if line < call.lineno)


def sources(file: Path, step: str) -> tuple[str, set[Path], set[str]]:
    """The text of its own, the files of the package and the libraries that make a step."""
    own, starts, outside = code._reached(file, maker(file, step))
    files, more = code._closure(frozenset(starts))
    return own, set(files), outside | more


@pytest.mark.parametrize("step", STEPS)
def test_a_step_depends_on_every_helper_that_it_runs_through(copy: Path, step: str) -> None:
    """Without a list: from its imports, through functions and workers."""
    file, helpers = STEPS[step]
    _, files, _ = sources(copy / file, step)
    assert {copy / name for name in helpers} <= files


def key(copy: Path, step: str) -> str:
    """A digest of all that makes a step, as ``describe`` takes it."""
    own, files, _ = sources(copy / STEPS[step][0], step)
    return own + "".join(sorted(path.read_text(encoding="utf-8") for path in files))


HELPERS = [(step, name) for step, (_, names) in STEPS.items() for name in sorted(names)]


@pytest.mark.parametrize(("step", "helper"), HELPERS)
def test_a_changed_helper_changes_the_key(copy: Path, step: str, helper: str) -> None:
    """The stale step that an upgrade would have served."""
    before = key(copy, step)
    path = copy / helper
    path.write_text(path.read_text(encoding="utf-8") + "\nCHANGED = True\n", encoding="utf-8")
    forget()
    assert key(copy, step) != before


def test_the_libraries_of_a_worker_are_part_of_the_key(copy: Path) -> None:
    """torch computes the source's scores, in a child that the parent never imports."""
    _, _, libraries = sources(copy / "fidelity/source.py", "reference")
    assert {"torch", "transformers", "safetensors", "numpy"} <= libraries


def test_what_has_nothing_to_do_with_a_step_does_not_change_its_key(copy: Path) -> None:
    """A new message of the command line merges nothing again."""
    _, files, _ = sources(copy / "build.py", "merge")
    assert not {path for path in files if path.parent.name in ("cli", "bundle", "formats", "planning")}


MODULE = """
from packager.core import hashing

LIMIT = 3

def helper(x):
    return x + LIMIT

def unused():
    return 1

def outer(pack):
    def make(folder, cost):
        hashing.hash_file(folder)
        return helper(pack(1))
    return make
"""


def described(tmp_path: Path, text: str, pack: Callable[[int], int] = abs) -> dict[str, Any]:
    """What ``describe`` gives for a module's ``make``."""
    file = tmp_path / "module.py"
    file.write_text(text, encoding="utf-8")
    forget()
    names: dict[str, Any] = {}
    compiled = compile(text, str(file), "exec")
    vars_of = type(test_a_changed_helper_changes_the_key)(compiled, names)
    vars_of()
    return code.describe(names["outer"](pack))


@pytest.mark.parametrize(
    ("old", "new", "changes"),
    [
        ("x + LIMIT", "x - LIMIT", True),  # a function that make calls
        ("LIMIT = 3", "LIMIT = 4", True),  # a constant that this reads
        ("return 1", "return 2", False),  # nothing that make reaches
        ("import hashing", "import hashing, errors", False),
        ("\n\ndef unused", "\n\n# a comment\ndef unused", False),
    ],
)
def test_of_its_own_file_a_step_takes_what_it_reaches(tmp_path: Path, old: str, new: str, changes: bool) -> None:
    """Functions and constants, by name; not comments, not its neighbours."""
    assert (described(tmp_path, MODULE) != described(tmp_path, MODULE.replace(old, new))) is changes


def test_functions_that_are_handed_in_count(tmp_path: Path) -> None:
    """A container format is a dataclass of functions, which the step that packs never names."""
    from packager.formats.int4 import awq, gptq

    assert len({str(described(tmp_path, MODULE, form)) for form in (abs, awq.FORM, gptq.FORM)}) == 3


def test_the_code_behind_what_is_handed_in_counts(tmp_path: Path) -> None:
    """A checkpoint's facts come from the tables of families, which no step imports."""
    from packager.checkpoint.families import FAMILIES

    family: Any = next(iter(FAMILIES.values()))
    assert described(tmp_path, MODULE, family) != described(tmp_path, MODULE)
    files, _ = code._closure(frozenset([ROOT / "packager/checkpoint/checkpoint.py"]))
    assert ROOT / "packager/checkpoint/families.py" in files


def test_a_step_needs_a_function() -> None:
    """Anything else has no source to read."""
    with pytest.raises(TypeError, match="by a function"):
        code.describe(len)
