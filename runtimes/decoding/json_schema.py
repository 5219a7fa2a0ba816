"""Holds an answer to a JSON Schema: llguidance says after every token which ones may follow."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtimes.engine import RequestRefused

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Guides:
    """Makes a Guide for a request; the tokenizer's tables are built at the first one and kept."""

    def __init__(self, tokenizer: Path, vocabulary: int, stop_ids: Sequence[int]) -> None:
        self._path, self._vocabulary, self._stops = tokenizer, vocabulary, sorted(stop_ids)
        self._tokenizer: Any = None
        self._lock = threading.Lock()

    def make(self, schema: str) -> Guide:
        """A guide for one answer. Raises RequestRefused for what llguidance cannot follow."""
        from llguidance import LLMatcher, LLTokenizer

        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = LLTokenizer(
                    self._path.read_text(encoding="utf-8"),
                    n_vocab=self._vocabulary,
                    eos_token=self._stops[0] if self._stops else None,
                )
        try:
            matcher = LLMatcher(self._tokenizer, LLMatcher.grammar_from_json_schema(schema), log_level=0)
            reason = matcher.get_error() if matcher.is_error() else ""
        except ValueError as error:
            reason = str(error)
        if reason:
            first = reason.strip().partition("\n")[0]
            raise RequestRefused(f"The JSON Schema cannot be followed: {first}", param="response_format")
        return Guide(matcher, self._vocabulary)


class Guide:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary

    def forbidden(self) -> NDArray[np.bool_]:
        """Which tokens may not come next, (vocabulary,)."""
        import numpy as np
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

        mask = allocate_token_bitmask(1, self._vocabulary)
        fill_next_token_bitmask(self._matcher, mask)
        bits = np.unpackbits(mask[0].view(np.uint8), bitorder="little", count=self._vocabulary)
        found: NDArray[np.bool_] = bits == 0
        return found

    def take(self, token: int) -> None:
        """The token that was chosen."""
        self._matcher.consume_token(token)

    @property
    def complete(self) -> bool:
        """Whether nothing but an end can follow."""
        return bool(self._matcher.is_stopped())
