"""What an artifact says when it is left to answer: how long, whether it ends, whether it closes its thoughts.

Whether an answer is kept word for word is read from distributions (gates.py). Length and thoughts need generation, so a
few prompts are answered greedily through the runtime that ships, each with a limit; the report says how many and how
far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from packager.fidelity.asking import ANSWER_SECONDS, answered_within, even

if TYPE_CHECKING:
    from pathlib import Path

    from packager.checkpoint.checkpoint import Checkpoint
    from packager.core.store import Cost, Step
    from packager.fidelity.artifact import Candidate
    from packager.fidelity.samples import Samples
    from packager.recipe import Job

LONGEST = 1024  # tokens of one answer; a pair's limit is twice its trained answer and SLACK, at most this
SLACK = 64
THINKING_ASKED, THINKING_LIMIT = 2, 512  # of a reasoning model without pairs: prompts, and tokens each
OPEN, CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class Answers:
    """asked: prompts answered. ended: how many of the answers ended by themselves, below their limit of tokens. limit:
    the largest of those. tokens_mean: mean length of the answers in tokens, an unfinished one counted as far as it got.
    trained_tokens_mean: that of the answers that were taught; None without pairs. thoughts_opened, thoughts_closed: how
    many answers began a thought and how many of those ended it; None for a model without thoughts.
    """

    asked: int
    ended: int
    limit: int
    tokens_mean: float
    trained_tokens_mean: float | None
    thoughts_opened: int | None
    thoughts_closed: int | None


def reasons(checkpoint: Checkpoint) -> bool:
    """Whether the model thinks aloud: its template or its vocabulary knows the end of a thought."""
    from packager.checkpoint.tokenizer import read_json

    added = read_json(checkpoint.path / "tokenizer.json").get("added_tokens") or []
    return CLOSE in (checkpoint.tokenizer.chat_template or "") or any(entry.get("content") == CLOSE for entry in added)


def questions(samples: Samples, thinking: bool) -> list[dict[str, Any]]:
    """{"ids", "max_tokens", "trained"} of what is asked: fine-tuning pairs, or for a reasoning model two prompts that
    the package carries; trained is the taught answer's length in tokens, None for those.
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
    plain = [prompt for prompt in samples.prompts if prompt.get("kind") == "general"][:THINKING_ASKED]
    return [{"ids": prompt["ids"], "max_tokens": THINKING_LIMIT, "trained": None} for prompt in plain]


def summarize(asked: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> Answers:
    """found: {"ids", "finish"} of each answer. texts: prompt's end and answer together, empty for a model without
    thoughts.
    """
    trained = [each["trained"] for each in asked if each["trained"] is not None]
    opened = [text for text in texts if OPEN in text]
    return Answers(
        asked=len(asked),
        ended=sum(each["finish"] == "stop" for each in found),
        limit=max(each["max_tokens"] for each in asked),
        tokens_mean=round(sum(len(each["ids"]) for each in found) / len(found), 1),
        trained_tokens_mean=round(sum(trained) / len(trained), 1) if trained else None,
        thoughts_opened=len(opened) if texts else None,
        thoughts_closed=sum(CLOSE in text.rpartition(OPEN)[2] for text in opened) if texts else None,
    )


def report(job: Job, form: Candidate, samples: Samples, steps: list[Step]) -> dict[str, Any] | None:
    """Let a form answer, once, and describe the answers; None where there is nothing to ask. With pairs, "of" has how
    many were scored, and "why" the reason for answering fewer.

    steps: where the step is added. Raises ToolError.
    """
    from packager.core.processes import follow
    from packager.fidelity.artifact import runtime_copy, with_room

    thinking = reasons(job.checkpoint)
    every = questions(samples, thinking)
    if not every:
        return None
    count = answered_within([each["trained"] or each["max_tokens"] for each in every], form.seconds_a_token, job.ask)
    asked = even(every, count)
    why = f"the budget is {ANSWER_SECONDS:.0f} s and a token takes about {form.seconds_a_token:.2g} s here"
    if not asked:
        return {"asked": 0, "of": len(every), "why": why}
    runtime = runtime_copy(job, form.run.engine)
    run = with_room(form, max(len(each["ids"]) + each["max_tokens"] for each in asked))

    def make(folder: Path, cost: Cost) -> None:
        follow(
            "runtimes",
            {"run": run, "prompts": asked, "max_rss_bytes": form.max_rss_bytes or None},
            f"asking {form.what}",
            job.progress,
            cost,
            work=folder,
            total=float(len(asked)),
            unit="answers",
            path=[runtime.path],
            arguments=["answer", "--input", "{job}", "--output", folder / "answers.json"],
        )

    inputs = {**form.identity, "asked": asked, "runtime": runtime.key}
    step = job.store.step("answers", inputs, make, progress=job.progress)
    steps.append(step)
    answered = step.read_json("answers.json")["answers"]
    summary = asdict(summarize(asked, answered, _texts(job, asked, answered) if thinking else []))
    return {**summary, "of": len(every), "why": why if count < len(every) else ""}


def _texts(job: Job, asked: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each answer with the last tokens of its prompt, where a template may have opened the thought."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(job.checkpoint.path / "tokenizer.json"))
    return [
        str(tokenizer.decode([*each["ids"][-4:], *said["ids"]], skip_special_tokens=False))
        for each, said in zip(asked, found, strict=True)
    ]
