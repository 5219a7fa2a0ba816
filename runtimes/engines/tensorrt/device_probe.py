"""Reads the facts of the first GPU and of an engine's library; run as a child, because it may crash."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from runtimes.engine import EngineError
from runtimes.engines.tensorrt.cuda import Cuda
from runtimes.engines.tensorrt.device import Device
from runtimes.engines.tensorrt.session import library_version


def main() -> int:
    """Print the facts, or the error, as one JSON object on standard output."""
    library = sys.argv[1]
    try:
        with Cuda() as cuda:  # before the library: TensorRT crashes without a driver
            facts = cuda.facts()
            result = asdict(Device(**facts, library=library, version=library_version(library)))
    except EngineError as error:
        result = {"error": str(error)}
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
