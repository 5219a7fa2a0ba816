"""Calibration files: every format that is read, and one clear sentence for each that is not."""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from packager.core.errors import InputError
from packager.prompts.calibration import general, load, split, spread


def written(folder: Path, content: Any, name: str = "pairs.json") -> Path:
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(
            content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), encoding="utf-8"
        )
    return path


def talk(*turns: tuple[str, str]) -> tuple[dict[str, str], ...]:
    return tuple({"role": role, "content": content} for role, content in turns)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"instruction": "Q", "output": "A"}, talk(("user", "Q"), ("assistant", "A"))),
        ({"instruction": "Q", "input": "", "output": "A"}, talk(("user", "Q"), ("assistant", "A"))),
        ({"instruction": "Q", "input": "more", "output": "A"}, talk(("user", "Q\nmore"), ("assistant", "A"))),
        ({"instruction": "", "input": "only", "output": "A"}, talk(("user", "only"), ("assistant", "A"))),
        (
            {"instruction": "Q2", "output": "A2", "system": "S", "history": [["Q1", "A1"]]},
            talk(("system", "S"), ("user", "Q1"), ("assistant", "A1"), ("user", "Q2"), ("assistant", "A2")),
        ),
        (
            {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
            talk(("user", "Q"), ("assistant", "A")),
        ),
        (
            {"system": "S", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
            talk(("system", "S"), ("user", "Q"), ("assistant", "A")),
        ),
    ],
)
def test_a_record_becomes_the_dialogue_that_training_saw(tmp_path: Path, record: Any, expected: Any) -> None:
    """Alpaca with and without input, system and history; messages; ShareGPT."""
    data = load(written(tmp_path, [record]))
    assert data.conversations == (expected,)
    assert data.texts == ()


def test_jsonl_has_one_record_a_line(tmp_path: Path) -> None:
    """Blank lines between records are skipped, a byte order mark too."""
    text = '\ufeff{"instruction": "Q", "output": "A"}\n\n{"text": "plain"}\n'
    data = load(written(tmp_path, text, "pairs.jsonl"))
    assert data.conversations == (talk(("user", "Q"), ("assistant", "A")),)
    assert data.texts == ("plain",)


def test_any_other_file_is_plain_text(tmp_path: Path) -> None:
    """A .txt or .md file is one text, even when it looks like JSON."""
    data = load(written(tmp_path, "[1, 2]", "notes.md"))
    assert (data.conversations, data.texts) == ((), ("[1, 2]",))


def test_the_digest_is_the_files(tmp_path: Path) -> None:
    """SHA-256 of the bytes, and the name without its folder: nothing of the machine gets into a manifest."""
    path = written(tmp_path, "text", "a.txt")
    data = load(path)
    assert data.digest == hashlib.sha256(b"text").hexdigest()
    assert data.name == "a.txt"


@pytest.mark.parametrize(
    ("content", "name", "says"),
    [
        (b"\xff\xfe\x00", "a.txt", r"not UTF-8 text \(byte 0\)"),
        ("  \n", "a.json", "is empty"),
        ("[1,", "a.json", r"not valid JSON.*line 1"),
        ('{"a": 1}\nnonsense\n', "a.jsonl", "not valid JSON"),
        ('{"a": 1}', "a.json", "holds a JSON dict, not a list"),
        ("[]", "a.json", "no record"),
        ("[7]", "a.json", "record 1 .* is not an object"),
        ([{"instruction": "Q", "output": "A"}, {"question": "Q"}], "a.json", "record 2 .*question"),
        ([{"instruction": "Q"}], "a.json", "neither messages nor instruction and output"),
        ([{"instruction": "Q", "output": None}], "a.json", "neither messages nor instruction and output"),
        ([{"instruction": "Q", "output": "A", "history": [["only"]]}], "a.json", "history of record 1"),
        ([{"instruction": "Q", "output": "A", "history": ["ab"]}], "a.json", "history of record 1"),
        ([{"instruction": "Q", "output": "A", "history": 3}], "a.json", "history of record 1"),
        ([{"messages": "hello"}], "a.json", "messages of record 1"),
        ([{"messages": []}], "a.json", "messages of record 1"),
        ([{"messages": [{"role": "tool", "content": "x"}]}], "a.json", "role 'tool'"),
        ([{"messages": [{"role": ["user"], "content": "x"}]}], "a.json", "a message of record 1"),
        ([{"messages": [{"role": "user", "content": None}]}], "a.json", "a message of record 1"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_a_sentence(
    tmp_path: Path, content: Any, name: str, says: str
) -> None:
    """Each names the file, the record where there is one, and what is expected."""
    with pytest.raises(InputError, match=says) as caught:
        load(written(tmp_path, content, name))
    assert caught.value.exit_code == 3
    assert name in caught.value.what


@pytest.mark.parametrize("what", ["absent", "folder"])
def test_a_file_that_cannot_be_read(tmp_path: Path, what: str) -> None:
    """A path that is not there, or is a folder, is an input error too."""
    if what == "folder":
        (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        load(tmp_path / what)


def test_the_built_in_data_covers_what_a_contract_needs() -> None:
    """System prompts, several turns and Chinese are in the built-in conversations, and its digest is stable."""
    data = general()
    assert data.digest == general().digest
    assert len(data.conversations) >= 8
    assert any(turn["role"] == "system" for one in data.conversations for turn in one)
    assert any(sum(turn["role"] == "user" for turn in one) > 1 for one in data.conversations)
    assert any(
        "\u4e00" <= letter <= "\u9fff" for one in data.conversations for turn in one for letter in turn["content"]
    )
    assert all(one[-1]["role"] == "assistant" for one in data.conversations)
    assert len(data.texts[0]) > 10_000


@pytest.mark.parametrize("count", [1, 5, 8, 15, 16, 17, 64, 65, 1000])
@pytest.mark.parametrize("length", [1, 8, 16, 64])
def test_split_keeps_the_order_and_drops_only_a_short_rest(count: int, length: int) -> None:
    """The pieces joined are the beginning of the tokens; what is lost is under an eighth of a piece."""
    tokens = list(range(count))
    pieces = split(tokens, length)
    joined = [token for piece in pieces for token in piece]
    assert joined == tokens[: len(joined)]
    assert all(0 < len(piece) <= length for piece in pieces)
    assert (count - len(joined)) * 8 < length
    assert pieces


def test_split_of_nothing_is_nothing() -> None:
    """No tokens, no pieces."""
    assert split([], 8) == []


LENGTHS = [[2], [1, 1], [0, 5], [512] * 20, [3, 700, 2, 90], [10, 10, 10], list(range(60))]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("budget", [1, 7, 256, 100_000])
def test_spread_chooses_valid_positions_about_the_budget(lengths: list[int], budget: int) -> None:
    """Positions lie in 1 … length - 1, ascending, never twice; every sequence that has one gets one; the sum is
    near the budget.
    """
    chosen = spread(lengths, budget)
    assert len(chosen) == len(lengths)
    for length, positions in zip(lengths, chosen, strict=True):
        assert positions == sorted(set(positions))
        assert all(1 <= position < length for position in positions)
        assert bool(positions) == (length > 1)
    total = sum(map(len, chosen))
    possible = sum(max(length - 1, 0) for length in lengths)
    assert abs(total - min(budget, possible)) <= len(lengths)


def test_spread_takes_every_position_when_it_may() -> None:
    """With room for all, all are taken."""
    assert spread([5, 3], 100) == [[1, 2, 3, 4], [1, 2]]


def test_spread_is_even() -> None:
    """The gaps between chosen positions differ by one at most."""
    (positions,) = spread([401], 40)
    gaps = {b - a for a, b in pairwise(positions)}
    assert len(positions) == 40
    assert max(gaps) - min(gaps) <= 1
