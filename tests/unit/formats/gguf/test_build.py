"""What the gguf recipe refuses before anything is built, and when it gathers an importance matrix."""

from __future__ import annotations

from typing import Any

import pytest

from packager.formats.gguf import build
from packager.formats.gguf.types import QUANTS
from packager.planning.catalog import load_recipe, load_target
from tests.unit.sketch import QWEN_1_5B, SMOLLM2, sketch

RECIPE = load_recipe("gguf")


def why_not(config: dict[str, Any], **options: Any) -> str | None:
    target = load_target("desktop_linux_x86_64")
    return build.why_not(sketch(config), target, RECIPE.options(**{"tune": "none", **options}))


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, whose wheel exports no C function."""
    monkeypatch.setattr(build, "library", lambda: None)


def test_every_quant_has_limits_and_a_larger_one_keeps_more() -> None:
    """A type that may lose more is never held to less loss than a larger one."""
    assert set(build.KEPT) == set(QUANTS)
    for tight, loose in zip(
        list(QUANTS)[1:], list(QUANTS)[2:], strict=False
    ):  # BF16 is scored in BF16, which is coarse
        if {tight, loose} != {"Q4_0", "IQ4_XS"}:  # at equal size blocks of 256 with an own scale for each 32 keep more
            assert build.KEPT[tight][0] <= build.KEPT[loose][0] and build.KEPT[tight][1] >= build.KEPT[loose][1], loose


@pytest.mark.parametrize("quant", QUANTS)
def test_every_quant_can_be_built_from_wheels(quant: str) -> None:
    """No compiler, no extra."""
    assert why_not(QWEN_1_5B, quant=quant) is None


def test_without_c_functions_four_types_are_left(no_library: None) -> None:
    """One sentence with what to do; what gguf-py writes is built there as well."""
    built = {quant for quant in QUANTS if why_not(QWEN_1_5B, quant=quant) is None}
    assert built == {"F16", "BF16", "Q8_0", "Q4_0"}
    refusal = why_not(QWEN_1_5B, quant="Q4_K_M")
    assert refusal is not None and refusal.startswith("Q4_K_M needs the C functions of xllamacpp's library")
    assert "build on Linux or macOS" in refusal
    refusal = why_not(QWEN_1_5B, quant="Q4_0", imatrix="on")
    assert refusal is not None and refusal.startswith("an importance matrix needs the C functions")
    assert not build.with_imatrix(RECIPE.options(quant="Q4_0", tune="none"))


def test_a_type_that_demands_a_matrix_is_refused_without() -> None:
    """As llama.cpp refuses it, by the tensor; where no tensor becomes such a type, nothing is demanded."""
    refusal = why_not(QWEN_1_5B, quant="IQ2_M", imatrix="off")
    assert refusal is not None and "IQ2_M makes blk.0.attn_k.weight IQ2_S" in refusal
    assert why_not(QWEN_1_5B, quant="IQ2_M") is None
    assert why_not(QWEN_1_5B, quant="Q2_K", imatrix="off") is None
    narrow = {**SMOLLM2, "hidden_size": 576, "intermediate_size": 1440}
    assert why_not(narrow, quant="IQ2_M", imatrix="off") is None


def test_a_matrix_is_gathered_for_coarse_types_and_not_beside_tuning() -> None:
    """auto below Q6_K; tuned integers leave it no room."""
    assert build.with_imatrix(RECIPE.options(quant="IQ4_NL", tune="none"))
    assert build.with_imatrix(RECIPE.options(quant="Q4_0", tune="none"))
    assert not build.with_imatrix(RECIPE.options(quant="Q4_0", tune="quick"))
    assert not build.with_imatrix(RECIPE.options(quant="Q6_K", tune="none"))
    assert not build.with_imatrix(RECIPE.options(quant="IQ4_NL", tune="none", imatrix="off"))


def test_tuning_is_q4_0s_own() -> None:
    """No other type can hold its integers."""
    refusal = why_not(QWEN_1_5B, quant="IQ4_NL", tune="quick")
    assert refusal is not None and "tuned integers are Q4_0's own" in refusal


def test_the_head_of_tuned_integers_is_in_the_estimate() -> None:
    """Q8_0 where llama.cpp would take Q6_K: more bytes."""
    target = load_target("desktop_linux_x86_64")
    plain, tuned = (
        build.estimate(sketch(QWEN_1_5B), target, RECIPE.options(quant="Q4_0", imatrix="off", tune=tune))
        for tune in ("none", "quick")
    )
    assert tuned.artifact_bytes - plain.artifact_bytes == 151936 * 1536 // 256 * (8 * 34 - 210)
