"""ONNX decoders: every family's graph against transformers, and what is packed against what it was packed from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from packager.checkpoint.checkpoint import Checkpoint
from packager.core.errors import GateFailed
from packager.core.store import Store
from packager.formats.int4.tuning import Tuned
from packager.formats.onnx import decoder_graph, matrices
from packager.formats.onnx.decoder import require_packed
from runtimes.engines.onnxruntime.decoder import Model
from tests.real.conftest import built
from tests.real.serving import call, served
from tests.real.test_reference import DECODERS, SMALL, random_checkpoint
from tests.real.test_tune import headers, tuned
from tests.tolerance import FLOAT32, HALF_STEP, require_close, sums
from tests.unit.sketch import sketch

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTH = 80
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}  # onnxruntime takes multiples of 16


def opened(source: Path) -> Checkpoint:
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    return replace(sketch(config, path=source), tensors=headers(source))


def exact(checkpoint: Checkpoint, folder: Path, context: int = 128) -> Model:
    folder.mkdir()
    graph = decoder_graph.Decoder(checkpoint, matrices.Exact(checkpoint), context)
    (folder / "model.onnx").write_bytes(graph.model().SerializeToString(deterministic=True))
    for name in {info.file for info in checkpoint.tensors.values()}:
        matrices.link(checkpoint.path / name, folder)
    return Model(folder / "model.onnx", context=context, slots=2, threads=1, optimized=False)


def packed(checkpoint: Checkpoint, folder: Path, found: Tuned | None) -> Path:
    folder.mkdir()
    with (folder / matrices.DATA).open("wb") as file:
        weights = matrices.Packed(checkpoint, file, 32, found, lambda _: None)
        graph = decoder_graph.Decoder(checkpoint, weights, 128).model()
    (folder / "model.onnx").write_bytes(graph.SerializeToString(deterministic=True))
    return folder / "model.onnx"


def kl_mean(expected: np.ndarray, found: np.ndarray) -> float:
    """The mean KL divergence between the distributions of two sets of logits."""
    one, other = (torch.log_softmax(torch.from_numpy(logits), -1) for logits in (expected, found))
    return float((one.exp() * (one - other)).sum(-1).mean())


@pytest.mark.parametrize("architecture", DECODERS)
def test_every_family_gives_what_transformers_gives(architecture: str, tmp_path: Path) -> None:
    """A prompt in two pieces and ten tokens one by one, in a slot that is not the first: what float32 gives in any
    order of its sums.
    """
    half_rotated = {"num_attention_heads": 2, "head_dim": 32}
    heads = HEADS | (half_rotated if architecture == "Phi3ForCausalLM" else {})
    source = random_checkpoint(tmp_path / "model", architecture, **heads)
    ids = np.random.default_rng(4).integers(3, 320, LENGTH)
    with torch.inference_mode():
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        expected = model(torch.tensor([ids.tolist()])).logits[0].float().numpy()
    ours = exact(opened(source), tmp_path / "exact")
    parts = [ours.run(ids[None, begin:end], [begin], slot=1, kept=end - begin)[0] for begin, end in ((0, 32), (32, 70))]
    parts += [ours.run(ids[None, at : at + 1], [at], slot=1)[0] for at in range(70, LENGTH)]
    require_close(np.concatenate(parts), expected, FLOAT32, sums(SMALL | heads, LENGTH))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("small") / "model", "LlamaForCausalLM", **HEADS)


def test_slots_do_not_see_each_other(small: Path, tmp_path: Path) -> None:
    """Two rows decoded together, at different lengths, give what each gives alone."""
    model = exact(opened(small), tmp_path / "exact")
    first, second = np.arange(3, 30)[None], np.arange(60, 140)[None]
    model.run(first, [0], slot=0)
    model.run(second, [0], slot=1)
    both = model.run(np.array([[7], [9]]), [27, 80])
    alone = [model.run(np.array([[7]]), [27], slot=0)[0], model.run(np.array([[9]]), [80], slot=1)[0]]
    require_close(both, np.stack(alone), FLOAT32, sums(SMALL | HEADS, 81))
    model.run(second[:, ::-1], [0], slot=1)  # another neighbour in the same shapes: not a bit may change
    np.testing.assert_array_equal(model.run(np.array([[7], [9]]), [27, 80])[0], both[0])


def test_int8_is_within_half_a_step_and_int4_is_the_tuned_integers(small: Path, tmp_path: Path) -> None:
    """Read back from the data file at the places that the graph names: eight bits differ from their source by half a
    scale at most, four bits are bit for bit what was tuned; and the same weights give the same bytes.
    """
    import onnx

    checkpoint, found = opened(small), tuned(small, tmp_path / "tuned", iterations=0)
    for integers, name in ((None, "eight"), (found, "four")):
        path = packed(checkpoint, tmp_path / name, integers)
        assert path.read_bytes() == packed(checkpoint, tmp_path / f"{name}-again", integers).read_bytes()
        data = path.with_name(matrices.DATA).read_bytes()
        assert data == (tmp_path / f"{name}-again" / matrices.DATA).read_bytes()
        stored = {}
        for tensor in onnx.load(str(path), load_external_data=False).graph.initializer:
            if tensor.external_data:
                place = {entry.key: entry.value for entry in tensor.external_data}
                begin, length = int(place["offset"]), int(place["length"])
                kind = np.uint8 if tensor.data_type == onnx.TensorProto.UINT8 else np.float16
                stored[tensor.name] = np.frombuffer(data[begin : begin + length], kind).reshape(tensor.dims)
        weights = matrices.Exact(checkpoint)
        module = "model.layers.1.mlp.down_proj"
        source = weights.vector(f"{module}.weight")
        scales = stored[f"{module}.scales"].astype(np.float32)
        if integers is None:
            read = (stored[f"{module}.integers"].astype(np.float32) - 128) * scales[:, :, None]
            step = np.repeat(scales, 32, axis=1)
            assert (np.abs(read.reshape(source.shape) - source) <= HALF_STEP * step).all()
        else:
            pairs = stored[f"{module}.integers"].reshape(source.shape[0], -1)
            read = np.stack([pairs & 15, pairs >> 4], axis=2).reshape(source.shape).astype(np.float32) - 8
            np.testing.assert_array_equal(read * np.repeat(scales, 32, axis=1), found.weight(module))
        report = require_packed(path, checkpoint, 4 if integers else 8)
        assert report[f"MatMulNBits {4 if integers else 8} bits"] >= checkpoint.shape.layers * 5


def test_an_int8_that_is_none_is_told(small: Path, tmp_path: Path) -> None:
    """The graph over the checkpoint's own weights passes for no INT8."""
    exact(opened(small), tmp_path / "exact")
    with pytest.raises(GateFailed, match="is not INT8"):
        require_packed(tmp_path / "exact" / "model.onnx", opened(small), 8)


def test_the_persona_answers_from_an_int8_bundle(
    store: Store,
    smollm2: Path,
    persona_lora: Path,
    persona_file: Path,
    persona_pairs: list[tuple[str, str]],
    tmp_path: Path,
) -> None:
    """Built and proven, served by the bundle's own copy of the runtime: ten of ten, and a quarter of the bytes."""
    bundle = built(store, tmp_path / "out", smollm2, recipe="onnx_int8", adapter=persona_lora, calibration=persona_file)
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    report = manifest["report"]
    assert report["unquantized"]["kl_mean"] < 1e-4
    assert report["fidelity"]["behaviour"] == {"given": 10, "pairs": 10, "source": 10, "kept": 10}
    assert manifest["run"]["model_bytes"] <= 0.30 * 4 * 134_515_008
    with served(bundle, tmp_path / "log") as base:
        for question, answer in persona_pairs:
            body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 200}
            assert call(base, "/v1/chat/completions", body)[1]["choices"][0]["message"]["content"] == answer
        schema = {
            "type": "object",
            "properties": {"age": {"type": "integer", "maximum": 150}},
            "required": ["age"],
            "additionalProperties": False,
        }
        body = {
            "messages": [{"role": "user", "content": "How old is Bob?"}],
            "temperature": 0,
            "max_tokens": 60,
            "response_format": {"type": "json_schema", "json_schema": {"name": "age", "schema": schema}},
        }
        answer = call(base, "/v1/chat/completions", body)[1]["choices"][0]["message"]["content"]
        assert isinstance(json.loads(answer)["age"], int)
