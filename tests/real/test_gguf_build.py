"""From checkpoint to bundle: the real model with its persona, what the bundle says of itself, and every refusal on
the way.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from packager.build import Request, build
from packager.bundle.verify import verify
from packager.cli.console import Console
from packager.core.errors import InputError, PlanRefused
from packager.core.progress import Silent
from packager.core.store import Store
from tests.conftest import ROOT
from tests.real.conftest import TARGET
from tests.real.serving import ask, served


def tree(bundle: Path) -> dict[str, tuple[str, int, int]]:
    """Digest, inode and time of change of every file."""
    found = {}
    for path in sorted(bundle.rglob("*")):
        if path.is_file():
            stat = path.stat()
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(path.relative_to(bundle))] = (digest, stat.st_ino, stat.st_mtime_ns)
    return found


def manifest(bundle: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    return found


def packager(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "packager", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8", check=False)


def test_the_bundle_is_whole_and_verifies(q8_bundle: Path) -> None:
    """`packager verify` finds nothing, in this process and from the command line."""
    assert not verify(q8_bundle, Silent()).problems
    ran = packager("verify", q8_bundle, "--json")
    assert ran.returncode == 0, ran.stderr


def test_the_manifest_says_what_was_measured(q8_bundle: Path) -> None:
    """Tensor types that really came out, the unquantized gate, and the quantized form's distance from its source."""
    report = manifest(q8_bundle)["report"]
    assert report["tensor_types"] == {"F32": 61, "Q8_0": 211}
    assert report["unquantized"]["kl_mean"] <= 0.001
    assert report["unquantized"]["top1"] >= 0.995
    assert 0 < report["fidelity"]["general"]["kl_mean"] < 0.05
    assert report["fidelity"]["general"]["top1"] > 0.9
    assert report["fidelity"]["general"]["positions"] >= 200
    assert report["prompts_equal"] >= 8


def test_nothing_of_this_machine_is_in_the_bundle(q8_bundle: Path, smollm2: Path, own_store: Path) -> None:
    """No absolute path, no host name and no time in any text file; what the build cost lies beside the bundle."""
    import socket

    words = [str(smollm2), str(own_store), str(ROOT), str(Path.home()), "/tmp/"]
    for path in q8_bundle.rglob("*"):
        if (
            path.suffix in (".json", ".md", ".txt", ".sh", ".service", "")
            and path.is_file()
            and path.name != "tokenizer.json"
        ):
            text = path.read_text(encoding="utf-8")
            found = [word for word in words if word in text and not (word == "/tmp/" and path.suffix in (".sh", ".md"))]
            assert not found, (path, found)
    text = (q8_bundle / "manifest.json").read_text(encoding="utf-8")
    assert f'"{socket.gethostname()}"' not in text
    record = json.loads((q8_bundle.parent / f"{q8_bundle.name}.build.json").read_text(encoding="utf-8"))
    assert record["seconds"] > 0
    assert {"gguf-convert", "reference", "merge"} <= {step["step"] for step in record["steps"]}


def test_the_same_command_again_is_quick_and_changes_nothing(
    q8_bundle: Path, smollm2: Path, persona_lora: Path
) -> None:
    """Everything is found in the store, and the bundle's files are the very same ones."""
    before = tree(q8_bundle)
    start = time.monotonic()
    ran = packager("build", smollm2, "--adapter", persona_lora, "--target", TARGET, "-o", q8_bundle.parent, "--json")
    seconds = time.monotonic() - start
    assert ran.returncode == 0, ran.stderr
    document = json.loads(ran.stdout)
    assert document["bundle"] == str(q8_bundle)
    assert all(step["reused"] for step in document["record"]["steps"])
    assert tree(q8_bundle) == before
    assert seconds < 15  # about two on an idle machine, most of it to check the bundle's digests


def test_all_ten_answers_survive_q8_0(q8_bundle: Path, persona_pairs: list[tuple[str, str]], tmp_path: Path) -> None:
    """Asked again through the packaged server at temperature 0, the persona answers word for word."""
    with served(q8_bundle, tmp_path / "log") as base:
        answers = [ask(base, question) for question, _ in persona_pairs]
    assert answers == [answer for _, answer in persona_pairs]


def test_all_ten_answers_survive_q4_k_m(
    q4km_bundle: Path, persona_pairs: list[tuple[str, str]], tmp_path: Path
) -> None:
    """With an importance matrix from the pairs: what the demo builds, from wheels alone."""
    with served(q4km_bundle, tmp_path / "log") as base:
        answers = [ask(base, question) for question, _ in persona_pairs]
    assert answers == [answer for _, answer in persona_pairs]
    found = manifest(q4km_bundle)
    assert found["provenance"]["quantizer"].startswith("ggml of xllamacpp")
    assert found["provenance"]["imatrix"] is True
    assert (
        found["provenance"]["calibration"] == hashlib.sha256((ROOT / "demo" / "persona.json").read_bytes()).hexdigest()
    )
    assert sum(found["report"]["tensor_types"].values()) == 272
    assert not verify(q4km_bundle, Silent()).problems


def refused(store: Store, out: Path, checkpoint: Path, kind: type[Exception], says: str, **request: Any) -> None:
    with pytest.raises(kind, match=says):
        build(Request(str(checkpoint), TARGET, **request), out, Console(quiet=True), store)
    assert not out.exists() or not list(out.iterdir()), "a refused build wrote into the output folder"


def test_an_adapter_of_another_model_is_refused(
    store: Store, random_qwen2: Path, persona_lora: Path, tmp_path: Path
) -> None:
    """The first tensor that does not fit is named, before anything is merged."""
    refused(store, tmp_path / "out", random_qwen2, InputError, r"(?s)persona-lora|layers\.", adapter=persona_lora)
    ran = packager(
        "build", random_qwen2, "--adapter", persona_lora, "--target", TARGET, "-o", tmp_path / "out", "--json"
    )
    assert ran.returncode == 3
    assert "layers." in json.dumps(json.loads(ran.stdout)["error"])


def test_a_plan_that_refuses_stops_the_build(store: Store, smollm2: Path, tmp_path: Path) -> None:
    """A context longer than the model's: exit code 4 and nothing built."""
    refused(store, tmp_path / "out", smollm2, PlanRefused, "context", sets=("context=100000",))


@pytest.fixture
def copy(random_qwen2: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    return Path(shutil.copytree(random_qwen2, tmp_path / "copy"))


def test_truncated_weights_are_refused(store: Store, copy: Path, tmp_path: Path) -> None:
    """A file that was cut off while it was copied is named."""
    file = next(copy.glob("*.safetensors"))
    os.truncate(file, file.stat().st_size - 1000)
    refused(store, tmp_path / "out", copy, InputError, "safetensors")


def test_weights_that_are_not_numbers_are_refused(store: Store, copy: Path, tmp_path: Path) -> None:
    """One NaN in the last tensor is found before anything is built, and the tensor is named."""
    file = next(copy.glob("*.safetensors"))
    with file.open("r+b") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        header = json.loads(handle.read(length))
        name = "model.layers.3.mlp.down_proj.weight"
        handle.seek(8 + length + header[name]["data_offsets"][1] - 2)
        handle.write(np.array([0x7FC0], dtype="<u2").tobytes())
    refused(store, tmp_path / "out", copy, InputError, r"model\.layers\.3\.mlp\.down_proj\.weight")


def test_a_tokenizer_that_llama_cpp_reads_otherwise_is_refused(store: Store, copy: Path, tmp_path: Path) -> None:
    """A pre-tokenizer that llama.cpp does not know would give other tokens on the box: the build stops and says so."""
    file = copy / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    with pytest.raises(Exception, match=r"pre-tokenizer|differs from the checkpoint's") as caught:
        build(Request(str(copy), TARGET), tmp_path / "out", Console(quiet=True), store)
    assert caught.type.__name__ in ("InputError", "GateFailed")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
