"""Checkpoints from the Hugging Face hub and ModelScope. Sole owner of huggingface_hub and modelscope.

An interrupted download resumes within a run; a new run keeps every complete file (huggingface_hub 2 keeps no partial
file between runs). Downloads stay in the hub's own cache. The libraries read HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN and
HF_HOME (and ModelScope's MODELSCOPE_ENDPOINT, MODELSCOPE_CACHE) themselves.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

from packager.checkpoint.origin import MODEL_FILES, Origin
from packager.core.errors import InputError, NetworkError, PackagerError, ToolError
from packager.core.progress import Progress, Task

MODELSCOPE = "modelscope:"
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# The weight files to fetch; ONNX, GGUF, TensorFlow and Flax copies of the same weights are not fetched.
SAFE = ["model*.safetensors", "model.safetensors.index.json"]
PICKLED = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
TIMEOUT_S = 10.0


def download(ref: str, *, revision: str | None, progress: Progress) -> tuple[Path, Origin]:
    """The folder and origin of ``org/name`` or ``modelscope:org/name``, the commit pinned in the origin.

    Raises InputError when ref is neither a path nor an id or the hub does not have it, NetworkError when the
    hub does not answer, ToolError when modelscope is not installed.
    """
    if ref.startswith(MODELSCOPE):
        return _modelscope(_checked(ref.removeprefix(MODELSCOPE), ref), revision, progress)
    return _hugging_face(_checked(ref, ref), revision, progress)


def _checked(name: str, ref: str) -> str:
    if _ID.fullmatch(name) and ".." not in name:
        return name
    raise InputError(
        f"There is no folder {ref}, and it is no hub id either (org/name).",
        why=f"Looked in {Path.cwd()}.",
        fix="Check the path; for the hub write org/name, for ModelScope modelscope:org/name.",
    )


def _hugging_face(name: str, revision: str | None, progress: Progress) -> tuple[Path, Origin]:
    # The library reads these when it is imported, here; values that the user set are kept.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # it would log every retry
    from huggingface_hub import snapshot_download

    pinned = revision or "main"
    try:
        with progress.step(f"Fetching {name} from {_endpoint()}", unit="B") as task:
            for weights in (SAFE, PICKLED):
                folder = snapshot_download(
                    name,
                    revision=pinned,
                    allow_patterns=[*list(MODEL_FILES), *weights],
                    etag_timeout=TIMEOUT_S,
                    tqdm_class=_counter(task),
                )
                if any(Path(folder).glob("model*.safetensors")):
                    break
    except Exception as error:  # the library raises its own errors, the HTTP client's and OSError
        raise _explained(error, name, pinned) from error
    return Path(folder), Origin("hub", name, Path(folder).name)


def _counter(task: Task) -> type[Any]:
    """A tqdm class that draws nothing and advances ``task`` by the bytes written to disk, resumed ones included."""
    from huggingface_hub import utils

    base: Any = utils.tqdm  # type: ignore[attr-defined]  # documented, but neither typed nor exported for mypy

    class Counter(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # snapshot_download makes three: the files, the bytes received and (this one) the bytes on disk
            self.counts = str(kwargs.get("desc", "")).startswith("Reconstructing")
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            if self.counts and n:
                task.advance(n)
            return None

    return Counter


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _explained(error: Exception, name: str, revision: str) -> PackagerError:
    """The error for the user, one kind for each way a download fails."""
    from huggingface_hub import constants, errors

    here = f"There is no folder {name} here, so it was read as a hub id."
    if isinstance(error, errors.GatedRepoError):
        return InputError(
            f"{name} is gated: the hub gives it only to accounts that accepted its terms.",
            fix=f"Accept them at {_endpoint()}/{name}, then set HF_TOKEN.",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return InputError(
            f"{_endpoint()} has no model {name}, or it is private.",
            why=here,
            fix="Check the spelling of the path or id; for a private model set HF_TOKEN.",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"{name} has no revision {revision}.", fix="Give a branch, tag or commit that the hub shows.")
    if constants.HF_HUB_OFFLINE:
        return NetworkError(
            f"{name} (revision {revision}) is not complete in the local cache, and HF_HUB_OFFLINE forbids access to "
            "the hub.",
            why=here,
            fix="Give a folder, or fetch it once with HF_HUB_OFFLINE unset.",
        )
    if isinstance(error, OSError) and error.errno in (28, 13, 30):  # no space, no permission, read-only
        from packager.core.errors import MachineError

        return MachineError(f"{name} could not be stored: {error.strerror}.", fix=f"See {constants.HF_HUB_CACHE}.")
    cause = error.__cause__ or error
    return NetworkError(
        f"{_endpoint()} did not deliver {name}.",
        why=f"{here} {type(cause).__name__}: {(str(cause).splitlines() or [''])[0][:200]}",
        fix=(
            "Check the network or set HF_ENDPOINT to a mirror and run again: complete files are kept. Or give a folder."
        ),
    )


def _modelscope(name: str, revision: str | None, progress: Progress) -> tuple[Path, Origin]:
    os.environ.setdefault("TQDM_DISABLE", "1")  # it draws bars beside the callback
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise ToolError(
            "ModelScope ids need the modelscope library, which is not installed.",
            fix='Install the extra: pip install "packager[modelscope]"',
        ) from error

    pinned = revision or "master"
    logging.disable(logging.WARNING)  # it logs every retry, and its two halves read one variable for their level
    try:
        with progress.step(f"Fetching {name} from ModelScope", unit="B") as task:

            class Count:
                """modelscope's progress callback: one for each file."""

                def __init__(self, filename: str, file_size: int) -> None:
                    return None

                def update(self, size: int) -> None:
                    task.advance(size)

                def end(self) -> None:
                    return None

            for weights in (SAFE, PICKLED):
                wanted = [*list(MODEL_FILES), *weights]
                folder = snapshot_download(name, revision=pinned, allow_patterns=wanted, progress_callbacks=[Count])
                if any(Path(folder).glob("model*.safetensors")):
                    break
    except Exception as error:  # modelscope raises requests' errors, its own and plain ones
        raise _explained_modelscope(error, name) from error
    finally:
        logging.disable(logging.NOTSET)
    return Path(folder), Origin("modelscope", name, pinned)  # its API names no commit; the digest pins the content


def _explained_modelscope(error: Exception, name: str) -> PackagerError:
    kind, text = type(error).__name__, (str(error).splitlines() or [""])[0][:200]
    status: Any = getattr(error, "status_code", None) or getattr(getattr(error, "response", None), "status_code", None)
    if "NotExistError" in (kind, type(error.__cause__).__name__) or status == 404:
        return InputError(f"ModelScope has no model {name} of that revision.", why=text, fix="Check the spelling.")
    return NetworkError(
        f"ModelScope did not deliver {name}.",
        why=f"{kind}: {text}",
        fix="Check the network and run again: complete files are kept. Or give a folder.",
    )
