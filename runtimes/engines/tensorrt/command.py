"""``engine``: build, show or clear the engine that this box builds from a TensorRT bundle.

Exit codes: 0 done, 2 usage, 3 the bundle is unusable, 4 the box does not fit, 9 the engine could not be made or kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from runtimes.engine import EngineError
from runtimes.engines.registry import COMPILED
from runtimes.engines.tensorrt import cache
from runtimes.engines.tensorrt.build import check
from runtimes.engines.tensorrt.cache import Key
from runtimes.engines.tensorrt.device import query_device, unfit
from runtimes.engines.tensorrt.open import home_of, prepare
from runtimes.engines.tensorrt.plan import Plan, read_plan
from runtimes.files import say
from runtimes.manifest import ManifestError, Run, read_bundle

PAST = "past_key_values."  # a language model's caches, two per layer; not shown
FINE, UNUSABLE, REFUSED, FAILED = 0, 3, 4, 9


def main(argv: Sequence[str]) -> int:
    """Run the verb; the exit code."""
    if list(argv[:1]) == ["--child-build"]:
        return child(Path(argv[1]), int(argv[2]), Path(argv[3]))
    options = parser().parse_args(argv)
    try:
        run = read_bundle(options.bundle)
        if run.engine not in COMPILED:
            raise ManifestError(
                f"This bundle's engine is {run.engine!r}; only TensorRT bundles have an engine to build."
            )
        plan = read_plan(run.model)
        document, code = WHAT[options.what](run, plan, options)
    except ManifestError as error:
        return _failed(str(error), UNUSABLE, options.json)
    except EngineError as error:
        return _failed(str(error), FAILED, options.json)
    if options.json:
        sys.stdout.write(json.dumps(document, indent=1, sort_keys=True) + "\n")
    else:
        sys.stdout.write("".join(f"{name}: {_plain(value)}\n" for name, value in document.items()))
    return code


def parser() -> argparse.ArgumentParser:
    """The options of ``engine``."""
    options = argparse.ArgumentParser(
        prog="python -m runtimes engine",
        description="The engine that this box builds from a TensorRT bundle.",
        epilog="Exit codes: 0 done, 3 the bundle is unusable, 4 the box does not fit, 9 the engine was not made.",
    )
    options.add_argument("what", choices=list(WHAT), help="build it where it is missing, show it, or clear all")
    options.add_argument("--bundle", type=Path, required=True, metavar="DIR", help="the bundle, or an install of it")
    options.add_argument("--force", action="store_true", help="build: rebuild an existing engine")
    options.add_argument("--json", action="store_true", help="one JSON document on standard output")
    return options


def build(run: Run, plan: Plan, options: argparse.Namespace) -> tuple[dict[str, object], int]:
    """Build the engine where it is missing; check one that the bundle contains. Code 4 for a box that does not fit."""
    try:
        device = query_device(plan.library)
    except EngineError as error:
        return {"ok": False, "error": str(error)}, REFUSED
    if (refusal := unfit(plan, device)) is not None:
        return {"ok": False, "error": refusal, "device": asdict(device)}, REFUSED
    ready = prepare(plan, home_of(run), force=options.force and plan.compiled is None, device=device)
    # an engine in the bundle was compiled without a GPU, so this is its first run
    checked = check(plan, 0, ready.engine, say) if plan.compiled is not None else None
    shapes = {name: list(shape.max) for name, shape in ready.profile.items() if not name.startswith(PAST)}
    return {
        "ok": True,
        "engine": ready.key,
        "file": str(ready.engine),
        "bytes": ready.engine.stat().st_size,
        "largest": shapes,
        "device": asdict(ready.device),
        "checked": checked,
    }, FINE


def show(run: Run, plan: Plan, options: argparse.Namespace) -> tuple[dict[str, object], int]:
    """The device, the plan's requirements, and the engines in the cache."""
    folders = cache.places(home_of(run))
    document: dict[str, object] = {
        "precision": plan.precision,
        "bundled": plan.compiled and plan.compiled.file.name,
        "sha256": plan.compiled and plan.compiled.sha256,
        "allowed": list(plan.compiled.sm if plan.compiled else plan.sm),
        "folders": [str(folder) for folder in folders],
        "kept": sorted(str(path) for folder in folders for path in cache.entries(folder)),
    }
    try:
        device = query_device(plan.library)
    except EngineError as error:
        return {**document, "ok": False, "device": None, "error": str(error)}, REFUSED
    refusal = unfit(plan, device)
    document |= {"ok": refusal is None, "device": asdict(device), "error": refusal}
    if refusal is None and plan.compiled is None:
        key = Key.of(plan, device)
        entry = cache.find(folders, key, plan)
        document |= {"engine": key.name, "built": entry is not None}
        if entry:
            document |= {"profile": entry.profile, "bytes": entry.bytes, "made": dict(entry.made)}
    return document, REFUSED if refusal else FINE


def clear(run: Run, plan: Plan, options: argparse.Namespace) -> tuple[dict[str, object], int]:
    """Remove every engine of this install."""
    removed = cache.clear(cache.places(home_of(run)), say)
    return {"ok": True, "removed": [str(path) for path in removed]}, FINE


WHAT = {"build": build, "show": show, "clear": clear}


def child(path: Path, number: int, engine: Path) -> int:
    """Build the engine of a profile; run as a child, because it may run out of memory or crash."""
    try:
        from runtimes.engines.tensorrt.session import build as make

        make(read_plan(path), number, engine)
    except (EngineError, ManifestError) as error:
        sys.stderr.write(f"[E] {error}\n")
        return FAILED
    return FINE


def _failed(sentence: str, code: int, as_json: bool) -> int:
    if as_json:
        sys.stdout.write(json.dumps({"ok": False, "error": sentence}, indent=1) + "\n")
    else:
        sys.stderr.write(f"{sentence}\n")
    return code


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(one)}" for name, one in value.items())
    return "\n  ".join(["", *map(str, value)]) if isinstance(value, list) else "none" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
