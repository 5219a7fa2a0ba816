"""Properties of the artifact's generated answers: their length, whether they end, whether they close their thoughts.

Whether an answer is kept word for word is read from distributions (artifact.py). Length and thoughts need generation,
so the bundle's runtime answers a few prompts greedily, each with a limit of tokens; the report has their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from packager.fidelity.pairs import ANSWER_SECONDS, answered_within, even

if TYPE_CHECKING:
    from pathlib import Path

    from packager.checkpoint.checkpoint import Checkpoint
    from packager.core.store import Cost, Step
    from packager.fidelity.artifact import Candidate
    from packager.fidelity.samples import Samples
    from packager.recipe import Job

LONGEST = 1024  # most tokens of one answer; a pair's limit is twice its trained answer plus SLACK
SLACK = 64
THINKING_PROMPTS, THINKING_LIMIT = 2, 512  # for a reasoning model without pairs: prompts, and tokens of each answer
OPEN, CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class Answers:
    """asked: number of prompts answered. ended: number of answers with an end token below their limit. limit: the
    largest limit, tokens. tokens_mean: mean length of the answers, tokens, unfinished ones up to their limit.
    trained_tokens_mean: mean length of the trained answers; None without pairs. thoughts_opened, thoughts_closed:
    number of answers that began a thought, and of those that ended it; None for a model without thoughts.
    """

    asked: int
    ended: int
    limit: int
    tokens_mean: float
    trained_tokens_mean: float | None
    thoughts_opened: int | None
    thoughts_closed: int | None


class Question(TypedDict):
    """A prompt to answer. max_tokens: the answer's limit. trained: the trained answer's length in tokens, None for one
    of the package's prompts.
    """

    ids: list[int]
    max_tokens: int
    trained: int | None


class Answer(TypedDict):
    """A generated answer. finish: "stop" when it ended by itself, "length" at its limit."""

    ids: list[int]
    finish: str


def reasons(checkpoint: Checkpoint) -> bool:
    """Whether it is a reasoning model: its template or its added tokens contain the end of a thought."""
    from packager.checkpoint.tokenizer import read_json

    added = read_json(checkpoint.path / "tokenizer.json").get("added_tokens") or []
    return CLOSE in (checkpoint.tokenizer.chat_template or "") or any(entry.get("content") == CLOSE for entry in added)


def questions(samples: Samples, thinking: bool) -> list[Question]:
    """The prompts to answer: those of the fine-tuning pairs, or for a reasoning model without pairs two of the
    package's.
    """
    pairs = [sequence for sequence in samples.sequences if sequence["set"] == "tuning"]
    if pairs:
        return [
            {
                "ids": pair["ids"][: pair["positions"][0]],
                "max_tokens": min(LONGEST, 2 * len(pair["positions"]) + SLACK),
                "trained": len(pair["positions"]),
            }
            for pair in pairs
        ]
    if not thinking:
        return []
    plain = [prompt for prompt in samples.prompts if prompt.get("kind") == "general"][:THINKING_PROMPTS]
    return [{"ids": prompt["ids"], "max_tokens": THINKING_LIMIT, "trained": None} for prompt in plain]


def summarize(prompts: Sequence[Question], answers: Sequence[Answer], texts: Sequence[str]) -> Answers:
    """The summary of ``answers`` to ``prompts``. texts: each prompt's end with its answer, empty for a model without
    thoughts.
    """
    trained = [each["trained"] for each in prompts if each["trained"] is not None]
    opened = [text for text in texts if OPEN in text]
    return Answers(
        asked=len(prompts),
        ended=sum(each["finish"] == "stop" for each in answers),
        limit=max(each["max_tokens"] for each in prompts),
        tokens_mean=round(sum(len(each["ids"]) for each in answers) / len(answers), 1),
        trained_tokens_mean=round(sum(trained) / len(trained), 1) if trained else None,
        thoughts_opened=len(opened) if texts else None,
        thoughts_closed=sum(CLOSE in text.rpartition(OPEN)[2] for text in opened) if texts else None,
    )


def report(job: Job, form: Candidate, samples: Samples, steps: list[Step]) -> dict[str, Any] | None:
    """Generate answers with a form, once, and summarize them; None without prompts. "of" is the number of prompts, and
    "why" the reason for answering fewer.

    steps: the list to which the step is added. Raises ToolError.
    """
    from packager.core.processes import follow
    from packager.fidelity.artifact import runtime_copy, with_room

    thinking = reasons(job.checkpoint)
    every = questions(samples, thinking)
    if not every:
        return None
    count = answered_within([each["trained"] or each["max_tokens"] for each in every], form.seconds_a_token, job.ask)
    prompts = even(every, count)
    why = f"the budget is {ANSWER_SECONDS:.0f} s and a token takes about {form.seconds_a_token:.2g} s here"
    if not prompts:
        return {"asked": 0, "of": len(every), "why": why}
    runtime = runtime_copy(job, form.run.engine)
    run = with_room(form, max(len(each["ids"]) + each["max_tokens"] for each in prompts))

    def make(folder: Path, cost: Cost) -> None:
        follow(
            "runtimes",
            {"run": run, "prompts": prompts, "max_rss_bytes": form.max_rss_bytes or None},
            f"generating answers with {form.what}",
            job.progress,
            cost,
            work=folder,
            total=float(len(prompts)),
            unit="answers",
            path=[runtime.path],
            arguments=["answer", "--input", "{job}", "--output", folder / "answers.json"],
        )

    inputs = {**form.identity, "asked": prompts, "runtime": runtime.key}
    step = job.store.step("answers", inputs, make, progress=job.progress)
    steps.append(step)
    answered = step.read_json("answers.json")["answers"]
    summary = asdict(summarize(prompts, answered, _texts(job, prompts, answered) if thinking else []))
    return {**summary, "of": len(every), "why": why if count < len(every) else ""}


def _texts(job: Job, prompts: Sequence[Question], answers: Sequence[Answer]) -> list[str]:
    """Each answer with the last tokens of its prompt, in which a template may have opened the thought."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(job.checkpoint.path / "tokenizer.json"))
    return [
        str(tokenizer.decode([*prompt["ids"][-4:], *answer["ids"]], skip_special_tokens=False))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
