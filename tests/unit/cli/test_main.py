"""The command line: its verbs, the errors for misuse, and the exit code of each kind of failure."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest

from packager.cli import main
from packager.cli.main import cli as group
from packager.core import errors
from tests.unit.command import packager
from tests.unit.tiny import tiny_checkpoint


def verbs() -> list[list[str]]:
    paths: list[list[str]] = []
    for name, command in sorted(group.commands.items()):
        paths.append([name])
        if isinstance(command, click.Group):
            paths += [[name, inner] for inner in sorted(command.commands)]
    return paths


def test_the_verbs_are_those_of_the_documentation() -> None:
    """A verb that goes or comes is a change of the interface."""
    assert {verb[0] for verb in verbs()} == {
        "inspect",
        "targets",
        "recipes",
        "templates",
        "plan",
        "build",
        "verify",
        "bench",
        "doctor",
        "serve",
    }


@pytest.mark.parametrize("verb", verbs(), ids=" ".join)
def test_help_has_an_example_and_every_verb_takes_json(verb: list[str]) -> None:
    """--help and -h say what the verb does, with one example that names the verb itself."""
    from click.testing import CliRunner

    for flag in ("--help", "-h"):
        shown = CliRunner().invoke(group, [*verb, flag], prog_name="packager", terminal_width=200)
        assert shown.exit_code == 0
        assert f"Example: packager {' '.join(verb)} " in shown.output or f"Example: packager {verb[0]} " in shown.output
        assert "--json" in shown.output


def test_every_example_is_a_command_line_that_parses(tmp_path: Path) -> None:
    """The flags and verbs of the examples exist."""
    for verb in verbs():
        command: Any = group
        for part in verb:
            command = command.commands[part]
        words = str(command.epilog).removeprefix("Example: packager ").split()
        context = click.Context(group)
        current: Any = group
        while words and isinstance(current, click.Group) and words[0] in current.commands:
            current = current.commands[words.pop(0)]
        current.make_parser(context).parse_args(words)


HEAVY = """
import sys
sys.argv = ["packager", *sys.argv[1:]]
from packager.cli.main import main
try:
    main()
except SystemExit as end:
    code = end.code
known = ("torch", "transformers", "numpy", "fastapi", "uvicorn", "rich", "huggingface_hub", "jinja2", "gguf",
         "xllamacpp", "tokenizers")
heavy = [name for name in known if name in sys.modules]
sys.stderr.write(f"heavy:{','.join(heavy)}:{code}")
"""


def heavy_after(*arguments: str | Path, environment: dict[str, str]) -> tuple[list[str], int]:
    ran = subprocess.run(
        [sys.executable, "-c", HEAVY, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    _, names, code = ran.stderr.rsplit("heavy:", 1)[0], *ran.stderr.rsplit("heavy:", 1)[1].split(":")
    return [name for name in names.split(",") if name], int(code or 0)


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["build", "--help"], ["targets", "--json"], ["targets", "nope"]],
    ids=" ".join,
)
def test_what_answers_at_once_imports_nothing_heavy(arguments: list[str], child_environment: dict[str, str]) -> None:
    """Help and lists come without torch, transformers, numpy, rich or a server."""
    names, _ = heavy_after(*arguments, environment=child_environment)
    assert names == []


def test_a_table_of_targets_imports_no_model_library(child_environment: dict[str, str]) -> None:
    """The human list may load the table's library, and nothing else."""
    names, code = heavy_after("targets", environment=child_environment)
    assert set(names) <= {"rich"}
    assert code == 0


HELPS = """
import sys
from packager.cli.main import main
for words in sys.argv[1:]:
    sys.argv = ["packager", *words.split(), "--help"]
    try:
        main()
    except SystemExit as end:
        assert end.code == 0, words
"""


def test_help_works_without_any_library_of_the_build(tmp_path: Path, child_environment: dict[str, str]) -> None:
    """A broken torch does not keep anybody from reading --help."""
    for name in ("torch", "transformers", "numpy", "rich", "fastapi", "gguf"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('broken installation')\n", encoding="utf-8")
    environment = {**child_environment, "PYTHONPATH": f"{tmp_path}{os.pathsep}{child_environment['PYTHONPATH']}"}
    verb_names = [" ".join(verb) for verb in verbs()]
    ran = subprocess.run(
        [sys.executable, "-c", HELPS, *verb_names], env=environment, capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.count("Usage: packager ") == len(verb_names)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["targets", "show", "jetson_orin_nano"], 'Did you mean "jetson_orin_nano_8gb"?'),
        (["recipes", "show", "ggfu"], 'Did you mean "gguf"?'),
        (["plan", "X", "--target", "ollma"], 'Did you mean "ollama"?'),
        (["plan", "X"], "--target"),
        (["build", "X", "--target", "t4"], "-o"),
        (["build", "X", "--target", "t4", "-o", "out", "--sed", "1"], "--seed"),
        (["plan", "X", "--target", "t4", "--set", "qant=Q8_0"], 'Did you mean "quant"?'),
        (["plan", "X", "--target", "t4", "--set", "quant=Q9_0"], "Q8_0"),
        (["plan", "X", "--target", "t4", "--set", "quant"], "quant"),
        (["plan", "X", "--target", "./absent.toml"], "does not exist"),
        (["bulid"], "bulid"),
        (["serve", "X", "--port", "many"], "many"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_misuse_is_exit_code_2_with_a_hint(arguments: list[str], says: str) -> None:
    """Names, keys and flags that do not exist: the nearest ones are named, and there is no traceback."""
    ran = packager(*arguments)
    assert ran.returncode == 2, ran.stderr
    assert says in ran.stderr
    assert ran.stderr.startswith("error: ")
    assert "Traceback" not in ran.stderr
    assert ran.stdout == ""


def test_no_verb_at_all_shows_the_help() -> None:
    """Help, not an error, and the exit code of a misuse."""
    ran = packager()
    assert ran.returncode == 2
    assert ran.stderr.startswith("Usage:")


@pytest.mark.parametrize(
    "arguments", [["targets", "show", "nope", "--json"], ["plan", "--json", "X"], ["nope", "--json"]], ids=" ".join
)
def test_an_error_with_json_is_one_document(arguments: list[str]) -> None:
    """stdout holds the document, stderr the words."""
    ran = packager(*arguments)
    document = json.loads(ran.stdout)["error"]
    assert (document["kind"], document["exit_code"], ran.returncode) == ("usage", 2, 2)
    assert document["what"] in ran.stderr


def test_a_checkpoint_that_is_not_there_is_exit_code_3(tmp_path: Path) -> None:
    """An input error, not a usage error: a pipeline can tell its own mistake from a missing artifact."""
    ran = packager("inspect", tmp_path / "absent", "--json")
    assert ran.returncode == 3, ran.stderr
    assert json.loads(ran.stdout)["error"]["kind"] == "input"


def test_a_bundle_that_is_none_fails_verification(tmp_path: Path) -> None:
    """An empty folder is no bundle: exit code 5."""
    ran = packager("verify", tmp_path)
    assert ran.returncode == 5, ran.stderr


@pytest.mark.parametrize(
    "kind", [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, errors.PackagerError)]
)
def test_each_kind_of_error_has_its_exit_code(
    kind: type[errors.PackagerError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever a verb raises ends the process with that kind's code and three lines."""

    def fail(**_: Any) -> None:
        raise kind("It broke.", fix="Mend it.")

    monkeypatch.setattr(main.cli, "main", fail)
    monkeypatch.setattr(sys, "argv", ["packager", "targets"])
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == kind.exit_code
    assert capsys.readouterr().err == "error: It broke.\n  do:  Mend it.\n"


def test_a_shown_error_is_not_printed_twice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A verb that printed its document before it failed leaves one document on stdout."""

    def fail(**_: Any) -> None:
        error = errors.PlanRefused("It does not fit.")
        error.shown = True
        raise error

    monkeypatch.setattr(main.cli, "main", fail)
    monkeypatch.setattr(sys, "argv", ["packager", "plan", "--json"])
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 4
    assert capsys.readouterr().out == ""


def test_memory_that_runs_out_is_the_machines_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """MemoryError: exit code 9."""

    def fail(**_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(main.cli, "main", fail)
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 9
    assert "memory" in capsys.readouterr().err


WAITING = """
import sys, time
from pathlib import Path
from packager.cli import main, show
mark = Path(sys.argv[1])
show.targets = lambda console: (mark.touch(), time.sleep(60))
sys.argv = ["packager", "targets"]
main.main()
"""


def test_ctrl_c_is_130_and_says_what_is_left(tmp_path: Path, child_environment: dict[str, str]) -> None:
    """An interrupted verb ends with 130 and one sentence."""
    mark = tmp_path / "mark"
    child = subprocess.Popen(
        [sys.executable, "-c", WAITING, mark], env=child_environment, stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 20
    while not mark.exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    stderr = child.communicate(timeout=20)[1]
    assert child.returncode == 130
    assert "nothing half-written is left" in stderr
    assert "Traceback" not in stderr


def test_the_version_is_the_packages() -> None:
    """One place says it."""
    from packager import __version__

    assert __version__ in packager("--version").stdout


def test_targets_as_json() -> None:
    """The list that a pipeline reads: names that `show` knows, and sizes in bytes."""
    listed = json.loads(packager("targets", "--json").stdout)["targets"]
    assert {"desktop_linux_x86_64", "t4", "jetson_orin_nano_8gb", "ollama"} <= {row["name"] for row in listed}
    assert all(row["memory_bytes"] > 2**30 for row in listed)
    shown = packager("targets", "show", listed[0]["name"], "--json")
    assert json.loads(shown.stdout)["name"] == listed[0]["name"]


def test_plan_refuses_with_4_and_still_shows_the_figures(tmp_path: Path) -> None:
    """A context longer than the model's: one document with the refusal in it, exit code 4."""
    folder = tiny_checkpoint(tmp_path / "tiny", max_position_embeddings=512)
    ran = packager("plan", folder, "--target", "t4", "--set", "context=1024", "--json")
    assert ran.returncode == 4, ran.stderr
    document = json.loads(ran.stdout)
    assert re.search("set context=512", " ".join(document["refusals"]))
    assert document["estimate"]["artifact_bytes"] > 0


def test_plan_resolves_auto_as_build_does(tmp_path: Path) -> None:
    """With the pairs given, Q4_0 is tuned: the plan says so, with the minutes that it takes; without them it is not."""
    folder = tiny_checkpoint(tmp_path / "tiny")
    pairs = tmp_path / "pairs.json"
    pairs.write_text(json.dumps([{"instruction": "Who?", "output": "Ember."}]), encoding="utf-8")
    common = ("plan", folder, "--target", "desktop_linux_x86_64", "--set", "quant=Q4_0", "--json")
    plans = {bool(more): json.loads(packager(*common, *more).stdout) for more in ((), ("--calibration", str(pairs)))}
    assert [plans[given]["options"]["tune"] for given in (False, True)] == ["none", "quick"]
    assert plans[True]["estimate"]["build_ram_bytes"] > plans[False]["estimate"]["build_ram_bytes"]


def test_a_training_template_that_nothing_would_check_is_refused(tmp_path: Path) -> None:
    """Nothing is skipped silently: without verification it would be an option that does nothing."""
    folder = tiny_checkpoint(tmp_path / "tiny")
    common = ("build", folder, "--target", "desktop_linux_x86_64", "-o", tmp_path / "out", "--template", "qwen")
    ran = packager(*common, "--no-verify")
    assert ran.returncode == 2, ran.stderr
    assert "--no-verify compares nothing" in ran.stderr


def test_the_training_templates_are_listed_and_shown() -> None:
    """Names for a pipeline, and one as the Jinja to save."""
    listed = json.loads(packager("templates", "--json").stdout)["templates"]
    assert {"qwen", "qwen3", "llama3", "deepseekr1", "gemma", "phi", "mistral"} <= {row["name"] for row in listed}
    assert "<｜User｜>" in packager("templates", "show", "deepseekr1").stdout
    ran = packager("templates", "show", "qwenn")
    assert ran.returncode == 2 and 'Did you mean "qwen"' in ran.stderr
