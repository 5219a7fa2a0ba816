"""The source's side of every comparison: its rendered samples, its next-token distributions, its input statistics.

Owner of transformers and torch, which run in children (children/samples.py, children/reference.py), so that their
memory is gone when the step is. Nothing here depends on the artifact's format.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packager import calibration
from packager.calibration import Calibration, Conversation, Message, general, split, spread
from packager.errors import InputError
from packager.recipe import Job
from packager.store import Cost, Step, code_digest
from packager.tools import CHILDREN, follow, version_of

TOP = 64  # tokens compared a position; the rest of the vocabulary is one bucket
POSITIONS = 256
HELD_OUT_AT_LEAST = 8
PAIRS = 32  # fine-tuning pairs asked again
PAIR_POSITIONS = 768  # tokens of their answers, at most
LONGEST = 512  # tokens a sequence
CALIBRATION_TOKENS = 8192


@dataclass(frozen=True)
class Samples:
    """What the source is asked. sequences: {"ids", "positions", "set"} for scoring; the set is "general" (conversations
    the package carries) or "tuning" (a fine-tuning pair, scored at every token of its answer). prompts: {"ids", "text",
    "messages"} as training rendered them. calibration: id lists for input statistics. step: where it is stored.
    held_out: whether the pairs that are scored are kept out of the calibration.
    """

    sequences: tuple[Mapping[str, Any], ...]
    prompts: tuple[Mapping[str, Any], ...]
    calibration: tuple[list[int], ...]
    step: Step
    held_out: bool = False

    @property
    def targets(self) -> list[int | None]:
        """The token that follows each scored position, in order."""
        return [sequence["ids"][p] for sequence in self.sequences for p in sequence["positions"]]


def contract_prompts(
    conversations: tuple[tuple[Message, ...], ...], own: tuple[tuple[Message, ...], ...]
) -> list[list[Message]]:
    """Conversations cut before their last answer: what a server is asked. Up to eight of the user's own come first."""
    talks = [*own[:8], *conversations]
    return [list(talk[:-1]) if talk[-1]["role"] == "assistant" else list(talk) for talk in talks]


def divide(talks: tuple[Conversation, ...]) -> tuple[list[Conversation], list[Conversation], bool]:
    """Fine-tuning conversations as (for calibration, to be asked again, whether the two are disjoint).

    Every tenth is held out where that leaves enough; of a few pairs all serve both, since what is asked again must be
    what was taught.
    """
    answered = [talk for talk in talks if talk[-1]["role"] == "assistant" and len(talk) > 1]
    held = answered[::10]
    if len(held) < HELD_OUT_AT_LEAST:
        return list(talks), answered[:PAIRS], False
    away = {id(talk) for talk in held}
    return [talk for talk in talks if id(talk) not in away], held[:PAIRS], True


def make_samples(job: Job) -> Samples:
    """Render and tokenize what the build needs, once, with the checkpoint's own tokenizer through transformers."""
    checkpoint, own = job.checkpoint, job.calibration
    builtin = general()
    templated = checkpoint.tokenizer.chat_template is not None
    inputs = {
        "checkpoint": checkpoint.digest,
        "calibration": own.digest if own else None,
        "builtin": builtin.digest,
        "transformers": version_of("transformers"),
        "templated": templated,
        "code": code_digest(Path(__file__), CHILDREN / "samples.py", Path(calibration.__file__)),
    }

    taught, asked, held_out = divide(own.conversations if own else ())
    prompts = contract_prompts(builtin.conversations, own.conversations if own else ()) if templated else []

    def make(folder: Path, cost: Cost) -> None:
        talks = [*taught, *builtin.conversations]
        follow(
            CHILDREN / "samples.py",
            {
                "checkpoint": str(checkpoint.path),
                "output": str(folder / "samples.json"),
                "conversations": [list(talk) for talk in talks] if templated else [],
                "prompts": prompts,
                "pairs": [list(talk) for talk in asked] if templated else [],
                "texts": [
                    *(own.texts if own else ()),
                    *builtin.texts,
                    *([] if templated else [plain(talk) for talk in talks]),
                ],
            },
            "rendering the samples",
            job.progress,
            cost,
            work=folder,
        )

    step = job.store.step("samples", inputs, make, progress=job.progress)
    found = step.read_json("samples.json")
    kept = [
        {**prompt, "messages": messages} for prompt, messages in zip(found["prompts"], prompts, strict=True) if prompt
    ]
    if len(kept) < len(prompts):
        refusal = found["refusal"] or "it gave no reason"
        if not kept:
            raise InputError(
                f"the chat template of {checkpoint.name} refuses every conversation: {refusal}.",
                fix="Compare it with the base model's chat template; a tokenizer without one can be packaged too.",
            )
        job.progress.note(
            f"the chat template refuses {len(prompts) - len(kept)} of {len(prompts)} sample conversations "
            f"({refusal}); the others are checked"
        )
    return Samples(
        sequences=(
            *_general(found, len(builtin.conversations), templated),
            *_pairs(found["pairs"], checkpoint.tokenizer.stop_ids),
        ),
        prompts=tuple(kept),
        calibration=tuple(_calibration(found, own, len(builtin.conversations))),
        step=step,
        held_out=held_out,
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


def _pairs(pairs: Sequence[Mapping[str, list[int]] | None], stops: Collection[int]) -> list[Mapping[str, Any]]:
    """Each pair at every token of its answer, the end token included, as long as there is room.

    A template that renders an answer differently from what follows its generation prompt (thoughts taken out) leaves
    nothing to compare: such a pair is left out.
    """
    chosen: list[Mapping[str, Any]] = []
    room = PAIR_POSITIONS
    for pair in filter(None, pairs):
        begin, ids = len(pair["prompt"]), pair["whole"]
        if ids[:begin] != pair["prompt"]:
            continue
        end = next((place + 1 for place in range(begin, len(ids)) if ids[place] in stops), len(ids))
        if begin < end <= LONGEST and end - begin <= room:
            room -= end - begin
            chosen.append({"ids": ids[:end], "positions": list(range(begin, end)), "set": "tuning"})
    return chosen


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


def _run(
    job: Job, samples: Samples, folder: Path, cost: Cost, name: str, model: Path | None = None, **outputs: str | None
) -> None:
    layers = float(job.checkpoint.shape.layers)
    follow(
        CHILDREN / "reference.py",
        {
            "checkpoint": str(model or job.checkpoint.path),
            "sequences": list(samples.sequences),
            "top": TOP,
            "calibration": list(samples.calibration),
            "threads": os.cpu_count() or 1,
            **outputs,
        },
        name,
        job.progress,
        cost,
        work=folder,
        total=layers,
        unit="layers",
    )


def _inputs(job: Job, samples: Samples) -> dict[str, object]:
    return {
        "checkpoint": job.checkpoint.digest,
        "samples": samples.step.key,
        "torch": version_of("torch"),
        "transformers": version_of("transformers"),
        "threads": os.cpu_count() or 1,
        "code": code_digest(CHILDREN / "reference.py"),
    }


def source_scores(job: Job, samples: Samples) -> tuple[list[dict[int, float]], Step]:
    """The source's best TOP tokens at every scored position: token -> log-probability (natural), best first."""

    def make(folder: Path, cost: Cost) -> None:
        _run(job, samples, folder, cost, "scoring the source", scores=str(folder / "scores.npz"), imatrix=None)

    step = job.store.step("reference", {**_inputs(job, samples), "top": TOP}, make, progress=job.progress)
    return _distributions(step), step


def dequantized_scores(job: Job, samples: Samples, model: Step) -> tuple[list[dict[int, float]], Step]:
    """The same for a GPTQ folder (a step's), its weights dequantized and computed with in float32: what the numbers
    are worth, not what a serving engine makes of them.
    """

    def make(folder: Path, cost: Cost) -> None:
        outputs = {"scores": str(folder / "scores.npz"), "imatrix": None}
        _run(job, samples, folder, cost, "scoring the dequantized weights", model.path, **outputs)

    inputs = {**_inputs(job, samples), "top": TOP, "model": model.key}
    step = job.store.step("dequantized", inputs, make, progress=job.progress)
    return _distributions(step), step


def _distributions(step: Step) -> list[dict[int, float]]:
    import numpy as np

    with np.load(step.path / "scores.npz", allow_pickle=False) as stored:
        ids, logprobs = stored["ids"].tolist(), stored["logprobs"].tolist()
    return [dict(zip(row, values, strict=True)) for row, values in zip(ids, logprobs, strict=True)]


def input_squares(job: Job, samples: Samples) -> tuple[Path, Step]:
    """The .npz of mean squared inputs per channel of every linear layer, by Hugging Face module name."""

    def make(folder: Path, cost: Cost) -> None:
        _run(
            job,
            samples,
            folder,
            cost,
            "gathering the importance matrix",
            scores=None,
            imatrix=str(folder / "squares.npz"),
        )

    step = job.store.step("input-squares", _inputs(job, samples), make, progress=job.progress)
    return step.path / "squares.npz", step
