"""What is known of a tuning without running it: names, groups, costs, and what the gguf recipe makes of its option."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from packager.core.store import Step
from packager.formats.gguf.steps import gguf_parts
from packager.formats.int4.tuning import BASE_BYTES, Tuned, costs, linear_modules, open_tuned, ragged, unpack
from packager.planning.catalog import load_recipe, load_target
from packager.prompts.calibration import general
from tests.unit.sketch import QWEN_7B, QWEN_32B, SMOLLM2, sketch
from tests.unit.tiny import write_json

GGUF = load_recipe("gguf")
TARGET = load_target("desktop_linux_x86_64")


def options(**values: Any) -> Any:
    return replace(GGUF.options(), **values)


def resolve(chosen: Any, data: Any, checkpoint: Any) -> Any:
    assert GGUF.resolve_auto is not None
    return GGUF.resolve_auto(chosen, data, checkpoint)


def test_halves_are_unpacked_in_order() -> None:
    """Element 2j lies in the low half of byte j."""
    assert unpack(np.array([[0x21, 0xF0]], np.uint8)).tolist() == [[1, 2, 0, 15]]


def test_a_tuning_is_read_back_exactly(tmp_path: Path) -> None:
    """Modules come from their files' headers; weights are scale times integer less eight; the report is averaged."""
    save_file(
        {"model.layers.0.a.q": np.array([[0x8F]], np.uint8), "model.layers.0.a.scales": np.array([[-0.5]], np.float16)},
        tmp_path / "layer-00000.safetensors",
    )
    layer = {"file": "layer-00000.safetensors", "searched": 0.25, "tuned": 0.125}
    write_json(tmp_path / "tune.json", {"group": 2, "iterations": 20, "layers": [layer]})
    stored = open_tuned(Step("tune", "k", tmp_path, 0.0, 0, False))
    assert list(stored.modules) == ["model.layers.0.a"]
    assert stored.weight("model.layers.0.a").tolist() == [[-3.5, 0.0]]
    assert stored.as_dict() == {
        "method": "SignRound (arXiv 2309.05516), 20 iterations, groups of 2",
        "group": 2,
        "iterations": 20,
        "layer_error_searched": 0.25,
        "layer_error_tuned": 0.125,
    }


def test_plain_rounding_says_so(tmp_path: Path) -> None:
    """It has no errors to report, and is not called tuned."""
    save_file({"model.layers.0.a.q": np.array([[0x8F]], np.uint8)}, tmp_path / "layer-00000.safetensors")
    write_json(tmp_path / "tune.json", {"group": 32, "iterations": 0, "layers": [{"file": "layer-00000.safetensors"}]})
    stored = open_tuned(Step("tune", "k", tmp_path, 0.0, 0, False))
    assert stored.as_dict() == {"method": "plain rounding to nearest, groups of 32", "group": 32, "iterations": 0}


def test_linear_modules_are_the_layers_own() -> None:
    """Seven a layer, no embedding, no head, no norm; the group must divide each one's inputs."""
    checkpoint = sketch(SMOLLM2)
    assert len(linear_modules(checkpoint)) == 7 * 30
    assert linear_modules(checkpoint)["model.layers.3.mlp.down_proj"] == (576, 1536)
    assert ragged(checkpoint, 64) is None
    assert "(576 inputs)" in str(ragged(checkpoint, 128))


def test_gguf_names_and_heads(tmp_path: Path) -> None:
    """Only q and k have rows that a converter may reorder."""
    modules = [f"model.layers.1.{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")]
    tuned = Tuned(Step("tune", "k", tmp_path, 0, 0, True), 32, 20, dict.fromkeys(modules, tmp_path / "layer"), ())
    parts = gguf_parts(tuned, sketch(SMOLLM2))
    assert {name: part["heads"] for name, part in parts.items()} == {
        "blk.1.attn_q.weight": 9,
        "blk.1.attn_k.weight": 3,
        "blk.1.ffn_down.weight": 0,
    }


def test_memory_follows_a_layer() -> None:
    """32B takes as much more than 7B as its layers are larger, not its number of layers."""
    small, large = (costs(sketch(config), "quick")[0] - BASE_BYTES for config in (QWEN_7B, QWEN_32B))
    assert large < 2.5 * small
    assert costs(sketch(QWEN_7B), "quick")[0] < 8e9
    assert costs(sketch(SMOLLM2), "full")[1] > 5 * costs(sketch(SMOLLM2), "quick")[1]


def test_auto_tunes_4_bits_where_there_is_fine_tuning_data() -> None:
    """Without data, at other types, or with an importance matrix, nothing is tuned."""
    data, small = general(), sketch(SMOLLM2)
    assert resolve(options(quant="Q4_0"), data, small) == (options(quant="Q4_0", tune="quick"), ())
    assert resolve(options(quant="Q4_0"), None, small) == (options(quant="Q4_0", tune="none"), ())
    assert resolve(options(quant="Q8_0"), data, small) == (options(quant="Q8_0", tune="none"), ())
    assert resolve(options(quant="Q4_0", imatrix="on"), data, small)[0].tune == "none"
    assert resolve(options(quant="Q4_0", tune="full"), None, small)[0].tune == "full"


def test_auto_does_not_start_hours_of_tuning_by_itself() -> None:
    """A 7B stays rounded, the note says how long tuning would take and how to ask for it; who asks gets it."""
    chosen, (note,) = resolve(options(quant="Q4_0"), general(), sketch(QWEN_7B))
    assert chosen.tune == "none"
    assert "hours" in note and "--set tune=quick" in note
    assert resolve(options(quant="Q4_0", tune="quick"), general(), sketch(QWEN_7B)) == (
        options(quant="Q4_0", tune="quick"),
        (),
    )


@pytest.mark.parametrize("values", [{"quant": "Q8_0"}, {"quant": "Q4_0", "imatrix": "on"}])
def test_tuning_what_is_not_q4_0_is_refused(values: dict[str, str]) -> None:
    """One sentence that names what would work."""
    refusal = GGUF.why_not(sketch(SMOLLM2), TARGET, options(tune="quick", **values))
    assert refusal is not None and "set quant=Q4_0" in refusal


def test_rows_that_blocks_do_not_divide_are_refused() -> None:
    """The module and its width are named."""
    odd = sketch({**SMOLLM2, "hidden_size": 560, "num_attention_heads": 10, "num_key_value_heads": 2})
    refusal = GGUF.why_not(odd, TARGET, options(quant="Q4_0", tune="quick"))
    assert refusal is not None and "(560 inputs)" in refusal


def test_a_tuned_plan_counts_its_time_and_memory() -> None:
    """The file is Q4_0's with a Q8_0 head; the build costs more than without."""
    checkpoint = sketch(QWEN_7B)
    plain, tuned = (GGUF.estimate(checkpoint, TARGET, options(quant="Q4_0", tune=tune)) for tune in ("none", "quick"))
    assert tuned.artifact_bytes >= plain.artifact_bytes
    assert tuned.seconds > 10 * plain.seconds
    assert tuned.build_ram_bytes > plain.build_ram_bytes
