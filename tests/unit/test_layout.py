"""The house's rules that a program can check: sizes of files, directions of imports, owners, and nothing of one
machine.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import rooms
from tests.conftest import ROOT
from tests.unit.syntax import dotted, imports, nodes, parsed, statements

LONGEST = 400
LONG_FOR_A_REASON: dict[str, str] = {}
MAY_WRITE = {
    "packager/cli/console.py",
    "packager/cli/main.py",
}  # main.py: the last line of an interrupt, when no console is there
OWNERS = {
    "subprocess": {"packager/core/processes.py", "packager/core/fork_server.py"},
    "torch": {"packager/checkpoint/state_dict.py"},
    "transformers": set[str](),
    "rich": {"packager/cli/console.py"},
    "click": {"packager/cli/main.py", "packager/cli/flags.py"},
}
LIGHT = {
    "packager/cli/main.py",
    "packager/cli/show.py",
    "packager/cli/flags.py",
    "packager/core/errors.py",
    "packager/cli/console.py",
    "packager/core/progress.py",
    "packager/recipe.py",
    "packager/planning/catalog.py",
    "packager/target.py",
    "packager/core/store.py",
    "packager/core/processes.py",
    "packager/build.py",
}
HEAVY = {
    "torch",
    "transformers",
    "numpy",
    "rich",
    "fastapi",
    "uvicorn",
    "gguf",
    "huggingface_hub",
    "safetensors",
    "tokenizers",
    "jinja2",
    "jsonschema",
    "psutil",
    "filelock",
    "xllamacpp",
    "peft",
    "modelscope",
}


def tracked(*suffixes: str) -> list[str]:
    """Files that git knows or would take, as paths from the root."""
    return [name for name in known_files() if name.endswith(suffixes)] if suffixes else list(known_files())


@functools.cache
def known_files() -> tuple[str, ...]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return tuple(name for name in listed.stdout.splitlines() if (ROOT / name).is_file())


def sources(folder: str) -> list[str]:
    return [name for name in tracked(".py") if name.startswith(folder + "/")]


def test_no_file_is_too_long() -> None:
    """A file over 400 lines is two rooms in one; an exception stands in the list above, with its reason."""
    long = {
        name: count
        for name in tracked(".py")
        if (count := len((ROOT / name).read_text(encoding="utf-8").splitlines())) > LONGEST
    }
    assert set(long) <= set(LONG_FOR_A_REASON), long
    assert all(count <= LONGEST + 80 for count in long.values()), long


def test_no_import_climbs() -> None:
    """Every module stands in a room, and imports only rooms below its own (scripts/rooms.py)."""
    assert not rooms.homeless()
    assert not rooms.climbs(), "\n".join(map(str, rooms.climbs()))


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("packager/core/store.py", "from packager.cli import console"),  # up
        ("packager/tensors/rounding.py", "from packager.metrics import encoders"),  # to a room of the same floor
        ("packager/build.py", "from packager.formats.int4 import tuning"),  # where the two rooms stay apart
        ("packager/recipe.py", "import packager.fidelity.samples"),
        ("runtimes/files.py", "from packager.core import hashing"),  # to the other side of the copy
        ("packager/fidelity/samples.py", "def f() -> None:\n    from packager.formats.gguf.build import build"),
    ],
)
def test_a_planted_climb_fails(tmp_path: Path, importer: str, imported: str) -> None:
    """The check sees an import that goes up, sideways or across, also inside a function."""
    for path in rooms.sources().values():
        place = tmp_path / path.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    assert rooms.climbs(tmp_path) == []
    (tmp_path / importer).write_text(imported + "\n", encoding="utf-8")
    assert [climb.importer.replace(".", "/") + ".py" for climb in rooms.climbs(tmp_path)] == [importer]


@pytest.mark.parametrize("folder", ["packager", "runtimes"])
def test_there_is_no_circle_of_imports(folder: str) -> None:
    """The modules can be put in an order in which each imports only earlier ones, wherever the import stands."""
    modules = {name.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): name for name in sources(folder)}
    graph = {
        module: {
            other
            for other in imports(name)
            if other in modules and other != module and not module.startswith(other + ".")
        }
        for module, name in modules.items()
    }
    while graph:
        free = [module for module, needs in graph.items() if not needs & set(graph)]
        assert free, f"these import each other: {', '.join(sorted(graph))}"
        for module in free:
            del graph[module]


def test_the_box_shares_no_code_with_the_packager() -> None:
    """runtimes/ imports nothing of packager/ or recipes/: it is copied to a box where they are not."""
    for name in sources("runtimes"):
        assert not {module for module in imports(name) if module.split(".")[0] in ("packager", "recipes")}, name


def test_packager_names_neither_recipes_nor_runtimes() -> None:
    """catalog.py finds them by path; an import by name could meet another package's folder."""
    for name in sources("packager"):
        assert not {module for module in imports(name) if module.split(".")[0] in ("recipes", "runtimes", "targets")}, (
            name
        )


def test_recipes_import_nothing_of_the_box() -> None:
    """A recipe copies the runtime as files and never runs it in its own process."""
    for name in sources("recipes"):
        assert not {module for module in imports(name) if module.split(".")[0] in ("runtimes", "recipes")}, name


@pytest.mark.parametrize("library", OWNERS)
def test_an_outside_library_has_one_owner(library: str) -> None:
    """Scripts that run in a child of their own may import what they are for."""
    matches = {
        name
        for name in sources("packager")
        if library in {module.split(".")[0] for module in imports(name)} and not name.startswith("packager/workers/")
    }
    assert matches <= OWNERS[library]


@pytest.mark.parametrize("name", sorted(LIGHT))
def test_heavy_libraries_are_imported_where_they_are_needed(name: str) -> None:
    """What `packager targets` loads imports nothing heavy at the top."""
    assert not {module.split(".")[0] for module in imports(name, top_only=True)} & HEAVY


@pytest.mark.parametrize("name", sources("packager"))
def test_only_the_console_writes_to_the_terminal(name: str) -> None:
    """No print and no sys.stdout elsewhere; children speak to their parent through a pipe."""
    if name in MAY_WRITE or name.startswith("packager/workers/"):
        return
    for node in nodes(name):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{name}:{node.lineno}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sys":
            assert node.attr not in ("stdout", "stderr"), f"{name}:{node.lineno}"


def test_nothing_runs_what_a_file_says() -> None:
    """No pickle, no shell, no eval, no torch.load of anything but weights, no unsafe template environment."""
    for name in [name for folder in ("packager", "recipes", "runtimes", "scripts", "demo") for name in sources(folder)]:
        banned = {"pickle", "dill", "marshal", "shelve", "jinja2.Environment"} & imports(name)
        # state_dict.py takes the name of an error from pickle, nothing else
        assert banned <= ({"pickle"} if name == "packager/checkpoint/state_dict.py" else set()), name
        for node in nodes(name):
            if not isinstance(node, ast.Call):
                continue
            called = dotted(node.func)
            where = f"{name}:{node.lineno}"
            constants = [word for word in node.keywords if isinstance(word.value, ast.Constant)]
            true = {word.arg for word in constants if word.value.value is True}  # type: ignore[attr-defined]
            assert not true & {"shell", "allow_pickle", "trust_remote_code"}, where
            assert called not in ("eval", "exec", "os.system", "os.popen", "jinja2.Environment"), where
            assert called not in ("pickle.load", "pickle.loads", "pickle.Unpickler"), where
            if called == "torch.load":
                assert "weights_only" in true, where


# Written in pieces, or this file would find itself.
MACHINE = re.compile(r"/(?:wo" + r"rk|ro" + r"ot)/|/tm" + r"p/w/|/ho" + r"me/[a-z]+/")
REGISTRY = re.compile(
    r"https?://(?:[\w.-]*\.)?(?:pypi\.org|pythonho" + r"sted\.org|huggingface\.co/[\w-]+/[\w-]+/resolve|hf-mirror\.com)"
)


def text_of(name: str) -> str:
    try:
        return (ROOT / name).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def test_no_file_names_this_machine() -> None:
    """Absolute paths of a developer's machine do not belong in a commit."""
    matches = [f"{name}: {match[0]}" for name in tracked() if (match := MACHINE.search(text_of(name)))]
    assert not matches, matches


def test_no_code_names_a_registry() -> None:
    """Where packages come from is the user's configuration: pip's index, HF_ENDPOINT."""
    names = [
        name
        for name in tracked()
        if not name.endswith((".md", "LICENSE", "NOTICE")) and name != "tests/unit/test_layout.py"
    ]
    matches = [f"{name}: {match[0]}" for name in names if (match := REGISTRY.search(text_of(name)))]
    assert not matches, matches


def test_every_test_module_says_what_it_is_about() -> None:
    """Modules, and every test, have a plain sentence."""
    for name in sources("tests"):
        if not Path(name).name.startswith("test_"):
            continue
        tree = parsed(name)
        assert ast.get_docstring(tree), name
        for node in statements(tree):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                # a name of four words and more is a sentence already
                assert ast.get_docstring(node) or node.name.count("_") >= 4, f"{name}:{node.lineno} {node.name}"


@pytest.mark.parametrize("name", [*sources("packager"), *sources("recipes")])
def test_public_functions_of_the_core_are_described(name: str) -> None:
    """Every module has a docstring; so does every public function of packager/ that is not a click verb or a view."""
    tree = parsed(name)
    assert ast.get_docstring(tree), name


def test_no_work_is_left_marked_as_undone() -> None:
    """No to-do marks and no stubs in what ships."""
    marks = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    names = [name for folder in ("packager", "recipes", "runtimes", "scripts", "demo") for name in sources(folder)]
    matches = [f"{name}: {match[0]}" for name in names if (match := marks.search(text_of(name)))]
    assert not matches, matches
    for name in names:
        for node in nodes(name):
            returns = isinstance(node, ast.Try) and any(isinstance(n, ast.Return) for n in ast.walk(node.body[-1]))
            if isinstance(node, ast.Try) and not returns:  # one that returns is the first of several sources
                for handler in node.handlers:
                    silent = all(isinstance(inner, ast.Pass) for inner in handler.body)
                    assert not silent, f"{name}:{handler.lineno} swallows an exception"
            if isinstance(node, ast.Raise) and node.exc is not None and "NotImplementedError" in ast.unparse(node.exc):
                # a base class may leave a method to its children, never a user a feature
                assert isinstance(node.exc, ast.Name), f"{name}:{node.lineno}"


def test_the_box_runs_on_python_3_10() -> None:
    """runtimes/ uses no syntax newer than 3.10."""
    for name in sources("runtimes"):
        ast.parse((ROOT / name).read_text(encoding="utf-8"), name, feature_version=(3, 10))
    assert sys.version_info >= (3, 11)
