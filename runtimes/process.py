"""How the engine's worker threads wait for each other."""

from __future__ import annotations

import os

SPINS = "1000"


def wait_politely() -> None:
    """Let OpenMP threads sleep soon instead of spinning; call it before the engine's library is loaded.

    llama.cpp's threads meet at hundreds of barriers a token. Where another program takes one of their cores, all others
    spin until it is given back. The user's own settings (GOMP_SPINCOUNT, OMP_WAIT_POLICY) are left alone.
    """
    if "GOMP_SPINCOUNT" not in os.environ and "OMP_WAIT_POLICY" not in os.environ:
        os.environ["GOMP_SPINCOUNT"] = SPINS
