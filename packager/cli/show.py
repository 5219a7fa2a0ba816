"""The output of each verb: the document for --json, and the text for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packager.build import Request
from packager.cli.console import Console
from packager.core.errors import PlanRefused, VerifyFailed
from packager.core.units import size

if TYPE_CHECKING:
    from packager.bundle.doctor import TargetRow
    from packager.planning.plan import Plan


def targets(console: Console) -> None:
    from packager.planning.catalog import load_target, target_names

    known = [load_target(name) for name in target_names()]
    document = {
        "targets": [
            {
                "name": t.name,
                "title": t.title,
                "system": t.system,
                "machine": t.machine,
                "memory_bytes": t.memory_bytes,
                "recipe": t.recipe,
            }
            for t in known
        ]
    }
    console.result(
        document,
        lambda: console.table(
            ("target", "device", "memory", "default recipe"),
            [(t.name, t.title, f"{t.memory_bytes / 2**30:.0f} GiB", t.recipe) for t in known],
            right=(2,),
        ),
    )


def target(console: Console, name: str) -> None:
    from packager.planning.catalog import load_target

    facts = load_target(name).as_dict()
    console.result(facts, lambda: console.facts(_flat(facts)))


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [
            pair for key, inner in value.items() for pair in _flat(inner, f"{prefix}.{key}" if prefix else str(key))
        ]
    if isinstance(value, list | tuple) and value and isinstance(value[0], dict):
        return [pair for number, inner in enumerate(value, 1) for pair in _flat(inner, f"{prefix}.{number}")]
    if isinstance(value, list | tuple):
        return [(prefix, ", ".join(map(str, value)))]
    return [(prefix, "" if value is None else str(value))]


def recipes(console: Console) -> None:
    from packager.planning.catalog import load_recipe, recipe_names

    known = [load_recipe(name) for name in recipe_names()]
    console.result(
        {"recipes": [{"name": r.name, "summary": r.summary, "format": r.format} for r in known]},
        lambda: console.table(("recipe", "makes"), [(r.name, r.summary) for r in known]),
    )


def recipe(console: Console, name: str) -> None:
    from packager.planning.catalog import load_recipe
    from packager.planning.options import options_keys

    chosen = load_recipe(name)
    keys = options_keys(chosen)
    document = {
        "name": chosen.name,
        "summary": chosen.summary,
        "format": chosen.format,
        "options": [{"key": k, "type": t, "default": d, "doc": doc} for k, t, d, doc in keys],
        "thresholds": asdict(chosen.thresholds(chosen.options())),
        "encoder_thresholds": asdict(chosen.encoder_thresholds) if chosen.encoder_thresholds else None,
    }

    def render() -> None:
        console.line(f"{chosen.name}: {chosen.summary}\n")
        console.table(("--set key", "values", "default", "meaning"), [tuple(map(str, key)) for key in keys])
        least = chosen.thresholds(chosen.options())
        console.line(
            f"\nThe artifact must keep (with the default options): mean KL at most {least.max_kl:g} nats, top-1 at "
            f"least {least.min_top1:.0%}, and {least.min_behaviour:.0%} of the fine-tuning pairs word for word."
        )
        if encoder := chosen.encoder_thresholds:
            console.line(
                f"An embedder: mean cosine at least {encoder.min_cosine:g}, rank correlation at least "
                f"{encoder.min_rank:g}. A classifier: the source's label for {encoder.min_agreement:.0%} of the texts, "
                f"at most {encoder.max_accuracy_loss:.0%} of accuracy lost."
            )

    console.result(document, render)


def templates(console: Console) -> None:
    from packager.prompts.training_template import known

    rows = sorted(known().items())
    document = {"templates": [{"name": name, "reasoning": slots.reasoning} for name, slots in rows]}

    def first(text: str) -> str:
        return text.replace("\n", "⏎")

    console.result(
        document,
        lambda: console.table(
            ("template", "a question", "an answer"),
            [(name, first(slots.user), first(slots.assistant)) for name, slots in rows],
        ),
    )


def template(console: Console, name: str) -> None:
    from packager.core.errors import UsageError
    from packager.prompts.training_template import as_jinja, load

    training = load(name)
    if training.slots is None:
        raise UsageError(f"{name} is a Jinja file already.", fix="`packager templates` lists the names.")
    text = as_jinja(training.slots)
    console.result({"name": training.name, "chat_template": text}, lambda: console.line(text))


def inspect(console: Console, checkpoint: str, adapter: Path | None, revision: str | None, name: str | None) -> None:
    from packager.checkpoint.checkpoint import open_checkpoint
    from packager.checkpoint.merge import check_fit, open_adapter
    from packager.cli.inspect import inspect as look
    from packager.core.store import cache_root
    from packager.planning.plan import fit_all

    opened = open_checkpoint(checkpoint, revision=revision, progress=console, cache=cache_root(), name=name)
    lora = open_adapter(adapter) if adapter else None
    if lora:
        check_fit(lora, opened)
    document = {**look(opened, lora), "targets": fit_all(opened)}

    def render() -> None:
        console.facts(
            [
                (key.replace("_", " "), text)
                for key, text in _flat({k: v for k, v in document.items() if k != "targets"})
            ]
        )
        console.line()
        console.table(
            ("target", "fits", "with its default recipe"),
            [(row["target"], "yes" if row["fits"] else "no", row["line"]) for row in document["targets"]],
        )

    console.result(document, render)


def plan(console: Console, request: Request) -> None:
    from packager.build import planned

    made = planned(request, console)
    console.result(made.as_dict(), lambda: _show_plan(console, made))
    if made.refusals:
        error = PlanRefused(f"{made.recipe} does not work here: {made.refusals[0]}", why=" ".join(made.refusals[1:]))
        error.shown = True
        raise error


def _show_plan(console: Console, made: Plan) -> None:
    plain = made.as_dict()
    e = plain["estimate"]
    console.facts(
        [
            ("checkpoint", plain["checkpoint"]),
            ("target", plain["target"]),
            ("recipe", plain["recipe"]),
            ("options", ", ".join(f"{key}={value}" for key, value in plain["options"].items())),
            ("artifact", size(e["artifact_bytes"])),
            (
                "build",
                f"{size(e['build_ram_bytes'])} of memory, {size(e['build_disk_bytes'])} of disk, about "
                f"{e['seconds']:.0f} s on two cores",
            ),
            (
                "on the box",
                f"{size(plain['box_bytes'])}: weights {size(e['load_bytes'])}, {_work(e)}; "
                f"{size(plain['budget_bytes'])} are free for it",
            ),
            _ceiling(plain["tokens_per_second_ceiling"], e),
        ]
    )
    for note in plain["notes"]:
        console.line(f"  note: {note}")
    console.line()
    console.line("It fits." if not plain["refusals"] else "Refused:")
    for refusal in plain["refusals"]:
        console.line(f"  - {refusal}")


def _work(e: Mapping[str, Any]) -> str:
    """The memory besides the weights: an encoder has no KV cache, and its activations count as the runtime's."""
    most = f"{e['slots']} × {e['context']} tokens"
    runtime = f"runtime {size(e['overhead_bytes'])}"
    return f"KV cache {size(e['kv_bytes'])} ({most}), {runtime}" if e["kv_bytes"] else f"{runtime} ({most} at a time)"


def _ceiling(rate: float, estimate: Mapping[str, Any]) -> tuple[str, str]:
    """The ceiling's label and text: a language model reads its weights for each token, an encoder for each text."""
    read, unit = size(estimate["read_per_token_bytes"]), "token" if estimate["kv_bytes"] else "text"
    name = "decode ceiling" if estimate["kv_bytes"] else "ceiling"
    return name, f"{rate:.0f} {unit}s/s (bandwidth ÷ {read} read per {unit})"


def build(console: Console, request: Request, out: Path) -> None:
    from packager.build import build as make
    from packager.core.store import Store, default_root

    built = make(request, out, console, Store(default_root()))
    document = {
        "bundle": str(built.path),
        "plan": built.plan.as_dict(),
        "report": dict(built.artifact.report),
        "record": dict(built.record),
    }

    def render() -> None:
        report = built.artifact.report
        for line in fidelity_lines(report.get("fidelity")):
            console.note(line)
        if types := report.get("tensor_types"):
            console.note("tensor types: " + ", ".join(f"{count} × {kind}" for kind, count in types.items()))
        if int4 := report.get("int4", {}).get("modules"):
            console.note(f"{int4} matrices at {report['int4']['bits_per_weight']} bits a weight")
        console.note(f"built in {built.record['seconds']:.0f} s, peak memory {size(built.record['peak_rss_bytes'])}")
        console.line(str(built.path))

    console.result(document, render)


def fidelity_lines(fidelity: Mapping[str, Any] | None) -> list[str]:
    """The lines of text for an artifact's fidelity. fidelity: the manifest's entry, None with --no-verify."""
    if not fidelity:
        return []
    if "min_cosine" in fidelity["thresholds"]:
        from packager.metrics.encoders import lines as encoder_lines

        return encoder_lines(fidelity)
    lines = []
    for name in ("general", "tuning"):
        if score := fidelity[name]:
            low, high = score["kl_mean_ci"]
            lines.append(
                f"fidelity, {name} text: mean KL {score['kl_mean']:.4f} ({low:.4f} to {high:.4f}), top-1 "
                f"{score['top1']:.1%}, perplexity × {score['perplexity_ratio']:.3f}; {score['positions']} positions"
            )
    if kept := fidelity["behaviour"]:
        held = "held out of the calibration" if fidelity["held_out"] else "also used for calibration"
        lines.append(
            f"behaviour: {kept['kept']} of {kept['source']} answers kept word for word; {kept['pairs']} asked of "
            f"{kept['given']} given, {held}"
        )
        pairs = fidelity.get("pairs") or {}
        if why := pairs.get("why"):
            lines.append(f"  not all: {why}")
        lines += [f"  left out: {count} ({reason})" for reason, count in pairs.get("left_out", {}).items()]
    answers = fidelity.get("answers")
    if answers and not answers["asked"]:
        lines.append(f"answers: none of {answers['of']} generated here ({answers['why']})")
    elif answers:
        closed, opened, trained = answers["thoughts_closed"], answers["thoughts_opened"], answers["trained_tokens_mean"]
        lines.append(
            f"answers: {answers['asked']} of {answers['of']} generated, {answers['ended']} ended within "
            f"{answers['limit']} tokens, on average {answers['tokens_mean']} tokens"
            f"{f' (trained: {trained})' if trained is not None else ''}"
            f"{f', {closed} of {opened} thoughts closed' if opened else ''}"
        )
    return lines


def verify(console: Console, bundle: Path) -> None:
    from packager.bundle.verify import verify as check

    report = check(bundle, console)
    document = report.as_dict()
    if not report.problems:
        console.result(document, lambda: console.line(f"{bundle}: whole, {report.files} files, {size(report.bytes)}."))
        return

    def render() -> None:
        for problem in report.problems:
            console.line(f"  - {problem.kind}: {problem.path}: {problem.detail}")

    console.result(document, render)
    try:
        report.raise_if_bad()
    except VerifyFailed as error:
        error.shown = True
        raise


def doctor(console: Console, bundle: Path | None, target: str | None, facts: Path | None, *, files: bool) -> None:
    from packager.bundle.doctor import examine, raise_if_refused, shown_facts
    from packager.core.errors import UsageError

    if bundle is not None and target is not None:
        raise UsageError("Both a bundle and --target are given.", fix="Name one of them.")
    document = examine(bundle, target, facts, files=files)

    def render() -> None:
        console.facts(shown_facts(document["facts"]))
        console.line()
        if verdict := document["verdict"]:
            for finding in verdict["findings"]:
                if finding["ok"] is None:
                    console.line(f"  unknown  {finding['name']}: needed is {finding['expected']}")
            for sentence in verdict["warnings"]:
                console.line(f"  warning  {sentence}")
            if verdict["ok"]:  # a refusal is shown as an error
                known = all(finding["ok"] is not None for finding in verdict["findings"])
                console.line("It fits." if known else "It fits, as far as is known.")
            return
        console.table(
            ("target", "this box", "why not"),
            [_target_row(row) for row in document["targets"]],
        )
        console.line(f"\nNearest target: {document['nearest'] or 'none; copy a target file and change it'}.")

    console.result(document, render)
    raise_if_refused(document)


def _target_row(row: TargetRow) -> tuple[str, str, str]:
    """A target's row: "yes", "no" with the reason, or "perhaps" with the unknown facts."""
    if not row["ok"]:
        return row["target"], "no", row["refusal"]
    unknown = ", ".join(f"{name} unknown" for name in row["unknown"])
    return row["target"], "perhaps" if unknown else "yes", unknown


def bench(
    console: Console, bundle: Path, *, quick: bool, baseline: Path | None, with_baseline: bool, output: Path | None
) -> None:
    from packager.bundle import benchmark, benchmark_encoder

    document = benchmark.bench(bundle, quick=quick, baseline=baseline, with_baseline=with_baseline, progress=console)
    place = output or bundle.parent / f"{bundle.name}.report.json"
    from packager.core.store import write_atomically

    write_atomically(place, json.dumps(document, indent=1, ensure_ascii=False) + "\n")

    def render() -> None:
        if document.get("task", "generate") != "generate":
            console.table(benchmark_encoder.HEAD, benchmark_encoder.rows(document), right=(1, 2, 3, 4, 5, 6))
            for line in benchmark_encoder.remarks(document):
                console.line(line)
            console.line(f"report: {place}")
            return
        console.table(
            ("mode", "memory", "P99 inter-token", "TTFT", "decode tokens/s"),
            benchmark.mode_rows(document),
            right=(1, 2, 3, 4),
        )
        console.line()
        console.table(
            ("streams", "TTFT ms", "p50 ms", "p95 ms", "p99 ms", "decode tokens/s", "prefill tokens/s"),
            benchmark.stream_rows(document),
            right=(0, 1, 2, 3, 4, 5, 6),
        )
        for line in benchmark.remarks(document):
            console.line(line)
        console.line(f"report: {place}")

    console.result(document, render)


def serve(console: Console, bundle: Path, host: str, port: int) -> None:
    from packager.bundle import benchmark

    benchmark.serve(bundle, host, port)
