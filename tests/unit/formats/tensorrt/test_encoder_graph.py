"""The typed ONNX of one attention layer: float16 all through, a softmax in float32, INT8 for chosen layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from packager.checkpoint.checkpoint import Checkpoint, open_checkpoint
from packager.cli.console import Console
from packager.core.errors import InputError
from packager.formats.onnx.external_data import DATA, MODEL
from packager.formats.tensorrt import encoder_graph
from tests.tolerance import FLOAT16, apart
from tests.unit.tiny import write_tensors
from tests.unit.tiny_encoder import CONFIG, shapes, tiny_encoder

LAYER = "encoder.layer.0.attention.self"
PARTS = ("query", "key")


def opened(tmp_path: Path) -> Checkpoint:
    folder = tiny_encoder(tmp_path / "tiny")
    return open_checkpoint(str(folder), progress=Console(quiet=True), cache=tmp_path / "cache")


def skeleton(path: Path) -> Path:
    """Scores of every token with every token, softmaxed under the mask: input_ids and attention_mask to [batch, length,
    length] in one head; parameters are inputs, and the mask is Where(mask, 0, least), as the exporter writes it.
    """
    from onnx import TensorProto, helper, numpy_helper, save

    def node(kind: str, inputs: list[str], output: str, **more: Any) -> Any:
        return helper.make_node(kind, inputs, [output], **more)

    def value(name: str, kind: int, shape: list[Any]) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    table = "embeddings.word_embeddings.weight"
    sizes = shapes(CONFIG)
    parameters = [table, *(f"{LAYER}.{part}.weight" for part in PARTS)]
    nodes = [
        node("Gather", [table, "input_ids"], "states"),
        *(
            step
            for part in PARTS
            for step in (
                node("Transpose", [f"{LAYER}.{part}.weight"], f"{part}.turned", perm=[1, 0]),
                node("MatMul", ["states", f"{part}.turned"], part),
            )
        ),
        node("Unsqueeze", ["query", "heads"], "query.heads"),
        node("Unsqueeze", ["key", "heads"], "key.heads"),
        node("Transpose", ["key.heads"], "key.across", perm=[0, 1, 3, 2]),
        node("MatMul", ["query.heads", "key.across"], "scores"),
        node("Cast", ["attention_mask"], "kept", to=TensorProto.BOOL),
        node("Unsqueeze", ["kept", "rows"], "kept.row"),
        node("Where", ["kept.row", "zero", "least"], "mask"),
        node("Add", ["scores", "mask"], "masked"),
        node("Softmax", ["masked"], "out", axis=-1),
    ]
    constants = [
        numpy_helper.from_array(np.array([1], np.int64), "heads"),
        numpy_helper.from_array(np.array([1, 2], np.int64), "rows"),
        numpy_helper.from_array(np.array(0, np.float32), "zero"),
        numpy_helper.from_array(np.array(np.finfo(np.float32).min, np.float32), "least"),
    ]
    inputs = [value(name, TensorProto.INT64, ["b", "l"]) for name in ("input_ids", "attention_mask")]
    inputs += [value(name, TensorProto.FLOAT, list(sizes[name])) for name in parameters]
    outputs = [value("out", TensorProto.FLOAT, ["b", 1, "l", "l"])]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, constants)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), str(path))
    return path


def run(folder: Path) -> np.ndarray[Any, Any]:
    """The written file on onnxruntime, two texts of three tokens, the last of the second is padding."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(folder / MODEL), options, providers=["CPUExecutionProvider"])
    given = {"input_ids": np.array([[1, 2, 3], [4, 5, 0]]), "attention_mask": np.array([[1, 1, 1], [1, 1, 0]])}
    (encoded,) = session.run(None, given)
    result: np.ndarray[Any, Any] = encoded[:, 0]
    return result


def expected(checkpoint: Checkpoint) -> np.ndarray[Any, Any]:
    """The same in numpy and float64, from the checkpoint's own file."""
    from safetensors.numpy import load_file

    tensors = load_file(checkpoint.path / "model.safetensors")
    states = tensors["embeddings.word_embeddings.weight"].astype(np.float64)[[[1, 2, 3], [4, 5, 0]]]
    query, key = (states @ tensors[f"{LAYER}.{part}.weight"].T for part in PARTS)
    scores = query @ key.transpose(0, 2, 1)
    scores[1, :, 2] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares: np.ndarray[Any, Any] = weights / weights.sum(axis=-1, keepdims=True)
    return shares


def written(tmp_path: Path, rounded: dict[str, encoder_graph.Rounding], name: str = "out") -> tuple[Checkpoint, Path]:
    checkpoint = (
        opened(tmp_path)
        if not (tmp_path / "tiny").exists()
        else open_checkpoint(str(tmp_path / "tiny"), progress=Console(quiet=True), cache=tmp_path / "cache")
    )
    folder = tmp_path / name
    folder.mkdir()
    encoder_graph.write(skeleton(tmp_path / "graph.onnx"), checkpoint, folder, rounded)
    return checkpoint, folder


def types(folder: Path) -> dict[str, int]:
    """Type of every tensor that shape inference can name."""
    import onnx

    model = onnx.shape_inference.infer_shapes(
        onnx.load(str(folder / MODEL), load_external_data=False), strict_mode=True
    )
    graph = model.graph
    return {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}


def test_layers_that_read_one_activation_are_one_group(tmp_path: Path) -> None:
    """They share its scale, and are named by what their names have in common."""
    (group,) = encoder_graph.groups(skeleton(tmp_path / "graph.onnx"))
    assert group == encoder_graph.Group(LAYER, tuple(f"{LAYER}.{part}.weight" for part in PARTS))


def test_everything_is_float16_but_the_softmax_and_the_output(tmp_path: Path) -> None:
    """The file's types are the precision: no product is float32, the output is."""
    from onnx import TensorProto

    _, folder = written(tmp_path, {})
    kinds = types(folder)
    assert {kinds[name] for name in ("states", "query", "key", "scores", "mask", "masked")} == {TensorProto.FLOAT16}
    assert kinds["masked.wide"] == TensorProto.FLOAT and kinds["out"] == TensorProto.FLOAT
    read = encoder_graph.read_back(folder)
    assert read.int8 == 0 and "FLOAT" not in read.bytes_by_type


def test_float16_computes_what_the_model_does(tmp_path: Path) -> None:
    """Padding gets no attention at all; the rest agrees with float64 to float16's precision."""
    checkpoint, folder = written(tmp_path, {})
    outputs = run(folder)
    # a share of the softmax is off by what its score is off by: sums over the width for query, key and score
    scores = np.log(np.maximum(expected(checkpoint), FLOAT16))
    assert np.abs(outputs - expected(checkpoint)).max() < apart(scores, FLOAT16, 3 * CONFIG["hidden_size"])
    assert not outputs[1, :, 2].any()


def test_the_mask_is_made_of_the_attention_mask_alone(tmp_path: Path) -> None:
    """The exporter's Where is gone, with what only it needed."""
    import onnx

    _, folder = written(tmp_path, {})
    graph = onnx.load(str(folder / MODEL), load_external_data=False).graph
    assert "Where" not in {node.op_type for node in graph.node}
    assert {constant.name for constant in graph.initializer} >= {"mask.least"}
    assert not {"zero", "least"} & {constant.name for constant in graph.initializer}


@pytest.mark.parametrize("smooth", [None, tuple(0.5 + number / 8 for number in range(16))])
def test_a_rounded_layer_is_int8_on_both_sides(tmp_path: Path, smooth: tuple[float, ...] | None) -> None:
    """Q and DQ before the product once for both layers, weights as integers whose product with their scales is the
    weight; evened-out channels cancel out.
    """
    import onnx

    checkpoint, folder = written(tmp_path, {LAYER: encoder_graph.Rounding(0.03, smooth)})
    graph = onnx.load(str(folder / MODEL), load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("QuantizeLinear") == 1 and kinds.count("DequantizeLinear") == 3
    assert encoder_graph.read_back(folder).int8 == 2
    whole = onnx.load(str(folder / MODEL))
    parts = {one.name: onnx.numpy_helper.to_array(one) for one in whole.graph.initializer}
    from safetensors.numpy import load_file

    exact = load_file(checkpoint.path / "model.safetensors")[f"{LAYER}.query.weight"]
    integers, scale = (parts[f"{LAYER}.query.weight.{part}"].astype(np.float32) for part in ("q8", "scale"))
    back = integers * scale
    if smooth is not None:
        back *= np.array(smooth, np.float16).astype(np.float32)[:, None]  # and the rounding error with it
    assert np.abs(back.T - exact).max() < np.abs(exact).max() / (120 if smooth is None else 60)
    assert np.abs(run(folder) - expected(checkpoint)).max() < 0.25


def test_a_clipped_scale_changes_the_answer(tmp_path: Path) -> None:
    """The scale is really used: one that clips everything gives another model."""
    checkpoint, folder = written(tmp_path, {LAYER: encoder_graph.Rounding(1e-4)})
    assert np.abs(run(folder) - expected(checkpoint)).max() > 0.3


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    rounding = {LAYER: encoder_graph.Rounding(0.03)}
    _, one = written(tmp_path, rounding, "one")
    _, two = written(tmp_path, rounding, "two")
    for name in (MODEL, DATA):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_a_weight_that_float16_cannot_hold_is_named(tmp_path: Path) -> None:
    """Infinity in the engine is no way to find out."""
    checkpoint = opened(tmp_path)
    values = {name: np.ones(size, np.float32) for name, size in shapes(CONFIG).items()}
    values[f"{LAYER}.key.weight"][0, 0] = 70000
    write_tensors(checkpoint.path, values, dtype="F32")
    with pytest.raises(InputError, match=r"key\.weight"):
        written(tmp_path, {})
