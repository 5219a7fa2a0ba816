"""The prompt contract names the first token that differs, wherever it is."""

from __future__ import annotations

from typing import Any

import pytest

from packager.contract import first_difference, require_one_bos, require_same
from packager.errors import GateFailed


def prompt(*ids: int) -> dict[str, Any]:
    return {
        "ids": list(ids),
        "text": "",
        "messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "who?"}],
    }


@pytest.mark.parametrize(
    ("left", "right", "at"),
    [
        ([1, 2, 3], [1, 2, 3], None),
        ([], [], None),
        ([1, 2, 3], [9, 2, 3], 0),
        ([1, 2, 3], [1, 9, 3], 1),
        ([1, 2, 3], [1, 2, 9], 2),
        ([1, 2, 3], [1, 2], 2),
        ([1, 2], [1, 2, 3], 2),
        ([], [1], 0),
    ],
)
def test_the_first_difference(left: list[int], right: list[int], at: int | None) -> None:
    """At the beginning, in the middle, at the end, or where one list stops."""
    assert first_difference(left, right) == at


def test_equal_prompts_pass() -> None:
    """Nothing to say, nothing raised."""
    require_same([prompt(1, 2), prompt(3)], [[1, 2], [3]], "the server", "")


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ([0, 1, 2, 3], r"at token 0: \[0, 1, 2, 3\] instead of \[1, 2, 3\]"),
        ([1, 9, 3], r"at token 1: \[9, 3\] instead of \[2, 3\]"),
        ([1, 2, 3, 4], r"at token 3: \[4\] instead of nothing"),
        ([1, 2], r"at token 2: nothing instead of \[3\]"),
    ],
)
def test_a_prompt_that_differs_stops_the_build(found: list[int], says: str) -> None:
    """The error names who differs, the token, both sides, and the conversation."""
    with pytest.raises(GateFailed, match=says) as caught:
        require_same([prompt(5), prompt(1, 2, 3)], [[5], found], "the server", "mend it")
    assert caught.value.exit_code == 6
    assert "the server" in caught.value.what
    assert "Conversation 2 ('who?')" in caught.value.why
    assert caught.value.fix == "mend it"


def test_a_missing_prompt_is_a_defect() -> None:
    """Fewer answers than prompts is no agreement."""
    with pytest.raises(ValueError, match="shorter"):
        require_same([prompt(1), prompt(2)], [[1]], "the server", "")


def test_two_bos_stop_the_build() -> None:
    """BOS from the template and again from the tokenizer: the classic fault of an export."""
    with pytest.raises(GateFailed, match=r"conversation 2 begins with the BOS token 1 twice") as caught:
        require_one_bos([prompt(1, 5), prompt(1, 1, 5)], 1)
    assert "add_bos_token" in caught.value.fix


def test_one_bos_none_or_no_bos_token_pass() -> None:
    """A prompt need not begin with BOS, and a doubled token that is not BOS is nobody's business."""
    require_one_bos([prompt(1, 5), prompt(5), prompt(1)], 1)
    require_one_bos([prompt(7, 7)], 1)
    require_one_bos([prompt(7, 7)], None)
