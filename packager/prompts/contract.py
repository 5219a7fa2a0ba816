"""The prompt contract: training, the checkpoint's tokenizer, the artifact and the box render the same token ids.

They also have one BOS and the right end token. Otherwise the build stops with the first token that differs, its text,
the two sources and what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from packager.core.errors import GateFailed

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from packager.checkpoint.checkpoint import Checkpoint
    from packager.prompts.training_template import Training

Naming = Callable[[int], str]

# Kinds of conversations in which LLaMA-Factory and Ollama may differ from a chat template, and which training data
# rarely has: both treat an empty system message as none, strip earlier thoughts in their own way or not at all, and
# never trim. A difference in these is reported as a note; the build continues.
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
    """A function from token id to text; it loads the tokenizer at the first call."""

    @cache
    def tokenizer() -> Tokenizer:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(checkpoint.path / "tokenizer.json"))

    return lambda token: str(tokenizer().decode([token], skip_special_tokens=False))


def shown(ids: Sequence[int], name: Naming | None) -> str:
    """The first tokens of one side: ids, with their texts when ``name`` is given."""
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
    """Raise GateFailed at the first prompt whose ids from ``who`` differ from those of the checkpoint's own tokenizer.

    prompts: {"ids", "text", "messages"} as transformers rendered them. name: the text of a token, for the message.
    """
    for number, (prompt, actual) in enumerate(zip(prompts, ids, strict=True), 1):
        at = first_difference(prompt["ids"], actual)
        if at is not None:
            raise _difference(who, prompt, number, at, actual, fix, name)


def _difference(
    who: str, prompt: Mapping[str, Any], number: int, at: int, actual: Sequence[int], fix: str, name: Naming | None
) -> GateFailed:
    expected = prompt["ids"][at:]
    question = next((m["content"] for m in reversed(prompt["messages"]) if m["role"] == "user"), "")[:60]
    kind = f", {prompt['kind']}" if prompt.get("kind") else ""
    error = GateFailed(
        f"the prompt of {who} differs from the checkpoint's at token {at}: {shown(actual[at:], name)} instead of "
        f"{shown(expected, name)}.",
        why=f"Conversation {number}{kind} ({question!r}), compared with the checkpoint's own tokenizer and template.",
        fix=fix,
    )
    error.details = {
        "source": who,
        "conversation": number,
        "token": at,
        "found": list(actual[at : at + SHOWN]),
        "expected": list(expected[:SHOWN]),
    }
    return error


def require_one_bos(prompts: Sequence[Mapping[str, Any]], bos: int | None) -> None:
    """Raise GateFailed when a rendered prompt begins with BOS twice: from the template and from the tokenizer."""
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
    """Raise GateFailed when the checkpoint's tokenizer and training render a prompt differently, or when training ended
    answers with a token that is no stop token of the checkpoint. Returns notes on the differences that are allowed.

    prompts: {"ids", "trained", "kind", "messages"}; trained may be None. rendered: the output of workers/samples.py,
    with the ids of a thought's opening and of an answer's end.
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
            note = f"the chat template opens the thought itself, which {who} left to the answer"
        elif prompt.get("kind") in EDGES:
            note = f"{who} renders conversations of the kind {prompt['kind']!r} differently from the checkpoint"
        else:
            raise _difference(who, prompt, number, at, trained, fix, token_names(checkpoint))
        if note not in notes:
            notes.append(note)
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
