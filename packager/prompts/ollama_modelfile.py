"""Compares the prompts of the Modelfile that LLaMA-Factory writes into an export with those of the tokenizer.

The Modelfile is no input of a build, but it is a second source on how the model was trained. When it disagrees with the
tokenizer, the model is right in training and wrong after the export (LLaMA-Factory issues 7238 and 6987).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packager.core.errors import GateFailed
from packager.prompts.contract import EDGES, require_same, token_names
from packager.prompts.go_template import NotUnderstood, render

if TYPE_CHECKING:
    from packager.checkpoint.checkpoint import Checkpoint

NAME = "Modelfile"
BLOCK = r'(?im)^{}\s+(?:"""(.*?)"""|"(.*?)"|(\S.*?)$)'


def instruction(text: str, name: str) -> str | None:
    """The argument of the last TEMPLATE or SYSTEM instruction; None where there is none."""
    matches = list(re.finditer(BLOCK.format(name), text, re.DOTALL))
    return next((part for part in matches[-1].groups() if part is not None), "") if matches else None


def require_agreement(checkpoint: Checkpoint, prompts: Sequence[Mapping[str, Any]], sure: str | None) -> list[str]:
    """Raise GateFailed when the folder's Modelfile and its tokenizer render a prompt differently; return notes.

    sure: the training template with which the tokenizer agrees; then the Modelfile is the wrong one, and the difference
    is a note instead of an error.
    """
    path: Path = checkpoint.path / NAME
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    template = instruction(text, "TEMPLATE")
    if template is None:
        return []
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint.path / "tokenizer.json"))
    bos = checkpoint.tokenizer.bos or ""

    def ids(rendered: str) -> list[int]:  # without a leading BOS, which Ollama may add itself
        tokens: list[int] = tokenizer.encode(rendered.removeprefix(bos), add_special_tokens=False).ids
        return tokens

    compared = [prompt for prompt in prompts if prompt.get("kind") not in EDGES]
    try:
        actual = [ids(render(template, prompt["messages"], instruction(text, "SYSTEM") or "")) for prompt in compared]
    except NotUnderstood as error:
        return [f"the checkpoint's Modelfile is not compared: its template has {error}"]
    expected = [{**prompt, "ids": ids(prompt["text"])} for prompt in compared]
    try:
        require_same(
            expected,
            actual,
            f"the checkpoint's own {NAME}",
            "Say which is right with --template and the name that training used (packager templates lists them), or "
            f"remove the {NAME}: the bundle does not use it.",
            token_names(checkpoint),
        )
    except GateFailed:
        if sure is None:
            raise
        return [f"the checkpoint's {NAME} renders prompts differently from {sure} and its tokenizer, which agree"]
    return []
