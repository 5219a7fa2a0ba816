"""The child that asks the first GPU and the library of an engine what they are, and may crash doing so."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from runtimes.engine import EngineError
from runtimes.engines.tensorrt.cuda import Cuda
from runtimes.engines.tensorrt.device import Device
from runtimes.engines.tensorrt.session import library_version


def main() -> int:
    """The facts, or what is missing, as one JSON object on standard output."""
    library = sys.argv[1]
    try:
        with Cuda() as cuda:  # before the library: TensorRT's own answer to a missing driver is a crash
            facts = cuda.facts()
            found = asdict(Device(**facts, library=library, version=library_version(library)))
    except EngineError as error:
        found = {"error": str(error)}
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
