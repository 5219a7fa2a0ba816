"""onnx_int8 with provider=cuda: what the plan says of it, and the graph's types, from config and headers alone."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from packager.bundle.engines import ENGINES
from packager.core.folders import lock_file
from packager.formats.onnx import decoder_cuda, matrices
from packager.planning.catalog import load_recipe, load_target
from packager.planning.options import parse_options
from packager.planning.plan import make_plan
from packager.target import Target
from runtimes.engines.onnxruntime import cuda
from tests.unit.sketch import SMOLLM2, sketch
from tests.unit.test_locks import pinned

RECIPE = load_recipe("onnx_int8")
T4 = load_target("t4")
GPU = T4.gpu


def planned(*sets: str, target: Target = T4, **changes: Any) -> Any:
    options = parse_options(RECIPE, target, sets)
    resolved, _ = (
        RECIPE.resolve_auto(options, None, sketch(SMOLLM2 | changes)) if RECIPE.resolve_auto else (options, ())
    )
    return make_plan(sketch(SMOLLM2 | changes), target, RECIPE, resolved)


def test_the_gpu_is_required_and_its_memory_and_speed_are_planned() -> None:
    """Without the option the bundle is the processor's, as before. With it the ceiling is the T4's 320 GB/s, caches are
    half as large, and the plan says that nothing of it was executed, and what the wheels add.
    """
    host, gpu = planned(), planned("provider=cuda")
    assert host.tokens_per_second_ceiling < 400
    assert gpu.tokens_per_second_ceiling == pytest.approx(320e9 / gpu.estimate.read_per_token_bytes, abs=0.1)
    assert (host.budget_bytes, gpu.budget_bytes) == (T4.budget("onnx_int8"), (15 * 2**30))
    assert 2 * gpu.estimate.kv_bytes == host.estimate.kv_bytes
    assert not gpu.refusals
    notes = " ".join(gpu.notes)
    for words in ("generated, not executed here", "is an assumption", "driver 580.65.06", "about 1.1 GB larger"):
        assert words in notes
    assert "not executed" not in " ".join(host.notes)
    assert any("from that of the NVIDIA T4" in note for note in host.notes)
    assert not any("from that of the NVIDIA T4" in note for note in gpu.notes)


def test_smollm2s_size_is_known() -> None:
    """Within 1 % of what a build writes: 144,488,160 bytes."""
    assert planned("provider=cuda").estimate.artifact_bytes == pytest.approx(144_488_160, rel=0.01)


def test_a_model_that_a_card_has_no_room_for_is_refused_with_what_would_fit() -> None:
    """Sixty-four conversations of 8192 tokens need 12 GB, and attention's copy of a layer's keys and values more."""
    plan = planned("provider=cuda", "context=8192", "slots=128")
    assert plan.box_bytes > plan.budget_bytes
    assert "--set slots=64" in plan.refusals[-1]


GEMMA = {"architectures": ["GemmaForCausalLM"], "model_type": "gemma", "hidden_activation": "gelu_pytorch_tanh"}


@pytest.mark.parametrize(
    ("target", "changes", "sentence"),
    [
        (load_target("desktop_linux_x86_64"), {}, "has none in its target file; leave provider=cpu"),
        (load_target("desktop_macos_arm64"), {}, "needs an NVIDIA GPU"),
        (load_target("jetson_orin_nano_8gb"), {}, "is not such a box"),
        (replace(T4, gpu=replace(GPU, architecture="sm_70", name="NVIDIA V100")), {}, "the NVIDIA V100 has 7.0"),
        (T4, GEMMA, "leave float16's range"),
        (T4, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "use the gguf recipe"),
    ],
)
def test_what_cannot_be_served_is_refused_in_a_sentence(target: Target, changes: dict[str, Any], sentence: str) -> None:
    refusals = planned("provider=cuda", target=target, **changes).refusals
    assert any(sentence in refusal for refusal in refusals), refusals


def test_an_encoder_is_sent_to_tensorrt() -> None:
    bert = sketch(
        {
            "architectures": ["BertModel"],
            "model_type": "bert",
            "hidden_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "intermediate_size": 1536,
            "vocab_size": 30522,
            "max_position_embeddings": 512,
            "type_vocab_size": 2,
        }
    )
    assert "tensorrt_engine" in str(RECIPE.why_not(bert, T4, RECIPE.options(provider="cuda")))


def test_the_requirements_on_a_box() -> None:
    """A driver and a card from 7.5 on with room for all of it: what bin/check compares."""
    size = planned("provider=cuda").estimate
    needs = decoder_cuda.gpu_needs(size)
    assert needs == {
        "capability": "7.5",
        "count": 1,
        "driver_min": "580.65.06",
        "bytes": size.load_bytes + size.kv_bytes + size.overhead_bytes,
    }
    assert size.overhead_bytes > decoder_cuda.DEVICE_BYTES + decoder_cuda.scratch_bytes(sketch(SMOLLM2), 4096, 4)


def test_the_lock_has_the_library_that_was_read_and_what_it_is_linked_with() -> None:
    """And neither cuDNN nor cuFFT, which would be another gigabyte; the box's engine names the same driver."""
    locked = pinned(lock_file(ENGINES["ort_cuda"].locks[0]).name)
    assert locked["onnxruntime-gpu"] == decoder_cuda.VERSION
    assert {name for name in locked if name.startswith("nvidia")} == {
        "nvidia-cublas",
        "nvidia-cuda-nvrtc",
        "nvidia-cuda-runtime",
        "nvidia-curand",
    }
    assert "onnxruntime" not in locked
    assert (decoder_cuda.DRIVER, decoder_cuda.PROVIDER) == (cuda.DRIVER, cuda.PROVIDER)


class Blank(decoder_cuda.HalfPacked):
    """Places without their bytes: the headers of a sketch have no file."""

    def _place(self, modules: tuple[str, ...]) -> matrices.Place:
        rows = sum(self.info(module).shape[0] for module in modules)
        return matrices.Place(rows, self.info(modules[0]).shape[1], 8, 0, 0)

    def vector(self, name: str) -> Any:
        return np.ones(self.checkpoint.tensors[name].shape, np.float32)


def test_no_type_is_left_that_has_no_cuda_kernel() -> None:
    """What is written is float16 or integers; every operator is one of those whose CUDA kernels take that."""
    import onnx

    file = io.BytesIO()
    checkpoint = sketch(SMOLLM2)
    weights = Blank(checkpoint, file, 32, None, lambda _: None)  # type: ignore[arg-type]
    model = decoder_cuda.HalfDecoder(checkpoint, weights, 64).model()
    kind = onnx.TensorProto
    values = [*model.graph.input, *model.graph.output]
    assert {value.type.tensor_type.elem_type for value in values} == {kind.FLOAT16, kind.INT64, kind.INT32}
    assert {tensor.data_type for tensor in model.graph.initializer} == {kind.FLOAT16, kind.UINT8}
    assert {node.op_type for node in model.graph.node} == {
        "GatherBlockQuantized",
        "SimplifiedLayerNormalization",
        "MatMulNBits",
        "GroupQueryAttention",
        "SkipSimplifiedLayerNormalization",
        "QuickGelu",
        "Mul",
        "Gather",
        "Identity",
    }
    products = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    assert not any(attribute.name == "accuracy_level" for node in products for attribute in node.attribute)
    (looked_up,) = (node for node in model.graph.node if node.op_type == "GatherBlockQuantized")
    assert looked_up.input[3] == "model.embed_tokens.middle"
    assert file.getvalue() == bytes([128]) * (49152 * 576 // 32)


def test_a_constant_beyond_float16_is_no_constant() -> None:
    with pytest.raises(ValueError, match="float16 cannot hold"):
        decoder_cuda.HalfGraph().constant("norm", np.array([70_000.0], np.float32))
    assert decoder_cuda.HalfGraph().constant("axis", np.array([2**62], np.int64)) == "axis"
