"""Compares a manifest's ``needs`` with a box's facts: findings, the gravest first, each one sentence.

A finding refuses, warns (the box works, but slower or short of memory), or is unknown. The gravest finding explains
the others: on a Jetson with the wrong JetPack it is the JetPack, not its Python. Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtimes.preflight import fit_gpu
from runtimes.preflight.facts import MACHINES, NEEDED_MODULES
from runtimes.preflight.fit_gpu import UNKNOWN, numbers, size

FITS, REFUSED, DAMAGED, MACHINE = 0, 4, 5, 9
SYSTEMS = {"linux": "Linux", "windows": "Windows", "macos": "macOS"}
REFUSES, WARNS = "refuses", "warns"


@dataclass(frozen=True)
class Finding:
    """The result of one check. ok: True, False, or None when the fact is unknown. fix: what to do when not ok.
    severity: whether a failed check refuses the box or only warns.
    """

    name: str
    ok: bool | None
    expected: str
    found: str
    fix: str = ""
    severity: str = REFUSES

    def sentence(self) -> str:
        """Expected, found and what to do, in one sentence."""
        return f"{self.name}: expected {self.expected}, found {self.found}; {self.fix}."

    @property
    def refuses(self) -> bool:
        return self.ok is False and self.severity == REFUSES

    @property
    def warns(self) -> bool:
        return self.ok is not True and self.severity == WARNS


def compare(needs: Mapping[str, Any], facts: Mapping[str, Any], *, installing: bool) -> list[Finding]:
    """Every finding, the gravest first, warnings last. installing: check the free disk too."""
    gpu = needs.get("gpu")
    findings = [*_system(needs, facts)]
    if gpu:
        findings += [Finding(*row) for row in fit_gpu.requirements(gpu, facts)]
    findings += [*_python(needs, facts), *_memory(needs, facts)]
    if gpu and "vllm" in gpu:
        findings.append(Finding(*fit_gpu.vllm(str(gpu["vllm"]), facts)))
    if installing:
        findings.append(
            _check(
                facts,
                "disk",
                "disk_free_bytes",
                f"{size(needs['disk_bytes'])} free where it is installed",
                lambda value: value >= needs["disk_bytes"],
                "free some space or choose another place with --prefix",
                size,
            )
        )
    return findings + [Finding(*row, severity=WARNS) for row in fit_gpu.cautions(needs, facts)]


def _check(
    facts: Mapping[str, Any],
    name: str,
    fact: str,
    expected: str,
    test: Callable[[Any], bool],
    fix: str,
    show: Callable[[Any], str] = str,
) -> Finding:
    value = facts.get(fact)
    if value is None:
        return Finding(name, None, expected, UNKNOWN, fix)
    return Finding(name, test(value), expected, show(value), fix)


def _system(needs: Mapping[str, Any], facts: Mapping[str, Any]) -> Sequence[Finding]:
    system, machine = needs["system"], needs["machine"]
    name = SYSTEMS.get(system, system)
    return (
        _check(
            facts,
            "system",
            "system",
            name,
            lambda value: value == system,
            f"use a bundle that was built for this system, or a {name} box",
            lambda value: SYSTEMS.get(value, value),
        ),
        _check(
            facts,
            "processor",
            "machine",
            machine,
            lambda value: MACHINES.get(value.lower(), value.lower()) == machine,
            "use a bundle that was built for this processor",
        ),
    )


def _python(needs: Mapping[str, Any], facts: Mapping[str, Any]) -> list[Finding]:
    oldest, newest = needs["python_min"], needs["python_max"]
    low, high = numbers(oldest), numbers(newest)
    pythons = f"Python {oldest} to {newest}" if oldest != newest else f"Python {oldest}"
    findings = [
        _check(
            facts,
            "Python",
            "python",
            pythons,
            lambda value: low <= numbers(value)[:2] <= high,
            f"install one of them beside the system's own and name it with --python python{newest}",
            lambda value: f"Python {value}",
        ),
        _check(
            facts,
            "Python implementation",
            "implementation",
            "CPython",
            lambda value: value == "CPython",
            "name a CPython with --python",
        ),
        _check(
            facts,
            "Python word size",
            "bits",
            "64 bit",
            lambda value: value == 64,
            "install a 64-bit system or name a 64-bit Python with --python",
            lambda value: f"{value} bit",
        ),
        _check(
            facts,
            "Python build",
            "free_threaded",
            "a Python with its global lock",
            lambda value: not value,
            "name an ordinary build with --python",
            lambda value: "a free-threaded one" if value else "one with it",
        ),
        _check(
            facts,
            "Python modules",
            "modules_missing",
            ", ".join(NEEDED_MODULES),
            lambda value: not value,
            "install the full python3 of the system (on Debian and Ubuntu the package python3)",
            lambda value: f"no {', '.join(value)}" if value else "all",
        ),
    ]
    if needs.get("glibc_min"):
        least = needs["glibc_min"]
        fix = f"use a system with glibc {least} or newer, or a bundle that was built for this older one"
        if facts.get("libc") not in (None, "glibc"):
            findings.append(Finding("C library", False, f"glibc {least} or newer", str(facts["libc"]), fix))
        else:
            findings.append(
                _check(
                    facts,
                    "C library",
                    "glibc",
                    f"glibc {least} or newer",
                    lambda value: numbers(value) >= numbers(least),
                    fix,
                    lambda value: f"glibc {value}",
                )
            )
    return findings


def _memory(needs: Mapping[str, Any], facts: Mapping[str, Any]) -> list[Finding]:
    if not needs["ram_bytes"]:
        return []
    return [
        _check(
            facts,
            "memory",
            "ram_bytes",
            f"at least {size(needs['ram_bytes'])} of RAM",
            lambda value: value >= needs["ram_bytes"],
            "use a box with more memory, or a bundle with a smaller context or smaller weights",
            size,
        )
    ]


def exit_code(findings: Sequence[Finding], files: Sequence[Finding]) -> int:
    """4 when the box does not fit, else 5 when files are damaged, else 0. Unknown facts and warnings do not refuse."""
    if any(finding.refuses for finding in findings):
        return REFUSED
    return DAMAGED if any(finding.refuses for finding in files) else FITS


def refusal(findings: Sequence[Finding], files: Sequence[Finding]) -> str:
    """The refusal in one sentence: the gravest finding and the names of the others; "" when nothing refuses."""
    bad = [finding for finding in [*findings, *files] if finding.refuses]
    if not bad:
        return ""
    others = f" (and {len(bad) - 1} more: {', '.join(item.name for item in bad[1:9])})" if len(bad) > 1 else ""
    return f"{bad[0].sentence()[:-1]}{others}."


def warnings(findings: Sequence[Finding]) -> list[str]:
    """A sentence for each finding that warns."""
    return [finding.sentence() for finding in findings if finding.warns]
