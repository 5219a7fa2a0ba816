"""The artifact's distributions and token ids, computed by the runtime of the bundle from a copy of its files.

Every engine of runtimes/ has the same commands: ``runtimes score`` for distributions and the artifact's tokenizer,
``runtimes render`` for the ids that the server would feed the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packager.core.hashing import hash_file
from packager.metrics.distributions import Score, compare
from packager.metrics.thresholds import Behaviour, Fidelity

if TYPE_CHECKING:
    from packager.checkpoint.checkpoint import Checkpoint
    from packager.core.store import Cost, Step
    from packager.fidelity.samples import Samples
    from packager.recipe import Job, Run


@dataclass(frozen=True)
class Candidate:
    """One form of an artifact, and the engine that opens it on this machine.

    what: its name in a sentence ("the Q4_K_M GGUF"). run: with absolute paths. identity: its content and the engine's
    version, for a step's key. max_rss_bytes: resident memory above which the engine drops mapped pages; 0: no limit.
    seconds_a_token: rough time to generate a token on this machine. streamed: a checkpoint of the same weights, whose
    distributions the reference computes a layer at a time; None: the engine computes them.
    """

    what: str
    run: Run
    identity: Mapping[str, object]
    seconds_a_token: float
    max_rss_bytes: int = 0
    streamed: Checkpoint | None = None


@dataclass(frozen=True)
class Scored:
    """The runtime's output for a form. distributions: token -> log-probability (natural) for each position. tokenized:
    the ids of the artifact's own tokenizer for each prompt's text. rendered: the box's ids for each prompt's messages.
    vocabulary: the vocabulary of an engine that reads it from the artifact (engines/llamacpp/logits.py), None for
    others.
    """

    distributions: list[dict[int, float]]
    tokenized: list[list[int]]
    rendered: list[list[int]]
    vocabulary: Mapping[str, Any] | None = None


LEAST_CONTEXT = 1024  # tokens of an engine's context while it scores


def with_room(form: Candidate, longest: int) -> dict[str, Any]:
    """The form's ``run`` object for one conversation of ``longest`` tokens."""
    context = max(LEAST_CONTEXT, -(-(longest + 1) // 256) * 256)
    return replace(form.run, context=context, slots=1).as_dict()


def score(job: Job, form: Candidate, samples: Samples) -> tuple[Scored, list[Step]]:
    """Score a form, once: distributions, its tokenizer's ids, its server's rendered prompts. Raises ToolError."""
    if form.streamed is not None:
        return _streamed(job, form, form.streamed, samples)
    from packager.core.processes import follow
    from packager.fidelity.source import TOP
    from packager.metrics.distributions import positions_of

    runtime = runtime_copy(job, form.run.engine)
    positions = sum(len(sequence["positions"]) for sequence in samples.sequences)

    def make(folder: Path, cost: Cost) -> None:
        follow(
            "runtimes",
            {
                "run": with_room(form, samples.longest),
                "top": TOP,
                "sequences": list(samples.sequences),
                "tokenize": [prompt["text"] for prompt in samples.prompts],
                "max_rss_bytes": form.max_rss_bytes,
            },
            f"scoring {form.what}",
            job.progress,
            cost,
            work=folder,
            total=float(positions),
            unit="positions",
            path=[runtime.path],
            arguments=["score", "--input", "{job}", "--output", folder / "scores.json"],
        )

    inputs = {**form.identity, "samples": samples.key, "runtime": runtime.key, "top": TOP}
    step = job.store.step("score", inputs, make, progress=job.progress)
    scored = step.read_json("scores.json")
    rendered, steps = _rendered(job, form, samples)
    distributions = positions_of(scored)
    return Scored(distributions, scored["tokenized"], rendered, scored.get("vocabulary")), [step, *steps]


def _streamed(job: Job, form: Candidate, checkpoint: Checkpoint, samples: Samples) -> tuple[Scored, list[Step]]:
    """As ``score``, for a form that no engine runs here in bounded memory: distributions by the reference, tokens by
    the form's own tokenizer, prompts by the server's code.
    """
    from packager.fidelity.source import source_scores

    rows, step = source_scores(replace(job, checkpoint=checkpoint), samples)
    rendered, steps = _rendered(job, form, samples)
    tokenized = encode(form.run.tokenizer, [prompt["text"] for prompt in samples.prompts])
    return Scored(rows, tokenized, rendered), [step, *steps]


def encode(tokenizer: str, texts: Sequence[str]) -> list[list[int]]:
    """Ids by a tokenizer.json of texts that contain their special tokens as text."""
    from tokenizers import Tokenizer

    opened = Tokenizer.from_file(tokenizer)
    opened.no_padding()
    opened.no_truncation()
    return [list(opened.encode(text, add_special_tokens=False).ids) for text in texts]


def _rendered(job: Job, form: Candidate, samples: Samples) -> tuple[list[list[int]], list[Step]]:
    """(the ids that the server on the box would feed the model for each prompt, the step); empty without prompts."""
    from packager.core.processes import follow

    if not samples.prompts:
        return [], []
    runtime = runtime_copy(job, form.run.engine)
    run = form.run.as_dict()

    def make(folder: Path, cost: Cost) -> None:
        follow(
            "runtimes",
            {"run": run, "conversations": [prompt["messages"] for prompt in samples.prompts]},
            "rendering the prompts as the box does",
            job.progress,
            cost,
            work=folder,
            path=[runtime.path],
            arguments=["render", "--input", "{job}", "--output", folder / "rendered.json"],
        )

    keys = ("special_tokens", "bos_id", "add_bos", "stop_ids")
    inputs = {
        "tokenizer": hash_file(Path(form.run.tokenizer)),
        "chat_template": hash_file(Path(form.run.chat_template)) if form.run.chat_template else None,
        "tokens": {key: run[key] for key in keys},
        "samples": samples.step.key,
        "runtime": runtime.key,
    }
    step = job.store.step("rendered", inputs, make, progress=job.progress)
    return step.read_json("rendered.json")["ids"], [step]


def runtime_copy(job: Job, engine: str) -> Step:
    """A folder with the files of runtimes/ that a bundle for this engine contains."""
    from packager.bundle.engines import runtime_files
    from packager.planning.catalog import runtimes_folder

    source = runtimes_folder()
    names = runtime_files(engine)

    def make(folder: Path, cost: Cost) -> None:
        import shutil

        for name in names:
            goal = folder / "runtimes" / name
            goal.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, goal)

    return job.store.step("runtime", {name: hash_file(source / name) for name in names}, make, progress=job.progress)


def require_contract(job: Job, samples: Samples, scored: Scored, tokenizer: str) -> list[str]:
    """Raise GateFailed unless every prompt's ids equal transformers' ids, with one BOS, in the artifact's tokenizer
    (its name in a sentence) and in the server's rendering. Returns notes on special tokens that users type and the
    engine's own tokenizer reads differently: this affects only users of the artifact without our server, which sends
    ids.
    """
    from packager.prompts.contract import TYPED, first_difference, require_one_bos, require_same, shown, token_names

    name = token_names(job.checkpoint)
    notes: list[str] = []
    same = []
    for prompt, ids in zip(samples.prompts, scored.tokenized, strict=True):
        at = first_difference(prompt["ids"], ids)
        if at is not None and prompt.get("kind") == TYPED:
            notes.append(
                f"{tokenizer} tokenizes special tokens typed by users differently from transformers: "
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
        "The tokenizer.json has a pre-tokenizer or added tokens that the engine reads differently: compare "
        "it with the base model's.",
        name,
    )
    require_same(
        samples.prompts,
        scored.rendered,
        "the server on the box",
        "Report the chat template: the server must render it as transformers does.",
        name,
    )
    return notes


Rows = Sequence[Mapping[int, float]]


def measure(samples: Samples, source: Rows, artifact: Rows) -> Fidelity:
    """The fidelity of an artifact. source, artifact: token -> log-probability at every position of ``samples``.

    The score on fine-tuning text covers the pairs kept out of the calibration, or all pairs when none was.
    """
    sets: dict[str, list[int]] = {"general": [], "tuning": [], "held": []}
    groups: list[int] = []
    for number, sequence in enumerate(samples.sequences):
        rows = range(len(groups), len(groups) + len(sequence["positions"]))
        sets[sequence["set"]] += rows
        if sequence.get("held"):
            sets["held"] += rows
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
    given = samples.pairs["given"] if samples.pairs else 0
    answers: dict[int, list[int]] = {}
    for row in sets["tuning"]:
        answers.setdefault(groups[row], []).append(row)

    def word_for_word(rows: Rows, places: Sequence[int]) -> bool:
        return all(max(rows[place], key=lambda token: rows[place][token]) == targets[place] for place in places)

    followed = [places for places in answers.values() if word_for_word(source, places)]
    kept = sum(word_for_word(artifact, places) for places in followed)
    behaviour = Behaviour(max(given, len(answers)), len(answers), len(followed), kept)
    tuning = score(sets["held"] or sets["tuning"])
    return Fidelity(score(sets["general"]), tuning, behaviour, held_out=bool(sets["held"]))
