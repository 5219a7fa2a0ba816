"""Opens the engine of a bundle's plan: the one in the bundle, or the one that this box built.

``--device`` chooses: nothing (or "gpu") for TensorRT itself, "onnxruntime" for a build of onnxruntime with a GPU
provider, "cpu" for onnxruntime without a GPU. Only the chosen device is used; there is no silent fallback.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from runtimes.engine import EngineError
from runtimes.engines.tensorrt import cache
from runtimes.engines.tensorrt.build import build
from runtimes.engines.tensorrt.cache import Key, Say
from runtimes.engines.tensorrt.device import Device, Session, query_device, unfit
from runtimes.engines.tensorrt.plan import Plan, Profile, read_plan
from runtimes.files import file_sha256, say
from runtimes.manifest import Run

DEVICES = ("gpu", "onnxruntime", "cpu")


@dataclass(frozen=True)
class Prepared:
    """An engine file that fits this box. key: its name in the cache, or its digest where it is in the bundle."""

    device: Device
    engine: Path
    profile: Profile
    key: str


@dataclass(frozen=True)
class Opened:
    """A session and its profile. details: its facts for /health and /v1/models."""

    session: Session
    profile: Profile
    details: Mapping[str, str]


def home_of(run: Run) -> Path:
    """The folder of the bundle or install; plan.json is in its model/."""
    return run.model.resolve().parent.parent


def prepare(plan: Plan, home: Path, log: Say = say, *, force: bool = False, device: Device | None = None) -> Prepared:
    """Check the GPU, then take the engine from the bundle or the cache, or build it. device: the GPU's facts, where
    they are known already. Raises EngineError with one sentence.
    """
    device = device or query_device(plan.library)
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
        cache.places(home), Key.of(plan, device), plan, lambda goal: build(plan, device, goal, log), log, force=force
    )
    if entry.profile:
        log(f"the engine is of the plan's profile {entry.profile + 1}, because a larger one did not fit into memory")
    return Prepared(device, entry.engine, plan.profiles[entry.profile], entry.path.name)


def kernels_file(plan: Plan, home: Path, device: Device) -> Path | None:
    """The file for kernels that TensorRT-RTX compiles on this box; None for TensorRT, or without a writable folder."""
    folder = cache.writable(cache.places(home)) if plan.library == "tensorrt-rtx" else None
    return folder / f"{Key.of(plan, device).name}.kernels" if folder else None


def open_plan(run: Run, *, verbose: bool) -> tuple[Plan, Opened]:
    """The plan of a bundle, and its opened engine. Raises ManifestError or EngineError."""
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
        if old != kernels:  # of another driver or version, which this box no longer has
            old.unlink(missing_ok=True)
    facts |= {
        "library": session.version,
        "device": session.device,
        "compute_capability": ready.device.sm,
        "engine": ready.key,
    }
    return plan, Opened(session, ready.profile, facts)
