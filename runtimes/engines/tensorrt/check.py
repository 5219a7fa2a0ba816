"""Runs an encoder's engine on the bundle's reference texts: ``python -m runtimes.engines.tensorrt.check PLAN PROFILE
ENGINE``.

A separate process, because an engine may crash the process that runs it. Standard output: one JSON document, the result
of ``try_engine`` or {"error": sentence}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.engine import EngineError
from runtimes.engines.encoder import Settings, Text, padded, rows
from runtimes.engines.tensorrt.encoder import pad_to_profile
from runtimes.engines.tensorrt.plan import Plan, read_plan
from runtimes.engines.tensorrt.session import NativeSession
from runtimes.files import file_sha256
from runtimes.manifest import ManifestError, read_bundle


def main(path: Path, number: int, engine: Path) -> None:
    """Print the result for the engine of a plan's profile."""
    try:
        result = try_engine(read_plan(path), number, engine)
    except (EngineError, ManifestError) as error:
        result = {"error": str(error)}
    sys.stdout.write(json.dumps(result) + "\n")


def try_engine(plan: Plan, number: int, engine: Path) -> dict[str, Any]:
    """The smallest cosine between the engine's and the source's vectors of the plan's texts. Raises EngineError."""
    if plan.reference is None:
        raise EngineError("The plan brings no texts to try an engine with.")
    file, digest = plan.reference
    try:
        if file_sha256(file) != digest:
            raise EngineError(f"{file.name}: expected the file that was bundled, found another; copy the bundle again.")
        given = json.loads(file.read_text("utf-8"))
        run = read_bundle(home_of_plan(plan))
        settings, least = Settings.of(run), float(given["cosine_min"])
        texts = [Text(tuple(ids), (0,) * len(ids)) for ids in given["ids"]]
        pairs = list(zip(texts, given["outputs"], strict=True))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError(f"{file.name} cannot be used ({error}); copy the bundle again.") from None
    profile = plan.profiles[number]
    longest = next(iter(profile.values())).max[1]
    session = NativeSession(plan, profile, engine, kernels=None, verbose=False)
    cosines: list[float] = []
    try:
        for text, row in pairs:
            if len(text.ids) > longest:  # too long for a smaller profile
                continue
            inputs = padded([text], settings)
            states = session.run(pad_to_profile(inputs, profile, settings.pad_id))[plan.outputs[0].name]
            cut = states[:1, : len(text.ids)] if states.ndim == 3 else states[:1]
            (vector,) = rows(cut, inputs["attention_mask"], run.task, settings)
            wanted = np.asarray(row, np.float32)
            if vector.shape != wanted.shape or not np.isfinite(vector).all():
                raise EngineError("The engine gives vectors of another size, or with NaN or infinity.")
            cosines.append(float(vector @ wanted / (np.linalg.norm(vector) * np.linalg.norm(wanted) + 1e-12)))
    finally:
        session.close()
    if not cosines:
        raise EngineError("Every text that the plan brings is longer than the profile takes.")
    return {"texts": len(cosines), "cosine_min": min(cosines), "least": least}


def home_of_plan(plan: Plan) -> Path:
    """The bundle's folder."""
    return plan.path.parent.parent


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
