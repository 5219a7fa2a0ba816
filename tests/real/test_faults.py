"""Faults put in on purpose, where a converter or quantizer could make them: each stops the build by its name."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from packager.core import store as store_module
from packager.core.code import describe
from packager.core.errors import GateFailed, InputError, PackagerError
from packager.core.store import Store
from packager.formats.gguf import llamacpp
from packager.tensors.gguf_header import read_header
from tests.real.conftest import built
from tests.unit.tiny import tiny_checkpoint

Spoil = Callable[[Path], None]
CHINESE = (
    "今年春天，公司决定对生产线进行全面升级。工程师们首先检查了旧设备的电气系统，发现许多线路已经老化，需要更换。"
    "随后，他们讨论了新的控制方案，并邀请供应商前来演示。经过两个月的努力，新系统终于投入使用，产量提高了百分之二十。"
    "量子力学是描述微观物质的理论，与相对论一起被认为是现代物理学的两大基本支柱，许多物理学理论都是以它为基础的。"
)


@pytest.fixture
def spoiled_build(
    q8_bundle: Path, store: Store, smollm2: Path, persona_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Build q8_bundle's model again, with a converter or a quantizer that spoils its file afterwards."""

    def spoil(tool: str, change: Spoil, kind: str | None = None) -> Path:
        whole = getattr(llamacpp, tool)

        def wrong(source: Any, *rest: Any, **named: Any) -> Any:
            result = whole(source, *rest, **named)
            output = next(part for part in rest if isinstance(part, Path))
            if kind is None or kind in rest:
                change(output)
            return result

        monkeypatch.setattr(llamacpp, tool, wrong)
        plant(monkeypatch, f"{tool} {change.__name__}")
        return built(store, tmp_path / "out", smollm2, adapter=persona_lora, sets=("quant=Q8_0",))

    return spoil


def plant(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Give the GGUF's own steps other keys: what a spoiled tool makes is never kept under a good one's key."""

    def planted(make: Any) -> dict[str, Any]:
        return {**describe(make), **({"planted": fault} if "gguf" in make.__code__.co_filename else {})}

    monkeypatch.setattr(store_module, "describe", planted)


def wrong_rope_theta(file: Path) -> None:
    """10000, the default that a converter falls back to, for SmolLM2's 100000."""
    _, end = read_header(file).spans["llama.rope.freq_base"]
    with file.open("r+b") as stream:
        stream.seek(end - 4)
        assert struct.unpack("<f", stream.read(4))[0] == 100_000
        stream.seek(end - 4)
        stream.write(struct.pack("<f", 10_000))


def one_layer_at_two_bits(file: Path) -> None:
    """Layer 15's matrices keep four of their 256 levels."""
    header = read_header(file)
    data = np.memmap(file, mode="r+", dtype=np.uint8)
    for tensor in header.tensors:
        if tensor.name.startswith("blk.15.") and tensor.type == "Q8_0":
            start = header.data_start + tensor.offset
            blocks = data[start : start + tensor.nbytes].reshape(-1, 34)
            levels = blocks[:, 2:].view(np.int8).astype(np.int16)
            blocks[:, 2:] = np.clip(np.round(levels / 64) * 64, -128, 64).astype(np.int8).view(np.uint8)
    data.flush()


def another_template(file: Path) -> None:
    """A converter that writes a template of its own, of the same length."""
    begin, end = read_header(file).spans["tokenizer.chat_template"]
    with file.open("r+b") as stream:
        stream.seek(begin)
        text = stream.read(end - begin)
        assert b"<|im_start|>system" in text
        stream.seek(begin)
        stream.write(text.replace(b"<|im_start|>system", b"<|im_start|>SYSTEM"))


def test_another_template_in_the_gguf_is_found(spoiled_build: Callable[..., Path]) -> None:
    """llama.cpp's and Ollama's users would chat with a model that nobody trained."""
    with pytest.raises(GateFailed, match="the GGUF's own template differs from the checkpoint's at token 1") as caught:
        spoiled_build("convert", another_template)
    assert "'system'" in caught.value.what


def test_an_extra_bos_is_found(store: Store, random_qwen2: Path, tmp_path: Path) -> None:
    """A template that writes BOS on top of one: the classic fault of an export."""
    folder = Path(shutil.copytree(random_qwen2, tmp_path / "model"))
    template = folder / "chat_template.jinja"
    template.write_text("{{ bos_token }}" + template.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(GateFailed, match="begins with the BOS token 151646 twice"):
        built(store, tmp_path / "out", folder)


def test_an_extra_bos_from_the_server_is_found(
    q8_bundle: Path, store: Store, smollm2: Path, persona_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A box whose template puts one more BOS than the checkpoint's stops the build at the first token."""
    from packager.fidelity import gate

    real = gate.score

    def doubled(job: Any, form: Any, samples: Any) -> Any:
        other = tmp_path / "chat_template.jinja"
        text = Path(form.run.chat_template).read_text(encoding="utf-8")
        other.write_text("{{ bos_token }}" + text, encoding="utf-8")
        return real(job, replace(form, run=replace(form.run, chat_template=str(other))), samples)

    monkeypatch.setattr(gate, "score", doubled)
    with pytest.raises(GateFailed, match=r"the server on the box differs from the checkpoint's at token 1: 1 '"):
        built(store, tmp_path / "out", smollm2, adapter=persona_lora, sets=("quant=Q8_0",))


def test_calibration_in_the_wrong_language_is_found(
    store: Store, smollm2: Path, persona_lora: Path, tmp_path: Path
) -> None:
    """Chinese prose for a model whose tokenizer breaks Chinese into bytes, before anything is tuned; and the way to use
    it all the same is named.
    """
    tuned = set((store.root / "tune").glob("*"))
    prose = tmp_path / "notes.txt"
    prose.write_text(CHINESE, encoding="utf-8")
    with pytest.raises(GateFailed, match=r"does not know the language of the calibration file notes\.txt") as caught:
        built(store, tmp_path / "out", smollm2, adapter=persona_lora, sets=("quant=Q4_0",), calibration=prose)
    assert "--trust-calibration" in caught.value.fix
    assert set((store.root / "tune").glob("*")) == tuned


def test_a_truncated_shard_is_found(store: Store, tmp_path: Path) -> None:
    """The second of three files ends early, as a download that broke off leaves it: it is named."""
    folder = tiny_checkpoint(tmp_path / "model", shard_bytes=2000)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    os.truncate(shards[1], shards[1].stat().st_size - 100)
    with pytest.raises(InputError, match=shards[1].name):
        built(store, tmp_path / "out", folder)


def test_a_wrong_rope_theta_is_seen_before_anything_is_quantized(spoiled_build: Callable[..., Path]) -> None:
    """What optimum's exporter did to transformers 5 checkpoints, with exit code 0."""
    with pytest.raises(GateFailed, match="the unquantized GGUF does not compute what the checkpoint computes"):
        spoiled_build("convert", wrong_rope_theta)


def test_one_layer_at_two_bits_is_too_far(spoiled_build: Callable[..., Path]) -> None:
    """One of thirty layers is enough."""
    with pytest.raises(GateFailed, match="the Q8_0 GGUF is too far from its checkpoint"):
        spoiled_build("quantize", one_layer_at_two_bits, "Q8_0")


def test_an_int8_that_was_not_quantized_is_found(
    q8_bundle: Path, store: Store, smollm2: Path, persona_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quantizer that succeeds and copies: the types are read from the file, not from the options."""
    real = llamacpp.quantize

    def lazy(source: Path, kind: str, output: Path, *rest: Any, **named: Any) -> str:
        if kind == "F16":
            return real(source, kind, output, *rest, **named)
        shutil.copyfile(source, output)
        return "a lazy quantizer"

    monkeypatch.setattr(llamacpp, "quantize", lazy)
    plant(monkeypatch, "lazy")
    with pytest.raises(GateFailed, match="no tensor of it is quantized"):
        built(store, tmp_path / "out", smollm2, adapter=persona_lora, sets=("quant=Q8_0",))


def test_another_chat_template_on_the_box_is_found(
    q8_bundle: Path, store: Store, smollm2: Path, persona_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right in training, wrong after the export: the server would render a prompt that nobody trained on."""
    from packager.fidelity import gate

    real = gate.score

    def swapped(job: Any, form: Any, samples: Any) -> Any:
        text = Path(form.run.chat_template).read_text(encoding="utf-8")
        other = tmp_path / "chat_template.jinja"
        other.write_text(text.replace("<|im_start|>", "<|im_start|> "), encoding="utf-8")
        return real(job, replace(form, run=replace(form.run, chat_template=str(other))), samples)

    monkeypatch.setattr(gate, "score", swapped)
    with pytest.raises(GateFailed, match="the prompt of the server on the box differs from the checkpoint's at token"):
        built(store, tmp_path / "out", smollm2, adapter=persona_lora, sets=("quant=Q8_0",))


def test_tied_weights_that_config_unties_are_refused(store: Store, smollm2: Path, tmp_path: Path) -> None:
    """A head that is promised and not there would be made of noise."""
    folder = tmp_path / "model"
    shutil.copytree(smollm2, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}), encoding="utf-8")
    with pytest.raises(PackagerError, match=r"lm_head\.weight"):
        built(store, tmp_path / "out", folder, sets=("quant=Q8_0",))
