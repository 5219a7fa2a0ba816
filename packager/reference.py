"""The source's side of every comparison: its rendered samples, its next-token distributions, its input statistics.

Owner of transformers and torch, which run in children (children/samples.py, children/reference.py), so that their
memory is gone when the step is. Nothing here depends on the artifact's format.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packager import calibration
from packager.calibration import Calibration, Message, general, split, spread
from packager.errors import InputError
from packager.recipe import Job
from packager.store import Cost, Step, code_digest
from packager.tools import CHILDREN, follow, version_of

TOP = 64  # tokens compared a position; the rest of the vocabulary is one bucket
POSITIONS = 256
LONGEST = 512  # tokens a sequence
CALIBRATION_TOKENS = 8192


@dataclass(frozen=True)
class Samples:
    """What the source is asked. sequences: {"ids", "positions"} for scoring. prompts: {"ids", "text", "messages"} as
    training rendered them. calibration: id lists for input statistics. step: where it is stored."""

    sequences: tuple[Mapping[str, Any], ...]
    prompts: tuple[Mapping[str, Any], ...]
    calibration: tuple[list[int], ...]
    step: Step

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

    def make(folder: Path, cost: Cost) -> None:
        talks = [*(own.conversations if own else ()), *builtin.conversations]
        prompts = contract_prompts(builtin.conversations, own.conversations if own else ())
        follow(
            CHILDREN / "samples.py",
            {
                "checkpoint": str(checkpoint.path),
                "output": str(folder / "samples.json"),
                "conversations": [list(talk) for talk in talks] if templated else [],
                "prompts": prompts if templated else [],
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
    prompts = contract_prompts(builtin.conversations, own.conversations if own else ()) if templated else []
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
        sequences=_sequences(found, builtin, own, templated),
        prompts=tuple(kept),
        calibration=tuple(_calibration(found, own, len(builtin.conversations))),
        step=step,
    )


def plain(talk: tuple[Message, ...]) -> str:
    """A conversation as text, for a model without a chat template."""
    return "\n".join(message["content"] for message in talk)


def _sequences(
    found: Mapping[str, Any], builtin: Calibration, own: Calibration | None, templated: bool
) -> tuple[Mapping[str, Any], ...]:
    if templated:
        count = len(builtin.conversations)
        rendered = found["conversations"][-count:][1::2] + found["conversations"][:-count][:8]
        rendered = [ids for ids in rendered if ids]  # without those that the template refuses
    else:
        rendered = found["texts"][-len(builtin.conversations) :][1::2]
    cut = [ids[:LONGEST] for ids in rendered]
    return tuple(
        {"ids": ids, "positions": positions}
        for ids, positions in zip(cut, spread([len(ids) for ids in cut], POSITIONS), strict=True)
    )


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
