"""Outside programs: how their end, their output, their memory and our own end are seen."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from packager.core.errors import ToolError
from packager.core.processes import ChildFailed, Ran, follow, has_module, last_words, run, run_python, version_of
from packager.core.progress import Silent
from packager.core.store import Cost


def script(folder: Path, text: str) -> Path:
    path = folder / "child.py"
    path.write_text(text, encoding="utf-8")
    return path


def test_output_comes_line_by_line_from_both_streams() -> None:
    """Lines of stdout and stderr arrive as they come; a carriage return ends a line too."""
    seen: list[str] = []
    code = "import sys; sys.stdout.write('one\\ntwo\\rthree\\n'); sys.stdout.flush(); sys.stderr.write('four')"
    ran = run([sys.executable, "-c", code], name="child", on_line=seen.append)
    assert ran.output.splitlines() == ["one", "two", "three", "four"]
    assert seen[:3] == ["one", "two", "three"]


def test_a_listener_that_fails_does_not_hang_the_child() -> None:
    """An exception in ``on_line`` comes out of run() when the child has written all it has to write."""

    def listen(line: str) -> None:
        raise KeyError(line)

    with pytest.raises(KeyError, match="line 0"):
        run([sys.executable, "-c", "for i in range(50000): print('line', i)"], name="child", on_line=listen)


def test_only_the_last_lines_are_kept() -> None:
    """A chatty child does not fill our memory: forty lines are enough for an error message."""
    ran = run([sys.executable, "-c", "for i in range(5000): print('line', i)"], name="child")
    assert ran.output.splitlines() == [f"line {i}" for i in range(4960, 5000)]


def test_bytes_that_are_no_text_do_no_harm() -> None:
    """Output that is not UTF-8 is shown as well as it can be."""
    ran = run([sys.executable, "-c", r"import sys; sys.stdout.buffer.write(b'a\xff\xfeb\n')"], name="child")
    assert ran.output.startswith("a")
    assert ran.output.endswith("b")


def test_a_child_reads_no_terminal() -> None:
    """stdin is empty: a program that asks a question cannot hang the build."""
    ran = run([sys.executable, "-c", "import sys; print(repr(sys.stdin.read()))"], name="child")
    assert ran.output == "''"


def test_a_failure_names_program_status_and_last_words() -> None:
    """The error carries exit status and the last line that says something."""
    code = "import sys; print('first'); print('no such tensor: blk.3'); print('  '); sys.exit(3)"
    with pytest.raises(ChildFailed) as caught:
        run([sys.executable, "-c", code], name="the converter")
    assert caught.value.what == "the converter exited with status 3."
    assert caught.value.why == "no such tensor: blk.3"
    assert (caught.value.code, caught.value.exit_code) == (3, 7)


def test_a_silent_failure_says_so() -> None:
    """A child that dies without a word is reported as such."""
    with pytest.raises(ChildFailed, match=r"status 1.*It printed nothing"):
        run([sys.executable, "-c", "raise SystemExit(1)"], name="child")


def test_a_killed_child_and_a_failed_one_have_different_errors() -> None:
    """SIGKILL from outside most often means that memory ran out; other signals have their names."""
    with pytest.raises(ChildFailed, match=r"signal 9 \(SIGKILL\).*out of memory"):
        run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], name="child")
    with pytest.raises(ChildFailed, match=r"signal 11 \(SIGSEGV\)"):
        run([sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"], name="child")


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    """A missing program is a ToolError with its name."""
    with pytest.raises(ToolError, match="the quantizer could not be started"):
        run([tmp_path / "absent"], name="the quantizer")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system counts from the fork")
def test_the_peak_memory_is_the_childs_own() -> None:
    """A child that touches 200 MB is seen with that and not much more, whatever we have had ourselves."""
    ours = bytearray(300_000_000)
    ours[::4096] = b"1" * len(ours[::4096])
    touch = "import time; x = bytearray(200_000_000); x[::4096] = b'1' * len(x[::4096]); time.sleep(0.3)"
    big = run([sys.executable, "-c", touch], name="big")
    small = run([sys.executable, "-c", "import time; time.sleep(0.2)"], name="small")
    assert len(ours) == 300_000_000
    assert 200e6 < big.peak_rss_bytes < 260e6
    assert 1e6 < small.peak_rss_bytes < 60e6


def test_last_words_are_the_last_line_that_is_not_blank() -> None:
    """Blank lines at the end are skipped, and a very long line is cut."""
    assert last_words("a\nb\n\n  \n") == "b"
    assert last_words("") == "It printed nothing."
    assert len(last_words("x" * 5000)) == 400


def test_python_children_are_offline_and_reproducible(tmp_path: Path) -> None:
    """The environment of a child forbids the hub, fixes the hash seed and speaks UTF-8."""
    child = script(
        tmp_path,
        "import os, sys\nprint(os.environ['HF_HUB_OFFLINE'], os.environ['PYTHONHASHSEED'], sys.flags.utf8_mode)\n",
    )
    assert run_python(child, name="child").output == "1 0 1"


def test_python_children_get_arguments_and_a_search_path(tmp_path: Path) -> None:
    """Arguments arrive as given, and the folders of ``path`` come first on the module search path."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "json.py").write_text("WHO = 'mine'\n", encoding="utf-8")
    child = script(tmp_path, "import sys, json\nprint(sys.argv[1:], json.WHO)\n")
    ran = run_python(child, ["a b", "--x"], name="child", path=[tmp_path / "mine"])
    assert ran.output == "['a b', '--x'] mine"


def test_a_script_finds_its_siblings_and_not_ours(tmp_path: Path) -> None:
    """sys.path begins with the script's own folder, as if Python had run it, so packager/workers is not on it."""
    (tmp_path / "sibling.py").write_text("VALUE = 5\n", encoding="utf-8")
    child = script(
        tmp_path, "import sys, sibling\nprint(sibling.VALUE, any(p.endswith('children') for p in sys.path))\n"
    )
    assert run_python(child, name="child").output == "5 False"


def test_a_module_runs_as_with_dash_m(tmp_path: Path) -> None:
    """A name instead of a path is a module, found on ``path``."""
    (tmp_path / "tool").mkdir()
    (tmp_path / "tool" / "__main__.py").write_text("import sys\nprint(__name__, sys.argv[1:])\n", encoding="utf-8")
    (tmp_path / "tool" / "__init__.py").write_text("", encoding="utf-8")
    assert run_python("tool", ["x"], name="child", path=[tmp_path]).output == "__main__ ['x']"


class Recorder(Silent):
    """A Progress that remembers."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, float | None, str]] = []
        self.amounts: list[float] = []

    @contextmanager
    def step(self, name: str, total: float | None = None, unit: str = "") -> Iterator[Recorder]:  # type: ignore[override]
        self.steps.append((name, total, unit))
        yield self

    def advance(self, amount: float) -> None:
        self.amounts.append(amount)


FOLLOWED = """
import json, sys
job = json.load(open(sys.argv[1], encoding="utf-8"))
for n in range(1, 5):
    print(json.dumps({"done": n, "total": 4}), flush=True)
open(job["output"], "w", encoding="utf-8").write(job["word"])
"""


def test_a_followed_child_reads_its_job_and_moves_the_bar(tmp_path: Path) -> None:
    """The job arrives whole, the reports become amounts in the step's unit, and the job file is gone afterwards."""
    progress, cost = Recorder(), Cost()
    child = script(tmp_path, FOLLOWED)
    work = tmp_path / "work"
    work.mkdir()
    ran = follow(
        child,
        {"output": str(work / "out"), "word": "über"},
        "working",
        progress,
        cost,
        work=work,
        total=200.0,
        unit="B",
    )
    assert isinstance(ran, Ran)
    assert progress.steps == [("working", 200.0, "B")]
    assert progress.amounts == [50.0] * 4
    assert [path.name for path in work.iterdir()] == ["out"]
    assert (work / "out").read_text(encoding="utf-8") == "über"
    assert cost.peak_rss_bytes == ran.peak_rss_bytes


def test_a_followed_child_that_fails_leaves_no_job_file(tmp_path: Path) -> None:
    """The failure passes through and the work folder is as it was."""
    work = tmp_path / "work"
    work.mkdir()
    with pytest.raises(ChildFailed, match="working exited with status 4"):
        follow(script(tmp_path, "raise SystemExit(4)"), {}, "working", Silent(), Cost(), work=work)
    assert list(work.iterdir()) == []


def test_a_line_that_only_looks_like_a_report_is_not_one(tmp_path: Path) -> None:
    """A cut or foreign line that begins like a report neither hangs nor fails the step."""
    child = script(tmp_path, "print('{\"done\": oops'); print('{\"done\": 1}'); print('x' * 300_000)")
    ran = follow(child, {}, "working", Recorder(), Cost(), work=tmp_path, total=4.0)
    assert len(ran.output) > 300_000


ORPHAN = """
import sys
from pathlib import Path
from packager.core import processes as tools
tools.GRACE = float(sys.argv[3])
tools.run_python(Path(sys.argv[1]), [sys.argv[2]], name="child")
"""
SLEEPER = """
import os, sys, time
from pathlib import Path
Path(sys.argv[1]).write_text(str(os.getpid()), encoding="utf-8")
time.sleep(120)
"""


def started(place: Path) -> int:
    end = time.monotonic() + 20
    while not (place.exists() and place.read_text(encoding="utf-8")):
        assert time.monotonic() < end, "the child did not start"
        time.sleep(0.02)
    return int(place.read_text(encoding="utf-8"))


def family(
    folder: Path, text: str, environment: dict[str, str], grace: float = 3
) -> tuple[subprocess.Popen[bytes], int]:
    """A process that runs a child, and the child's id. grace: seconds that the child has to end itself."""
    place = folder / "pid"
    parent = subprocess.Popen(
        [sys.executable, "-c", ORPHAN, script(folder, text), place, str(grace)],
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    return parent, started(place)


def is_over(process: int, seconds: float = 5) -> bool:
    """Whether a process of another parent is gone (or a zombie that nobody reaps) within some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(process, 0)
            state = Path(f"/proc/{process}/stat")
            if state.exists() and state.read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_child_ends_with_its_parent(
    tmp_path: Path, child_environment: dict[str, str], number: signal.Signals
) -> None:
    """Whether the build is killed, interrupted or terminated: no orphan goes on writing."""
    parent, child = family(tmp_path, SLEEPER, child_environment)
    parent.send_signal(number)
    parent.wait(timeout=15)
    assert parent.returncode != 0
    assert is_over(child)


STUBBORN = """
import os, signal, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, signal.SIG_IGN)
Path(sys.argv[1]).write_text(str(os.getpid()), encoding="utf-8")
time.sleep(120)
"""


def test_an_interrupt_ends_even_a_child_that_will_not_go(tmp_path: Path, child_environment: dict[str, str]) -> None:
    """A child that ignores SIGTERM is killed after its grace, before the interrupt goes on."""
    parent, child = family(tmp_path, STUBBORN, child_environment, grace=0.2)
    parent.send_signal(signal.SIGINT)
    parent.wait(timeout=15)
    assert is_over(child, 1)


def test_modules_and_versions_are_known_without_importing() -> None:
    """Absent ones are False and empty; present ones are not imported by the look."""
    assert has_module("json")
    assert not has_module("no_such_module_anywhere")
    assert version_of("pytest")
    assert version_of("no-such-distribution") == ""
