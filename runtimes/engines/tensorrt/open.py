"""From a bundle's plan to an opened engine: the one it brings, or the one that this box built for itself.

``--device`` chooses: nothing (or "gpu") for TensorRT itself, "onnxruntime" for a build of onnxruntime with a GPU
provider, "cpu" for onnxruntime without any GPU. Only what was asked for is used; there is no silent way down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from runtimes.engine import EngineError
from runtimes.engines.tensorrt import cache
from runtimes.engines.tensorrt.build import build
from runtimes.engines.tensorrt.cache import Key, Say
from runtimes.engines.tensorrt.device import Device, Session, ask, unfit
from runtimes.engines.tensorrt.plan import Plan, Profile, read_plan
from runtimes.files import file_sha256, say
from runtimes.manifest import Run

DEVICES = ("gpu", "onnxruntime", "cpu")


@dataclass(frozen=True)
class Prepared:
    """An engine file that fits this box. key: its name in the cache, or its digest where the bundle brings it."""

    device: Device
    engine: Path
    profile: Profile
    key: str


@dataclass(frozen=True)
class Opened:
    """A session and what it takes. details: what /health and /v1/models tell of it."""

    session: Session
    profile: Profile
    details: Mapping[str, str]


def home_of(run: Run) -> Path:
    """The bundle's folder, or that of its install: plan.json lies in model/."""
    return run.model.resolve().parent.parent


def prepare(plan: Plan, home: Path, tell: Say = say, *, force: bool = False, device: Device | None = None) -> Prepared:
    """Ask the GPU, refuse a wrong one, and find or build the engine. device: the answer, where it was asked already.
    Raises EngineError with one sentence.
    """
    device = device or ask(plan.library)
    if (refusal := unfit(plan, device)) is not None:
        raise EngineError(refusal)
    if plan.compiled is not None:
        engine = plan.compiled.file
        if engine.stat().st_size != plan.compiled.bytes or file_sha256(engine) != plan.compiled.sha256:
            raise EngineError(
                f"{engine.name}: expected the engine that was bundled, found another; copy the bundle again."
            )
        return Prepared(device, engine, plan.profiles[0], f"bundled-{plan.compiled.sha256[:16]}")
    entry = cache.ensure(
        cache.places(home), Key.of(plan, device), plan, lambda goal: build(plan, device, goal, tell), tell, force=force
    )
    if entry.profile:
        tell(f"the engine is of the plan's profile {entry.profile + 1}, because a larger one did not fit into memory")
    return Prepared(device, entry.engine, plan.profiles[entry.profile], entry.path.name)


def kernels_file(plan: Plan, home: Path, device: Device) -> Path | None:
    """Where TensorRT-RTX keeps what it compiles on this box; None for TensorRT, or where nothing can be written."""
    folder = cache.writable(cache.places(home)) if plan.library == "tensorrt-rtx" else None
    return folder / f"{Key.of(plan, device).name}.kernels" if folder else None


def open_plan(run: Run, *, verbose: bool) -> tuple[Plan, Opened]:
    """The plan of a bundle with its engine opened. Raises ManifestError or EngineError."""
    plan = read_plan(run.model)
    device, home = run.device or "gpu", home_of(run)
    facts = {"precision": plan.precision}
    if device not in DEVICES:
        raise EngineError(f"There is no device {device!r}; choose {', '.join(DEVICES)}.")
    if device != "gpu":
        from runtimes.engines.tensorrt.onnxruntime import OrtSession

        folder = cache.writable(cache.places(home)) if device == "onnxruntime" else None
        ort = OrtSession(
            plan,
            plan.profiles[0],
            device,
            engines=folder and folder / "onnxruntime",
            threads=run.threads,
            verbose=verbose,
        )
        return plan, Opened(ort, plan.profiles[0], {**facts, "library": ort.version, "device": ort.device})
    from runtimes.engines.tensorrt.session import NativeSession

    ready = prepare(plan, home)
    kernels = kernels_file(plan, home, ready.device)
    session = NativeSession(plan, ready.profile, ready.engine, kernels=kernels, verbose=verbose)
    for old in kernels.parent.glob("*.kernels") if kernels else ():
        if old != kernels:  # of another driver or version: this box has no more use for it
            old.unlink(missing_ok=True)
    facts |= {
        "library": session.version,
        "device": session.device,
        "compute_capability": ready.device.sm,
        "engine": ready.key,
    }
    return plan, Opened(session, ready.profile, facts)
