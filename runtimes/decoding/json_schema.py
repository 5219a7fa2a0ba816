"""Constrains an answer to a JSON Schema: llguidance gives the allowed next tokens after every token."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtimes.engine import RequestRefused

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class ConstraintFactory:
    """Makes a Constraint for each request; the tokenizer's tables are built for the first one and kept."""

    def __init__(self, tokenizer: Path, vocabulary: int, stop_ids: Sequence[int]) -> None:
        self._path, self._vocabulary, self._stops = tokenizer, vocabulary, sorted(stop_ids)
        self._tokenizer: Any = None
        self._lock = threading.Lock()

    def make(self, schema: str) -> Constraint:
        """A constraint for one answer. Raises RequestRefused for a schema that llguidance does not support."""
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
        return Constraint(matcher, self._vocabulary)


class Constraint:
    """The grammar state of one answer."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary

    def forbidden(self) -> NDArray[np.bool_]:
        """Mask of the tokens that may not come next, (vocabulary,)."""
        import numpy as np
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

        mask = allocate_token_bitmask(1, self._vocabulary)
        fill_next_token_bitmask(self._matcher, mask)
        bits = np.unpackbits(mask[0].view(np.uint8), bitorder="little", count=self._vocabulary)
        forbidden: NDArray[np.bool_] = bits == 0
        return forbidden

    def take(self, token: int) -> None:
        """Advance by the chosen token."""
        self._matcher.consume_token(token)

    @property
    def complete(self) -> bool:
        """Whether only an end token can follow."""
        return bool(self._matcher.is_stopped())
