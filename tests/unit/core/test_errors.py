"""Every kind of failure has its own exit code, and they are those that the documentation promises."""

from __future__ import annotations

import re

import pytest

from packager.core import errors
from packager.core.errors import PackagerError, closest

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, PackagerError)]


def test_exit_codes_are_distinct_and_documented() -> None:
    """No two kinds share a code or a name, and the table in the module says all of them."""
    codes = [kind.exit_code for kind in KINDS]
    assert len(set(codes)) == len(codes)
    assert len({kind.kind for kind in KINDS}) == len(KINDS)
    table = {int(code) for code in re.findall(r"^(\d+) ", errors.__doc__ or "", flags=re.M)}
    assert set(codes) | {0, 130} == table


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_has_three_parts_and_a_json_form(kind: type[PackagerError]) -> None:
    """What, why and fix come out again, as text and as a document."""
    error = kind("It broke.", why="It was thin.", fix="Take a thicker one.")
    assert str(error) == "It broke. It was thin. Take a thicker one."
    assert error.as_dict() == {
        "kind": kind.kind,
        "exit_code": kind.exit_code,
        "what": "It broke.",
        "why": "It was thin.",
        "fix": "Take a thicker one.",
    }
    assert str(kind("It broke.")) == "It broke."


def test_the_closest_choice() -> None:
    """A near miss is suggested, nonsense is not."""
    assert closest("jetson_orin_nano", ["t4", "jetson_orin_nano_8gb"]) == ' Did you mean "jetson_orin_nano_8gb"?'
    assert closest("zzz", ["t4"]) == ""
