"""The build pipeline from a checkpoint to a published bundle: open, check, merge, plan, run the recipe, assemble."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packager import __version__
from packager.core.errors import MachineError, PlanRefused, ToolError, UsageError
from packager.core.progress import Progress
from packager.core.store import Cost, Step, Store, cache_root, machine_errors, write_atomically
from packager.core.units import size
from packager.recipe import Artifact, Job, Options, Recipe

if TYPE_CHECKING:
    from packager.checkpoint.checkpoint import Checkpoint
    from packager.planning.plan import Plan
    from packager.prompts.calibration import Calibration
    from packager.target import Target

OLDEST_TORCH = "2.6"  # transformers 5.23 disables itself beside an older one


@dataclass(frozen=True)
class Request:
    """The user's parameters. sets: ``key=value`` options. calibration: a file of text or fine-tuning pairs. limits:
    thresholds that replace the recipe's, by the field names of Thresholds. template: the training template's name or
    file. trust_calibration: the calibration is used even when the source does not know its language. ask: at most so
    many of the fine-tuning pairs are scored; None: as many as the time budget allows.
    """

    checkpoint: str
    target: str
    recipe: str | None = None
    adapter: Path | None = None
    revision: str | None = None
    name: str | None = None
    sets: Sequence[str] = ()
    calibration: Path | None = None
    seed: int = 0
    verify: bool = True
    limits: Mapping[str, float] = field(default_factory=dict)
    template: str | None = None
    trust_calibration: bool = False
    ask: int | None = None


@dataclass(frozen=True)
class Built:
    """A published bundle. record: the build's time and memory, also written beside it as ``<bundle>.build.json``."""

    path: Path
    plan: Plan
    artifact: Artifact
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Opened:
    """A checkpoint ready to be built, with its adapter (if any) merged. steps: the store's steps that this took.

    sources: the origin of base and adapter for the manifest: names, digests and commits, no paths.
    """

    checkpoint: Checkpoint
    steps: tuple[Step, ...]
    sources: Mapping[str, Any]


def open_merged(request: Request, store: Store, progress: Progress) -> Opened:
    """Open the checkpoint, check its weights, merge the adapter. Raises InputError or NetworkError."""
    from packager.checkpoint.checkpoint import check_weights, open_checkpoint
    from packager.checkpoint.merge import check_fit, merge, merged_name, open_adapter
    from packager.core.processes import warm_up

    base = open_checkpoint(
        request.checkpoint,
        revision=request.revision,
        progress=progress,
        cache=cache_root(),
        name=None if request.adapter else request.name,
    )
    adapter = open_adapter(request.adapter) if request.adapter else None
    if adapter:
        check_fit(adapter, base)

    def check(folder: Path, cost: Cost) -> None:
        check_weights(base, progress)

    origin = base.origin
    sources = {
        "base": {"kind": origin.kind, "id": origin.id, "revision": origin.revision, "digest": base.digest},
        "adapter": None,
    }
    steps = [store.step("checked-weights", {"checkpoint": base.digest}, check, progress=progress)]
    if not steps[0].reused:  # a build that starts from nothing: import torch while the adapter is merged
        warm_up()
    if adapter is None or request.adapter is None:
        return Opened(base, tuple(steps), sources)

    def make(folder: Path, cost: Cost) -> None:
        merge(base, adapter, folder / "model", progress)

    merged = store.step(
        "merge",
        {"checkpoint": base.digest, "adapter": adapter.digest},
        make,
        progress=progress,
    )
    steps.append(merged)
    checkpoint = open_checkpoint(
        str(merged.path / "model"),
        progress=progress,
        cache=cache_root(),
        name=request.name or merged_name(base, adapter),
    )
    return Opened(checkpoint, tuple(steps), {**sources, "adapter": {"name": adapter.name, "digest": adapter.digest}})


def open_planned(request: Request, progress: Progress) -> Checkpoint:
    """The checkpoint as it will be after merging, read from headers only: nothing is merged or written."""
    from packager.checkpoint.checkpoint import open_checkpoint
    from packager.checkpoint.merge import check_fit, merged_name, open_adapter

    base = open_checkpoint(request.checkpoint, revision=request.revision, progress=progress, cache=cache_root())
    if request.adapter is None:
        return replace(base, name=request.name or base.name)
    adapter = open_adapter(request.adapter)
    check_fit(adapter, base)
    return replace(base, name=request.name or merged_name(base, adapter))


def choose(request: Request) -> tuple[Target, Recipe[Any], Any]:
    """Target, recipe and options of a request. Raises UsageError for unknown names and keys."""
    from packager.planning.catalog import load_recipe, load_target
    from packager.planning.options import parse_options

    target = load_target(request.target)
    recipe = load_recipe(request.recipe or target.recipe)
    return target, recipe, parse_options(recipe, target, request.sets)


def resolved(
    recipe: Recipe[Options],
    options: Options,
    samples: Calibration | None,
    checkpoint: Checkpoint,
    ask: int | None = None,
) -> tuple[Options, tuple[str, ...]]:
    """The options with every "auto" replaced, and the notes shown with the plan: on the tokenizer, the fine-tuning
    pairs and the recipe's choices.
    """
    from packager.fidelity.pairs import note

    options, notes = recipe.resolve_auto(options, samples, checkpoint) if recipe.resolve_auto else (options, ())
    if checkpoint.family.kind != "decoder":  # an encoder has no conversations and no stop tokens
        return options, notes
    pairs = note(samples, checkpoint, ask)
    return options, (*checkpoint.tokenizer.agreement, *checkpoint.tokenizer.remarks, *pairs, *notes)


def planned(request: Request, progress: Progress) -> Plan:
    """The plan that a build of the same request would make; writes nothing. Raises as open_planned and choose."""
    from packager.planning.plan import make_plan
    from packager.prompts import calibration

    target, recipe, options = choose(request)
    samples = calibration.load(request.calibration) if request.calibration else None
    checkpoint = open_planned(request, progress)
    options, notes = resolved(recipe, options, samples, checkpoint, request.ask)
    return make_plan(checkpoint, target, recipe, options, notes)


def build(request: Request, out: Path, progress: Progress, store: Store) -> Built:
    """Build the bundle ``out/<model>-<target>-<recipe>`` and return it; an equal one in its place is kept.

    Raises PlanRefused when the plan has refusals, GateFailed when the artifact misses a threshold or the prompt
    contract, MachineError when the disk is too small, and the errors of opening and choosing.
    """
    from packager.metrics.encoders import refuse_for_decoders
    from packager.planning.plan import make_plan
    from packager.prompts import calibration, training_template

    start = time.monotonic()
    target, recipe, options = choose(request)
    samples = calibration.load(request.calibration) if request.calibration else None
    template = training_template.load(request.template) if request.template else None
    if request.limits and not request.verify:
        raise UsageError("--no-verify measures nothing, so no threshold can hold.", fix="Leave one of the two out.")
    if template and not request.verify:
        raise UsageError("--no-verify compares nothing, so --template has no effect.", fix="Leave one of the two out.")
    if "min_behaviour" in request.limits and not (samples and samples.conversations):
        raise UsageError("--min-behaviour needs the fine-tuning pairs.", fix="Give them with --calibration.")
    _require_torch()
    opened = open_merged(request, store, progress)
    if template and opened.checkpoint.family.kind != "decoder":
        raise UsageError(f"{opened.checkpoint.name} has no conversations to render.", fix="Leave --template out.")
    if opened.checkpoint.family.kind == "decoder":
        refuse_for_decoders(request.limits)
    options, notes = resolved(recipe, options, samples, opened.checkpoint, request.ask)
    plan = make_plan(opened.checkpoint, target, recipe, options, notes)
    if plan.refusals:
        raise PlanRefused(
            f"{opened.checkpoint.name} cannot be built with {recipe.name} for {target.name}: {plan.refusals[0]}",
            why=" ".join(plan.refusals[1:]),
            fix="`packager plan` shows the figures; nothing was built.",
        )
    for note in plan.notes:
        progress.note(note)
    _require_room(out, store, plan)
    job = Job(
        checkpoint=opened.checkpoint,
        target=target,
        store=store,
        progress=progress,
        calibration=samples,
        seed=request.seed,
        verify=request.verify,
        limits=request.limits,
        training=template,
        trust_calibration=request.trust_calibration,
        ask=request.ask,
    )
    artifact = recipe.build(job, options)
    bundle = _assemble(job, plan, artifact, recipe, opened.sources, out)
    costs = [*(step.cost() for step in opened.steps), *artifact.costs]
    record = {
        "bundle": str(bundle),
        "checkpoint_path": str(opened.checkpoint.path.resolve()),
        "seconds": round(time.monotonic() - start, 2),
        "peak_rss_bytes": max([_own_peak(), *(cost["peak_rss_bytes"] for cost in costs)]),
        "steps": costs,
    }
    with machine_errors(out):
        write_atomically(out / f"{bundle.name}.build.json", json.dumps(record, indent=1) + "\n")
    return Built(bundle, plan, artifact, record)


def _require_torch() -> None:
    """Raise ToolError where torch is missing or too old. The wheel asks for no version of it, so that no install
    takes the torch of somebody's own environment away.
    """
    from packaging.version import Version

    from packager.core.processes import version_of

    installed = version_of("torch")
    if not installed or Version(installed) < Version(OLDEST_TORCH):
        raise ToolError(
            f"A build needs torch {OLDEST_TORCH} or newer; this environment has {installed or 'none'}.",
            why="The source model is run beside the artifact, and transformers refuses older ones.",
            fix="Install a newer torch, of whatever CUDA, or make an environment for packager alone.",
        )


def _require_room(out: Path, store: Store, plan: Plan) -> None:
    """Raise MachineError before the work when ``out`` or the store is not writable or has too little space."""
    for place, wanted in ((out, plan.estimate.artifact_bytes), (store.root, plan.estimate.build_disk_bytes)):
        with machine_errors(place):
            try:
                place.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=place):
                    free = shutil.disk_usage(place).free
            except (FileNotFoundError, NotADirectoryError, FileExistsError) as error:
                raise MachineError(
                    f"{place} cannot be a folder: {error.strerror}.",
                    fix="Choose another one with -o or PACKAGER_STORE.",
                ) from error
        if free < wanted:
            raise MachineError(
                f"{place} has {size(free)} free; this build writes about {size(wanted)} there.",
                fix="Free some space, or choose another disk with -o or PACKAGER_STORE.",
            )


def _assemble(
    job: Job, plan: Plan, artifact: Artifact, recipe: Recipe[Any], sources: Mapping[str, Any], out: Path
) -> Path:
    from packager.bundle.assemble import Contents, assemble
    from packager.bundle.engines import box_engine, lock_files, needs_of
    from packager.bundle.wheels import fetch_wheels
    from packager.core.hashing import file_digest
    from packager.planning.catalog import runtimes_folder

    target, checkpoint = job.target, job.checkpoint
    if artifact.release is not None:
        target = target.on_release(artifact.release)
    locks, engine = lock_files(artifact.run), box_engine(artifact.run.engine)
    wheels = fetch_wheels(
        locks[0], target, cache_root() / "box-wheels", job.progress, more=locks[1:], scarce=engine.scarce
    )
    contents = Contents(
        name=checkpoint.name,
        target={"name": target.name, "digest": target.digest},
        recipe={"name": recipe.name, "options": artifact.provenance["options"]},
        needs=needs_of(target, plan, artifact, wheels),
        run=artifact.run.as_dict(),
        files=artifact.files,
        extra=artifact.extra,
        runtimes=runtimes_folder(),
        wheels=wheels,
        store=job.store.root,
        report=artifact.report,
        provenance={**artifact.provenance, "sources": dict(sources), "packager": __version__},
    )
    return assemble(contents, out, job.progress, digest=lambda path: file_digest(path, cache_root())).path


def _own_peak() -> int:
    """This process's highest resident memory in bytes; 0 where the system does not report it."""
    try:
        import resource
        import sys
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
