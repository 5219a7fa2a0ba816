"""The Modelfile that LLaMA-Factory leaves in an export: what it says of the prompt, against what the tokenizer says.

It is no input of a build, but it is a second witness of how the model was trained: exports whose Modelfile and
tokenizer disagree are what "right in training, wrong after the export" is made of (LLaMA-Factory issues 7238 and 6987).
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
    found = list(re.finditer(BLOCK.format(name), text, re.DOTALL))
    return next((part for part in found[-1].groups() if part is not None), "") if found else None


def require_agreement(checkpoint: Checkpoint, prompts: Sequence[Mapping[str, Any]], sure: str | None) -> list[str]:
    """Raise GateFailed when the folder's Modelfile renders a prompt otherwise than its tokenizer; give notes.

    sure: the training template that the tokenizer was found to agree with; then the Modelfile is known to be the wrong
    one, which is told and not refused.
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

    def ids(rendered: str) -> list[int]:  # BOS may be Ollama's to put: one at the beginning is the same as none
        found: list[int] = tokenizer.encode(rendered.removeprefix(bos), add_special_tokens=False).ids
        return found

    asked = [prompt for prompt in prompts if prompt.get("kind") not in EDGES]
    try:
        found = [ids(render(template, prompt["messages"], instruction(text, "SYSTEM") or "")) for prompt in asked]
    except NotUnderstood as error:
        return [f"the checkpoint's Modelfile is not compared: its template has {error}"]
    expected = [{**prompt, "ids": ids(prompt["text"])} for prompt in asked]
    try:
        require_same(
            expected,
            found,
            f"the checkpoint's own {NAME}",
            "Say which is right with --template and the name that training used (packager templates lists them), or "
            f"remove the {NAME}: the bundle does not use it.",
            token_names(checkpoint),
        )
    except GateFailed:
        if sure is None:
            raise
        return [f"the checkpoint's {NAME} renders prompts otherwise than {sure} and its tokenizer, which agree"]
    return []
