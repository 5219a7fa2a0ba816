"""Incremental detokenization: whole characters only, and the bytes of one token."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from runtimes.decoding.tokenizer import open_tokenizer

if TYPE_CHECKING:
    from tokenizers.decoders import DecodeStream


class Detokenizer:
    """One per server, shared by all answers. Raises ManifestError when the file cannot be read."""

    def __init__(self, tokenizer: Path) -> None:
        self.path = tokenizer
        self.tokenizer = open_tokenizer(tokenizer)

    def stream(self) -> DecodeStream:
        """A decoder for one answer. ``step(tokenizer, id)`` returns text, or None while a character is incomplete. The
        tokenizer's special tokens give no text.
        """
        from tokenizers.decoders import DecodeStream

        return DecodeStream(skip_special_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens are recognised, none added."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    @functools.cached_property
    def byte_level(self) -> bool:
        """Whether each character of a token's text encodes one byte (GPT-2's alphabet)."""
        decoder = json.loads(self.path.read_text(encoding="utf-8")).get("decoder") or {}
        return "ByteLevel" in [decoder.get("type"), *(part.get("type") for part in decoder.get("decoders") or [])]

    @functools.cached_property
    def added(self) -> dict[int, str]:
        """Added tokens, whose text is literal."""
        return {token: str(entry.content) for token, entry in self.tokenizer.get_added_tokens_decoder().items()}

    def bytes_of(self, token: int) -> bytes:
        """The bytes a token adds to a text."""
        if token in self.added:
            return self.added[token].encode()
        text = self.tokenizer.id_to_token(token)
        if text is None:
            return b""
        if self.byte_level:
            return bytes(alphabet()[char] for char in text if char in alphabet())
        if match := re.fullmatch(r"<0x([0-9A-F]{2})>", text):
            return bytes.fromhex(match[1])
        return str(text).replace("▁", " ").encode()


@functools.cache
def alphabet() -> dict[str, int]:
    """GPT-2's byte alphabet, character -> byte: printable bytes map to themselves, the others to 256 and up."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + at): byte for at, byte in enumerate(other)}
