"""What a recipe author imports: Recipe, Job, Estimate, Artifact, Need, and provenance.

A recipe is one module in recipes/ (the file name is its identifier) with a module-level ``RECIPE = Recipe(...)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from packager.metrics.encoders import EncoderThresholds
from packager.metrics.thresholds import Thresholds

if TYPE_CHECKING:
    from packager.checkpoint.checkpoint import Checkpoint
    from packager.core.progress import Progress
    from packager.core.store import Step, Store
    from packager.prompts.calibration import Calibration
    from packager.prompts.training_template import Training
    from packager.target import Target

Options = TypeVar("Options")


class ServingOptions(Protocol):
    """Options of a model that is served: tokens of its longest text or conversation, and how many are computed at the
    same time. What a module reads beside these is its own Options, made from this.
    """

    @property
    def context(self) -> int: ...
    @property
    def slots(self) -> int: ...


@dataclass(frozen=True)
class Need:
    """A module or program a recipe cannot work without, and what brings it.

    when: "" (always), or the option values it is needed for: "option=value|value".
    """

    module: str
    brings: str
    when: str = ""


@dataclass(frozen=True)
class Estimate:
    """What a build will cost and yield; all sizes in bytes.

    artifact_bytes: the model file. build_ram_bytes: peak resident memory of the build. build_disk_bytes: store and
    output together. load_bytes: weights resident on the box. kv_bytes: KV cache at ``context`` tokens for all
    ``slots`` together. read_per_token_bytes: weights read to decode one token at batch 1 (the roofline's divisor).
    seconds: a rough build time on two cores. gpu: whether it runs on the target's GPU, where an option decides it;
    None: as the target's gpu.recipes says.
    """

    artifact_bytes: int
    build_ram_bytes: int
    build_disk_bytes: int
    load_bytes: int
    kv_bytes: int
    overhead_bytes: int
    read_per_token_bytes: int
    context: int
    slots: int
    seconds: float
    notes: tuple[str, ...] = ()
    gpu: bool | None = None


@dataclass(frozen=True)
class Job:
    """Everything a build may use. ``checkpoint`` is already merged and all safetensors. limits: the user's own
    thresholds, by the names of gates.Thresholds. training: the template that the model was fine-tuned with, where it is
    known. trust_calibration: the calibration is used whatever the source makes of its text.
    """

    checkpoint: Checkpoint
    target: Target
    store: Store
    progress: Progress
    calibration: Calibration | None = None
    seed: int = 0
    verify: bool = True
    limits: Mapping[str, float] = field(default_factory=dict)
    training: Training | None = None
    trust_calibration: bool = False


@dataclass(frozen=True)
class Artifact:
    """What a recipe built: files (bundle-relative name under model/ -> path in the store) and what is known of them.

    run: how the box runs it (manifest's ``run`` object). report: measured facts (tensor types, fidelity).
    provenance: versions, digests, options. extra: further files at the bundle's top level (an Ollama store). costs:
    seconds and peak resident bytes of each step, which stay outside the bundle (they differ between equal builds). gpu:
    what the box's GPU has to be, as the manifest's needs.gpu has it; None where the run object's settings say it, or
    none is needed. release: the release of the target's system image (JetPack) whose Python and C library its wheels
    are for; None for all that the target names.
    """

    format: str
    files: Mapping[str, Path]
    run: Mapping[str, Any]
    report: Mapping[str, Any]
    provenance: Mapping[str, Any]
    extra: Mapping[str, Path] = field(default_factory=dict)
    costs: tuple[Mapping[str, Any], ...] = ()
    gpu: Mapping[str, Any] | None = None
    release: str | None = None


def provenance(job: Job, options: Any, steps: Iterable[Step], **made_by: Any) -> dict[str, Any]:
    """An artifact's provenance: what every recipe says, and ``made_by``, its own tools by their part in it.

    options: the recipe's, a dataclass. steps: of the store, those that the artifact was made and compared in.
    """
    return {
        **made_by,
        "checkpoint": job.checkpoint.digest,
        "calibration": job.calibration.digest if job.calibration else None,
        "verified": job.verify,
        "options": asdict(options),
        "steps": {step.name: step.key for step in steps},
    }


@dataclass(frozen=True)
class Recipe(Generic[Options]):
    """One way to turn a checkpoint into an artifact.

    options: the recipe's own frozen dataclass; ``--set key=value`` and the target's ``[options]`` fill it.
    why_not: None, or one sentence why this checkpoint cannot be built for this target and what would work.
    thresholds: what an artifact must keep of its source, unless the user says otherwise. encoder_thresholds: the same
    for embedders and classifiers, where it makes them.
    settle: decides, before the plan, what the options left to the calibration data ("auto"), and says in sentences what
    a user may want otherwise; None: nothing is left open.
    """

    name: str
    summary: str
    format: str
    options: type[Options]
    needs: tuple[Need, ...]
    why_not: Callable[[Checkpoint, Target, Options], str | None]
    estimate: Callable[[Checkpoint, Target, Options], Estimate]
    build: Callable[[Job, Options], Artifact]
    thresholds: Callable[[Options], Thresholds] = field(default=lambda _options: Thresholds())
    encoder_thresholds: EncoderThresholds | None = None
    settle: Callable[[Options, Calibration | None, Checkpoint], tuple[Options, tuple[str, ...]]] | None = None
