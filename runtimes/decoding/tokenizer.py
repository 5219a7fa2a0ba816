"""The tokenizer of a bundle."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from runtimes.manifest import ManifestError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@functools.lru_cache(maxsize=1)  # the server and its engine share one: a vocabulary of 49,000 takes 25 MB
def open_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.json without padding and truncation. Raises ManifestError."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ManifestError(f"{path.name} cannot be read: {error}.") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
