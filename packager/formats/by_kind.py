"""A recipe for encoders and decoders: each kind has its own module, and the checkpoint decides which is used.

``ByKind`` provides a Recipe's ``why_not``, ``estimate`` and ``build``. A kind's module is imported when it is needed.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar, cast

if TYPE_CHECKING:
    from packager.checkpoint.checkpoint import Checkpoint
    from packager.recipe import Artifact, Estimate, Job
    from packager.target import Target

Options = TypeVar("Options")
Read = TypeVar("Read", contravariant=True)


class Maker(Protocol[Read]):
    """The functions of a kind's module."""

    def why_not(self, checkpoint: Checkpoint, target: Target, options: Read) -> str | None: ...
    def estimate(self, checkpoint: Checkpoint, target: Target, options: Read) -> Estimate: ...
    def build(self, job: Job, options: Read) -> Artifact: ...


@dataclass(frozen=True)
class ByKind(Generic[Options]):
    """options: the recipe's dataclass, which both modules read. encoder, decoder: the modules' dotted names."""

    options: type[Options]
    encoder: str
    decoder: str

    def maker(self, checkpoint: Checkpoint) -> Maker[Options]:
        """The module for the checkpoint's kind."""
        names = {"encoder": self.encoder, "decoder": self.decoder}
        return cast(Maker[Options], importlib.import_module(names[checkpoint.family.kind]))

    def why_not(self, checkpoint: Checkpoint, target: Target, options: Options) -> str | None:
        return self.maker(checkpoint).why_not(checkpoint, target, options)

    def estimate(self, checkpoint: Checkpoint, target: Target, options: Options) -> Estimate:
        return self.maker(checkpoint).estimate(checkpoint, target, options)

    def build(self, job: Job, options: Options) -> Artifact:
        return self.maker(job.checkpoint).build(job, options)
