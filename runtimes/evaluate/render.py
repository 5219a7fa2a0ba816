"""``render``: conversations to the server's prompt ids, for the build machine, through two JSON files."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from runtimes.evaluate.json_files import run_json_verb
from runtimes.manifest import Run


def main(argv: Sequence[str]) -> int:
    """Exit codes: see run_json_verb."""
    return run_json_verb("render", __doc__, argv, render)


def render(run: Run, question: dict[str, Any], verbose: bool = False) -> dict[str, Any]:
    """Each conversation's text and ids, exactly as the server makes them on 1 January 2026. The date is fixed, so that
    a template that writes it gives the same bytes in every build. Raises ValueError when the template refuses.
    """
    from runtimes.decoding.chat_template import Prompts, TemplateRefused

    prompts = Prompts(run, now=lambda: datetime(2026, 1, 1))
    try:
        texts = [prompts.render(conversation) for conversation in question["conversations"]]
    except TemplateRefused as error:
        raise ValueError(f"the chat template refuses a conversation: {error}") from None
    return {"ids": [prompts.encode(text) for text in texts], "texts": texts}
