"""The table of engines: for each the runtime files and wheel locks of its bundle.

A new engine gets an entry here, a module below runtimes/engines/ with its line in registry.py, and a lock. The files
are listed one by one, so that no other file of the folder gets onto a box.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from packager.bundle.manifest import Needs
from packager.core.errors import PackagerError
from packager.core.folders import lock_file

if TYPE_CHECKING:
    from packager.bundle.wheels import WheelSet
    from packager.planning.plan import Plan
    from packager.recipe import Artifact, Run
    from packager.target import Target

# Files of runtimes/; the __init__.py of each of their folders is added.
COMMON = (
    "__main__.py", "files.py", "manifest.py", "process.py",
    "engines/registry.py", "install/install.py", "install/launchers.py",
    "bench/client.py", "bench/llm.py", "bench/machine.py", "bench/server.py",
    "preflight/check.py", "preflight/driver_probe.py", "preflight/facts.py", "preflight/fit.py",
    "preflight/fit_gpu.py", "preflight/jetson.py", "preflight/nvidia.py", "preflight/sources.py", "preflight/vllm.py",
)  # fmt: skip
# The HTTP server of every engine that runs in its process.
SERVER = (
    "engine.py", "evaluate/json_files.py", "server/base_app.py", "server/http_protocol.py", "server/loading.py",
    "server/metrics.py", "server/middleware.py", "server/openai_responses.py", "server/serve.py",
)  # fmt: skip
# Language models: chat and completions, and the scoring and rendering that the build machine runs.
CHAT = (
    *SERVER, "decoding/chat_template.py", "decoding/tokenizer.py", "evaluate/answer.py", "evaluate/render.py",
    "evaluate/score.py", "server/chat_app.py", "server/dispatcher.py", "server/openai_requests.py",
    "server/responses.py",
)  # fmt: skip
# Engines that return logits: this package samples the tokens, in slots that share a batch.
SAMPLED = (*CHAT, "decoding/detokenize.py", "decoding/sampling.py", "decoding/stream.py")
SCHEDULED = (*SAMPLED, "decoding/json_schema.py", "decoding/scheduler.py")
# Embedders and classifiers.
ENCODER = (
    *SERVER, "bench/encoder.py", "engines/encoder.py", "evaluate/encode.py", "server/batcher.py",
    "server/encoder_app.py",
)  # fmt: skip
ONNXRUNTIME = ("engines/onnxruntime/session.py",)
# TensorRT's engines, opened or built on the box.
TENSORRT = (
    *ONNXRUNTIME,
    *(
        f"engines/tensorrt/{name}.py"
        for name in (
            "build",
            "cache",
            "command",
            "cuda",
            "device",
            "device_probe",
            "onnxruntime",
            "open",
            "plan",
            "session",
        )
    ),
)


@dataclass(frozen=True)
class BoxEngine:
    """files: of runtimes/, in addition to COMMON. locks: names in locks/ of the wheels; with ``by_library`` the lock of
    the settings' library replaces the first. scarce: packages that an index may have for some Pythons only. compiled:
    the box builds an engine and has bin/engine for it. caches: it stores files that it builds, so its unit gets a
    CacheDirectory.
    """

    files: tuple[str, ...]
    locks: tuple[str, ...]
    scarce: tuple[str, ...] = ()
    by_library: bool = False
    compiled: bool = False
    caches: bool = False


ENGINES: Mapping[str, BoxEngine] = {
    "llamacpp": BoxEngine(
        files=(*CHAT, *(f"engines/llamacpp/{name}.py" for name in ("engine", "logits", "page_cache", "replies"))),
        locks=("box-llamacpp",),
    ),
    "ort": BoxEngine(
        files=(*SCHEDULED, *ONNXRUNTIME, "engines/onnxruntime/cpu.py", "engines/onnxruntime/decoder.py"),
        locks=("box-ort",),
        scarce=("onnxruntime",),
    ),
    "ort_cuda": BoxEngine(
        files=(*SCHEDULED, *ONNXRUNTIME, "engines/onnxruntime/cuda.py", "engines/onnxruntime/decoder.py"),
        locks=("box-ort_cuda",),
        scarce=("onnxruntime-gpu", "numpy"),
    ),
    "ort_encoder": BoxEngine(
        files=(*ENCODER, *ONNXRUNTIME, "engines/onnxruntime/encoder.py"),
        locks=("box-ort_encoder",),
        scarce=("onnxruntime", "numpy"),
    ),
    "transformers": BoxEngine(
        files=(*SAMPLED, *(f"engines/transformers/{name}.py" for name in ("engine", "int4", "model"))),
        locks=("box-transformers", "torch-cpu"),
        scarce=("torch",),
    ),
    "tensorrt": BoxEngine(
        files=(*ENCODER, *TENSORRT, "engines/tensorrt/check.py", "engines/tensorrt/encoder.py"),
        locks=("box-tensorrt",),
        by_library=True,
        compiled=True,
        caches=True,
    ),
    "tensorrt_decoder": BoxEngine(
        files=(*SCHEDULED, *TENSORRT, "engines/tensorrt/cache_session.py", "engines/tensorrt/decoder.py"),
        locks=("box-tensorrt_decoder",),
        compiled=True,
        caches=True,
    ),
    "vllm": BoxEngine(files=(*CHAT, "engines/vllm.py"), locks=("box-vllm",)),
    "edgellm": BoxEngine(
        files=(*CHAT, "engines/edge_llm.py", "engines/vllm.py"), locks=("box-edgellm",), caches=True
    ),
}  # fmt: skip


def box_engine(name: str) -> BoxEngine:
    """The entry of an engine. Raises PackagerError for an unknown engine."""
    if name not in ENGINES:
        raise PackagerError(
            f"No runtime files are listed for the engine {name!r}; the table has {', '.join(sorted(ENGINES))}.",
            fix="Add it to ENGINES in packager/bundle/engines.py.",
        )
    return ENGINES[name]


def runtime_files(name: str) -> tuple[str, ...]:
    """The files of runtimes/ in a bundle for an engine. Raises PackagerError for an unknown engine."""
    named = {*COMMON, *box_engine(name).files}
    packages = {(parent / "__init__.py").as_posix() for file in named for parent in Path(file).parents}
    return tuple(sorted(named | packages))


def lock_files(run: Run) -> list[Path]:
    """The lock files of the box's wheels: the engine's or its library's first, then its further ones."""
    entry = box_engine(run.engine)
    library = run.settings.get("library") if entry.by_library else None
    first = f"box-{str(library).replace('-', '_')}" if library else entry.locks[0]
    return [lock_file(name) for name in (first, *entry.locks[1:])]


def needs_of(target: Target, plan: Plan, artifact: Artifact, wheels: WheelSet) -> Needs:
    """The requirements on the box. Disk: the model, and four times the size of the wheels for their copy and the
    unpacked files. vLLM's settings have its requirements on the GPU and on main memory.
    """
    model = sum(path.stat().st_size for path in artifact.files.values())
    settings = artifact.run.settings
    gpu = artifact.gpu
    if "capability" in settings:
        count = 1 if settings["ray"] else settings["tensor_parallel"]  # Ray's other GPUs are in other machines
        gpu = {key: settings[key] for key in ("capability", "vllm")} | {"count": count, "bytes": plan.box_bytes}
    return Needs(
        system=target.system,
        machine=target.machine,
        python_min=wheels.python[0],
        python_max=wheels.python[-1],
        glibc_min=target.glibc,
        ram_bytes=settings.get("host_bytes", plan.box_bytes) if gpu else plan.box_bytes,
        disk_bytes=model + 4 * sum(path.stat().st_size for path in wheels.files),
        gpu=gpu,
    )
