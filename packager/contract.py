"""The prompt contract: what training saw, what the tokenizer renders, what the artifact carries and what the box sends.

All of them must be the same token ids, with one BOS, or the build stops and names the first token that differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from packager.errors import GateFailed


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """Index of the first token that differs (or where the shorter one ends); None when they are equal."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return None if len(left) == len(right) else min(len(left), len(right))


def require_same(prompts: Sequence[Mapping[str, Any]], ids: Sequence[Sequence[int]], who: str, fix: str) -> None:
    """Raise GateFailed at the first prompt whose ``ids`` from ``who`` are not those of the checkpoint's own tokenizer.

    prompts: {"ids", "text", "messages"} as transformers rendered them.
    """
    for number, (prompt, found) in enumerate(zip(prompts, ids, strict=True), 1):
        at = first_difference(prompt["ids"], found)
        if at is None:
            continue
        expected = list(prompt["ids"][at : at + 4])
        got = list(found[at : at + 4])
        asked = next((m["content"] for m in reversed(prompt["messages"]) if m["role"] == "user"), "")[:60]
        raise GateFailed(
            f"the prompt of {who} differs from the checkpoint's at token {at}: {got or 'nothing'} instead of "
            f"{expected or 'nothing'}.",
            why=f"Conversation {number} ({asked!r}); the checkpoint's own tokenizer and chat template are the truth.",
            fix=fix,
        )


def require_one_bos(prompts: Sequence[Mapping[str, Any]], bos: int | None) -> None:
    """Raise GateFailed when a rendered prompt begins with BOS twice: the template writes it and the tokenizer adds
    it.
    """
    for number, prompt in enumerate(prompts, 1):
        if bos is not None and list(prompt["ids"][:2]) == [bos, bos]:
            raise GateFailed(
                f"conversation {number} begins with the BOS token {bos} twice.",
                why="The chat template writes BOS and the tokenizer's post-processor adds another.",
                fix='Set "add_bos_token": false in tokenizer_config.json, or take BOS out of the chat template.',
            )
