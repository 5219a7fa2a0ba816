"""A reference that is neither a path nor a hub id never reaches a hub; tests/real/test_hub.py uses the hubs."""

from __future__ import annotations

import pytest

from packager.checkpoint.hub import download
from packager.core.errors import InputError
from packager.core.progress import Silent


@pytest.mark.parametrize("ref", ["nothing", "a/b/c", "org/..", "modelscope:x", "./x/y", "https://h/x"])
def test_what_is_no_id_is_refused(ref: str) -> None:
    """Paths that do not exist, addresses and ids that would climb out of a folder are refused in words."""
    with pytest.raises(InputError, match="no hub id either"):
        download(ref, revision=None, progress=Silent())
