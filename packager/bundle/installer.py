"""The files of a bundle for the box and its operator, from templates/: install.sh, README.md and the systemd units.

Templates are plain files with ``@KEY@`` marks. Values are checked before they are inserted, because a shell script
must not contain text of unknown origin.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files as package_files
from typing import Any

from packager.bundle.engines import box_engine
from packager.bundle.manifest import Needs
from packager.core.errors import PackagerError

SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
SYSTEMS = {"linux": "Linux", "windows": "Windows", "macos": "macOS"}
CHECK = "    ./install.sh --check             # only looks whether this box fits\n"
INSTALL = {
    "linux": CHECK + "    ./install.sh                     # or: ./install.sh --prefix /opt/@BUNDLE@",
    "macos": CHECK + "    ./install.sh                     # or: ./install.sh --prefix /opt/@BUNDLE@",
    "windows": "    install.cmd                      & rem or: install.cmd --prefix C:\\@BUNDLE@\n\n"
    "Below, read `PREFIX\\bin\\serve.cmd` for `PREFIX/bin/serve`, and so on.",
}


# The README's text for each kind of model: its name, capacity, request, client and measurements. The request is a shell
# command, so the only value in it is the checked name.
OPENAI = "Any OpenAI client works with the base address `http://127.0.0.1:8000/v1` and any key."
CURL = "    curl http://127.0.0.1:8000@PATH@ -H 'Content-Type: application/json' \\\n      -d '@BODY@'"
KINDS = {
    "generate": {
        "KIND": "A language model", "HOLDS": "@CONTEXT@ tokens for each of @SLOTS@ answers at a time", "CLIENT": OPENAI,
        "PATH": "/v1/chat/completions",
        "BODY": '{"model": "@MODEL@", "messages": [{"role": "user", "content": "Who are you?"}]}',
        "MEASURED": "Latency, tokens per second, memory, and the memory bandwidth of this box beside them.",
    },
    "embed": {
        "KIND": "An embedding model", "HOLDS": "@CONTEXT@ tokens a text, up to @SLOTS@ texts computed together",
        "CLIENT": OPENAI, "PATH": "/v1/embeddings", "BODY": '{"model": "@MODEL@", "input": ["A red kite circled."]}',
        "MEASURED": "Latency, texts per second and memory.",
    },
    "classify": {
        "KIND": "A text classifier", "HOLDS": "@CONTEXT@ tokens a text, up to @SLOTS@ texts computed together",
        "CLIENT": "The answer names the best label and the score of each.", "PATH": "/classify",
        "BODY": '{"input": ["A wonderful evening."]}', "MEASURED": "Latency, texts per second and memory.",
    },
}  # fmt: skip


# The further section in the README of a TensorRT bundle.
ENGINE = """## The engine

TensorRT runs an engine that is made for one GPU and one version of it. A bundle for a T4 or another RTX card brings its
own. On a Jetson the last step of `install.sh` builds it, which takes minutes and most of the memory (end the desktop
session first); after an update of JetPack the next start builds it anew. `--skip-engine` leaves it to the first start.

    PREFIX/bin/engine show           # which one this box needs, and whether it is there; also build, clear

It lies in `PREFIX/cache`, or where that cannot be written in the service's `CacheDirectory` or `~/.cache/packager`.

"""


def box_files(bundle: str, model: str, target: str, needs: Needs, run: Mapping[str, Any]) -> dict[str, str]:
    """File name -> text of the files from templates. Raises PackagerError for a value that SAFE does not match."""
    engine = box_engine(str(run["engine"]))
    on_gpu = bool(run.get("gpu_layers") or needs.gpu)
    values = {
        "BUNDLE": bundle,
        "MODEL": model,
        "TARGET": target,
        "MACHINE": needs.machine,
        "PYTHON_MIN": needs.python_min,
        "PYTHON_MAX": needs.python_max,
    }
    for key, value in values.items():
        if not SAFE.fullmatch(value):
            raise PackagerError(
                f"{value!r} cannot be used in an installer ({key.lower()}).",
                why="Only letters, digits, dot, dash and underscore are allowed.",
                fix="Choose a plain name.",
            )
    values |= {
        "SYSTEM": SYSTEMS[needs.system],
        "GLIBC": f"glibc {needs.glibc_min} or newer" if needs.glibc_min else "any",
        "RAM": f"at least {_size(needs.ram_bytes)}",
        "DISK": f"{_size(needs.disk_bytes)} free",
        "GPU": _gpu(needs.gpu),
        "PRIVATE_DEVICES": "no" if on_gpu else "yes",  # a GPU is a device node
        "CACHE": _service(bundle, needs) if engine.caches else "",
        "ENGINE": ENGINE if engine.compiled else "",
        **_task_texts(run, model),
        "INSTALL": INSTALL[needs.system].replace("@BUNDLE@", bundle),
    }
    names = ["README.md", "install.cmd"] if needs.system == "windows" else ["README.md", "install.sh"]
    if needs.system == "linux":
        names += ["packager.service", "packager-user.service"]
    return {name: _fill(name, values) for name in names}


def _gpu(needs: Mapping[str, Any] | None) -> str:
    """``needs.gpu`` in words."""
    if needs is None:
        return "none is needed"
    count = f"{needs['count']} × " if needs["count"] > 1 else ""
    size = _size(needs["bytes"])
    alone = "and no other" if needs.get("exact") else "or newer"
    words = [f"{count}NVIDIA, compute capability {needs['capability']} {alone}, {size} of memory"]
    if needs.get("jetpack"):
        words.append(f"JetPack {' or '.join(needs['jetpack'])}")
    for key, name in (("tensorrt", "TensorRT"), ("cuda", "a driver for CUDA")):
        if wanted := needs.get(key):
            low, high = wanted.get("min"), wanted.get("below")
            ends = [f"{low} or newer" if low else "", f"older than {high}" if high else ""]
            words.append(f"{name} {' and '.join(filter(None, ends))}")
    if needs.get("driver_min"):
        words.append(f"NVIDIA driver {needs['driver_min']} or newer")
    if needs.get("vllm"):
        words.append(f"vLLM {needs['vllm']} or newer in an environment of its own")
    return "; ".join(words)


def _service(bundle: str, needs: Needs) -> str:
    """Further lines of a system unit: a folder for the engine or kernels that the box builds, and on a Jetson the group
    of the GPU's device nodes.
    """
    return f"\nCacheDirectory={bundle}" + ("\nSupplementaryGroups=video" if needs.machine == "aarch64" else "")


def _task_texts(run: Mapping[str, Any], model: str) -> dict[str, str]:
    """The README's texts for the model's task."""
    words = KINDS[str(run.get("task", "generate"))]
    request = CURL.replace("@PATH@", words["PATH"]).replace("@BODY@", words["BODY"]).replace("@MODEL@", model)
    holds = words["HOLDS"].replace("@CONTEXT@", str(run["context"])).replace("@SLOTS@", str(run["slots"]))
    return {**{key: words[key] for key in ("KIND", "CLIENT", "MEASURED")}, "ASK": request, "HOLDS": holds}


def _fill(name: str, values: Mapping[str, str]) -> str:
    text = package_files("packager.bundle").joinpath("templates", name).read_text("utf-8")

    def value(mark: re.Match[str]) -> str:
        # install.sh replaces @PREFIX@ on the box
        return mark[0] if mark[1] == "PREFIX" else values[mark[1]]

    return re.sub(r"@([A-Z_]+)@", value, text)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
