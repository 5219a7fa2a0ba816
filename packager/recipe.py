"""The API for recipe authors: Recipe, Job, Estimate, Artifact, Run, Need, and provenance.

A recipe is one module in recipes/ (the file name is its identifier) with a module-level ``RECIPE = Recipe(...)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from packager.metrics.encoders import EncoderThresholds
from packager.metrics.thresholds import Thresholds

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from packager.checkpoint.checkpoint import Checkpoint
    from packager.core.progress import Progress
    from packager.core.store import Step, StepCost, Store
    from packager.prompts.calibration import Calibration
    from packager.prompts.training_template import Training
    from packager.target import Target

Options = TypeVar("Options", bound="DataclassInstance")  # a recipe's own frozen dataclass
TEMPLATE = "chat_template.jinja"  # the chat template's name in a bundle


class ServingOptions(Protocol):
    """Options of a served model. context: tokens of its longest text or conversation. slots: how many of these are
    computed at the same time. A module that reads more defines its own Options from this.
    """

    @property
    def context(self) -> int: ...
    @property
    def slots(self) -> int: ...


@dataclass(frozen=True)
class Need:
    """A module that a recipe needs, and the package that provides it.

    when: "" (always), or the option values it is needed for: "option=value|value".
    """

    module: str
    brings: str
    when: str = ""


@dataclass(frozen=True)
class Estimate:
    """The estimated cost and result of a build; all sizes in bytes.

    artifact_bytes: the model file. build_ram_bytes: peak resident memory of the build. build_disk_bytes: store and
    output together. load_bytes: weights resident on the box. kv_bytes: KV cache at ``context`` tokens for all
    ``slots`` together. read_per_token_bytes: weights read to decode one token at batch 1 (the roofline's divisor).
    seconds: a rough build time on two cores. gpu: whether it runs on the target's GPU, when an option decides it; None:
    the target's gpu.recipes decides.
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
    """The inputs of a build. ``checkpoint`` is already merged and in safetensors. limits: the user's own thresholds, by
    the field names of Thresholds. training: the template that the model was fine-tuned with, if known.
    trust_calibration: the calibration is used even when the source does not know its language. ask: at most so many of
    the fine-tuning pairs are scored; None: as many as the time budget of fidelity/pairs.py allows.
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
    ask: int | None = None


@dataclass(frozen=True)
class Run:
    """The manifest's ``run`` object: how the box runs the model. bundle/schemas/manifest.schema.json is its schema, and
    runtimes/manifest.py reads it.

    engine: an entry of packager/bundle/engines.py. model, tokenizer, chat_template: paths in the bundle, or absolute
    ones while a file is scored on the build machine. context: tokens of a conversation, or of an encoder's text. slots:
    conversations or texts at the same time. read_per_token_bytes: weights read to decode one token at batch 1.
    model_bytes: size of the loaded files. task: "generate", "embed" or "classify". threads: 0 for one on each physical
    core. flash_attention, kv_type, gpu_layers: None for an engine that does not read them. settings: keys that only
    this engine reads.
    """

    engine: str
    model: str
    tokenizer: str
    chat_template: str | None
    special_tokens: Mapping[str, str | None]
    bos_id: int | None
    add_bos: bool
    stop_ids: tuple[int, ...]
    sampling: Mapping[str, float]
    context: int
    slots: int
    read_per_token_bytes: int
    model_bytes: int
    task: str = "generate"
    threads: int = 0
    flash_attention: bool | None = None
    kv_type: str | None = None
    gpu_layers: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        engine: str,
        model: str,
        serving: ServingOptions,
        *,
        read_per_token_bytes: int,
        model_bytes: int,
        **others: Any,
    ) -> Run:
        """The run object of a checkpoint's artifact, with the checkpoint's tokenizer. others: further fields."""
        tokenizer = checkpoint.tokenizer
        usual: dict[str, Any] = {
            "tokenizer": "model/tokenizer.json",
            "chat_template": None if tokenizer.chat_template is None else f"model/{TEMPLATE}",
            "special_tokens": dict(tokenizer.special_tokens),
            "bos_id": tokenizer.bos_id,
            "add_bos": tokenizer.add_bos,
            "stop_ids": tuple(sorted(tokenizer.stop_ids)),
            "sampling": dict(tokenizer.sampling),
            "context": serving.context,
            "slots": serving.slots,
        }
        sizes = {"read_per_token_bytes": read_per_token_bytes, "model_bytes": model_bytes}
        return cls(engine=engine, model=model, **{**usual, **sizes, **others})

    def here(self, model: Path, beside: Mapping[str, Path], **others: Any) -> Run:
        """A copy with paths of this machine. beside: the tokenizer's files by their names in the bundle. others:
        further fields that differ on this machine.
        """
        template = None if self.chat_template is None else str(beside[PurePosixPath(self.chat_template).name])
        tokenizer = str(beside[PurePosixPath(self.tokenizer).name])
        return replace(self, model=str(model), tokenizer=tokenizer, chat_template=template, **others)

    def as_dict(self) -> dict[str, Any]:
        """The form stored in the manifest; keys that the engine does not read are absent."""
        plain = {**asdict(self), "stop_ids": list(self.stop_ids)}
        return {key: value for key, value in plain.items() if value is not None or key in ("chat_template", "bos_id")}


@dataclass(frozen=True)
class Artifact:
    """The result of a recipe. files: name under model/ in the bundle -> path in the store.

    run: how the box runs it. report: measured facts (tensor types, fidelity). provenance: versions, digests, options.
    extra: further files at the bundle's top level (an Ollama store). costs: seconds and peak resident bytes of each
    step, which stay outside the bundle (they differ between equal builds). gpu: the required GPU, in the form of the
    manifest's needs.gpu; None when the run object's settings have it, or no GPU is needed. release: the release of the
    target's system image (JetPack) whose Python and C library its wheels are for; None for all that the target lists.
    """

    format: str
    files: Mapping[str, Path]
    run: Run
    report: Mapping[str, Any]
    provenance: Mapping[str, Any]
    extra: Mapping[str, Path] = field(default_factory=dict)
    costs: tuple[StepCost, ...] = ()
    gpu: Mapping[str, Any] | None = None
    release: str | None = None


def provenance(job: Job, options: Any, steps: Iterable[Step], **made_by: Any) -> dict[str, Any]:
    """An artifact's provenance: the entries of every recipe, and ``made_by``, the recipe's own tools by their role.

    options: the recipe's, a dataclass. steps: the store's steps in which the artifact was made and compared.
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
    thresholds: the default thresholds of an artifact. encoder_thresholds: those for embedders and classifiers, None for
    a recipe that does not build them.
    resolve_auto: replaces, before the plan, options of "auto" by values that depend on the calibration data, and
    returns notes on its choices; None: the recipe has no such option.
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
    resolve_auto: Callable[[Options, Calibration | None, Checkpoint], tuple[Options, tuple[str, ...]]] | None = None
