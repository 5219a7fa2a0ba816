"""The GGUF files of a build as steps of the store: unquantized, as another type, and the importance matrix.

What each is for is the gguf recipe's to say.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from packager.core.store import Cost, Step
from packager.formats.gguf import llamacpp
from packager.formats.gguf.sizes import gguf_name
from packager.recipe import Job

if TYPE_CHECKING:
    from packager.checkpoint.checkpoint import Checkpoint
    from packager.fidelity.source import Samples
    from packager.formats.int4.tuning import Tuned


def base_type(checkpoint: Checkpoint) -> str:
    """The unquantized type that holds the checkpoint's own numbers."""
    return {"BF16": "BF16", "F16": "F16"}.get(checkpoint.dtype, "F32")


def unquantized(job: Job, steps: list[Step]) -> Path:
    """The checkpoint as one GGUF file in its own type. Raises what llamacpp.convert does."""
    kind = base_type(job.checkpoint)

    def make(folder: Path, cost: Cost) -> None:
        llamacpp.convert(job.checkpoint.path, job.checkpoint.name, kind, folder / "model.gguf", job.progress, cost)

    step = job.store.step(
        "gguf-convert",
        {
            "checkpoint": job.checkpoint.digest,
            "name": job.checkpoint.name,
            "type": kind,
            "converter": llamacpp.SDIST_SHA256,
        },
        make,
        progress=job.progress,
    )
    steps.append(step)
    return step.path / "model.gguf"


def as_type(
    job: Job, whole: Path, kind: str, matrix: Path | None, steps: list[Step], tuned: Tuned | None = None
) -> Path:
    """The folder of ``whole`` written as another type; tuned: the integers that its Q4_0 tensors are to hold."""
    library = llamacpp.library()
    parts = gguf_parts(tuned, job.checkpoint) if tuned else None
    quantizer = llamacpp.quantizer(library is not None)

    def make(folder: Path, cost: Cost) -> None:
        output = folder / "model.gguf"
        llamacpp.quantize(whole, kind, output, job.progress, cost, library=library, imatrix=matrix, tuned=parts)
        (folder / "quantizer.txt").write_text(quantizer, encoding="utf-8")

    inputs = {
        "source": whole.parent.name,
        "type": kind,
        "quantizer": quantizer,
        "imatrix": matrix.parent.name if matrix else None,
        "tuned": tuned.step.key if tuned else None,
    }
    step = job.store.step("gguf-quantize", inputs, make, progress=job.progress)
    steps.append(step)
    return step.path


def said(made: Path) -> str:
    """What quantized the file in a folder that as_type made."""
    return (made / "quantizer.txt").read_text(encoding="utf-8")


def exact_form(job: Job, whole: Path, steps: list[Step]) -> Path:
    """The file that is run against the source.

    llama.cpp's BF16 arithmetic on a CPU rounds activations to 8 bits of mantissa: on SmolLM2 its mean KL divergence is
    20 times that of the same weights in F16 (docs/explanation), enough to hide a small fault. So a BF16 file is run in
    F16, unless F16 cannot hold its weights.
    """
    from packager.core.processes import ChildFailed

    if base_type(job.checkpoint) != "BF16":
        return whole
    try:
        return as_type(job, whole, "F16", None, steps) / "model.gguf"
    except ChildFailed as error:
        if "cannot hold" not in error.output:
            raise
        job.progress.note("a weight is too large for F16: the unquantized GGUF is checked in BF16, which is coarser")
        return whole


def imatrix(job: Job, whole: Path, samples: Samples, steps: list[Step]) -> Path:
    """The .npz of mean squared inputs per channel, by GGUF tensor name."""
    from packager.fidelity.source import input_squares

    squares, source = input_squares(job, samples)
    steps.append(source)
    architecture = llamacpp.architecture(whole)

    def make(folder: Path, cost: Cost) -> None:
        import numpy as np

        with np.load(squares, allow_pickle=False) as stored:
            names = llamacpp.imatrix_names(list(stored.files), architecture, job.checkpoint.shape.layers)
            np.savez(folder / "imatrix.npz", **{name: stored[module] for module, name in sorted(names.items())})

    step = job.store.step("imatrix", {"squares": source.key, "architecture": architecture}, make, progress=job.progress)
    steps.append(step)
    return step.path / "imatrix.npz"


def gguf_parts(tuned: Tuned, checkpoint: Checkpoint) -> dict[str, dict[str, object]]:
    """What a GGUF is packed from: tensor name -> file, module, group, and heads where a converter reorders rows."""
    heads = {"q_proj": checkpoint.shape.heads, "k_proj": checkpoint.shape.kv_heads}
    return {
        str(gguf_name(f"{module}.weight")): {
            "file": str(file),
            "module": module,
            "group": tuned.group,
            "heads": heads.get(module.rpartition(".")[2], 0),
        }
        for module, file in tuned.modules.items()
    }
