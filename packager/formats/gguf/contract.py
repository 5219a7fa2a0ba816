"""The prompt contract of a GGUF: its own metadata, which llama.cpp's and Ollama's users rely on without our server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packager.core.errors import GateFailed
from packager.prompts.contract import require_same, token_names
from packager.tensors.gguf_header import read_header

if TYPE_CHECKING:
    from packager.fidelity.samples import Samples
    from packager.recipe import Job

TEMPLATE = "tokenizer.chat_template"


def require_carried(job: Job, samples: Samples, model: Path, vocabulary: Mapping[str, Any] | None) -> list[str]:
    """Raise GateFailed unless the file's own chat template renders every conversation as the checkpoint's does, and its
    end token is the checkpoint's. Gives notes on what llama.cpp does by itself and our server does not.

    vocabulary: what the engine said of the file's tokens (runtimes/engines/llamacpp/logits.py).
    """
    tokenizer = job.checkpoint.tokenizer
    values = read_header(model).values
    carried = values.get(TEMPLATE)
    if tokenizer.chat_template is not None:
        if not isinstance(carried, str):
            raise GateFailed(
                f"the GGUF carries no chat template ({TEMPLATE}), and the checkpoint has one.",
                why="llama.cpp and what is built on it would guess how to render a conversation.",
                fix="Report the converter; do not ship the file.",
            )
        if carried.rstrip("\n") != tokenizer.chat_template.rstrip("\n"):
            found = _rendered(job, samples.prompts, carried)
            fix = "Report the converter: it has written another template than the checkpoint's."
            require_same(samples.prompts, found, "the GGUF's own template", fix, token_names(job.checkpoint))
    notes: list[str] = []
    end = values.get("tokenizer.ggml.eos_token_id")
    if isinstance(end, int) and tokenizer.stop_ids and end not in tokenizer.stop_ids:
        known = ", ".join(map(str, tokenizer.stop_ids))
        raise GateFailed(
            f"the GGUF's end token is {end}, which is none of the checkpoint's ({known}).",
            fix="Report the converter; do not ship the file.",
        )
    if vocabulary is None:
        return notes
    if bool(vocabulary["adds_bos"]) != tokenizer.add_bos:
        does = "puts" if vocabulary["adds_bos"] else "does not put"
        notes.append(
            f"llama.cpp by itself {does} BOS before plain text, unlike transformers; our server follows transformers"
        )
    missing = [token for token in tokenizer.stop_ids if token not in vocabulary["ends"]]
    if missing:
        names = ", ".join(f"{token} {token_names(job.checkpoint)(token)!r}" for token in missing)
        notes.append(f"llama.cpp by itself does not stop at {names}; our server does")
    return notes


def adds_bos(model: Path, otherwise: bool) -> bool:
    """Whether a GGUF says that BOS goes before every text; ``otherwise`` where it does not say."""
    said = read_header(model).values.get("tokenizer.ggml.add_bos_token")
    return said if isinstance(said, bool) else otherwise


def _rendered(job: Job, prompts: Sequence[Mapping[str, Any]], template: str) -> list[list[int]]:
    """Ids of every prompt as a chat template renders it, in the sandbox that the contract always uses."""
    from tokenizers import Tokenizer

    from packager.checkpoint.chat_template import renderer

    tokenizer = Tokenizer.from_file(str(job.checkpoint.path / "tokenizer.json"))
    try:
        render = renderer(template, job.checkpoint.tokenizer.special_tokens)
        texts = [render(list(prompt["messages"]), True) for prompt in prompts]
    except Exception as error:  # a template is a program: it may fail in any way
        raise GateFailed(
            f"the GGUF's own template cannot be rendered ({type(error).__name__}: {error}).",
            fix="Report the converter; do not ship the file.",
        ) from error
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
