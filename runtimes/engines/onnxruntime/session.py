"""Opens onnxruntime sessions with telemetry and spinning off and one-line errors."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtimes.engine import EngineError

# from 1.29 on, onnxruntime sends telemetry on import unless both are set before
QUIET = {"ORT_DISABLE_TELEMETRY": "1", "ORT_TELEMETRY_DISABLED": "1"}
CPU: tuple[str, dict[str, str]] = ("CPUExecutionProvider", {})


def quiet_onnxruntime() -> Any:
    """onnxruntime, imported with its telemetry off."""
    os.environ.update(QUIET)
    import onnxruntime

    return onnxruntime


def open_session(
    path: Path,
    *,
    threads: int,
    verbose: bool,
    providers: Sequence[tuple[str, Mapping[str, str]]] = (CPU,),
    optimized: bool = True,
) -> Any:
    """A session. threads: 0 means one per physical core. optimized: False runs the graph as it is in the file, with
    little memory. Raises EngineError.
    """
    ort = quiet_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 1 if verbose else 3
    # a waiting thread that spins takes a core from other programs
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.enable_cpu_mem_arena = False  # the arena keeps the memory of the longest prompt
        # by default every weight is cast before the first is used
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    try:
        return ort.InferenceSession(str(path), options, providers=[(name, dict(given)) for name, given in providers])
    except Exception as error:  # onnxruntime's errors share no class of their own
        raise EngineError(f"{path.name} does not load: {error}") from None
