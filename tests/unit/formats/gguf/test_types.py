"""The type of each tensor is the one that the compiled llama.cpp chose (recorded by benchmarks/quantizers.py)."""

from __future__ import annotations

import json
import typing
from typing import Any

import pytest

from packager.checkpoint.families import FAMILIES, expected_tensors, find_family, read_shape
from packager.formats.gguf.sizes import gguf_name, plan_tensors
from packager.formats.gguf.types import (
    IMATRIX_QUANTS,
    QUANTS,
    Dimensions,
    Unquantized,
    choose_types,
    demands_imatrix,
    file_order,
    of_checkpoint,
    of_header,
    wants_imatrix,
)
from packager.planning.catalog import load_recipe
from packager.tensors.gguf_header import Header
from tests.conftest import ROOT
from tests.unit.sketch import sketch

RECORDED: dict[str, Any] = json.loads((ROOT / "tests" / "data" / "gguf_types.json").read_text(encoding="utf-8"))
LLAMA = Dimensions("llama", 16, 8, 8)


def planned(config: dict[str, Any], quant: str, *, imatrix: bool) -> dict[str, str]:
    """Types by GGUF name for a config's tensors."""
    family = find_family(config)
    shapes = expected_tensors(config, family, read_shape(config, family))
    model = of_checkpoint(sketch(config))
    return {tensor.name: tensor.type for tensor in plan_tensors(shapes, quant, model, imatrix=imatrix)}


def recorded_type(roles: dict[str, Any], name: str) -> str:
    """What llama.cpp wrote: a role's type, or type -> layers where the layers differ."""
    _, layer, role = name.split(".", 2) if name.startswith("blk.") else ("", "-1", name)
    kinds = roles[role]
    return kinds if isinstance(kinds, str) else next(kind for kind, layers in kinds.items() if int(layer) in layers)


@pytest.mark.parametrize("how", ["without", "with"])
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("shape", RECORDED)
def test_every_tensor_has_llama_cpps_type(shape: str, quant: str, how: str) -> None:
    """Grouped heads, layers, tied heads, rows that no block divides, families; with and without importance matrix."""
    config, roles = RECORDED[shape]["config"], RECORDED[shape]["types"][quant][how]
    found = planned(config, quant, imatrix=how == "with")
    if roles is None:  # llama.cpp refused
        assert how == "without" and any(demands_imatrix(name, kind) for name, kind in found.items())
        return
    assert how == "with" or not any(demands_imatrix(name, kind) for name, kind in found.items())
    matrices = {name: kind for name, kind in found.items() if name.endswith(".weight") and "norm" not in name}
    assert matrices == {name: recorded_type(roles, name) for name in matrices}
    assert {kind for name, kind in found.items() if name not in matrices} == {"F32"}


def test_the_record_covers_what_the_rule_asks() -> None:
    """Every quant, tied and untied heads, grouped and other attention, 80 layers, and rows of every divisibility."""
    configs = [entry["config"] for entry in RECORDED.values()]
    assert all(set(entry["types"]) == set(QUANTS) for entry in RECORDED.values())
    assert {config["tie_word_embeddings"] for config in configs} == {True, False}
    assert {config["num_attention_heads"] // config["num_key_value_heads"] >= 4 for config in configs} == {True, False}
    assert 80 in {config["num_hidden_layers"] for config in configs}
    assert {(config["hidden_size"] % 256 == 0, config["hidden_size"] % 32 == 0) for config in configs} == {
        (True, True),
        (False, True),
        (False, False),
    }


def test_the_recipe_offers_every_quant_in_this_order() -> None:
    """The plan proposes what comes later where something does not fit."""
    hints = typing.get_type_hints(load_recipe("gguf").options)
    offered = typing.get_args(hints["quant"])
    assert sorted(offered) == sorted(QUANTS)
    assert [quant for quant in offered if quant != "F16"] == [quant for quant in QUANTS if quant != "F16"]


def test_a_matrix_is_gathered_below_q6() -> None:
    """auto: for the types whose rounding is coarse."""
    assert [quant for quant in QUANTS if not wants_imatrix(quant)] == ["BF16", "F16", "Q8_0", "Q6_K"]
    assert IMATRIX_QUANTS[0] == "Q5_K_M"
    assert wants_imatrix("Q8_0", "on") and not wants_imatrix("Q4_0", "off")


def test_the_users_types_go_before_the_rule() -> None:
    """A type by name; the tensors beside it keep theirs; rows that its block does not divide fall back."""
    tensors = [Unquantized(f"blk.{layer}.ffn_up.weight", (8, 512), "BF16") for layer in range(3)]
    tensors.append(Unquantized("blk.0.attn_q.weight", (8, 64), "BF16"))
    chosen = {"blk.1.ffn_up.weight": "Q6_K", "blk.0.attn_q.weight": "Q6_K"}
    found = choose_types(tensors, "Q4_K_M", LLAMA, imatrix=False, chosen=chosen)
    assert list(found.values()) == ["Q8_0", "Q4_K", "Q6_K", "Q4_K"]
    with pytest.raises(KeyError, match=r"blk\.9"):
        choose_types(tensors, "Q4_K_M", LLAMA, imatrix=False, chosen={"blk.9.ffn_up.weight": "Q6_K"})


def test_what_is_no_matrix_keeps_its_type() -> None:
    """Norms, biases, vectors, and a matrix of one row, whose trailing axis ggml does not count."""
    tensors = [
        Unquantized("blk.0.attn_q_norm.weight", (4, 256), "F32"),
        Unquantized("blk.0.attn_q.bias", (2, 256), "F16"),
        Unquantized("blk.0.gate.weight", (1, 256), "BF16"),
        Unquantized("rope_freqs.weight", (64,), "F32"),
    ]
    found = choose_types(tensors, "Q4_K_M", LLAMA, imatrix=False)
    assert found == {tensor.name: tensor.type for tensor in tensors}


def test_the_order_is_by_layer_then_name() -> None:
    """Layer 10 comes after layer 2, and what belongs to no layer comes first."""
    names = ["blk.10.a.weight", "blk.2.b.weight", "token_embd.weight", "blk.2.a.weight", "output_norm.weight"]
    expected = ["output_norm.weight", "token_embd.weight", "blk.2.a.weight", "blk.2.b.weight", "blk.10.a.weight"]
    assert sorted(names, key=file_order) == expected


def test_dimensions_are_read_from_a_file_too() -> None:
    """By the architecture's own keys; without grouped heads the file does not give their number."""
    values: dict[str, object] = {"llama.block_count": 30, "llama.attention.head_count": 9}
    header = Header(3, "llama", 32, 0, 0, (), 2, values)
    assert of_header(header) == Dimensions("llama", 30, 9, 9)
    values["llama.attention.head_count_kv"] = 3
    assert of_header(header).queries_per_value == 3
    del values["llama.block_count"]
    with pytest.raises(ValueError, match=r"does not declare llama\.block_count"):
        of_header(header)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.gguf])
def test_a_family_is_found_under_llama_cpps_name(name: str) -> None:
    """The name that the converter writes decides what counts as a 70B."""
    config = dict(RECORDED["llama-80"]["config"], architectures=[name], model_type=FAMILIES[name].model_type)
    expected = {"MistralForCausalLM": "llama", "Gemma3ForCausalLM": "gemma3"}
    model = of_checkpoint(sketch(config))
    assert model.architecture == expected.get(name, name.removesuffix("ForCausalLM").lower())
    assert model.seventy_billion == (model.architecture in ("llama", "qwen2"))


def test_tensor_names_are_those_of_the_record() -> None:
    """The rule goes by names: a role that no recorded file has would be chosen unseen."""
    for entry in RECORDED.values():
        family = find_family(entry["config"])
        for old in expected_tensors(entry["config"], family, read_shape(entry["config"], family)):
            name = str(gguf_name(old))
            if name.startswith("blk.") and name.endswith(".weight") and "norm" not in name:
                assert name.split(".", 2)[2] in entry["types"]["Q4_0"]["without"], name
