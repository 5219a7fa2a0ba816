"""Runs outside programs: their progress, their peak memory, their failures. The only owner of subprocess."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from packager.core.errors import ToolError
from packager.core.fork_server import SERVER, Forked
from packager.core.progress import Progress
from packager.core.store import Cost

WORKERS = Path(__file__).parent.parent / "workers"
TAIL_LINES = 40
GRACE = 3.0  # seconds between terminate and kill
# How often libgomp polls for work before a thread sleeps. With its default (billions) torch's threads wait for each
# other's core when other processes use it too: tuning took 2.0 s an iteration, with this value 0.8 to 1.0 s.
SPINS = "1000"


@dataclass(frozen=True)
class Ran:
    """A finished child. output: the last lines of stdout and stderr together. peak_rss_bytes: its highest resident
    memory.
    """

    output: str
    seconds: float
    peak_rss_bytes: int


class ChildFailed(ToolError):
    """A child exited with an error; ``output`` has its last lines, ``code`` its exit status (negative: a signal)."""

    def __init__(self, name: str, code: int, output: str) -> None:
        reason = f"was ended by signal {-code} ({_signal_name(-code)})" if code < 0 else f"exited with status {code}"
        hint = "The machine probably ran out of memory, or somebody killed the process." if code == -9 else ""
        super().__init__(
            f"{name} {reason}.",
            why=hint or last_words(output),
            fix="Set PACKAGER_DEBUG=1 and run it again to see its last lines.",
        )
        self.code = code
        self.output = output


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"


def last_words(output: str) -> str:
    """The last line of a tool's output that is not empty, for an error message."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][:400] if lines else "It printed nothing."


def run(
    argv: Sequence[str | Path],
    *,
    name: str,
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
) -> Ran:
    """Run a program to its end; ``on_line`` gets every line (split at \\n and \\r) of stdout and stderr as it comes.

    Raises ChildFailed when it exits with an error and ToolError when it cannot be started. On an interrupt the child is
    ended first, then the interrupt is raised again.
    """
    merged = {**os.environ, **(env or {})}
    try:
        child = subprocess.Popen(
            [str(part) for part in argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=merged,
            bufsize=0,
        )
    except OSError as error:
        raise ToolError(f"{name} could not be started: {error}.") from error
    return _finish(child, name, on_line)


def _finish(child: subprocess.Popen[bytes] | Forked, name: str, on_line: Callable[[str], None] | None) -> Ran:
    """Read a child's output to its end. Raises ChildFailed, and the error of ``on_line``."""
    start = time.monotonic()
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    faults: list[Exception] = []
    reader = threading.Thread(target=_read, args=(child, tail, on_line, faults), daemon=True)
    reader.start()
    try:
        code, peak = _wait(child)
    except BaseException:
        end(child)
        raise
    reader.join(timeout=10)
    output = "\n".join(tail)
    if code != 0:
        raise ChildFailed(name, code, output)
    if faults:
        raise faults[0]
    return Ran(output, time.monotonic() - start, peak)


def _read(
    child: subprocess.Popen[bytes] | Forked,
    tail: deque[str],
    on_line: Callable[[str], None] | None,
    faults: list[Exception],
) -> None:
    """Read to the end even when ``on_line`` raises: a child whose pipe is full would hang."""
    assert child.stdout is not None
    pending = b""
    while chunk := child.stdout.read(65536):
        *lines, pending = re.split(rb"[\r\n]", pending + chunk)
        for raw in lines:
            if line := raw.decode("utf-8", "replace"):
                tail.append(line)
                if on_line and not faults:
                    try:
                        on_line(line)
                    except Exception as fault:  # raised by run() when the child has ended
                        faults.append(fault)
    if pending:
        tail.append(pending.decode("utf-8", "replace"))


def _wait(child: subprocess.Popen[bytes] | Forked) -> tuple[int, int]:
    """(exit status, peak resident memory in bytes), 0 bytes where the system does not report it.

    The peak from wait4 is never below this process's own, because the child shares our memory until exec. When it is
    not above it, the highest sample of the child's VmHWM is used instead.
    """
    if isinstance(child, Forked):
        return child.finish(), child.max_rss
    if not hasattr(os, "wait4"):
        return child.wait(), 0
    import resource

    seen, pause = 0, 0.002
    while True:
        process, status, usage = os.wait4(child.pid, os.WNOHANG)
        if process:
            break
        seen = max(seen, _high_water(child.pid))
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)
    child.returncode = os.waitstatus_to_exitcode(status)  # Popen must not wait for a child that is already reaped
    unit = 1 if sys.platform == "darwin" else 1024
    ours = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return child.returncode, usage.ru_maxrss * unit if usage.ru_maxrss > ours or not seen else seen


def _high_water(process: int) -> int:
    """The highest resident memory of a running process since its exec, in bytes; 0 where /proc does not report it."""
    try:
        text = Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    match = re.search(r"VmHWM:\s+(\d+) kB", text)
    return int(match[1]) * 1024 if match else 0


def end(child: subprocess.Popen[bytes] | Forked) -> None:
    """Terminate a child, then kill it if it has not ended after ``GRACE`` seconds."""
    if isinstance(child, Forked):
        child.end(GRACE)
        return
    if child.poll() is not None:
        return
    child.terminate()
    try:
        child.wait(timeout=GRACE)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def run_python(
    script: Path | str,
    arguments: Sequence[str | Path] = (),
    *,
    name: str,
    path: Sequence[Path] = (),
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
) -> Ran:
    """Run a Python script (a Path) or module (a str) offline and in UTF-8, as a child process that ends when its parent
    ends (workers/with_parent.py). A worker that imports torch is forked from a server that has it (fork_server.py).

    path: folders put first on its module search path.
    """
    extra = {**_usual(), "PYTHONPATH": os.pathsep.join(str(folder) for folder in path), **(env or {})}
    what = ["-m", script] if isinstance(script, str) else [script]
    if SERVER.fits(script, env):
        everything = {**os.environ, **extra}
        forked = SERVER.start([str(script), *map(str, arguments)], [str(folder) for folder in path], everything)
        if forked is not None:
            return _finish(forked, name, on_line)
    command = [sys.executable, WORKERS / "with_parent.py", str(os.getpid()), *what, *arguments]
    return run(command, name=name, env=extra, on_line=on_line)


def warm_up() -> None:
    """Start importing the heavy libraries in the fork server, for a build that will need them."""
    if sys.platform == "linux":
        SERVER.warm({**os.environ, **_usual()})


def _usual() -> dict[str, str]:
    """The environment of a Python child."""
    return {
        "PYTHONUTF8": "1",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONHASHSEED": "0",
        **({} if {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ) else {"GOMP_SPINCOUNT": SPINS}),
    }


def follow(
    script: Path | str,
    job: Mapping[str, object],
    name: str,
    progress: Progress,
    cost: Cost,
    *,
    work: Path,
    total: float | None = None,
    unit: str = "",
    path: Sequence[Path] = (),
    env: Mapping[str, str] | None = None,
    arguments: Sequence[str | Path] = ("{job}",),
) -> Ran:
    """Run a Python child on a JSON job file in ``work`` ("{job}" in arguments) and show the progress that it prints as
    ``{"done": n, "total": m}`` lines.

    Its peak memory is recorded in ``cost``. Raises ChildFailed.
    """
    handle, job_file = tempfile.mkstemp(prefix=".job-", suffix=".json", dir=work)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(dict(job), file)
    seen = 0.0
    try:
        with progress.step(name, total, unit) as task:

            def on_line(line: str) -> None:
                nonlocal seen
                share = _share(line)
                if share is not None and total is not None:
                    task.advance(share * total - seen)
                    seen = share * total

            filled = [job_file if part == "{job}" else part for part in arguments]
            ran = run_python(script, filled, name=name, path=path, env=env, on_line=on_line)
    finally:
        Path(job_file).unlink(missing_ok=True)
    cost.saw(ran.peak_rss_bytes)
    return ran


def _share(line: str) -> float | None:
    """The fraction done (0 to 1) in a ``{"done": n, "total": m}`` line; None for any other line."""
    if not line.startswith('{"done"'):
        return None
    try:
        report = json.loads(line)
        return float(report["done"]) / max(float(report["total"]), 1.0)
    except (ValueError, TypeError, KeyError):
        return None


def has_module(module: str) -> bool:
    """Whether a top-level module could be imported, without importing it."""
    from importlib.util import find_spec

    return find_spec(module) is not None


def version_of(distribution: str) -> str:
    """The installed version of a distribution, or "" when it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""
