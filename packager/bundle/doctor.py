"""Is this box one that a bundle or a target fits? The preflight that every bundle carries, asked from the packager.

The facts and the verdicts are the preflight's own (runtimes/preflight/check.py, run as a child and read as JSON): a box
is told the same by ``packager doctor`` and by ``bin/check``.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from packager.core.errors import PlanRefused, UsageError, VerifyFailed
from packager.core.processes import ChildFailed, run_python
from packager.planning.catalog import load_target, runtimes_folder, target_names
from packager.target import Target

# Of its nominal memory a board shows this much at least: 6.7 of 8 GiB on a Xavier NX, 7.3 on an Orin Nano.
SHOWN_MEMORY = 0.8
KEYS = ("ok", "exit_code", "refusal", "warnings", "findings")  # of a verdict
REFUSED, DAMAGED = PlanRefused.exit_code, VerifyFailed.exit_code


def target_needs(target: Target) -> dict[str, Any]:
    """What makes a box one of this target, in the form of a manifest's ``needs``: no model's size, but the device's.

    Memory that the target file only assumes is not asked for.
    """
    gpu = None
    if target.gpu is not None and target.gpu.architecture.startswith("sm_"):
        digits = target.gpu.architecture.removeprefix("sm_")
        size = target.gpu.memory_gib if target.gpu.memory_gib is not None else target.memory.total_gib
        gpu = {
            "capability": f"{digits[:-1]}.{digits[-1]}",
            "exact": True,
            "count": 1,
            "bytes": round(size * 2**30 * SHOWN_MEMORY),
            "jetpack": [one.jetpack for one in target.software] or None,
        }
    ordered = sorted(target.python, key=lambda version: int(version.split(".")[1]))
    return {
        "system": target.system,
        "machine": target.machine,
        "python_min": ordered[0],
        "python_max": ordered[-1],
        "glibc_min": target.glibc,
        "ram_bytes": 0 if target.memory.assumed else round(target.memory_bytes * SHOWN_MEMORY),
        "disk_bytes": 0,
        "gpu": gpu,
    }


def examine(bundle: Path | None, target: str | None, facts: Path | None, *, files: bool) -> dict[str, Any]:
    """The document of ``packager doctor --json``: facts, the verdict for the bundle or target that is named, and for
    every known target whether this box is one.

    Raises UsageError for a folder that is no bundle, and for recorded facts that cannot be read.
    """
    if bundle is not None and not (bundle / "manifest.json").is_file():
        raise UsageError(
            f"{bundle} is not a bundle: it has no manifest.json.", fix="Give the folder that `packager build` printed."
        )
    known = [load_target(name) for name in target_names()]
    asked = load_target(target) if target else None
    needs = {one.name: target_needs(one) for one in [*known, *([asked] if asked else [])]}
    with tempfile.TemporaryDirectory(prefix="packager-doctor-") as folder:
        place = Path(folder)
        (place / "needs.json").write_text(json.dumps(needs), encoding="utf-8")
        compared = _ask(place / "targets.json", "--needs", place / "needs.json", *_recorded(facts))
        # the bundle is held against the very facts that are shown; the disk is that of the home folder
        (place / "facts.json").write_text(json.dumps(compared["facts"]), encoding="utf-8")
        verdict: Mapping[str, Any] | None = None
        if bundle is not None:
            options = () if files else ("--no-files",)
            verdict = _ask(place / "bundle.json", "--bundle", bundle, "--facts", place / "facts.json", *options)
        elif asked is not None:
            verdict = compared["results"][asked.name]
    rows = [
        {"target": one.name, "title": one.title, "ok": said["ok"], "refusal": said["refusal"], "unknown": _open(said)}
        for one in known
        for said in (compared["results"][one.name],)
    ]
    return {
        "facts": compared["facts"],
        "bundle": str(bundle) if bundle is not None else None,
        "target": asked.name if asked else None,
        "verdict": None if verdict is None else {key: verdict[key] for key in KEYS},
        "targets": rows,
        "nearest": _nearest(known, rows),
    }


def _open(verdict: Mapping[str, Any]) -> list[str]:
    """What could not be read and might still refuse the box."""
    return [one["name"] for one in verdict["findings"] if one["ok"] is None and one["severity"] == "refuses"]


def _recorded(facts: Path | None) -> tuple[str | Path, ...]:
    return () if facts is None else ("--facts", facts.resolve())


def _ask(output: Path, *arguments: str | Path) -> dict[str, Any]:
    """Run the preflight and read its document. A box that does not fit is an answer, not a failure."""
    try:
        run_python(runtimes_folder() / "preflight/check.py", [*arguments, "--output", output], name="the preflight")
    except ChildFailed as error:
        if error.code == UsageError.exit_code:
            raise UsageError(error.output.strip().splitlines()[-1], fix="See `packager doctor --help`.") from error
        if error.code == DAMAGED and not output.exists():
            raise VerifyFailed(error.output.strip().splitlines()[-1]) from error
        if error.code not in (REFUSED, DAMAGED):
            raise
    document: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return document


def _nearest(known: list[Target], rows: list[dict[str, Any]]) -> str | None:
    """The target that says most of this box: of those that it is, one with a GPU, then the one with most memory."""
    fitting = [target for target, row in zip(known, rows, strict=True) if row["ok"] and not row["unknown"]]
    best = max(fitting, key=lambda one: (one.gpu is not None, one.memory_bytes), default=None)
    return best.name if best else None


def raise_if_refused(document: Mapping[str, Any]) -> None:
    """PlanRefused or VerifyFailed, as bin/check ends, when the bundle or target that was named does not fit."""
    verdict = document["verdict"]
    if verdict is None or verdict["ok"]:
        return
    kind = PlanRefused if verdict["exit_code"] == REFUSED else VerifyFailed
    error = kind(verdict["refusal"])
    error.shown = True
    raise error


def shown_facts(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A box's facts for people, what is unknown as such."""
    from packager.core.units import size

    def amount(key: str) -> str:
        return "unknown" if facts.get(key) is None else size(facts[key])

    def text(key: str, none: str = "none") -> str:
        return "unknown" if facts.get(key) is None else (str(facts[key]) or none)

    place = ", ".join(part for part in (facts.get("container") or "", "WSL" if facts.get("wsl") else "") if part)
    rows = [
        ("system", f"{text('os')}, {text('machine')}{f' ({place})' if place else ''}"),
        ("C library", f"{text('libc')} {facts.get('glibc') or ''}".strip()),
        ("Python", f"{text('python')} ({text('implementation')}, {text('bits')} bit)"),
        ("memory", f"{amount('ram_bytes')}, {amount('ram_available_bytes')} available"),
        ("disk", f"{amount('disk_free_bytes')} free"),
        ("GPU", _shown_gpus(facts)),
        ("driver", text("driver")),
        ("CUDA", f"driver {text('cuda_driver')}, toolkit {text('cuda_toolkit')}"),
        ("TensorRT", text("tensorrt")),
    ]
    if facts.get("jetson_model") != "":
        rows += [
            ("Jetson", f"{text('jetson_model')} ({text('jetson_module')}, {text('soc')})"),
            ("JetPack", f"{text('jetpack')} (Jetson Linux {text('l4t')})"),
            ("power mode", f"{text('power_mode')} of {', '.join(facts.get('power_modes') or []) or 'unknown'}"),
            ("GPU clocks", _shown_clocks(facts)),
        ]
    return [*rows, ("vLLM", text("vllm"))]


def _shown_gpus(facts: Mapping[str, Any]) -> str:
    from packager.core.units import size

    gpus = facts.get("gpus")
    if gpus is None:
        return f"unknown ({facts['gpus_unknown_because']})" if facts.get("gpus_unknown_because") else "unknown"
    if not gpus:
        return "an NVIDIA card without its driver" if facts.get("card_without_driver") else "none of NVIDIA's"
    return "\n".join(
        f"{one.get('name') or 'unknown'}, compute capability {one.get('capability') or 'unknown'}, "
        + (f"{size(one['bytes'])}" if one.get("bytes") is not None else "memory unknown")
        + (f", {size(one['free_bytes'])} free" if one.get("free_bytes") is not None else "")
        + (", shared with the processor" if one.get("unified") else "")
        + (", cut into slices (MIG)" if one.get("mig") else "")
        for one in gpus
    )


def _shown_clocks(facts: Mapping[str, Any]) -> str:
    least, most = facts.get("gpu_clock_least_hz"), facts.get("gpu_clock_most_hz")
    if least is None or most is None:
        return "unknown"
    return f"locked at {most / 1e6:.0f} MHz" if least == most else f"{least / 1e6:.0f} to {most / 1e6:.0f} MHz"
