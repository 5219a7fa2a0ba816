"""The errors shown to users: what went wrong, why, and what to do next. Each kind has its own exit code.

Exit codes are part of the interface: release pipelines branch on them.

====  =====================================================================
code  meaning
====  =====================================================================
0     done
1     a defect of the packager itself (the only case that shows a traceback)
2     usage: an unknown option, target, recipe or key
3     the checkpoint, adapter or calibration file is not usable
4     refused by the plan: it does not fit or cannot work on that target
5     a bundle failed verification
6     the artifact failed a gate: prompt contract or fidelity
7     an outside tool is missing or failed
8     the network, a hub or a package index did not deliver
9     the machine: disk full, permission denied, not enough memory
130   interrupted (Ctrl-C); nothing half-written is left
====  =====================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class PackagerError(Exception):
    """A failure the user can act on. Shown as three lines, never as a traceback.

    what: what went wrong and where, one sentence. why: the cause, when it is known. fix: what to do next.
    """

    exit_code: ClassVar[int] = 1
    kind: ClassVar[str] = "error"
    details: Mapping[str, Any] | None = None  # figures for ``--json``
    shown = False  # True when the document that explains it is already printed

    def __init__(self, what: str, *, why: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.fix = fix

    def __str__(self) -> str:
        return " ".join(part for part in (self.what, self.why, self.fix) if part)

    def as_dict(self) -> dict[str, Any]:
        """The JSON form that ``--json`` prints."""
        plain = {"kind": self.kind, "exit_code": self.exit_code, "what": self.what, "why": self.why, "fix": self.fix}
        return plain if self.details is None else {**plain, "details": dict(self.details)}


class UsageError(PackagerError):
    exit_code = 2
    kind = "usage"


class InputError(PackagerError):
    """A checkpoint, adapter or calibration file that cannot be used as it is."""

    exit_code = 3
    kind = "input"


class PlanRefused(PackagerError):
    exit_code = 4
    kind = "refused"


class VerifyFailed(PackagerError):
    exit_code = 5
    kind = "verification"


class GateFailed(PackagerError):
    exit_code = 6
    kind = "gate"


class ToolError(PackagerError):
    exit_code = 7
    kind = "tool"


class NetworkError(PackagerError):
    exit_code = 8
    kind = "network"


class MachineError(PackagerError):
    exit_code = 9
    kind = "machine"


def closest(word: str, choices: list[str] | tuple[str, ...]) -> str:
    """``' Did you mean "x"?'`` when a choice is near the misspelt word, else an empty string."""
    import difflib

    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f' Did you mean "{near[0]}"?' if near else ""
