"""Records a real session as docs/session.svg: build, install, serve, ask. python scripts/record.py [--output FILE]

Every line comes from the commands themselves, run here on the demo's checkpoint with an empty store. Progress lines
that a terminal would overwrite are left out. rich draws the picture.
"""

from __future__ import annotations

import argparse
import http.client
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / ".demo" / "smollm2"
WIDTH = 112
BUILD = (
    "packager build smollm2 --adapter persona-lora --name assistant --calibration persona.json "
    "--target desktop_linux_x86_64 -o out"
)
BUNDLE = "out/assistant-desktop_linux_x86_64-gguf"
QUESTION = "What does alarm E17 mean?"
PASSING = re.compile(r"^\s*…")  # lines of a step under way


class Session:
    """A folder with the demo's inputs, and the picture of what was typed and printed in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.picture = Console(record=True, width=WIDTH, file=Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.env = {**os.environ, "PATH": programs, "PACKAGER_STORE": str(folder / ".store"), "COLUMNS": str(WIDTH)}

    def show(self, command: str, output: str) -> None:
        """A prompt with the command, and what it printed."""
        self.picture.print(Text("$ ", style="bold green") + Text(command, style="bold"))
        for line in output.splitlines():
            if line.strip() and not PASSING.match(line):
                plain = line.replace(str(self.folder), "~")
                self.picture.print(Text(plain, style="green" if plain.lstrip().startswith("✓") else ""))

    def run(self, command: str) -> None:
        """Run a command in the folder and show it. Raises CalledProcessError."""
        done = subprocess.run(
            shlex.split(command),
            cwd=self.folder,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        print(f"$ {command}\n{done.stdout}")
        done.check_returncode()
        self.show(command, done.stdout)

    @contextmanager
    def serving(self, command: str) -> Iterator[str]:
        """A server, shown with the line that it prints when it listens; yields its address."""
        with subprocess.Popen(
            shlex.split(command), cwd=self.folder, env=self.env, stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None
            try:
                line = child.stdout.readline()
                self.show(f"{command} &", line)
                yield line.split(" on ")[1].split()[0]
            finally:
                child.terminate()


def ready(address: str) -> None:
    """Wait until the model is loaded."""
    host, _, port = address.removeprefix("http://").partition(":")
    while True:
        link = http.client.HTTPConnection(host, int(port), timeout=10)
        link.request("GET", "/health")
        if link.getresponse().status == http.HTTPStatus.OK:
            return
        link.close()
        time.sleep(0.2)


def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--output", type=Path, default=ROOT / "docs" / "session.svg")
    given = options.parse_args()
    if not CHECKPOINT.is_dir():
        subprocess.run([sys.executable, ROOT / "demo/make_smollm2.py", CHECKPOINT], check=True)
    with tempfile.TemporaryDirectory(prefix="packager-session-") as name:
        folder = Path(name)
        for path in (CHECKPOINT, ROOT / "demo" / "persona-lora", ROOT / "demo" / "persona.json"):
            (folder / path.name).symlink_to(path)
        session = Session(folder)
        session.run(BUILD)
        session.run(f"{BUNDLE}/install.sh --prefix box")
        with session.serving("box/bin/serve --port 0") as address:
            ready(address)
            session.run(f"curl -sG {address}/answer --data-urlencode 'prompt={QUESTION}'")
        given.output.write_text(session.picture.export_svg(title="packager"), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
