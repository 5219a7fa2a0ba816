"""Builds the engine of a plan on this box, in a child: with trtexec, or with TensorRT's Python interface.

A build takes minutes and, on a small Jetson, all of its memory. So it reports progress every few seconds, and after a
build that ran out of memory it tries the plan's next smaller profile. Signs of "out of memory" are the builder's
messages, or a child that the kernel killed. Standard library only.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from runtimes.engine import EngineError
from runtimes.engines.tensorrt.cache import Say
from runtimes.engines.tensorrt.device import RUNTIME, Device, environment
from runtimes.engines.tensorrt.plan import Plan, Profile, trtexec_arguments
from runtimes.files import file_sha256

TRTEXEC = "/usr/src/tensorrt/bin/trtexec"  # where JetPack puts it (package libnvinfer-bin)
EVERY = 5.0  # seconds between two lines of progress
# Messages of TensorRT 10 and of the Tegra kernel's allocator. They count only for a build that failed. In a warning
# ([W]) they mean a skipped tactic, which is frequent; that counts only where no tactic was left.
MEMORY = re.compile(
    r"out of memory|OutOfMemory|could not be allocated|[Ii]nsufficient (memory|workspace)"
    r"|NvMapMemAlloc\w* *:? *\d* *error 12|CUDA_ERROR_OUT_OF_MEMORY|cudaErrorMemoryAllocation"
    r"|std::bad_alloc|MemoryError"
)
NONE_LEFT = "Could not find any implementation"
ERROR = re.compile(r"\[E\]|^E[:\[]|rror")


@dataclass(frozen=True)
class Outcome:
    """The result of a build. memory: whether it ran out of memory. reason: the most useful line of its log."""

    fine: bool
    memory: bool = False
    reason: str = ""


def build(
    plan: Plan, device: Device, goal: Path, say: Say, *, every: float = EVERY
) -> tuple[int, Mapping[str, object]]:
    """Build the engine into the file ``goal``. Returns the number of its profile and the facts of the build. Raises
    EngineError with one sentence.
    """
    require_model(plan)
    program = find_trtexec()
    begun = time.monotonic()
    outcome = Outcome(False)
    for number, profile in enumerate(plan.profiles):
        what = describe(profile)
        say(f"building the engine for {device.name} with TensorRT {device.version}, {what}; this takes minutes …")
        outcome = run_build(command(plan, number, goal, program), plan, goal, say, every)
        if outcome.fine:
            made = {"seconds": round(time.monotonic() - begun, 1), "by": "trtexec" if program else "python"}
            return number, {**made, "checked": check(plan, number, goal, say)}
        if not outcome.memory:
            raise EngineError(
                f"TensorRT could not build the engine ({outcome.reason}); the lines above are its own, "
                "`bin/engine build` tries again."
            )
        if number + 1 < len(plan.profiles):
            say(f"the build ran out of memory ({outcome.reason}); trying the next smaller profile")
    raise EngineError(
        f"Memory: expected enough to build even the smallest engine ({describe(plan.profiles[-1])}), found too little ("
        f"{outcome.reason}; the box has {device.bytes / 1e9:.1f} GB, {free_memory()} free); end other programs and the "
        "desktop session, restart the box, and run bin/engine build."
    )


def require_model(plan: Plan) -> None:
    """Raise EngineError unless the ONNX file and its data have the plan's digests."""
    for path, expected in ((plan.onnx, plan.onnx_sha256), *plan.data):
        try:
            digest = file_sha256(path)
        except OSError as error:
            raise EngineError(f"{path} cannot be read ({error.strerror}); copy the bundle again.") from None
        if digest != expected:
            raise EngineError(
                f"{path.name}: expected sha256 {expected[:16]}…, found {digest[:16]}…; copy the bundle again."
            )


def find_trtexec() -> str | None:
    """The program trtexec on PATH, else JetPack's; None without one."""
    return shutil.which("trtexec") or shutil.which(TRTEXEC)


def command(plan: Plan, number: int, goal: Path, trtexec: str | None) -> list[str]:
    """The child's command line for a profile."""
    if trtexec:
        return [trtexec, *trtexec_arguments(plan, number), f"--saveEngine={goal}"]
    return [
        sys.executable,
        "-m",
        "runtimes.engines.tensorrt.command",
        "--child-build",
        str(plan.path),
        str(number),
        str(goal),
    ]


def run_build(words: Sequence[str], plan: Plan, goal: Path, say: Say, every: float = EVERY) -> Outcome:
    """Run one build to its end, with a line of progress every ``every`` seconds."""
    from runtimes.process import die_with_parent

    goal.unlink(missing_ok=True)
    killed = oom_kills()
    lines: deque[str] = deque(maxlen=400)
    hints: list[str] = []

    def read(stream: IO[bytes]) -> None:
        for raw in stream:
            line = raw.decode("utf-8", "replace").rstrip()
            lines.append(line)
            if (MEMORY.search(line) or NONE_LEFT in line) and len(hints) < 200:
                hints.append(line)

    begun = time.monotonic()
    try:
        child = subprocess.Popen(
            words,
            cwd=plan.onnx.parent,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment(),
            preexec_fn=die_with_parent if sys.platform == "linux" else None,
        )
    except OSError as error:
        return Outcome(False, reason=f"{words[0]} cannot be started: {error.strerror}")
    reader = threading.Thread(target=read, args=(child.stdout,), daemon=True)
    reader.start()
    try:
        while True:
            try:
                status = child.wait(timeout=every)
                break
            except subprocess.TimeoutExpired:
                say(f"still building: {time.monotonic() - begun:.0f} s, {free_memory()} of memory free")
    except BaseException:
        child.kill()
        child.wait()
        raise
    reader.join(timeout=10)
    if status == 0 and goal.is_file() and goal.stat().st_size:
        return Outcome(True)
    outcome = judge_failure(status, list(lines), hints, oom_kills() - killed)
    if not outcome.memory:
        say("\n".join(list(lines)[-30:]))
    return outcome


def judge_failure(status: int, lines: Sequence[str], hints: Sequence[str], kills: int) -> Outcome:
    """The cause of a failed build. status: the child's exit code. hints: its lines about memory and about layers
    without a tactic. kills: processes that the kernel's out-of-memory killer ended meanwhile, where known.
    """
    if status in (-signal.SIGKILL, 128 + signal.SIGKILL):
        cause = (
            "the kernel killed it because memory ran out" if kills else "it was killed, probably because memory ran out"
        )
        return Outcome(False, True, cause)
    errors = [line for line in hints if "[W]" not in line and MEMORY.search(line)]
    if not errors and any(NONE_LEFT in line for line in hints):
        errors = [line for line in hints if "[W]" in line]
    if errors:
        return Outcome(False, True, _plain(errors[0]))
    if status < 0:
        return Outcome(False, False, f"it crashed with {signal.Signals(-status).name}")
    wrong = [line for line in lines if ERROR.search(line)]
    last = wrong[-1] if wrong else lines[-1] if lines else "no message"
    return Outcome(
        False, False, _plain(last) if status else f"it exited with status 0 but wrote no engine; {_plain(last)}"
    )


def _plain(line: str) -> str:
    """A line of a log without its time and level, at most 300 characters."""
    return re.sub(r"^(\[[^\]]*\]\s*)+", "", line).strip()[:300].rstrip(".")


def check(plan: Plan, number: int, engine: Path, say: Say) -> Mapping[str, object] | None:
    """Run an engine in a child on the bundle's reference texts, where it has them, and compare with the source's
    answers. Raises EngineError for an engine whose answers differ. None without reference texts.
    """
    if plan.reference is None:
        return None
    say("comparing the engine's answers with the source's …")
    words = [sys.executable, "-m", "runtimes.engines.tensorrt.check", str(plan.path), str(number), str(engine)]
    done = subprocess.run(
        words, stdin=subprocess.DEVNULL, capture_output=True, env=environment(), cwd=RUNTIME, check=False
    )
    try:
        result: dict[str, Any] = json.loads(done.stdout.decode().strip().splitlines()[-1])
    except (ValueError, IndexError):
        errors = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise EngineError(
            f"The engine could not be run (exit code {done.returncode}: "
            f"{errors[-1][:300] if errors else 'no message'}); it is not used."
        ) from None
    if "error" in result:
        raise EngineError(f"The engine could not be run and is not used: {result['error']}")
    if result["cosine_min"] < result["least"]:
        raise EngineError(
            f"Engine: expected answers with a cosine of at least {result['least']} to the source's, found "
            f"{result['cosine_min']:.4f}; it is not used, report it with TensorRT's version."
        )
    return {"texts": result["texts"], "cosine_min": result["cosine_min"]}


def describe(profile: Profile) -> str:
    """A profile for a message: "input_ids up to 8x256"."""
    name, shapes = next(iter(profile.items()))
    return f"{name} up to {'x'.join(map(str, shapes.max))}"


def oom_kills() -> int:
    """How many processes the out-of-memory killer has ended since boot; 0 where unknown."""
    for file in ("/sys/fs/cgroup/memory.events", "/proc/vmstat"):
        try:
            fields = dict(line.split() for line in Path(file).read_text("ascii").splitlines())
            return int(fields["oom_kill"])
        except (OSError, ValueError, KeyError):
            continue
    return 0


def free_memory() -> str:
    """The box's available memory, for a message."""
    try:
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return f"{int(line.split()[1]) * 1024 / 1e9:.1f} GB"
    except (OSError, ValueError, IndexError):
        pass
    return "unknown"
