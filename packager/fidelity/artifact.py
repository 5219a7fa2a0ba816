"""An artifact's side of every comparison: what the runtime that ships answers, run from a copy of exactly what ships.

Any engine of runtimes/ is scored in the same words: ``runtimes score`` for its distributions and its tokenizer's ids,
``runtimes render`` for the ids that the server would feed the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from packager.metrics.distributions import Score, compare
from packager.metrics.thresholds import Behaviour, Fidelity

if TYPE_CHECKING:
    from pathlib import Path

    from packager.core.store import Cost, Step
    from packager.fidelity.source import Samples
    from packager.recipe import Job


@dataclass(frozen=True)
class Scored:
    """What the runtime answered. distributions: token -> log-probability (natural) a position. tokenized: the ids of
    the artifact's own tokenizer for each prompt's text. rendered: the box's ids for each prompt's messages. vocabulary:
    what an engine that reads tokens out of the artifact does with them (runtimes/engines/llamacpp/logits.py), None for
    others. run, inputs, max_rss_bytes: how it was run and what identifies it, to ask it more.
    """

    distributions: list[dict[int, float]]
    tokenized: list[list[int]]
    rendered: list[list[int]]
    vocabulary: Mapping[str, Any] | None = None
    run: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, object] = field(default_factory=dict)
    max_rss_bytes: int | None = None


def score(
    job: Job,
    run: Mapping[str, Any],
    samples: Samples,
    *,
    what: str,
    inputs: Mapping[str, object],
    max_rss_bytes: int,
) -> tuple[Scored, Step]:
    """Score an artifact, once.

    run: the manifest's ``run`` table with absolute paths. what: the artifact, in a sentence. inputs: what identifies
    it. max_rss_bytes: resident memory above which the engine drops what it has mapped. Raises ToolError.
    """
    from packager.core.processes import follow
    from packager.fidelity.source import TOP
    from packager.metrics.distributions import positions_of

    runtime = runtime_copy(job, str(run["engine"]))
    positions = sum(len(sequence["positions"]) for sequence in samples.sequences)

    def make(folder: Path, cost: Cost) -> None:
        follow(
            "runtimes",
            {
                "run": dict(run),
                "top": TOP,
                "sequences": list(samples.sequences),
                "tokenize": [prompt["text"] for prompt in samples.prompts],
                "max_rss_bytes": max_rss_bytes,
            },
            f"scoring {what}",
            job.progress,
            cost,
            work=folder,
            total=float(positions),
            unit="positions",
            path=[runtime.path],
            arguments=["score", "--input", "{job}", "--output", folder / "scores.json"],
        )
        if samples.prompts:
            follow(
                "runtimes",
                {"run": dict(run), "conversations": [prompt["messages"] for prompt in samples.prompts]},
                "rendering as the box does",
                job.progress,
                cost,
                work=folder,
                path=[runtime.path],
                arguments=["render", "--input", "{job}", "--output", folder / "rendered.json"],
            )

    step = job.store.step(
        "score",
        {**inputs, "samples": samples.step.key, "runtime": runtime.key, "top": TOP},
        make,
        progress=job.progress,
    )
    scored = step.read_json("scores.json")
    rendered = step.read_json("rendered.json")["ids"] if samples.prompts else []
    found = Scored(
        positions_of(scored),
        scored["tokenized"],
        rendered,
        vocabulary=scored.get("vocabulary"),
        run=dict(run),
        inputs=dict(inputs),
        max_rss_bytes=max_rss_bytes or None,
    )
    return found, step


def runtime_copy(job: Job, engine: str) -> Step:
    """A folder with the copy of runtimes/ that a bundle for this engine carries."""
    from packager.bundle.engines import runtime_files
    from packager.core.hashing import hash_file
    from packager.planning.catalog import runtimes_folder

    source = runtimes_folder()
    names = runtime_files(engine)

    def make(folder: Path, cost: Cost) -> None:
        import shutil

        (folder / "runtimes").mkdir()
        for name in names:
            shutil.copyfile(source / name, folder / "runtimes" / name)

    return job.store.step("runtime", {name: hash_file(source / name) for name in names}, make, progress=job.progress)


def require_contract(job: Job, samples: Samples, found: Scored, tokenizer: str) -> list[str]:
    """Raise GateFailed unless every prompt's ids are transformers' own, with one BOS, in the artifact's tokenizer
    (named as in a sentence) and in what the server renders. Gives notes on what an engine's own tokenizer makes of
    special tokens that users type: our server sends ids, so only those who use the artifact without it meet that.
    """
    from packager.prompts.contract import TYPED, first_difference, require_one_bos, require_same, shown, token_names

    name = token_names(job.checkpoint)
    notes: list[str] = []
    same = []
    for prompt, ids in zip(samples.prompts, found.tokenized, strict=True):
        at = first_difference(prompt["ids"], ids)
        if at is not None and prompt.get("kind") == TYPED:
            notes.append(
                f"{tokenizer} reads special tokens that a user types otherwise than transformers: "
                f"{shown(ids[at:], name)} instead of {shown(prompt['ids'][at:], name)}; our server does not"
            )
            same.append(prompt["ids"])
        else:
            same.append(ids)
    require_one_bos(samples.prompts, job.checkpoint.tokenizer.bos_id)
    require_same(
        samples.prompts,
        same,
        tokenizer,
        "The tokenizer.json has a pre-tokenizer or added tokens that the engine reads otherwise: compare "
        "it with the base model's.",
        name,
    )
    require_same(
        samples.prompts,
        found.rendered,
        "the server on the box",
        "Report the chat template: the server must render it as transformers does.",
        name,
    )
    return notes


Rows = Sequence[Mapping[int, float]]


def measure(samples: Samples, source: Rows, artifact: Rows) -> Fidelity:
    """Measure an artifact. source, artifact: token -> log-probability at every position of ``samples``, in order."""
    sets: dict[str, list[int]] = {"general": [], "tuning": []}
    groups: list[int] = []
    for number, sequence in enumerate(samples.sequences):
        sets[sequence["set"]] += range(len(groups), len(groups) + len(sequence["positions"]))
        groups += [number] * len(sequence["positions"])
    targets = samples.targets

    def score(rows: Sequence[int]) -> Score:
        return compare(
            [source[row] for row in rows],
            [artifact[row] for row in rows],
            [targets[row] for row in rows],
            [groups[row] for row in rows],
        )

    if not sets["tuning"]:
        return Fidelity(score(sets["general"]), None, None, held_out=False)
    answers: dict[int, list[int]] = {}
    for row in sets["tuning"]:
        answers.setdefault(groups[row], []).append(row)

    def word_for_word(rows: Rows, places: Sequence[int]) -> bool:
        return all(max(rows[place], key=lambda token: rows[place][token]) == targets[place] for place in places)

    followed = [places for places in answers.values() if word_for_word(source, places)]
    kept = sum(word_for_word(artifact, places) for places in followed)
    behaviour = Behaviour(len(answers), len(followed), kept)
    return Fidelity(score(sets["general"]), score(sets["tuning"]), behaviour, samples.held_out)
