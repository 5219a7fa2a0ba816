"""A Qwen2 checkpoint with the real DeepSeek-R1 tokenizer: what the box feeds its model is what transformers would."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from packager.bundle.verify import verify
from packager.core.progress import Silent
from tests.real.serving import ask, chat, rendered, served

transformers = pytest.importorskip("transformers")

CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "你好，请介绍一下你自己。"}],
    [
        {"role": "system", "content": "You are a careful assistant."},
        {"role": "user", "content": "Why is the sky blue?"},
    ],
    [{"role": "system", "content": "你是一名车间维修助手。"}, {"role": "user", "content": "报警 E17 是什么意思？🔧"}],
    [
        {"role": "user", "content": "What is 17 times 23?"},
        {"role": "assistant", "content": "<think>\n17·23 = 391\n</think>\n\nIt is 391."},
        {"role": "user", "content": "And doubled?"},
    ],
    [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "  leading spaces,\ttabs\nand 1234567890 digits  "},
        {"role": "assistant", "content": "好的。"},
        {"role": "user", "content": "naïve café — ﷽ \u200b end"},
    ],
]


def test_the_bundle_verifies_and_has_one_prompt_contract(random_bundle: Path) -> None:
    """Built through the contract, with the architecture that the checkpoint has."""
    assert not verify(random_bundle, Silent()).problems
    report = json.loads((random_bundle / "manifest.json").read_text(encoding="utf-8"))["report"]
    assert report["prompts_equal"] >= 8
    assert report["unquantized"]["kl_mean"] <= 0.001
    notes = " ".join(report["contract"]["notes"])
    assert "transformers adds <|endoftext|>" in notes
    # llama.cpp reads <|endoftext|> (the converter wrote transformers' own) and </s> (a plain entry) as control tokens
    assert "the GGUF's own tokenizer tokenizes special tokens typed by users differently" in notes
    answers = report["fidelity"]["answers"]
    assert (answers["asked"], answers["trained_tokens_mean"]) == (2, None)  # no pairs: two prompts of a reasoning model
    assert answers["thoughts_closed"] <= answers["thoughts_opened"] <= 2


def test_the_box_feeds_what_transformers_would(random_bundle: Path, random_qwen2: Path, tmp_path: Path) -> None:
    """System, several turns, Chinese and odd spaces: the same ids, with exactly one BOS, at the beginning."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(random_qwen2)
    found = rendered(random_bundle, CONVERSATIONS, tmp_path)
    for talk, ids in zip(CONVERSATIONS, found, strict=True):
        expected = tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert ids == expected, talk
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids[0] == tokenizer.bos_token_id


def test_the_server_answers_and_counts_the_same_prompt(random_bundle: Path, random_qwen2: Path, tmp_path: Path) -> None:
    """Random weights say nonsense, but the same nonsense each time, for a prompt of as many tokens as transformers
    counts.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(random_qwen2)
    with served(random_bundle, tmp_path / "log") as base:
        assert ask(base, "你好", max_tokens=12) == ask(base, "你好", max_tokens=12)
        usage = chat(base, CONVERSATIONS[1], max_tokens=4)["usage"]
    expected = tokenizer.apply_chat_template(
        CONVERSATIONS[1], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert usage["prompt_tokens"] == len(expected)
