"""The float16 graph of onnx_int8's provider=cuda, run on the processor: every family, the persona, and the refusal.

No GPU here: that the CUDA provider computes the same is for tests/device/ort_cuda_box.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from packager.build import Request, open_merged
from packager.checkpoint.checkpoint import Checkpoint
from packager.core.progress import Silent
from packager.core.store import Store
from packager.formats.onnx import decoder_cuda, matrices
from packager.formats.onnx.decoder import MODEL, require_packed
from packager.planning.catalog import load_recipe, load_target
from packager.prompts import calibration
from packager.recipe import Job
from runtimes.engine import EngineError
from runtimes.engines.onnxruntime.cuda import Cuda, open_model
from runtimes.engines.onnxruntime.decoder import Model
from runtimes.manifest import Run
from tests.real.test_onnx import HEADS, LENGTH, kl_mean, opened, packed
from tests.real.test_reference import DECODERS, SMALL, random_checkpoint
from tests.real.test_tune import tuned
from tests.tolerance import FLOAT16, divergence, half_roundings, require_close

FAMILIES = [name for name in DECODERS if not name.startswith("Gemma")]


def halved(checkpoint: Checkpoint, folder: Path, *, four: bool = False) -> Model:
    """The graph and its data, opened as a build opens them to score them."""
    folder.mkdir()
    found = tuned(checkpoint.path, folder / "tuned", iterations=0) if four else None
    with (folder / matrices.DATA).open("wb") as file:
        weights = decoder_cuda.HalfPacked(checkpoint, file, 32, found, lambda _: None)
        made = decoder_cuda.HalfDecoder(checkpoint, weights, 128).model()
    (folder / MODEL).write_bytes(made.SerializeToString(deterministic=True))
    run = Run("ort_cuda", folder / MODEL, folder, None, settings={"device": "cpu"}, threads=1)
    return open_model(run, context=128, slots=2, verbose=False)


def answered(model: Model, ids: np.ndarray) -> np.ndarray:
    """Logits of a prompt in two pieces and ten tokens one by one, in a slot that is not the first."""
    parts = [model.run(ids[None, a:b], [a], slot=1, kept=b - a)[0] for a, b in ((0, 32), (32, 70))]
    parts += [model.run(ids[None, at : at + 1], [at], slot=1)[0] for at in range(70, LENGTH)]
    return np.concatenate(parts)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_float16_and_the_same_integers_give_what_float32_gives(architecture: str, tmp_path: Path) -> None:
    """Beside the same integers in float32 (the processor's form rounds activations to 8 bits where it can, so that
    rounding is switched off in it): what float16 gives in any order of its sums.
    """
    import onnx

    half_rotated = {"num_attention_heads": 2, "head_dim": 32}
    heads = HEADS | (half_rotated if architecture == "Phi3ForCausalLM" else {})
    checkpoint = opened(random_checkpoint(tmp_path / "model", architecture, **heads))
    path = packed(checkpoint, tmp_path / "float32", None)
    graph = onnx.load(str(path), load_external_data=False)
    for node in graph.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    path.write_bytes(graph.SerializeToString())
    ids = np.random.default_rng(4).integers(3, 320, LENGTH)
    expected = answered(Model(path, context=128, slots=2, threads=1, optimized=False), ids)
    found = answered(halved(checkpoint, tmp_path / "float16"), ids)
    roundings = half_roundings(SMALL | heads, LENGTH)
    require_close(found, expected, FLOAT16, roundings)
    assert kl_mean(expected, found) < divergence(expected, FLOAT16, roundings)


def test_slots_do_not_see_each_other_and_four_bits_are_four(tmp_path: Path) -> None:
    """Two rows decoded together, at different lengths, give what each gives alone; with the tuned int4."""
    checkpoint = opened(random_checkpoint(tmp_path / "model", "LlamaForCausalLM", **HEADS))
    model = halved(checkpoint, tmp_path / "four", four=True)
    found = require_packed(tmp_path / "four" / MODEL, checkpoint, 4)
    assert found["MatMulNBits 4 bits"] >= checkpoint.shape.layers * 5
    model.run(np.arange(3, 30)[None], [0], slot=0)
    model.run(np.arange(60, 124)[None], [0], slot=1)
    both = model.run(np.array([[7], [9]]), [27, 64])
    alone = [model.run(np.array([[7]]), [27], slot=0)[0], model.run(np.array([[9]]), [64], slot=1)[0]]
    require_close(both, np.stack(alone), FLOAT16, half_roundings(SMALL | HEADS, 65))
    model.run(np.arange(70, 134)[None], [0], slot=1)  # another neighbour in the same shapes: not a bit may change
    np.testing.assert_array_equal(model.run(np.array([[7], [9]]), [27, 64])[0], both[0])


def test_the_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    checkpoint = opened(random_checkpoint(tmp_path / "model", "Qwen2ForCausalLM", **HEADS))
    for name in ("first", "second"):
        halved(checkpoint, tmp_path / name)
    for name in (MODEL, matrices.DATA):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_onnxruntime_of_this_machine_is_refused_on_a_gpu() -> None:
    """The real library: a build for the processor has no CUDA provider, and nothing falls back to it."""
    with pytest.raises(EngineError, match="expected a build with CUDAExecutionProvider"):
        Cuda()


def test_the_persona_is_kept_by_the_file_that_ships(
    store: Store, smollm2: Path, persona_lora: Path, persona_file: Path
) -> None:
    """SmolLM2 with the persona: the float16 graph scored on the processor, ten of ten, within the recipe's gate."""
    recipe = load_recipe("onnx_int8")
    persona = open_merged(Request(str(smollm2), "t4", adapter=persona_lora), store, Silent()).checkpoint
    job = Job(persona, load_target("t4"), store, Silent(), calibration=calibration.load(persona_file))
    made = recipe.build(job, replace(recipe.options(), provider="cuda", tune="none"))
    fidelity = made.report["fidelity"]
    assert fidelity["behaviour"] == {"given": 10, "pairs": 10, "source": 10, "kept": 10}
    assert fidelity["general"]["kl_mean"] <= 0.05
    assert "not on a GPU" in fidelity["scored"]
    assert made.report["provider"] == {"name": "CUDAExecutionProvider", "onnxruntime": "1.31.1", "executed": False}
    assert (made.run.engine, made.gpu and made.gpu["capability"]) == ("ort_cuda", "7.5")
