"""Records a real box as a tree for tests/unit/boxes/trees, and proves that the tree gives the box's own facts.

    python3 tests/device/record_box.py OUT                      # from a checkout
    python3 record_box.py OUT --runtimes PREFIX/runtime         # beside an installed bundle

Keeps exactly what the preflight reads: no host name, address or serial number is among it; of dpkg's list the packages
of NVIDIA's. Look through OUT before you hand it over. Prints one JSON verdict; exit code 0 when the tree gives the same
facts. Python 3.8 or newer, nothing else.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("out", type=Path, help="a new folder")
    options.add_argument(
        "--runtimes", type=Path, default=Path(__file__).resolve().parents[2], help="the folder that holds runtimes/"
    )
    given = options.parse_args()
    sys.path.insert(0, str(given.runtimes))
    from runtimes.preflight.facts import process_facts, read_facts
    from runtimes.preflight.nvidia import PACKAGES
    from runtimes.preflight.sources import Box, Output

    class Recorder(Box):
        """This box, with a copy of whatever is asked of it."""

        def __init__(self, out: Path) -> None:
            super().__init__()
            self.out = out
            self.asked: dict[str, Any] = {}

        def keep(self, name: str, text: str) -> None:
            place = self.out / name.lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text, encoding="utf-8")

        def text(self, name: str) -> str | None:
            found = super().text(name)
            if found is not None:
                self.keep(name, found)
            return found

        def lines(self, name: str) -> Any:
            found = super().lines(name)
            if found is None:
                return None
            kept, wanted = [], False
            for line in found:
                if line.startswith("Package: "):
                    wanted = line[9:].startswith(PACKAGES)
                if wanted and line.startswith(("Package: ", "Status: ", "Version: ")):
                    kept.append(line)
            self.keep(name, "".join(kept))
            return iter(kept)

        def exists(self, name: str) -> bool:
            found = super().exists(name)
            if found and not (self.out / name.lstrip("/")).exists():
                self.keep(name, "")
            return found

        def names(self, folder: str) -> list[str]:
            found = [name for name in super().names(folder) if wanted(folder, name)]
            for name in found:
                if not (self.out / folder.lstrip("/") / name).exists():
                    inside = "/.kept" if self.path(f"{folder}/{name}").is_dir() else ""
                    self.keep(f"{folder}/{name}{inside}", "")
            return found

        def output(self, program: str, *arguments: str, seconds: float = 20) -> Output | None:
            found = super().output(program, *arguments, seconds=seconds)
            if found is not None:
                if not arguments:  # nvidia-smi's table also lists who uses the GPU
                    head = [line for line in found.output.splitlines() if "CUDA" in line]
                    found = found._replace(output="\n".join(head))
                self.asked[" ".join([program.split("|")[0], *arguments])] = found._asdict()
            return found

        def probe(self, *, seconds: float = 30) -> Any:
            found = super().probe(seconds=seconds)
            self.asked["probe"] = {"status": 0, "output": json.dumps(found)}
            return found

    def wanted(folder: str, name: str) -> bool:
        """Library folders hold thousands of names: those that are looked for stay."""
        if "lib" not in folder.split("/")[-1] and not folder.startswith(("/usr/lib/", "/usr/local/lib/")):
            return True
        return name.startswith(("libnvinfer", "python3", "tensorrt"))

    given.out.mkdir(parents=True)
    box = Recorder(given.out)
    facts = read_facts(Path.home(), box=box)
    facts.pop("vllm", None)  # an environment of the user's own, not the box's
    told = process_facts(Path.home())
    process = {name: facts[name] for name in told}
    (given.out / "process.json").write_text(json.dumps(process, indent=1) + "\n", encoding="utf-8")
    (given.out / "commands.json").write_text(json.dumps(box.asked, indent=1) + "\n", encoding="utf-8")
    again = read_facts(box=Box(given.out))
    different = sorted(name for name in {*facts, *again} if facts.get(name) != again.get(name))
    sys.stdout.write(
        json.dumps(
            {
                "recorded": str(given.out),
                "same": not different,
                "different": different,
                "jetson": bool(facts["jetson_model"]),
                "gpus": facts["gpus"],
            }
        )
        + "\n"
    )
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
