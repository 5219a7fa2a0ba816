"""int4 integers and scales, tuned once for every container (GGUF Q4_0, GPTQ, AWQ).

workers/tune.py computes them with SignRound (Cheng et al. 2023, arXiv 2309.05516). The implementation is our own: it
streams a layer at a time, and a killed run resumes at the last finished layer. All containers store the same integers:
weight = scale · (q - 8), q in 0…15, one float16 scale for ``group`` inputs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from packager.core.processes import WORKERS, follow
from packager.core.store import Cost, Step, digest_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from packager.checkpoint.checkpoint import Checkpoint
    from packager.fidelity.source import Samples
    from packager.recipe import Job

ITERATIONS = {"none": 0, "quick": 20, "full": 200}
AUTO_SECONDS = 3600.0  # tune=auto does not start a longer tuning
ZERO = 8  # the zero point
# The child's peak memory: torch and transformers; for each weight of a layer the weight, its shift, its rounded form
# and gradients in float32; the calibration's hidden states; one batch's activations for the backward pass.
BASE_BYTES = 900 << 20
BYTES_PER_WEIGHT = 24
TOKENS, BATCH_TOKENS = 8192, 1024  # packager/fidelity/source.py's calibration, workers/tune.py's batches
FLOPS = 4e10  # a second on two shared cores with AVX2, measured: SmolLM2 4.1e10, two layers of a 1.5B 3.6e10


@dataclass(frozen=True)
class Tuned:
    """A tuning in the store. group: inputs that share a scale. modules: Hugging Face module name -> file with its
    ``.q`` and ``.scales``. errors: each layer's mean relative squared output error, before and after (empty for plain
    rounding).
    """

    step: Step
    group: int
    iterations: int
    modules: dict[str, Path]
    errors: tuple[dict[str, float], ...]

    @property
    def method(self) -> str:
        """The method that made the integers, for a report."""
        if not self.iterations:
            return f"plain rounding to nearest, groups of {self.group}"
        return f"SignRound (arXiv 2309.05516), {self.iterations} iterations, groups of {self.group}"

    def as_dict(self) -> dict[str, Any]:
        """The form stored in a report; errors are means over the layers."""
        report: dict[str, Any] = {"method": self.method, "group": self.group, "iterations": self.iterations}
        if self.errors:
            for key in ("searched", "tuned"):
                report[f"layer_error_{key}"] = round(sum(each[key] for each in self.errors) / len(self.errors), 6)
        return report

    def read(self, module: str) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
        """Integers 0…15 (rows, inputs) and scales (rows, inputs / group) of one module. Raises KeyError."""
        from safetensors import safe_open

        with safe_open(self.modules[module], framework="np") as stored:
            packed, scales = stored.get_tensor(f"{module}.q"), stored.get_tensor(f"{module}.scales")
        return unpack(packed), scales

    def weight(self, module: str) -> NDArray[np.float32]:
        """The dequantized weights (rows, inputs), without rounding."""
        import numpy as np

        values, scales = self.read(module)
        wide = np.repeat(scales.astype(np.float32), self.group, axis=1)
        exact: NDArray[np.float32] = (values.astype(np.float32) - ZERO) * wide
        return exact


def unpack(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(rows, n / 2) bytes as (rows, n) integers; element 2j is in the low half of byte j."""
    import numpy as np

    integers = np.empty((packed.shape[0], packed.shape[1] * 2), np.uint8)
    integers[:, 0::2] = packed & 15
    integers[:, 1::2] = packed >> 4
    return integers


def linear_modules(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """Name -> (rows, inputs) of every linear module in the decoder's layers, from the headers, without the head."""
    modules: dict[str, tuple[int, int]] = {}
    for name, info in checkpoint.tensors.items():
        if name.startswith("model.layers.") and name.endswith(".weight") and len(info.shape) == 2:
            modules[name.removesuffix(".weight")] = (info.shape[0], info.shape[1])
    return modules


def ragged(checkpoint: Checkpoint, group: int) -> str | None:
    """The first module whose inputs ``group`` does not divide, with their number; None when it divides all."""
    for name, (_, inputs) in linear_modules(checkpoint).items():
        if inputs % group:
            return f"{name} ({inputs} inputs)"
    return None


def costs(checkpoint: Checkpoint, budget: str) -> tuple[int, float]:
    """(peak resident bytes, rough seconds on two cores) of a tuning; memory depends on a layer's size."""
    layers = checkpoint.shape.layers
    weights = sum(rows * inputs for rows, inputs in linear_modules(checkpoint).values()) // layers
    states = 3 * 4 * TOKENS * checkpoint.shape.hidden
    inner = 4 * 4 * BATCH_TOKENS * (checkpoint.shape.intermediate + checkpoint.shape.hidden)
    flops = layers * weights * (6 * BATCH_TOKENS * ITERATIONS[budget] + 6 * TOKENS)
    return BASE_BYTES + BYTES_PER_WEIGHT * weights + states + inner, flops / FLOPS


def affordable(checkpoint: Checkpoint, whose: str) -> tuple[Literal["none", "quick"], tuple[str, ...]]:
    """The value of tune=auto when fine-tuning data is given, and a note when it is not to tune."""
    _, seconds = costs(checkpoint, "quick")
    if seconds <= AUTO_SECONDS:
        return "quick", ()
    return "none", (
        f"{whose} integers are rounded, not tuned: tuning would take about {seconds / 3600:.1f} hours on two cores, "
        "and auto stays below one. Ask for it with --set tune=quick: it keeps more of the fine-tuning.",
    )


def tune(job: Job, samples: Samples | None, *, budget: str, group: int) -> Tuned:
    """The integers of a checkpoint, tuned on ``samples.calibration`` (samples may be None for the budget "none").

    budget: a key of ITERATIONS. Raises ChildFailed (a ToolError); a killed tuning goes on at the next call.
    """
    from packager.fidelity.source import source_scores

    iterations = ITERATIONS[budget]
    if samples and iterations and job.verify:
        source_scores(job, samples)  # a calibration that the source does not know is refused before minutes are spent
    calibration = list(samples.calibration) if samples and iterations else []
    threads = os.cpu_count() or 1
    layers = job.checkpoint.shape.layers

    def make(folder: Path, cost: Cost) -> None:
        for left in (*folder.glob(".job-*.json"), *folder.glob("*.part")):  # of a run that was killed
            left.unlink()
        follow(
            WORKERS / "tune.py",
            {
                "checkpoint": str(job.checkpoint.path),
                "calibration": calibration,
                "group": group,
                "iterations": iterations,
                "seed": job.seed,
                "threads": threads,
                "output": str(folder),
            },
            f"tuning int4 weights ({iterations} iterations a layer)" if iterations else "rounding to int4",
            job.progress,
            cost,
            work=folder,
            total=float(layers),
            unit="layers",
            path=[WORKERS.parent.parent],
        )

    inputs = {
        "checkpoint": job.checkpoint.digest,
        "calibration": digest_of(calibration),  # of the tokens: what else the samples hold must not tune again
        "iterations": iterations,
        "group": group,
        "seed": job.seed if iterations else None,
        "threads": threads if iterations else None,  # the order of float32 sums
    }
    return open_tuned(job.store.step("tune", inputs, make, progress=job.progress, resumable=True))


def open_tuned(step: Step) -> Tuned:
    """A finished tuning, read from its step."""
    report: dict[str, Any] = step.read_json("tune.json")
    files = [step.path / layer["file"] for layer in report["layers"]]
    return Tuned(
        step,
        report["group"],
        report["iterations"],
        {module: file for file in files for module in _modules(file)},
        tuple({key: layer[key] for key in ("searched", "tuned")} for layer in report["layers"] if "tuned" in layer),
    )


def _modules(file: Path) -> Iterator[str]:
    from packager.tensors.safetensors import read_header

    for name in sorted(read_header(file)):
        if name.endswith(".q"):
            yield name.removesuffix(".q")
