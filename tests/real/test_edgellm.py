"""Folders for TensorRT Edge-LLM: float16 held against the source, int4 in the groups that it computes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from packager.checkpoint.checkpoint import open_checkpoint
from packager.core.progress import Silent
from packager.core.store import Store, cache_root
from packager.planning.catalog import load_recipe, load_target
from packager.recipe import Job
from packager.tensors.safetensors import read_header
from tests.real.test_onnx import opened
from tests.real.test_reference import random_checkpoint
from tests.unit.runtimes.serving import write_tokenizer

RECIPE, AGX = load_recipe("edge_llm"), load_target("jetson_agx_orin_64gb")


def test_float16_is_the_source_and_says_what_the_box_must_be(store: Store, random_qwen2: Path) -> None:
    """Every tensor in 16 bits, scored by the reference; for JetPack 7.2 and compute capability 8.7 alone."""
    checkpoint = open_checkpoint(str(random_qwen2), progress=Silent(), cache=cache_root())
    made = RECIPE.build(Job(checkpoint, AGX, store, Silent()), RECIPE.options(context=256))
    weights = {
        name: info
        for path in made.files.values()
        if path.suffix == ".safetensors"
        for name, info in read_header(path).items()
    }
    assert set(weights) == set(checkpoint.tensors)
    assert {info.dtype for info in weights.values()} == {"F16"}
    config = json.loads(made.files["config.json"].read_text(encoding="utf-8"))
    assert config["dtype"] == "float16"
    assert "quantization_config" not in config
    assert made.report["fidelity"]["general"]["kl_mean"] <= 0.001
    assert (made.run.engine, made.run.settings["reasoning"]) == ("edgellm", "deepseek_r1")
    assert made.release == "7.2"
    assert made.gpu is not None
    assert (made.gpu["capability"], made.gpu["exact"], made.gpu["jetpack"]) == ("8.7", True, ["7.2"])


def test_int4_is_gptq_in_groups_of_128_and_read_back(tmp_path: Path) -> None:
    """What was to be int4 is int4, by the file's own headers; the config says so to Edge-LLM's builder."""
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 256}
    source = random_checkpoint(tmp_path / "source", "Qwen2ForCausalLM", **sizes)
    write_tokenizer(source)
    tokenizer = open_checkpoint(str(source), progress=Silent(), cache=tmp_path / "cache").tokenizer
    job = Job(replace(opened(source), tokenizer=tokenizer), AGX, Store(tmp_path / "store"), Silent(), verify=False)
    made = RECIPE.build(job, RECIPE.options(quant="int4", tune="none", context=64))
    config = json.loads(made.files["config.json"].read_text(encoding="utf-8"))["quantization_config"]
    assert (config["quant_method"], config["bits"], config["group_size"]) == ("gptq", 4, 128)
    assert (config["sym"], config["desc_act"]) == (True, False)
    assert made.report["int4"]["modules"] == 7 * job.checkpoint.shape.layers
    assert 4 < made.report["int4"]["bits_per_weight"] < 4.5
