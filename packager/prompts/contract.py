"""The prompt contract: what training saw, what the tokenizer renders, what the artifact carries and what the box sends.

All of them must be the same token ids, with one BOS and the right end, or the build stops and names the first token
that differs, with its text, the two sources and what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from packager.core.errors import GateFailed

if TYPE_CHECKING:
    from packager.checkpoint.checkpoint import Checkpoint
    from packager.prompts.training_template import Training

Naming = Callable[[int], str]

# Where LLaMA-Factory and Ollama have habits that a chat template need not share, and training data hardly tells: both
# take an empty system message for none, strip earlier thoughts in their own way or not at all, and never trim. A
# difference there is told, not refused.
EDGES = ("empty system", "earlier thoughts", "outer spaces")
TYPED = "typed special tokens"
SHOWN = 4  # tokens of each side in a diff


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """Index of the first token that differs (or where the shorter one ends); None when they are equal."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return None if len(left) == len(right) else min(len(left), len(right))


def token_names(checkpoint: Checkpoint) -> Naming:
    """Texts of token ids, read only when a difference is to be shown."""

    @cache
    def tokenizer() -> Any:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(checkpoint.path / "tokenizer.json"))

    return lambda token: str(tokenizer().decode([token], skip_special_tokens=False))


def shown(ids: Sequence[int], name: Naming | None) -> str:
    """The first tokens of a side: ids alone, or ids with their texts."""
    if not ids:
        return "nothing"
    part = list(ids[:SHOWN])
    return ", ".join(f"{token} {name(token)!r}" for token in part) if name else str(part)


def require_same(
    prompts: Sequence[Mapping[str, Any]],
    ids: Sequence[Sequence[int]],
    who: str,
    fix: str,
    name: Naming | None = None,
) -> None:
    """Raise GateFailed at the first prompt whose ``ids`` from ``who`` are not those of the checkpoint's own tokenizer.

    prompts: {"ids", "text", "messages"} as transformers rendered them. name: the text of a token, for the message.
    """
    for number, (prompt, found) in enumerate(zip(prompts, ids, strict=True), 1):
        at = first_difference(prompt["ids"], found)
        if at is not None:
            raise _difference(who, prompt, number, at, found, fix, name)


def _difference(
    who: str, prompt: Mapping[str, Any], number: int, at: int, found: Sequence[int], fix: str, name: Naming | None
) -> GateFailed:
    expected = prompt["ids"][at:]
    asked = next((m["content"] for m in reversed(prompt["messages"]) if m["role"] == "user"), "")[:60]
    kind = f", {prompt['kind']}" if prompt.get("kind") else ""
    error = GateFailed(
        f"the prompt of {who} differs from the checkpoint's at token {at}: {shown(found[at:], name)} instead of "
        f"{shown(expected, name)}.",
        why=f"Conversation {number}{kind} ({asked!r}); the checkpoint's own tokenizer and chat template are the truth.",
        fix=fix,
    )
    error.details = {
        "source": who,
        "conversation": number,
        "token": at,
        "found": list(found[at : at + SHOWN]),
        "expected": list(expected[:SHOWN]),
    }
    return error


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


def require_training(
    checkpoint: Checkpoint, training: Training, prompts: Sequence[Mapping[str, Any]], rendered: Mapping[str, Any]
) -> list[str]:
    """Raise GateFailed when the checkpoint's tokenizer renders a prompt otherwise than training did, or training ended
    answers with a token that does not end them on the box. Gives notes for what is allowed to differ.

    prompts: {"ids", "trained", "kind", "messages"}; trained may be None. rendered: workers/samples.py's answer, for
    the ids of a thought's opening and of an answer's end.
    """
    who = f"the training template {training.name}"
    carry = (
        f"If {training.name} is right, give the checkpoint its template: packager templates show {training.name} > "
        "chat_template.jinja in its folder."
        if training.slots
        else f"If {training.name} is right, save it as chat_template.jinja in the checkpoint's folder."
    )
    fix = f"{carry} If the checkpoint is right, leave --template out or name the one it was trained with."
    if checkpoint.tokenizer.chat_template is None:
        raise GateFailed(
            f"{checkpoint.name} has no chat template, and {who} renders prompts that no server would.",
            why="The export left the template out, so a server can only continue plain text.",
            fix=carry,
        )
    notes: list[str] = []
    compared = 0
    for number, prompt in enumerate(prompts, 1):
        trained, ids = prompt["trained"], list(prompt["ids"])
        if trained is None:
            continue
        compared += 1
        at = first_difference(ids, trained)
        if at is None:
            continue
        if ids[: len(trained)] == trained and ids[len(trained) :] == list(rendered["opening"]):
            told = f"the chat template opens the thought itself, which {who} left to the answer"
        elif prompt.get("kind") in EDGES:
            told = f"{who} renders conversations of the kind {prompt['kind']!r} otherwise than the checkpoint"
        else:
            raise _difference(who, prompt, number, at, trained, fix, token_names(checkpoint))
        if told not in notes:
            notes.append(told)
    if not compared:
        raise GateFailed(f"{who} renders none of the {len(prompts)} conversations.", fix=fix)
    end = rendered["end"]
    if end is None and training.slots and training.slots.replaces_eos:
        raise GateFailed(
            f"{who} ends answers with {training.slots.stops[0]!r}, which is not in the vocabulary of "
            f"{checkpoint.name}.",
            why="Training added it to the vocabulary; these tokenizer files are from before that.",
            fix="Take the tokenizer files that training saved.",
        )
    if end is not None and end not in checkpoint.tokenizer.stop_ids:
        raise GateFailed(
            f"{who} ends answers with {end} {token_names(checkpoint)(end)!r}, which is no end token of "
            f"{checkpoint.name} ({', '.join(map(str, checkpoint.tokenizer.stop_ids)) or 'it has none'}).",
            why="The box would go on after every answer.",
            fix=f'Add {end} to "eos_token_id" in generation_config.json.',
        )
    return notes
