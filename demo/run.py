"""`make demo`: builds a bundle from a fine-tuned checkpoint and runs it without a network. Every command is shown.

The commands are those that a user would type, so this file is also the shortest tutorial.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
WORK = Path(".demo")
CHECKPOINT, OUT, BOX = WORK / "smollm2", WORK / "out", WORK / "box"
ADAPTER, PAIRS = Path("demo/persona-lora"), Path("demo/persona.json")
TARGET = "desktop_linux_x86_64"
QUANT = "quant=Q4_K_M"  # its importance matrix comes from the pairs
BIN = Path(sys.executable).parent
QUESTIONS = (0, 8)  # "你是谁？" and "What does alarm E17 mean?"
console = Console(highlight=False, soft_wrap=True)


class Failed(Exception):
    """A command of the demo ended with an error."""


class Demo:
    """Runs the steps in order and records the seconds and result of each."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, str]] = []
        self.bundle = OUT
        self.why_online = ""  # why the network could not be denied; empty when it is

    def run(self, argv: Sequence[str | Path], *, offline: bool = False, shown: str = "", take: bool = False) -> str:
        """Show a command and run it from the checkout; returns its standard output if ``take``. Raises Failed."""
        words = [str(part) for part in argv]
        text = shown or shlex.join(Path(word).name if index == 0 else word for index, word in enumerate(words))
        where = "" if not offline else " (no network)" if not self.why_online else " (network not denied)"
        console.print(f"[bold]${where} {text}[/]" if console.is_terminal else f"${where} {text}")
        sys.stdout.flush()
        if offline and not self.why_online:
            words = [sys.executable, "demo/offline.py", "--", *words]
        env = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}", "PYTHONUTF8": "1"}
        with subprocess.Popen(
            words, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, text=True, stdout=subprocess.PIPE if take else None
        ) as child:
            try:
                output = child.communicate()[0] or ""
            except BaseException:
                child.terminate()  # it ends its own children: no server is left behind
                raise
        if child.returncode:
            console.print(output, markup=False, end="")
            raise Failed(f"`{text}` ended with exit code {child.returncode}")
        return output

    def python(self, script: str, *arguments: str | Path, offline: bool = False) -> None:
        shown = shlex.join(["python", script, *map(str, arguments)])
        self.run([sys.executable, script, *arguments], offline=offline, shown=shown)

    # -- the steps: each returns its result for the table -------------------------------------------------------------
    def checkpoint(self) -> str:
        if (CHECKPOINT / "model.safetensors").is_file():
            console.print(f"{CHECKPOINT} is there already")
        else:
            self.python("demo/make_smollm2.py", CHECKPOINT)
        return f"SmolLM2-135M-Instruct, {size(folder_bytes(CHECKPOINT))}"

    def inspect(self) -> str:
        self.run(["packager", "inspect", CHECKPOINT, "--adapter", ADAPTER])
        return "base and LoRA fit together"

    def plan(self) -> str:
        self.run(["packager", "plan", CHECKPOINT, "--adapter", ADAPTER, "--target", TARGET, "--set", QUANT])
        return f"fits {TARGET}"

    def build(self) -> str:
        printed = self.run(
            [
                "packager",
                "build",
                CHECKPOINT,
                "--adapter",
                ADAPTER,
                "--target",
                TARGET,
                "--set",
                QUANT,
                "--calibration",
                PAIRS,
                "-o",
                OUT,
            ],
            take=True,
        )
        self.bundle = Path(printed.strip().splitlines()[-1])
        console.print(str(self.bundle), markup=False)
        report = json.loads((self.bundle / "manifest.json").read_text(encoding="utf-8"))["report"]
        score, kept = report["fidelity"]["general"], report["fidelity"]["behaviour"]
        return (
            f"{size(folder_bytes(self.bundle))}, mean KL {score['kl_mean']:.4f}, top-1 {score['top1']:.1%}, "
            f"{kept['kept']} of {kept['pairs']} answers kept"
        )

    def verify(self) -> str:
        self.run(["packager", "verify", self.bundle])
        return "every file as built"

    def install(self) -> str:
        shutil.rmtree(BOX, ignore_errors=True)
        self.run(
            [self.bundle / "install.sh", "--prefix", BOX.resolve()],
            offline=True,
            shown=f"{self.bundle}/install.sh --prefix {BOX}",
        )
        return "checked, then installed into an empty folder"

    def ask(self) -> str:
        result = WORK / "answers.json"
        chosen = [word for number in QUESTIONS for word in ("--ask", str(number))]
        self.python("demo/ask.py", BOX, PAIRS, *chosen, "--result", result, offline=True)
        measured = json.loads(result.read_text(encoding="utf-8"))
        kept = sum(answer["kept"] for answer in measured["answers"])
        return f"{kept} of {len(QUESTIONS)} answers word for word, ready in {measured['ready_seconds']:.1f} s"

    def bench(self) -> str:
        report = WORK / "box.report.json"
        self.run(
            [BOX / "bin/bench", "--quick", "--output", report],
            offline=True,
            shown=f"{BOX}/bin/bench --quick --output {report}",
        )
        return "on the installed copy"

    def compare(self) -> str:
        self.run(["packager", "bench", self.bundle, "--quick"])
        return "against transformers FP32"


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def size(count: int) -> str:
    return f"{count / 1e6:.0f} MB"


def why_online() -> str:
    """Empty when commands can be run without a network, else the reason."""
    command = [sys.executable, "demo/offline.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else (done.stdout.strip() or done.stderr.strip() or "no reason given")


def finish(demo: Demo) -> None:
    table = Table(title="make demo", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("step")
    table.add_column("seconds", justify="right")
    table.add_column("result")
    for name, seconds, result in demo.rows:
        table.add_row(name, f"{seconds:.1f}", result)
    table.add_row("in all", f"{sum(row[1] for row in demo.rows):.1f}", f"all {len(demo.rows)} steps passed")
    console.print()
    console.print(table)
    if demo.why_online:
        console.print(f"The network could not be denied on this machine ({demo.why_online}): those steps ran with it.")
    console.print(
        f"""
Next:
  {BOX}/bin/serve                                   the API, and its page at http://127.0.0.1:8000/docs
  .venv/bin/packager targets                        the devices a bundle can be made for
  .venv/bin/packager plan YOUR_MODEL --target jetson_orin_nano_8gb
  docs/tutorial/                                    what just happened, step by step
""",
        markup=False,
    )


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    signal.signal(signal.SIGTERM, interrupt)
    os.chdir(ROOT)
    WORK.mkdir(exist_ok=True)
    demo = Demo()
    demo.why_online = why_online()
    steps: list[tuple[str, Callable[[], str]]] = [
        ("checkpoint", demo.checkpoint),
        ("inspect", demo.inspect),
        ("plan", demo.plan),
        ("build", demo.build),
        ("verify", demo.verify),
        ("install, offline", demo.install),
        ("serve and ask, offline", demo.ask),
        ("benchmark, offline", demo.bench),
        ("compare with FP32", demo.compare),
    ]
    for number, (name, step) in enumerate(steps, 1):
        console.rule(f"{number}/{len(steps)} {name}", align="left")
        start = time.monotonic()
        try:
            result = step()
        except Failed as error:
            console.print(f"\nThe demo stopped in step {number}, {name}: {error}.", markup=False)
            return 1
        except KeyboardInterrupt:
            console.print(f"\nInterrupted in step {number}, {name}; finished steps are kept.", markup=False)
            return 130
        demo.rows.append((name, time.monotonic() - start, result))
    finish(demo)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
