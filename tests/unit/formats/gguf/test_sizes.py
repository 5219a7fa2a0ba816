"""Tensor types and file sizes against what llama.cpp wrote (measured once; tests/real measures again)."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from packager.checkpoint.families import kv_cache_bytes
from packager.formats.gguf.sizes import QUANTIZE_RATE, estimate_gguf, gguf_name, metadata_bytes, predict, tensor_bytes
from packager.formats.gguf.types import QUANTS
from packager.recipe import Estimate
from packager.target import load_target
from tests.conftest import ROOT
from tests.unit.sketch import QWEN_1_5B, SMOLLM2, sketch

MEASURED = {
    "BF16": 270_885_728, "Q8_0": 144_810_848, "Q6_K": 138_382_688, "Q5_K_M": 112_103_264, "Q4_K_M": 105_453_920,
    "Q4_0": 91_726_688,
}  # fmt: skip


@pytest.mark.parametrize("quant", MEASURED)
def test_size_of_a_real_file_is_met(quant: str) -> None:
    """SmolLM2 as llama.cpp wrote it, although the tokenizer is only estimated here."""
    assert predict(sketch(SMOLLM2), quant, imatrix=False).bytes == pytest.approx(MEASURED[quant], rel=0.002)


def test_size_of_a_real_1_5b_file_is_met() -> None:
    """A random Qwen2 of 1.5B (152064 tokens) was 1894531904 bytes as Q8_0."""
    assert predict(sketch({**QWEN_1_5B, "vocab_size": 152064}), "Q8_0", imatrix=False).bytes == pytest.approx(
        1_894_531_904, rel=0.002
    )


def test_rows_not_divisible_by_256_fall_back() -> None:
    """At hidden size 576 a Q4_K_M file is mostly Q5_0, and the plan says so."""
    size = predict(sketch(SMOLLM2), "Q4_K_M", imatrix=False)
    assert size.types == {"Q5_0": 166, "F32": 61, "Q4_K": 16, "Q8_0": 15, "Q6_K": 14}
    notes = _estimate(SMOLLM2, "Q4_K_M").notes
    assert len(notes) == 1 and "166 of 211 quantized tensors become Q5_0" in notes[0]


def test_types_of_a_divisible_model() -> None:
    """No fallback: the output layer and every third value and down projection get Q6_K."""
    types = predict(sketch(QWEN_1_5B), "Q4_K_M", imatrix=False).types
    assert types == {"Q4_K": 169, "F32": 141, "Q6_K": 29}
    assert _estimate(QWEN_1_5B, "Q4_K_M").notes == ()


def test_imatrix_changes_types_where_llama_cpp_does() -> None:
    """Q4_0 guards early down projections with Q4_1; IQ4_XS no longer needs Q5_K there."""
    checkpoint = sketch(SMOLLM2)
    assert predict(checkpoint, "Q4_0", imatrix=True).types["Q4_1"] == 3
    assert "Q4_1" not in predict(checkpoint, "Q4_0", imatrix=False).types
    assert predict(checkpoint, "IQ4_XS", imatrix=False).types["Q5_K"] == 3
    assert "Q5_K" not in predict(checkpoint, "IQ4_XS", imatrix=True).types


def test_the_head_can_be_another_type() -> None:
    """Tuned integers go with a Q8_0 head, and so does all Q4_0 that gguf-py writes."""
    checkpoint = sketch(QWEN_1_5B)
    own, other = (predict(checkpoint, "Q4_0", imatrix=False, head=head) for head in (None, "Q8_0"))
    assert own.types["Q6_K"] == 1
    assert other.types["Q8_0"] == 1
    assert other.bytes > own.bytes


def test_tied_embeddings_are_read_for_every_token() -> None:
    """Untied, the embedding is a look-up and does not count; tied, it is the head."""
    untied = predict(sketch(QWEN_1_5B), "Q8_0", imatrix=False)
    embedding = tensor_bytes("Q8_0", (151936, 1536))
    assert untied.read_per_token_bytes == sum(t.nbytes for t in untied.tensors) - embedding
    tied = predict(sketch({**QWEN_1_5B, "tie_word_embeddings": True}), "Q8_0", imatrix=False)
    assert tied.read_per_token_bytes == sum(t.nbytes for t in tied.tensors) == untied.read_per_token_bytes


def test_llama3_rope_adds_a_tensor() -> None:
    """The converter computes rope_freqs for llama3 scaling."""
    checkpoint = sketch({**SMOLLM2, "rope_scaling": {"rope_type": "llama3"}})
    assert predict(checkpoint, "F16", imatrix=False).tensors[0].name == "rope_freqs.weight"


def test_names() -> None:
    """As the converter maps them; what it drops is None, what it does not know stays."""
    assert gguf_name("model.layers.3.self_attn.v_proj.bias") == "blk.3.attn_v.bias"
    assert gguf_name("lm_head.weight") == "output.weight"
    assert gguf_name("model.layers.0.self_attn.rotary_emb.inv_freq") is None
    assert gguf_name("something.else.weight") == "something.else.weight"


def test_rows_that_no_block_divides_stay_f16() -> None:
    """Rows of 24: neither 256 nor 32 divides them."""
    tiny = {**SMOLLM2, "hidden_size": 24, "head_dim": 8, "num_attention_heads": 3, "intermediate_size": 40}
    assert set(predict(sketch(tiny), "Q4_K_M", imatrix=False).types) == {"F16", "F32"}
    with pytest.raises(ValueError, match="rows of 24 cannot be Q8_0"):
        tensor_bytes("Q8_0", (4, 24))


def test_tokenizer_is_counted_exactly(tmp_path: Path) -> None:
    """Text and length of each token and merge, four bytes a type, and a [PAD] name for rows without a token."""
    vocab = {"a": 0, "中": 1}
    document = {"model": {"vocab": vocab, "merges": [["a", "中"]]}, "added_tokens": [{"content": "<s>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    plain = metadata_bytes(tmp_path, 3) - (8 + 1) - (8 + 3) - (8 + 3) - (8 + 5) - 3 * 4
    assert 0 < plain < 2000
    assert metadata_bytes(tmp_path, 4) > metadata_bytes(tmp_path, 3)


def test_a_strange_tokenizer_is_estimated(tmp_path: Path) -> None:
    """A file that is no tokenizer gives the estimate, not a traceback."""
    (tmp_path / "tokenizer.json").write_text("[]", encoding="utf-8")
    assert metadata_bytes(tmp_path, 1000) > 30_000


def test_kv_cache() -> None:
    """Two tensors a layer; the context is rounded up to 256; Q8_0 takes 34 bytes for 32 values."""
    assert kv_cache_bytes(30, 3, 64, 4096, 4, "f16") == 2 * 30 * 192 * 4096 * 4 * 2
    assert kv_cache_bytes(1, 1, 64, 257, 1, "f16") == 2 * 64 * 512 * 2
    assert kv_cache_bytes(1, 1, 64, 256, 1, "q8_0") * 64 == kv_cache_bytes(1, 1, 64, 256, 1, "f16") * 34


@pytest.mark.parametrize(
    ("config", "quant", "context", "slots", "measured_mib"),
    [(SMOLLM2, "Q8_0", 4096, 4, 637), (SMOLLM2, "Q8_0", 4096, 1, 364), (QWEN_1_5B, "Q8_0", 2048, 1, 2076)],
)
def test_memory_on_the_box_meets_what_was_measured(
    config: dict[str, object], quant: str, context: int, slots: int, measured_mib: int
) -> None:
    """Resident memory of xllamacpp and the server's modules after a 1500-token prompt a slot (1.5B: after loading)."""
    estimate = _estimate(config, quant, context=context, slots=slots)
    box = estimate.load_bytes + estimate.kv_bytes + estimate.overhead_bytes
    assert box / 2**20 == pytest.approx(measured_mib, rel=0.06)


def test_smaller_types_are_smaller() -> None:
    """QUANTS is declared best first; the plan relies on it."""
    sizes = [predict(sketch(QWEN_1_5B), quant, imatrix=True).bytes for quant in QUANTS]
    assert all(smaller < 1.002 * larger for larger, smaller in pairwise(sizes))  # Q4_0 has the blocks of IQ4_NL


def test_types_that_do_not_fit_the_rows_are_no_smaller() -> None:
    """At 576 columns all types below four bits become types of four: the plan says so."""
    notes = _estimate(SMOLLM2, "Q2_K").notes
    assert len(notes) == 1 and "Q2_K is in name only here" in notes[0]
    sizes = {quant: predict(sketch(SMOLLM2), quant, imatrix=True).bytes for quant in ("Q4_0", "Q2_K", "IQ2_M")}
    assert min(sizes.values()) > 0.85 * sizes["Q4_0"]


@pytest.mark.parametrize("quant", QUANTS)
def test_every_quant_has_its_time(quant: str) -> None:
    """Every type that a quant can hold has a measured rate: a build of 1.5B is minutes, not nothing."""
    for imatrix in (True, False):
        kinds = set(predict(sketch(QWEN_1_5B), quant, imatrix=imatrix).types)
        kinds |= set(predict(sketch(SMOLLM2), quant, imatrix=imatrix).types)
        assert kinds <= set(QUANTIZE_RATE[imatrix]) | {"F32", "F16", "BF16"}


def _estimate(config: dict[str, object], quant: str, *, context: int = 4096, slots: int = 1) -> Estimate:
    target = load_target(ROOT / "targets" / "desktop_linux_x86_64.toml")
    return estimate_gguf(sketch(config), target, quant=quant, context=context, slots=slots)
