"""What reaches the terminal: plain lines in a pipe, bars on a terminal, and with --json one document and nothing
else.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from packager.cli import console as console_module
from packager.cli.console import Console
from packager.cli.main import cli
from packager.core.errors import InputError
from packager.core.units import size
from tests.unit.tiny import tiny_checkpoint


def test_a_piped_step_is_one_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Name and seconds on stderr, no escape codes, nothing on stdout."""
    with Console().step("converting", 100.0, "B") as task:
        task.advance(100)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"  ✓ converting \(\d+\.\d s\)\n", err)


def test_a_step_that_fails_has_no_tick(capsys: pytest.CaptureFixture[str]) -> None:
    """The tick means done."""
    with pytest.raises(RuntimeError), Console().step("converting"):
        raise RuntimeError
    assert "✓" not in capsys.readouterr().err


def test_a_long_step_says_that_it_lives(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody sees a bar, a line comes from time to time, with the share that is done."""
    monkeypatch.setattr(console_module, "HEARTBEAT", 0.02)
    with Console().step("scoring", 4.0) as task:
        task.advance(1)
        time.sleep(0.2)
    assert re.search(r"… scoring: \d+ s 25%, about \d+ s left", capsys.readouterr().err)


def test_quiet_shows_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither steps nor notes."""
    console = Console(quiet=True)
    with console.step("converting") as task:
        task.advance(1)
    console.note("something")
    assert capsys.readouterr() == ("", "")


def test_json_is_pure(capsys: pytest.CaptureFixture[str]) -> None:
    """stdout parses as one document; the human rendering is not called; progress stays on stderr."""
    console = Console(json_mode=True)
    with console.step("converting"):
        console.note("a note")
    console.result({"path": Path("a/b"), "name": "小焰"}, lambda: pytest.fail("rendered for people"))
    out, err = capsys.readouterr()
    assert json.loads(out) == {"path": "a/b", "name": "小焰"}
    assert "小焰" in out
    assert "a note" in err


def test_without_json_the_rendering_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """People get what ``render`` writes and no braces."""
    console = Console()
    console.result({"a": 1}, lambda: console.line("hello"))
    assert capsys.readouterr().out == "hello\n"


def test_an_error_is_three_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """What, why and do on stderr, plain in a pipe; a part that is empty has no line."""
    Console().error(InputError("It broke.", why="It was thin.", fix="Take a thicker one."))
    assert capsys.readouterr() == ("", "error: It broke.\n  why: It was thin.\n  do:  Take a thicker one.\n")
    Console().error(InputError("It broke."))
    assert capsys.readouterr() == ("", "error: It broke.\n")


def test_an_error_in_json_mode_is_a_document_too(capsys: pytest.CaptureFixture[str]) -> None:
    """A pipeline reads the kind and the exit code from stdout; people still read stderr."""
    Console(json_mode=True).error(InputError("It broke."))
    out, err = capsys.readouterr()
    assert json.loads(out)["error"] == {"kind": "input", "exit_code": 3, "what": "It broke.", "why": "", "fix": ""}
    assert err.startswith("error: It broke.")


def test_a_table_in_a_pipe_keeps_every_cell_on_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    """No colours, no wrapping at 80 columns, markup shown as it is."""
    Console().table(("name", "text"), [("a", "x" * 120), ("[bold]b", "y")])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "x" * 120 in out
    assert "[bold]b" in out


def test_facts_align_and_leave_out_what_is_empty(capsys: pytest.CaptureFixture[str]) -> None:
    """Values stand in one column; a value of two lines goes on under itself."""
    Console().facts([("a", "1"), ("long name", "2\n3"), ("empty", "")], title="Facts")
    assert capsys.readouterr().out == "Facts\n  a          1\n  long name  2\n             3\n"


@pytest.mark.parametrize(
    ("amount", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (144_810_848, "144.8 MB"), (7.5e9, "7.5 GB"), (2e13, "20000.0 GB")],
)
def test_sizes_are_decimal(amount: float, text: str) -> None:
    """The unit that disks and downloads are counted in."""
    assert size(amount) == text


ON_A_TERMINAL = """
from packager.cli.console import Console
from packager.core.errors import InputError
from tests.unit.tiny import tiny_checkpoint
import time
console = Console()
with console.step("converting", 2.0, "B") as task:
    task.advance(1); time.sleep(0.3); task.advance(1)
with console.step("waiting"):
    pass
console.note("a note")
console.error(InputError("It broke."))
"""


def on_a_terminal(environment: dict[str, str]) -> str:
    pty = pytest.importorskip("pty", reason="no pseudo-terminals here")
    main, other = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL], env=environment, stdout=other, stderr=other, stdin=other
    )
    os.close(other)
    seen = b""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not part:
            break
        seen += part
    os.close(main)
    assert child.wait(timeout=30) == 0, seen
    return seen.decode()


def test_on_a_terminal_there_are_bars_and_colours(child_environment: dict[str, str]) -> None:
    """Escape codes move a bar; the error's first word is red."""
    environment = {key: value for key, value in child_environment.items() if key != "NO_COLOR"}
    seen = on_a_terminal({**environment, "TERM": "xterm-256color", "COLUMNS": "100"})
    assert "\x1b[" in seen
    assert "━" in seen
    assert "\x1b[1;31merror:" in seen


def test_no_color_is_honoured(child_environment: dict[str, str]) -> None:
    """With NO_COLOR set the terminal gets no colour codes at all."""
    seen = on_a_terminal({**child_environment, "NO_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "100"})
    assert "error: It broke." in seen
    assert not re.search(r"\x1b\[[0-9;]*3[0-9](;[0-9]+)*m", seen)


READERLESS = """
import json, os, sys
from packager.cli import main as cli
reader, writer = os.pipe()
os.close(reader)
ended = {}
for words in sys.argv[1:]:
    os.dup2(writer, 1)
    sys.stdout, sys.argv = sys.__stdout__, ["packager", *words.split()]
    try:
        cli.main()
    except SystemExit as end:
        sys.stdout.flush()  # as Python does at its end
        ended[words] = end.code
sys.stderr.write("\\n" + json.dumps(ended))
"""


def test_a_verb_ends_without_a_reader_as_with_one(tmp_path: Path, child_environment: dict[str, str]) -> None:
    """`packager plan … | head -1` has the plan's exit code, and says nothing of pipes."""
    tiny_checkpoint(tmp_path / "tiny")
    expected = {
        "targets": 0,
        "targets show t4": 0,
        "targets --json": 0,
        "recipes": 0,
        "recipes show gguf": 0,
        "templates": 0,
        "templates show qwen": 0,
        "inspect tiny": 0,
        "plan tiny --target t4 --set context=64": 0,
        "plan tiny --target t4": 4,
        "verify tiny --json": 5,
        "doctor": 0,
        "doctor --json": 0,
        "--help": 0,
    }
    ran = subprocess.run(
        [sys.executable, "-c", READERLESS, *expected],
        cwd=tmp_path,
        env=child_environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert json.loads(ran.stderr.splitlines()[-1]) == expected
    assert "Traceback" not in ran.stderr and "Broken" not in ran.stderr
    # these work for seconds before they print their one answer, to the same stream
    assert set(cli.commands) - {words.split()[0] for words in expected} == {"build", "bench", "serve"}


@pytest.mark.parametrize("unread", [("stdout",), ("stdout", "stderr")], ids="+".join)
def test_a_reader_that_goes_away_is_no_error(unread: tuple[str, ...], child_environment: dict[str, str]) -> None:
    """`packager targets | head` ends quietly, and so does `packager targets 2>&1 | head`."""
    reader, writer = os.pipe()
    os.close(reader)
    ran = subprocess.run(
        [sys.executable, "-m", "packager", "targets"],
        env=child_environment,
        **{"stderr": subprocess.PIPE, **dict.fromkeys(unread, writer)},  # type: ignore[arg-type]
        text=True,
        check=False,
    )
    os.close(writer)
    assert ran.returncode == 0
    assert not ran.stderr


def test_a_terminal_without_unicode_gets_question_marks(child_environment: dict[str, str]) -> None:
    """Output that the terminal cannot show is replaced, not a traceback."""
    ran = subprocess.run(
        [sys.executable, "-m", "packager", "targets", "show", "t4"],
        env={**child_environment, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
