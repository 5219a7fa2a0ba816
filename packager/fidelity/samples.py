"""The token samples of a build: the contract's prompts, the scored conversations, the calibration.

transformers renders and tokenizes them with the checkpoint's own tokenizer, in a child (workers/samples.py). With a
known training template, conversations are also rendered by it, as training did.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from packager.core.errors import InputError
from packager.core.processes import WORKERS, follow
from packager.core.store import Cost, Step, digest_of
from packager.fidelity.pairs import choose
from packager.prompts.calibration import DATA, Calibration, Message, general, split, spread
from packager.recipe import Job

POSITIONS = 256
LONGEST = 512  # tokens of a sequence of general text or calibration
LONGEST_PAIR = 8192  # tokens of a pair, which the reference holds in memory as one sequence
CALIBRATION_TOKENS = 8192
OWN_PROMPTS = 8
JUDGED, JUDGED_TOKENS = 8, 128  # pieces of the calibration file that the source scores, and tokens of each
FINE_TUNING = "fine-tuning pair"


class ScoredSequence(TypedDict):
    """Tokens to score. positions: of the scored tokens. set: "general" (a conversation included in the package) or
    "tuning" (a fine-tuning pair, scored at every token of its answer). held: the pair is kept out of the calibration.
    """

    ids: list[int]
    positions: list[int]
    set: Literal["general", "tuning"]
    held: NotRequired[bool]


class PairCounts(TypedDict):
    """The fine-tuning pairs in a report. given: in the user's file. asked: scored. why: the reason for scoring fewer.
    left_out: chosen pairs that cannot be scored, by the reason.
    """

    given: int
    asked: int
    why: str
    left_out: dict[str, int]


@dataclass(frozen=True)
class Samples:
    """The token samples. prompts: {"ids", "text", "messages", "kind", "trained"} as transformers renders them; trained:
    the ids of the training template, None without one. calibration: id lists for input statistics. step: of the store.
    typed: special tokens that become control tokens when a user types them. notes: differences that the contract
    allows. training: the training template's name. judged: pieces of the user's plain text, for the check of its
    language (language.py). pairs: None without fine-tuning pairs.
    """

    sequences: tuple[ScoredSequence, ...]
    prompts: tuple[Mapping[str, Any], ...]
    calibration: tuple[list[int], ...]
    step: Step
    typed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    training: str | None = None
    judged: tuple[list[int], ...] = ()
    pairs: PairCounts | None = None

    @property
    def key(self) -> str:
        """The key of all that is scored: the rendering, and the sequences chosen from it."""
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
        """The contract's entry in an artifact's report."""
        return {
            "conversations": len(self.prompts),
            "kinds": sorted({str(prompt.get("kind")) for prompt in self.prompts}),
            "training_template": self.training,
            "typed_control_tokens": list(self.typed),
            "notes": list(self.notes),
        }


def contract_talks() -> list[dict[str, Any]]:
    """Conversations for the contract alone, not for scores or calibration: {"kind", "messages"}."""
    talks: list[dict[str, Any]] = json.loads((DATA / "contract.json").read_text(encoding="utf-8"))
    return talks


def contract_prompts(
    conversations: tuple[tuple[Message, ...], ...], own: tuple[tuple[Message, ...], ...]
) -> list[dict[str, Any]]:
    """The contract's prompts as {"kind", "messages"}: the user's own conversations (up to OWN_PROMPTS), then
    ``conversations``, both without their last answer, then the contract's own.
    """
    talks = [(FINE_TUNING, talk) for talk in own[:OWN_PROMPTS]] + [("general", talk) for talk in conversations]
    cut: list[dict[str, Any]] = []
    for kind, talk in talks:
        messages = list(talk[:-1]) if talk[-1]["role"] == "assistant" else list(talk)
        cut.append({"kind": _edge(messages) or kind, "messages": messages})
    return [*cut, *contract_talks()]


def _edge(messages: Sequence[Message]) -> str | None:
    """The kind of a conversation that a training template may render differently (contract.EDGES); None for others."""
    if messages and messages[0]["role"] == "system" and not messages[0]["content"]:
        return "empty system"
    if any(message["role"] == "assistant" and "</think>" in message["content"] for message in messages):
        return "earlier thoughts"
    if any(message["content"] != message["content"].strip() for message in messages):
        return "outer spaces"
    return None


def make_samples(job: Job, context: int | None = None) -> Samples:
    """Render and tokenize the samples of a build, once. context: tokens of a conversation on the box; None: the
    model's.

    Raises GateFailed when the training template and the checkpoint's tokenizer disagree, before anything is converted;
    InputError when the chat template refuses every conversation.
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
        "asked": len(choice.scored),
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
                "pairs": [list(talk) for talk in choice.scored] if templated else [],
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
    rendered = step.read_json("samples.json")
    kept = [{**ids, **prompt} for ids, prompt in zip(rendered["prompts"], prompts, strict=True) if ids]
    notes = []
    if len(kept) < len(prompts):
        refusal = rendered["refusal"] or "it gave no reason"
        if not kept:
            raise InputError(
                f"the chat template of {checkpoint.name} refuses every conversation: {refusal}.",
                fix="Compare it with the base model's chat template; a tokenizer without one can be packaged too.",
            )
        notes.append(
            f"the chat template refuses {len(prompts) - len(kept)} of {len(prompts)} sample conversations "
            f"({refusal}); the others are checked"
        )
    if rendered["invented"]:
        notes.append(
            f"transformers adds {', '.join(rendered['invented'])} to this tokenizer, whose files do not have it; the "
            "files decide: it is plain text when a user types it"
        )
    require_one_bos(kept, checkpoint.tokenizer.bos_id)
    if trained:
        notes += require_training(checkpoint, trained, kept, rendered)
    notes += require_agreement(checkpoint, kept, trained.name if trained else None)
    most = min(LONGEST_PAIR, checkpoint.shape.context, context or checkpoint.shape.context)
    pairs, left = _pairs(rendered["pairs"], checkpoint.tokenizer.stop_ids, choice.held, most)
    if not templated and choice.scored:
        left = {"the model has no chat template": len(choice.scored)}
    if left:
        reasons = ", ".join(f"{count} ({reason})" for reason, count in left.items())
        notes.append(f"of {len(choice.scored)} fine-tuning pairs {sum(left.values())} cannot be scored: {reasons}")
    for note in notes:
        job.progress.note(note)
    # without a chat template conversations are plain text, behind the user's own texts and the package's
    talks = rendered["conversations"] if templated else rendered["texts"][len(texts) :]
    return Samples(
        sequences=(*_general(rendered, len(builtin.conversations), templated), *pairs),
        prompts=tuple(kept),
        calibration=tuple(_calibration(rendered["texts"], talks, own, len(builtin.conversations))),
        step=step,
        typed=tuple(rendered["typed"]),
        notes=tuple(notes),
        training=trained.name if trained else None,
        judged=tuple(_judged(rendered, own)),
        pairs={"given": choice.given, "asked": len(pairs), "why": choice.why, "left_out": left}
        if choice.given
        else None,
    )


def plain(talk: tuple[Message, ...]) -> str:
    """A conversation as text, for a model without a chat template."""
    return "\n".join(message["content"] for message in talk)


def _general(rendered: Mapping[str, Any], count: int, templated: bool) -> list[ScoredSequence]:
    """Every other conversation included in the package, at POSITIONS positions spread over them."""
    talks = rendered["conversations" if templated else "texts"][-count:][1::2]  # _calibration has the others
    cut = [ids[:LONGEST] for ids in talks if ids]  # without those that the template refuses
    return [
        {"ids": ids, "positions": positions, "set": "general"}
        for ids, positions in zip(cut, spread([len(ids) for ids in cut], POSITIONS), strict=True)
        if positions
    ]


def _pairs(
    pairs: Sequence[Mapping[str, list[int]] | None], stops: Collection[int], held: int, longest: int
) -> tuple[list[ScoredSequence], dict[str, int]]:
    """(sequences, number left out by reason): each pair at every token of its answer, the end token included.

    held: the number of pairs, from the first, that are kept out of the calibration. longest: tokens that the model
    takes. A pair is left out when the template renders the answer differently from what follows its own generation
    prompt (without thoughts), because there is nothing to compare.
    """
    chosen: list[ScoredSequence] = []
    left: Counter[str] = Counter()
    for number, pair in enumerate(pairs):
        if pair is None:
            left["the chat template refuses them"] += 1
            continue
        begin, ids = len(pair["prompt"]), pair["whole"]
        end = next((place + 1 for place in range(begin, len(ids)) if ids[place] in stops), len(ids))
        if ids[:begin] != pair["prompt"]:
            left["the chat template renders the answer differently from what follows its own prompt"] += 1
        elif begin >= end:
            left["the answer is empty"] += 1
        elif end > longest:
            left[f"longer than {longest} tokens"] += 1
        else:
            positions = list(range(begin, end))
            chosen.append({"ids": ids[:end], "positions": positions, "set": "tuning", "held": number < held})
    return chosen, dict(sorted(left.items()))


def _calibration(
    texts: list[list[int]], talks: list[list[int] | None], own: Calibration | None, count: int
) -> list[list[int]]:
    """Fine-tuning data first, then general text, up to CALIBRATION_TOKENS; at least a quarter is general text. Of the
    package's ``count`` conversations, the last ones of ``talks``, every other one: ``_general`` scores the rest, so
    that no score is computed on data that the weights were tuned on.
    """
    general_part = split(texts[len(own.texts) if own else 0], LONGEST)
    mine: list[list[int]] = []
    talks = talks[:-count] + talks[-count:][::2]
    for ids in [*filter(None, talks), *(texts[: len(own.texts)] if own else [])]:
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


def _judged(rendered: Mapping[str, Any], own: Calibration | None) -> list[list[int]]:
    """A few pieces of the user's plain text, evenly spread, for the check of its language (language.py)."""
    if own is None:
        return []
    pieces: list[list[int]] = []
    for ids in rendered["texts"][: len(own.texts)]:
        pieces += [piece for piece in split(ids, JUDGED_TOKENS) if len(piece) > 1]
    step = max(1, len(pieces) / JUDGED)
    return [pieces[int(number * step)] for number in range(min(JUDGED, len(pieces)))]
