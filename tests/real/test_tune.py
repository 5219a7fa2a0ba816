"""Tuned int4: every family is tuned as it should be, a killed tuning goes on, and containers hold the same numbers."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from packager.core.processes import WORKERS
from packager.core.progress import Silent
from packager.core.store import Cost, Step
from packager.formats.gguf import llamacpp
from packager.formats.gguf.sizes import gguf_name
from packager.formats.gguf.steps import gguf_parts
from packager.formats.int4 import awq, gptq
from packager.formats.int4 import folder as int4_folder
from packager.formats.int4.folder import dequantize
from packager.formats.int4.tuning import Tuned, linear_modules, open_tuned
from packager.tensors.safetensors import read_header
from tests.conftest import ROOT
from tests.real.test_reference import DECODERS, random_checkpoint
from tests.unit.sketch import sketch

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from packager.workers import tune as child  # noqa: E402 - it imports torch at once, as scripts may

GROUP = 32
FORMS = (gptq.FORM, awq.FORM)
TOKENIZER: Any = SimpleNamespace(chat_template=None)  # what of a tokenizer the weights' writer asks


def job_for(folder: Path, output: Path, *, iterations: int = 8, group: int = GROUP) -> dict[str, Any]:
    output.mkdir(exist_ok=True)
    random = np.random.default_rng(2)
    calibration = [random.integers(3, 320, length).tolist() for length in (60, 5, 64, 31)]
    return {
        "checkpoint": str(folder),
        "calibration": calibration,
        "group": group,
        "iterations": iterations,
        "seed": 0,
        "threads": 1,
        "output": str(output),
    }


def tuned(folder: Path, output: Path, **more: Any) -> Tuned:
    child.main(job_for(folder, output, **more))
    return open_tuned(Step("tune", output.name, output, 0.0, 0, False))


def output_error(folder: Path, weights: dict[str, Any]) -> float:
    """Relative squared difference of the whole model's last hidden states when these weights replace its own."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([job_for(folder, folder)["calibration"][2]])
    with torch.inference_mode():
        goal = model.model(ids).last_hidden_state
        for name, weight in weights.items():
            model.get_submodule(name).weight.copy_(torch.from_numpy(weight))
        found = model.model(ids).last_hidden_state
    return float((found - goal).square().sum() / goal.square().sum())


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("architecture", DECODERS)
def test_every_family_is_nearer_to_its_source_than_rounded(
    architecture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run whole, on tokens of its calibration (random weights have nothing to say of others); the integers are those
    of the very modules.
    """
    folder = random_checkpoint(tmp_path / "model", architecture)
    plain = tuned(folder, tmp_path / "plain", iterations=0)
    best = tuned(folder, tmp_path / "tuned", iterations=20)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"done": 66, "total": 66}
    checkpoint = sketch(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    assert set(best.modules) == set(plain.modules) == set(linear_modules(checkpoint))
    errors = [output_error(folder, {name: each.weight(name) for name in each.modules}) for each in (plain, best)]
    assert errors[1] < 0.8 * errors[0]
    assert all(layer["tuned"] < layer["searched"] for layer in best.errors)


def test_plain_rounding_is_llama_cpps(tmp_path: Path) -> None:
    """Without iterations the integers and scales are those of a Q4_0 block, which has its extreme at -8."""
    import gguf

    folder = random_checkpoint(tmp_path / "model", "LlamaForCausalLM")
    found = tuned(folder, tmp_path / "plain", iterations=0)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    name = "model.layers.1.mlp.up_proj"
    weight = model.get_submodule(name).weight.detach().numpy()
    blocks = gguf.quants.Q4_0.quantize_blocks(weight.reshape(-1, 32))
    expected = gguf.quants.Q4_0.dequantize_blocks(blocks).reshape(weight.shape)
    assert np.mean(found.weight(name) != expected) < 0.01  # gguf-py rounds with the scale before it is a float16


def test_a_killed_tuning_goes_on_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ended inside layer 1 and again inside layer 2: what was done is not done again, and the result is the same."""
    folder = random_checkpoint(tmp_path / "model", "Qwen2ForCausalLM")
    child.main(job_for(folder, tmp_path / "whole"))
    begun: list[int] = []
    real = child.Tuner.goals
    for stop in (1, 2):

        def goals(self: Any, index: int, linears: Any, stop: int = stop) -> Any:
            begun.append(index)
            if index == stop:
                raise KeyboardInterrupt
            return real(self, index, linears)

        monkeypatch.setattr(child.Tuner, "goals", goals)
        with pytest.raises(KeyboardInterrupt):
            child.main(job_for(folder, tmp_path / "killed"))
    monkeypatch.setattr(child.Tuner, "goals", real)
    capsys.readouterr()
    child.main(job_for(folder, tmp_path / "killed"))
    assert begun == [0, 1, 1, 2]
    assert json.loads(capsys.readouterr().out.splitlines()[0])["done"] == 2 * 10 + 1  # where the bar goes on
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")


def test_a_killed_process_leaves_what_the_next_goes_on_from(tmp_path: Path) -> None:
    """SIGKILL in the middle of a layer, as when memory runs out: the next run ends with the bytes of a whole one."""
    folder = random_checkpoint(tmp_path / "model", "LlamaForCausalLM")
    child.main(job_for(folder, tmp_path / "whole", iterations=40))
    job = tmp_path / "job.json"
    job.write_text(json.dumps(job_for(folder, tmp_path / "killed", iterations=40)), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, WORKERS / "tune.py", job], stdout=subprocess.PIPE, env=environment) as ran:
        assert ran.stdout is not None
        for line in ran.stdout:
            if json.loads(line)["done"] == 60:  # of 126, in the second layer
                ran.kill()
                break
    assert (tmp_path / "killed" / child.STATE).is_file()
    child.main(job_for(folder, tmp_path / "killed", iterations=40))
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")


def test_a_damaged_state_starts_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A state file cut off by a full disk costs time, not the result; the run says so."""
    folder = random_checkpoint(tmp_path / "model", "LlamaForCausalLM")
    child.main(job_for(folder, tmp_path / "whole"))
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / child.STATE).write_bytes(b"\x10\0\0\0\0\0\0\0{")
    child.main(job_for(folder, tmp_path / "again"))
    assert "starting again" in capsys.readouterr().out
    assert digests(tmp_path / "again") == digests(tmp_path / "whole")


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_a_gguf_holds_the_tuned_numbers_bit_for_bit(architecture: str, tmp_path: Path) -> None:
    """Dequantized by gguf-py: every linear tensor equals its integers times scales, q and k in llama.cpp's order."""
    import gguf

    folder = random_checkpoint(tmp_path / "model", architecture)
    found = tuned(folder, tmp_path / "tuned")
    checkpoint = sketch(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    whole = tmp_path / "whole.gguf"
    _unquantized(folder, whole, permuted=architecture == "LlamaForCausalLM")
    output = tmp_path / "out.gguf"
    parts = gguf_parts(found, checkpoint)
    llamacpp.quantize(whole, "Q4_0", output, Silent(), Cost(), library=llamacpp.library(), tuned=parts)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(output).tensors}
    for module in found.modules:
        tensor = tensors[str(gguf_name(f"{module}.weight"))]
        assert tensor.tensor_type.name == "Q4_0"
        expected = found.weight(module)
        if architecture == "LlamaForCausalLM" and module.endswith(("q_proj", "k_proj")):
            expected = interleaved(expected, 4 if module.endswith("q_proj") else 2)
        assert np.array_equal(gguf.quants.dequantize(tensor.data, tensor.tensor_type), expected), module


@pytest.mark.parametrize("group", [32, 64])
def test_gptq_awq_and_gguf_hold_the_same_numbers(group: int, tmp_path: Path) -> None:
    """One tuning, three containers: each dequantized, and what our own runtime makes of the two folders, are equal bit
    for bit; embedding, head and norms are the source's.
    """
    import gguf
    from safetensors.torch import load_file

    from runtimes.engines.transformers.int4 import Int4Linear, integers

    folder = random_checkpoint(tmp_path / "model", "Qwen2ForCausalLM", intermediate_size=192)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = tuned(folder, tmp_path / "tuned", group=group)
    checkpoint = replace(sketch(config, path=folder), tensors=headers(folder), tokenizer=TOKENIZER)
    whole, output = tmp_path / "whole.gguf", tmp_path / "out.gguf"
    _unquantized(folder, whole, permuted=False)
    parts = gguf_parts(found, checkpoint)
    llamacpp.quantize(whole, "Q4_0", output, Silent(), Cost(), library=llamacpp.library(), tuned=parts)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(output).tensors}
    source = load_file(folder / "model.safetensors")
    for form in FORMS:
        packed = tmp_path / form.name
        packed.mkdir()
        int4_folder.write(form, checkpoint, found, (), packed)
        stored = load_file(packed / "model.safetensors")
        for module in found.modules:
            tensor = tensors[str(gguf_name(f"{module}.weight"))]
            one, other = dequantize(form, packed, module), gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            ours = Int4Linear(*integers(form.name, {part: stored[f"{module}.{part}"] for part in form.parts}))
            assert one.tobytes() == other.tobytes() == found.weight(module).tobytes(), module
            assert ours.weight(0, len(one), torch.float32).numpy().tobytes() == one.tobytes(), module
            assert f"{module}.weight" not in stored
        for name in set(source) - {f"{module}.weight" for module in found.modules}:
            assert torch.equal(stored[name], source[name].half()), name
        said = json.loads((packed / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        assert (said["quant_method"], said["bits"], said["group_size"]) == (form.name, 4, group)


def headers(folder: Path) -> dict[str, Any]:
    return {name: info for file in folder.glob("*.safetensors") for name, info in read_header(file).items()}


def interleaved(weight: Any, heads: int) -> Any:
    """The rows of q or k as llama.cpp's converter orders them for its llama family."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def _unquantized(folder: Path, path: Path, *, permuted: bool) -> None:
    """The checkpoint as an F32 GGUF, written as llama.cpp's converter does but without a tokenizer."""
    import gguf

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    writer = gguf.GGUFWriter(path, "llama" if permuted else "qwen2")
    writer.add_block_count(model.config.num_hidden_layers)
    writer.add_head_count(model.config.num_attention_heads)
    writer.add_head_count_kv(model.config.num_key_value_heads)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        if permuted and name.endswith(("q_proj.weight", "k_proj.weight")):
            values = interleaved(values, 4 if "q_proj" in name else 2)
        writer.add_tensor(str(gguf_name(name)), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
