"""Checks whether this box fits a bundle or a target, with the preflight that every bundle contains.

The facts and verdicts are the preflight's (runtimes/preflight/check.py, run as a child and read as JSON), so that
``packager doctor`` and ``bin/check`` give the same result.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from packager.core.errors import PlanRefused, UsageError, VerifyFailed
from packager.core.processes import ChildFailed, run_python
from packager.planning.catalog import load_target, runtimes_folder, target_names
from packager.target import Target

# The least share of its nominal memory that a board reports: 6.7 of 8 GiB on a Xavier NX, 7.3 on an Orin Nano.
SHOWN_MEMORY = 0.8
KEYS = ("ok", "exit_code", "refusal", "warnings", "findings")  # of a verdict
REFUSED, DAMAGED = PlanRefused.exit_code, VerifyFailed.exit_code


class TargetRow(TypedDict):
    """Whether the box is one of a target. refusal: "" when ok. unknown: names of facts that could still refuse it."""

    target: str
    title: str
    ok: bool
    refusal: str
    unknown: list[str]


def target_needs(target: Target) -> dict[str, Any]:
    """The properties of a target's boxes, in the form of a manifest's ``needs``, with the memory of the device instead
    of a model's.

    Memory that the target file only assumes is not required.
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
    """The document of ``packager doctor --json``: facts, the verdict for the given bundle or target, and for every
    known target whether this box is one.

    facts: recorded facts of a box, None to read this machine's. files: whether a bundle's files are checked too.
    Raises UsageError for a folder that is no bundle, and for recorded facts that cannot be read.
    """
    if bundle is not None and not (bundle / "manifest.json").is_file():
        raise UsageError(
            f"{bundle} is not a bundle: it has no manifest.json.", fix="Give the folder that `packager build` printed."
        )
    known = [load_target(name) for name in target_names()]
    chosen = load_target(target) if target else None
    needs = {one.name: target_needs(one) for one in [*known, *([chosen] if chosen else [])]}
    with tempfile.TemporaryDirectory(prefix="packager-doctor-") as folder:
        place = Path(folder)
        (place / "needs.json").write_text(json.dumps(needs), encoding="utf-8")
        compared = _preflight(place / "targets.json", "--needs", place / "needs.json", *_recorded(facts))
        # the bundle is compared with the same facts that are shown; the disk is that of the home folder
        (place / "facts.json").write_text(json.dumps(compared["facts"]), encoding="utf-8")
        verdict: Mapping[str, Any] | None = None
        if bundle is not None:
            options = () if files else ("--no-files",)
            verdict = _preflight(place / "bundle.json", "--bundle", bundle, "--facts", place / "facts.json", *options)
        elif chosen is not None:
            verdict = compared["results"][chosen.name]
    rows: list[TargetRow] = [
        {
            "target": one.name,
            "title": one.title,
            "ok": result["ok"],
            "refusal": result["refusal"],
            "unknown": _unknown(result),
        }
        for one in known
        for result in (compared["results"][one.name],)
    ]
    return {
        "facts": compared["facts"],
        "bundle": str(bundle) if bundle is not None else None,
        "target": chosen.name if chosen else None,
        "verdict": None if verdict is None else {key: verdict[key] for key in KEYS},
        "targets": rows,
        "nearest": _nearest(known, rows),
    }


def _unknown(verdict: Mapping[str, Any]) -> list[str]:
    """The names of facts that could not be read and could refuse the box."""
    return [one["name"] for one in verdict["findings"] if one["ok"] is None and one["severity"] == "refuses"]


def _recorded(facts: Path | None) -> tuple[str | Path, ...]:
    return () if facts is None else ("--facts", facts.resolve())


def _preflight(output: Path, *arguments: str | Path) -> dict[str, Any]:
    """Run the preflight and read its document. A box that does not fit is a result, not an error.

    Raises UsageError and VerifyFailed with the preflight's own sentence, ChildFailed when it crashes.
    """
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


def _nearest(known: list[Target], rows: list[TargetRow]) -> str | None:
    """The most specific target that the box fits with every fact known: one with a GPU, then that with most memory."""
    fitting = [target for target, row in zip(known, rows, strict=True) if row["ok"] and not row["unknown"]]
    best = max(fitting, key=lambda one: (one.gpu is not None, one.memory_bytes), default=None)
    return best.name if best else None


def raise_if_refused(document: Mapping[str, Any]) -> None:
    """Raise PlanRefused or VerifyFailed, with bin/check's exit codes, when the given bundle or target does not fit."""
    verdict = document["verdict"]
    if verdict is None or verdict["ok"]:
        return
    kind = PlanRefused if verdict["exit_code"] == REFUSED else VerifyFailed
    error = kind(verdict["refusal"])
    error.shown = True
    raise error


def shown_facts(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, text) of a box's facts; a fact that could not be read is "unknown"."""
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
