"""vLLM is started by one command line and nothing else: what it gets, and every refusal before it starts.

vLLM itself needs a GPU; a script in its place prints how it was called.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runtimes.engines.vllm import command, free_port
from runtimes.manifest import ManifestError, read_bundle
from runtimes.preflight import vllm as box_vllm
from runtimes.preflight.check import compare
from runtimes.preflight.fit_gpu import requirements
from tests.conftest import ROOT
from tests.unit.runtimes.serving import write_bundle

SETTINGS = {
    "quantization": "gptq", "dtype": "half", "tensor_parallel": 1, "ray": False, "enforce_eager": False,
    "gpu_share": 0.9, "capability": "7.5", "vllm": "0.33", "host_bytes": 1 << 32,
}  # fmt: skip
NEEDS = {"capability": "7.5", "count": 1, "bytes": 8 << 30, "vllm": "0.33"}
T4 = {"name": "Tesla T4", "capability": "7.5", "bytes": 15360 << 20}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    run = {"engine": "vllm", "context": 2048, "slots": 6, "settings": SETTINGS}
    return write_bundle(tmp_path / "a bundle", run=run, needs={"gpu": NEEDS})


def write(folder: Path, **changes: Any) -> None:
    """Change keys of the manifest."""
    file = folder / "manifest.json"
    before = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**before, **changes}), encoding="utf-8")


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder for PATH with nvidia-smi of a T4 box and a vllm that writes down how it was called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program(folder / "nvidia-smi", "echo 'Tesla T4, 7.5, 15360, 15100, 535.183.01, [N/A]'")
    (folder / "vllm").write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "if sys.argv[1:] == ['--version']:\n    print('0.33.1')\n    sys.exit()\n"
        "print(json.dumps({'argv': sys.argv, 'env': dict(os.environ), 'pid': os.getpid()}))\nsys.exit(7)\n",
        encoding="utf-8",
    )
    (folder / "vllm").chmod(0o755)
    return folder


def program(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)


def serve(bundle: Path, programs: Path, *more: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "runtimes", "serve", "--bundle", bundle, *more],
        env={**os.environ, "PATH": f"{programs}:/usr/bin:/bin", "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(child: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, error = child.communicate(timeout=60)
    return child.returncode, out, error


def test_vllm_takes_this_process_with_the_manifests_flags(bundle: Path, programs: Path) -> None:
    """Model, context, slots, template and name from the manifest; the port; no network, no usage statistics, nothing
    of the bundle's own Python; its exit code and process are the server's.
    """
    child = serve(bundle, programs, "--port", "0", PYTHONNOUSERSITE="1", VLLM_ATTENTION_BACKEND="TRITON_ATTN")
    code, out, _ = ended(child)
    line, called = out.splitlines()
    call = json.loads(called)
    assert (code, call["pid"]) == (7, child.pid)
    port = call["argv"][6]
    assert int(port) > 0 and f"http://127.0.0.1:{port} " in line
    model = str(bundle / "model")
    assert call["argv"][1:] == [
        "serve",
        model,
        "--host",
        "127.0.0.1",
        "--port",
        port,
        "--served-model-name",
        "tiny",
        "--quantization",
        "gptq",
        "--dtype",
        "half",
        "--max-model-len",
        "2048",
        "--max-num-seqs",
        "6",
        "--gpu-memory-utilization",
        "0.9",
        "--tensor-parallel-size",
        "1",
        "--generation-config",
        model,
        "--chat-template",
        f"{model}/chat_template.jinja",
    ]
    env = call["env"]
    assert {key: env[key] for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK")}
    assert not {"PYTHONPATH", "PYTHONNOUSERSITE"} & env.keys()
    assert env["VLLM_ATTENTION_BACKEND"] == "TRITON_ATTN"


def test_several_gpus_ray_and_eager_mode_are_flags(bundle: Path) -> None:
    write(
        bundle,
        run={
            **json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["run"],
            "settings": {**SETTINGS, "tensor_parallel": 4, "ray": True, "enforce_eager": True},
        },
    )
    words = command(read_bundle(bundle), "vllm", "127.0.0.1", 8000)
    assert words[words.index("--tensor-parallel-size") + 1] == "4"
    assert words[-3:] == ["--enforce-eager", "--distributed-executor-backend", "ray"]


@pytest.mark.parametrize(
    ("smi", "vllm", "sentence"),
    [
        ("echo 'Tesla P100, 6.0, 16384, 16000, 535.1, [N/A]'", "", "GPU: expected an NVIDIA GPU of compute capability"),
        ("echo 'Tesla T4, 7.5, 4096, 4000, 535.1, [N/A]'", "", "found Tesla T4 (7.5, 4.3 GB)"),
        ("", "none", "vLLM: expected vLLM 0.33 or newer, as the program vllm on PATH"),
        ("", "echo 0.8.5.post1", "found vLLM 0.8.5.post1"),
    ],
)
def test_what_is_missing_is_told_in_one_sentence(
    bundle: Path, programs: Path, smi: str, vllm: str, sentence: str
) -> None:
    """Before anything starts, with the exit code of a box that does not fit."""
    if smi:
        program(programs / "nvidia-smi", smi)
    if vllm:
        (programs / "vllm").unlink()
        if vllm != "none":
            program(programs / "vllm", vllm)
    code, out, error = ended(serve(bundle, programs))
    assert (code, out) == (4, "")
    assert sentence in error and len(error.splitlines()) == 1


def test_a_taken_port_and_a_manifest_without_needs_are_refused(bundle: Path, programs: Path) -> None:
    """Both before vLLM would have loaded a model."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, error = ended(serve(bundle, programs, "--port", str(taken.getsockname()[1])))
    assert code == 3 and "choose another with --port" in error
    write(bundle, needs={"gpu": None})
    code, _, error = ended(serve(bundle, programs))
    assert code == 3 and "needs.gpu" in error
    with pytest.raises(ManifestError, match="70000"):
        free_port("127.0.0.1", 70000)


def test_settings_that_lack_something_are_no_traceback(bundle: Path) -> None:
    write(bundle, run={**json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["run"], "settings": {}})
    with pytest.raises(ManifestError, match="tensor_parallel"):
        command(read_bundle(bundle), "vllm", "127.0.0.1", 8000)


@pytest.mark.parametrize(
    "script",
    [
        "#!{python}\nraise SystemExit(1)\n",
        "#!/usr/bin/env {python}\nraise SystemExit(1)\n",
        "#!/bin/sh\n'''exec' \"{python}\" \"$0\" \"$@\"\n' '''\nraise SystemExit(1)\n",
    ],
)
def test_the_version_is_asked_of_the_scripts_own_python(script: str, tmp_path: Path) -> None:
    """Of pip's three ways to begin a script; a wheel of that name lies beside it."""
    site = tmp_path / "site"
    (site / "vllm-0.34.2.dist-info").mkdir(parents=True)
    (site / "vllm-0.34.2.dist-info" / "METADATA").write_text("Name: vllm\nVersion: 0.34.2\n", encoding="utf-8")
    python = tmp_path / "python3"
    # a Python whose isolated mode sees that folder, as a virtual environment's does
    python.write_text(
        f"#!/bin/sh\nshift 2\nexec {sys.executable} -c \"import sys; sys.path.insert(0, '{site}'); $1\"\n",
        encoding="utf-8",
    )
    python.chmod(0o755)
    vllm = tmp_path / "vllm"
    vllm.write_text(script.format(python=python), encoding="utf-8")
    vllm.chmod(0o755)
    assert box_vllm.vllm_version(str(vllm)) == "0.34.2"


def test_facts_are_compared_and_the_unknown_refuses_nothing() -> None:
    """As bin/check and the installer do."""

    def verdicts(**facts: Any) -> dict[str, bool | None]:
        common = {
            "system": "linux",
            "machine": "x86_64",
            "python_min": "3.10",
            "python_max": "3.13",
            "ram_bytes": 1,
            "glibc_min": None,
            "gpu": NEEDS,
        }
        rows = compare(common, facts, installing=False)
        return {row.name: row.ok for row in rows if row.name in ("GPU", "vLLM")}

    assert verdicts(gpus=[T4], vllm="0.33.0") == {"GPU": True, "vLLM": True}
    assert verdicts(gpus=[], vllm="") == {"GPU": False, "vLLM": False}
    assert verdicts(gpus=None, vllm=None) == {"GPU": None, "vLLM": None}
    assert verdicts() == {"GPU": None, "vLLM": None}
    assert verdicts(gpus=[{**T4, "capability": None}], vllm="0.40")["GPU"] is None
    assert [(name, ok) for name, ok, *_ in requirements({**NEEDS, "count": 2}, {"gpus": [T4]})] == [("GPU", False)]
