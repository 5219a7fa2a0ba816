"""What a model is asked, rendered once: the contract's prompts, the scored conversations, the calibration.

Everything is rendered and tokenized by transformers with the checkpoint's own tokenizer, in a child
(workers/samples.py); where the training template is known, conversations are rendered by that too, as training did.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packager.core.errors import InputError
from packager.core.processes import WORKERS, follow
from packager.core.store import Cost, Step, digest_of
from packager.fidelity.asking import choose
from packager.prompts.calibration import DATA, Calibration, Message, general, split, spread
from packager.recipe import Job

POSITIONS = 256
LONGEST = 512  # tokens a sequence of general text and of the calibration
LONGEST_PAIR = 8192  # tokens of a pair: what the reference holds in memory for one sequence
CALIBRATION_TOKENS = 8192
OWN_PROMPTS = 8
JUDGED, JUDGED_TOKENS = 8, 128  # pieces of the calibration file that the source itself is asked about
FINE_TUNING = "fine-tuning pair"


@dataclass(frozen=True)
class Samples:
    """What the source is asked. sequences: {"ids", "positions", "set"} for scoring; the set is "general" (conversations
    the package carries) or "tuning" (a fine-tuning pair, scored at every token of its answer). prompts: {"ids", "text",
    "messages", "kind", "trained"} as transformers renders them; trained: the ids of the training template, None where
    it is not known. calibration: id lists for input statistics. step: where it is stored. typed: special tokens that
    become control tokens when a user types them. notes: what the contract found and let pass. training: the training
    template's name. judged: pieces of the user's own plain text, which the source is asked about (language.py). pairs:
    {"given", "asked", "why", "left_out"} of the fine-tuning pairs, None without any.
    """

    sequences: tuple[Mapping[str, Any], ...]
    prompts: tuple[Mapping[str, Any], ...]
    calibration: tuple[list[int], ...]
    step: Step
    typed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    training: str | None = None
    judged: tuple[list[int], ...] = ()
    pairs: Mapping[str, Any] | None = None

    @property
    def key(self) -> str:
        """Names all that is scored: the rendering, and which of its sequences were chosen."""
        return digest_of([self.step.key, list(self.sequences), list(self.judged)])[:40]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max((len(sequence["ids"]) for sequence in self.sequences), default=0)

    @property
    def targets(self) -> list[int | None]:
        """The token that follows each scored position, in order."""
        return [sequence["ids"][p] for sequence in self.sequences for p in sequence["positions"]]

    def contract(self) -> dict[str, Any]:
        """What was compared, as it stands in an artifact's report."""
        return {
            "conversations": len(self.prompts),
            "kinds": sorted({str(prompt.get("kind")) for prompt in self.prompts}),
            "training_template": self.training,
            "typed_control_tokens": list(self.typed),
            "notes": list(self.notes),
        }


def contract_talks() -> list[dict[str, Any]]:
    """The conversations that only the contract renders: {"kind", "messages"}; no score and no calibration sees them."""
    found: list[dict[str, Any]] = json.loads((DATA / "contract.json").read_text(encoding="utf-8"))
    return found


def contract_prompts(
    conversations: tuple[tuple[Message, ...], ...], own: tuple[tuple[Message, ...], ...]
) -> list[dict[str, Any]]:
    """What a server is asked, as {"kind", "messages"}: the user's own conversations first (up to OWN_PROMPTS), then
    those given, all cut before their last answer, then the contract's own.
    """
    talks = [(FINE_TUNING, talk) for talk in own[:OWN_PROMPTS]] + [("general", talk) for talk in conversations]
    cut: list[dict[str, Any]] = []
    for kind, talk in talks:
        messages = list(talk[:-1]) if talk[-1]["role"] == "assistant" else list(talk)
        cut.append({"kind": _edge(messages) or kind, "messages": messages})
    return [*cut, *contract_talks()]


def _edge(messages: Sequence[Message]) -> str | None:
    """The kind of a conversation that a training template may render in its own way (contract.EDGES)."""
    if messages and messages[0]["role"] == "system" and not messages[0]["content"]:
        return "empty system"
    if any(message["role"] == "assistant" and "</think>" in message["content"] for message in messages):
        return "earlier thoughts"
    if any(message["content"] != message["content"].strip() for message in messages):
        return "outer spaces"
    return None


def make_samples(job: Job, context: int | None = None) -> Samples:
    """Render and tokenize what the build needs, once. context: tokens of a conversation that the artifact takes, where
    it takes fewer than the model.

    Raises GateFailed when the training template and the checkpoint's tokenizer disagree, before anything is converted;
    InputError when the chat template refuses everything.
    """
    from packager.prompts.contract import require_one_bos, require_training
    from packager.prompts.ollama_modelfile import require_agreement

    checkpoint, own, trained = job.checkpoint, job.calibration, job.training
    builtin = general()
    templated = checkpoint.tokenizer.chat_template is not None
    choice = choose(own.conversations if own else (), checkpoint, job.ask)
    prompts = contract_prompts(builtin.conversations, own.conversations if own else ()) if templated else []
    texts = [*(own.texts if own else ()), *builtin.texts]
    inputs = {
        "checkpoint": checkpoint.digest,
        "calibration": own.digest if own else None,
        "builtin": builtin.digest,
        "contract": contract_talks(),
        "training": trained.digest if trained else None,
        "templated": templated,
        "asked": len(choice.asked),
    }

    def make(folder: Path, cost: Cost) -> None:
        talks = [*choice.calibrated, *builtin.conversations]
        follow(
            WORKERS / "samples.py",
            {
                "checkpoint": str(checkpoint.path),
                "output": str(folder / "samples.json"),
                "conversations": [list(talk) for talk in talks] if templated else [],
                "prompts": [prompt["messages"] for prompt in prompts],
                "pairs": [list(talk) for talk in choice.asked] if templated else [],
                "texts": [*texts, *([] if templated else [plain(talk) for talk in talks])],
                "training": trained.as_job() if trained else None,
                "vocabulary": checkpoint.tokenizer.vocab_size,
            },
            "rendering the samples",
            job.progress,
            cost,
            work=folder,
            path=[WORKERS.parent.parent],
        )

    step = job.store.step("samples", inputs, make, progress=job.progress)
    found = step.read_json("samples.json")
    kept = [{**prompt, **asked_} for prompt, asked_ in zip(found["prompts"], prompts, strict=True) if prompt]
    notes = []
    if len(kept) < len(prompts):
        refusal = found["refusal"] or "it gave no reason"
        if not kept:
            raise InputError(
                f"the chat template of {checkpoint.name} refuses every conversation: {refusal}.",
                fix="Compare it with the base model's chat template; a tokenizer without one can be packaged too.",
            )
        notes.append(
            f"the chat template refuses {len(prompts) - len(kept)} of {len(prompts)} sample conversations "
            f"({refusal}); the others are checked"
        )
    if found["invented"]:
        notes.append(
            f"transformers adds {', '.join(found['invented'])} to this tokenizer, whose files have no such token; the "
            "files are followed: it is plain text when a user types it"
        )
    require_one_bos(kept, checkpoint.tokenizer.bos_id)
    if trained:
        notes += require_training(checkpoint, trained, kept, found)
    notes += require_agreement(checkpoint, kept, trained.name if trained else None)
    most = min(LONGEST_PAIR, checkpoint.shape.context, context or checkpoint.shape.context)
    pairs, left = _pairs(found["pairs"], checkpoint.tokenizer.stop_ids, choice.held, most)
    if left:
        reasons = ", ".join(f"{count} ({reason})" for reason, count in left.items())
        notes.append(f"of {len(choice.asked)} fine-tuning pairs {sum(left.values())} cannot be asked: {reasons}")
    for note in notes:
        job.progress.note(note)
    return Samples(
        sequences=(*_general(found, len(builtin.conversations), templated), *pairs),
        prompts=tuple(kept),
        calibration=tuple(_calibration(found, own, len(builtin.conversations))),
        step=step,
        typed=tuple(found["typed"]),
        notes=tuple(notes),
        training=trained.name if trained else None,
        judged=tuple(_judged(found, own)),
        pairs={"given": choice.given, "asked": len(pairs), "why": choice.why, "left_out": left}
        if choice.given
        else None,
    )


def plain(talk: tuple[Message, ...]) -> str:
    """A conversation as text, for a model without a chat template."""
    return "\n".join(message["content"] for message in talk)


def _general(found: Mapping[str, Any], count: int, templated: bool) -> list[Mapping[str, Any]]:
    """Every other conversation that the package carries, at POSITIONS positions spread over them."""
    rendered = found["conversations" if templated else "texts"][-count:][1::2]  # the others are in the calibration
    cut = [ids[:LONGEST] for ids in rendered if ids]  # without those that the template refuses
    return [
        {"ids": ids, "positions": positions, "set": "general"}
        for ids, positions in zip(cut, spread([len(ids) for ids in cut], POSITIONS), strict=True)
        if positions
    ]


def _pairs(
    pairs: Sequence[Mapping[str, list[int]] | None], stops: Collection[int], held: int, longest: int
) -> tuple[list[Mapping[str, Any]], dict[str, int]]:
    """Each pair at every token of its answer, the end token included; and how many are left out, by the reason.

    held: the first so many are kept out of the calibration. longest: tokens that the model takes. A template that
    renders an answer differently from what follows its generation prompt (thoughts taken out) leaves nothing to
    compare.
    """
    chosen: list[Mapping[str, Any]] = []
    left: Counter[str] = Counter()
    for number, pair in enumerate(pairs):
        if pair is None:
            left["the chat template refuses them"] += 1
            continue
        begin, ids = len(pair["prompt"]), pair["whole"]
        end = next((place + 1 for place in range(begin, len(ids)) if ids[place] in stops), len(ids))
        if ids[:begin] != pair["prompt"]:
            left["the chat template renders the answer otherwise than behind its own prompt"] += 1
        elif begin >= end:
            left["the answer is empty"] += 1
        elif end > longest:
            left[f"longer than {longest} tokens"] += 1
        else:
            positions = list(range(begin, end))
            chosen.append({"ids": ids[:end], "positions": positions, "set": "tuning", "held": number < held})
    return chosen, dict(sorted(left.items()))


def _calibration(found: Mapping[str, Any], own: Calibration | None, count: int) -> list[list[int]]:
    """Fine-tuning data first, then general text, until the budget of tokens is full; never less than a quarter
    general. Of the ``count`` conversations that the package carries every other one: the rest is what is scored, and a
    score on what was tuned on says nothing.
    """
    general_part = split(found["texts"][len(own.texts) if own else 0], LONGEST)
    mine: list[list[int]] = []
    talks = found["conversations"]
    talks = talks[:-count] + talks[-count:][::2]
    for ids in [*filter(None, talks), *(found["texts"][: len(own.texts)] if own else [])]:
        mine += split(ids, LONGEST)
    room = CALIBRATION_TOKENS
    chosen: list[list[int]] = []
    for piece in mine:
        if sum(map(len, chosen)) + len(piece) > room * 3 // 4:
            break
        chosen.append(piece)
    for piece in general_part:
        if sum(map(len, chosen)) + len(piece) > room:
            break
        chosen.append(piece)
    return chosen


def _judged(found: Mapping[str, Any], own: Calibration | None) -> list[list[int]]:
    """A few pieces of the user's plain text, spread over it: language.py asks the source whether it knows such text."""
    if own is None:
        return []
    pieces: list[list[int]] = []
    for ids in found["texts"][: len(own.texts)]:
        pieces += [piece for piece in split(ids, JUDGED_TOKENS) if len(piece) > 1]
    step = max(1, len(pieces) / JUDGED)
    return [pieces[int(number * step)] for number in range(min(JUDGED, len(pieces)))]
