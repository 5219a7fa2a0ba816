"""Language models for TensorRT: the typed graph against transformers for every family, and a T4 bundle of one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from packager.build import Request, build
from packager.bundle.verify import verify
from packager.checkpoint.checkpoint import Checkpoint
from packager.cli.console import Console
from packager.core.store import Store
from packager.formats.onnx import matrices as onnx_weights
from packager.formats.tensorrt import decoder, decoder_graph, matrices
from packager.formats.tensorrt import plan as plans
from packager.planning.catalog import load_target
from runtimes.engines.tensorrt.decoder import Model, open_model
from runtimes.manifest import Run
from tests.real.test_onnx import HEADS, kl_mean, opened
from tests.real.test_reference import DECODERS, SMALL, random_checkpoint
from tests.tolerance import FLOAT16, divergence, half_roundings, require_close

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
LENGTH = 80


def typed(checkpoint: Checkpoint, folder: Path, *, rows: int = 2, context: int = 128, bits: int = 16) -> Path:
    """A folder with the graph and a plan without an engine; the plan."""
    folder.mkdir()
    with (folder / onnx_weights.DATA).open("wb") as file:
        weights = matrices.Half(checkpoint, file, bits, lambda _: None)
        model = decoder_graph.TypedDecoder(checkpoint, weights, context).model()
    (folder / decoder.MODEL).write_bytes(model.SerializeToString(deterministic=True))
    shapes = decoder.profile(checkpoint, rows, context)
    plan = decoder.plain_plan(checkpoint, load_target("t4"), folder, "fp16" if bits == 16 else "int8", shapes, None)
    (folder / plans.PLAN).write_text(plans.to_text(plan), encoding="utf-8")
    return folder / plans.PLAN


def loaded(plan: Path, rows: int = 2) -> Model:
    run = Run("tensorrt_decoder", plan, plan, None, settings={"device": "cpu"}, threads=1)
    return open_model(run, rows=rows, verbose=False)


@pytest.mark.parametrize("architecture", DECODERS)
def test_every_family_gives_what_transformers_gives(architecture: str, tmp_path: Path) -> None:
    """A prompt in two pieces and ten tokens one by one, in a slot that is not the first: what float16 gives in any
    order of its sums.
    """
    half_rotated = {"num_attention_heads": 2, "head_dim": 32}
    heads = HEADS | (half_rotated if architecture == "Phi3ForCausalLM" else {})
    source = random_checkpoint(tmp_path / "model", architecture, **heads)
    ids = np.random.default_rng(4).integers(3, 320, LENGTH)
    with torch.inference_mode():
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        expected = model(torch.tensor([ids.tolist()])).logits[0].float().numpy()
    ours = loaded(typed(opened(source), tmp_path / "typed"))
    parts = [ours.run(ids[None, begin:end], [begin], slot=1, kept=end - begin)[0] for begin, end in ((0, 32), (32, 70))]
    parts += [ours.run(ids[None, at : at + 1], [at], slot=1)[0] for at in range(70, LENGTH)]
    found = np.concatenate(parts)
    roundings = half_roundings(SMALL | heads, LENGTH)
    require_close(found, expected, FLOAT16, roundings)
    assert kl_mean(expected, found) < divergence(expected, FLOAT16, roundings)


def test_slots_do_not_see_each_other(tmp_path: Path) -> None:
    """Two rows decoded together, at different lengths, give what each gives alone."""
    source = random_checkpoint(tmp_path / "model", "LlamaForCausalLM", **HEADS)
    model = loaded(typed(opened(source), tmp_path / "typed"))
    model.run(np.arange(3, 30)[None], [0], slot=0)
    model.run(np.arange(60, 124)[None], [0], slot=1)
    both = model.run(np.array([[7], [9]]), [27, 64])
    alone = [model.run(np.array([[7]]), [27], slot=0)[0], model.run(np.array([[9]]), [64], slot=1)[0]]
    require_close(both, np.stack(alone), FLOAT16, half_roundings(SMALL | HEADS, 65))
    model.run(np.arange(70, 134)[None], [0], slot=1)  # another neighbour in the same shapes: not a bit may change
    np.testing.assert_array_equal(model.run(np.array([[7], [9]]), [27, 64])[0], both[0])


def test_a_t4_bundle_is_compiled_here(store: Store, random_qwen2: Path, tmp_path: Path) -> None:
    """A small Qwen2: proven, compiled for SM 7.5 without a GPU, verified. Another store, on a longer path, gives the
    same bundle, engine included.
    """
    sets = ("context=256", "slots=2")
    request = Request(str(random_qwen2), "t4", recipe="tensorrt_engine", sets=sets)
    bundle = build(request, tmp_path / "out", Console(quiet=True), store).path
    assert verify(bundle).ok
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["run"]["engine"] == "tensorrt_decoder"
    assert manifest["needs"]["gpu"]["capability"] == "7.5"
    assert manifest["report"]["fidelity"]["general"]["kl_mean"] <= 0.001
    plan = json.loads((bundle / "model" / "plan.json").read_text(encoding="utf-8"))
    assert plan["engine"]["sm"] == ["7.5"]
    again = build(
        Request(str(random_qwen2), "t4", recipe="tensorrt_engine", sets=sets, verify=False),
        tmp_path / "again",
        Console(quiet=True),
        Store(tmp_path / "a-store-whose-path-is-longer" / "store"),
    ).path
    names = [path.name for path in sorted((bundle / "model").iterdir())]
    assert {"engine.rtx", "model.onnx", "plan.json"} <= set(names)
    for name in names:
        assert (again / "model" / name).read_bytes() == (bundle / "model" / name).read_bytes(), name
    assert manifest["report"]["tensorrt"]["same_bytes"] == decoder.SAME
