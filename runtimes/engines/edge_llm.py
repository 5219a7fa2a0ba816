"""Starts TensorRT Edge-LLM's own server on the bundle's folder: one command line, made from the manifest.

The server is a wheel of the bundle (its documentation calls this frontend experimental). At its first start it builds
the engine from the folder with the box's own TensorRT and keeps it under --cache-dir; later starts reuse it. JetPack
installs TensorRT's Python package for the system's Python. A folder of links to that package alone is put on the module
path, so that no other system package is imported. Flags are those of 0.11.0. This process becomes the server (exec).
"""

from __future__ import annotations

import argparse
import os
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

from runtimes.engines.vllm import OFFLINE, OURS, free_port
from runtimes.manifest import ManifestError, Run

REFUSED = 4
SETTING = "PACKAGER_TENSORRT"  # a folder with the package tensorrt, for one that was installed elsewhere
KEPT = "edgellm"  # subfolder of each possible cache folder
CACHE = "PACKAGER_ENGINE_CACHE"  # a cache folder other than the install's own
# the Python packages of JetPack's TensorRT; only tensorrt is required
PARTS = ("tensorrt", "tensorrt_lean", "tensorrt_dispatch", "tensorrt_libs", "tensorrt_bindings")
SYSTEM = (
    "/usr/lib/python{0}/dist-packages",
    "/usr/lib/python3/dist-packages",
    "/usr/local/lib/python{0}/dist-packages",
)
# the module has no __main__, and the first line of its script names the temporary path of the install
START = "from experimental.server.cli import main; main()"
PARSERS = ("auto", "none", "qwen3", "deepseek_r1")


def command(run: Run, python: str, host: str, port: int, cache: Path) -> list[str]:
    """The server's command line. Raises ManifestError for settings that are not those of this engine."""
    reasoning = run.settings.get("reasoning")
    if reasoning not in PARSERS:
        raise ManifestError(f"The manifest's run.settings.reasoning is {reasoning!r}; {', '.join(PARSERS)} are known.")
    words = [
        python,
        "-P",
        "-c",
        START,
        str(run.model.parent),
        "--host",
        host,
        "--port",
        str(port),
        "--served-model-name",
        run.name,
        "--cache-dir",
        str(cache),
        "--max-input-len",
        str(run.context),
        "--max-kv-cache-capacity",
        str(run.context),
        "--max-batch-size",
        str(run.slots),
        "--reasoning-parser",
        reasoning,
    ]
    if run.slots > 1:
        words.append("--enable-in-flight-batching")  # else requests run one after the other
    return words


def environment(given: Mapping[str, str], tensorrt: Path) -> dict[str, str]:
    """The server's environment variables. tensorrt: the folder of links."""
    return {
        **{key: value for key, value in given.items() if key not in OURS},
        **OFFLINE,
        "PYTHONPATH": str(tensorrt),
        "PYTHONNOUSERSITE": "1",
    }


def serve(run: Run, options: argparse.Namespace) -> int:
    """Replace this process by the server. Prints one sentence and returns 4 when the box has no TensorRT for this
    Python. Raises ManifestError.
    """
    home = Path(options.bundle).resolve()
    packages = find_tensorrt(os.environ)
    if packages is None:
        version = sysconfig.get_python_version()
        sys.stderr.write(
            f"TensorRT: expected JetPack's Python package tensorrt for Python {version}, found none; "
            f"install python3-libnvinfer, or name its folder in {SETTING}.\n"
        )
        return REFUSED
    cache = cache_folder(home, os.environ)
    links = link_tensorrt(packages, cache / "tensorrt")
    words = command(run, sys.executable, options.host, free_port(options.host, options.port), cache)
    if options.verbose:
        words += ["--log-level", "debug"]
    if options.log_json:
        sys.stderr.write("--log-json is an option of our own server; Edge-LLM writes its own log.\n")
    shown = f"[{options.host}]" if ":" in options.host else options.host
    sys.stdout.write(
        f"{run.name} by TensorRT Edge-LLM on http://{shown}:{words[words.index('--port') + 1]} (the first "
        f"start builds the engine, which takes minutes, into {cache})\n"
    )
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(words[0], words, environment(os.environ, links))  # noqa: S606 - a list, no shell
    except OSError as error:
        raise ManifestError(f"{words[0]} cannot be started: {error.strerror}.") from None


def find_tensorrt(given: Mapping[str, str], places: Sequence[str] = SYSTEM) -> Path | None:
    """The folder that holds the package ``tensorrt``; None when there is none."""
    named = given.get(SETTING)
    folders = [named] if named else [place.format(sysconfig.get_python_version()) for place in places]
    return next((Path(folder) for folder in folders if (Path(folder) / "tensorrt" / "__init__.py").is_file()), None)


def link_tensorrt(packages: Path, links: Path) -> Path:
    """A folder with links to TensorRT's own packages. Raises ManifestError when it cannot be made."""
    try:
        links.mkdir(parents=True, exist_ok=True)
        for part in PARTS:
            goal, target = links / part, packages / part
            if goal.is_symlink():
                goal.unlink()
            if target.is_dir():
                goal.symlink_to(target, target_is_directory=True)
        for record in packages.glob("tensorrt*-info"):  # importlib.metadata reads the version there
            goal = links / record.name
            if not goal.is_symlink():
                goal.symlink_to(record)
    except OSError as error:
        raise ManifestError(f"{links} cannot be written ({error.strerror}); name another folder in {CACHE}.") from None
    return links


def cache_folder(home: Path, given: Mapping[str, str]) -> Path:
    """The cache folder: PACKAGER_ENGINE_CACHE, else systemd's CacheDirectory, else the install where it is writable,
    else the user's cache.
    """
    if named := given.get(CACHE):
        return Path(named)
    if place := given.get("CACHE_DIRECTORY"):  # CacheDirectory= of systemd.exec(5); several are parted by colons
        return Path(place.partition(":")[0]) / KEPT
    if os.access(home, os.W_OK):
        return home / "cache" / KEPT
    base = given.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "packager" / home.name / KEPT
