"""Compiles an ONNX file with TensorRT-RTX, without a GPU and without a driver: ``tensorrt_compile.py JOB.json``.

JOB.json: {"onnx", "profile": {input: {"min", "opt", "max"}}, "sm": ["7.5", …], "output", "told"}. Writes the engine,
and into the file "told" {"settled"}: whether addresses were fixed, so that the same file gives the same engine again
(fixed_addresses.py). The module tensorrt_rtx_bindings is on the module search path
(packager/formats/tensorrt/compiler.py). It runs in a process of its own because the library is large and could crash
while it loads.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from packager.workers.fixed_addresses import call, one_thread


def load() -> Any:
    import tensorrt_rtx_bindings

    return tensorrt_rtx_bindings


def compiled(tensorrt: Any, job: dict[str, Any]) -> Any:
    """The engine, serialized; None when the graph is refused, with the reasons on stdout."""
    logger = tensorrt.Logger(tensorrt.Logger.WARNING)
    builder = tensorrt.Builder(logger)
    network = builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse_from_file(job["onnx"]):
        for number in range(parser.num_errors):
            error = parser.get_error(number)
            print(f"the parser refuses node {error.node_name() or error.node()}: {error.desc()}", flush=True)
        return None
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(job["sm"])
    for place, version in enumerate(job["sm"]):
        name = f"SM{version.replace('.', '')}"
        config.set_compute_capability(getattr(tensorrt.ComputeCapability, name), place)
    profile = builder.create_optimization_profile()
    for name, shape in job["profile"].items():
        profile.set_shape(name, shape["min"], shape["opt"], shape["max"])
    config.add_optimization_profile(profile)
    with one_thread():
        engine = builder.build_serialized_network(network, config)
    if engine is None:
        print("the compiler gave no engine; its messages are above", flush=True)
    return engine


def main(job: dict[str, Any]) -> int:
    model = Path(job["onnx"])
    os.chdir(model.parent)  # so that the model's name does not depend on the store's path
    engine, settled = call(load, lambda tensorrt: compiled(tensorrt, {**job, "onnx": model.name}))
    if engine is None:
        return 1
    Path(job["output"]).write_bytes(engine)
    Path(job["told"]).write_text(json.dumps({"settled": settled}) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
