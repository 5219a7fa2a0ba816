"""ONNX decoders on a GPU: the calls of onnxruntime, and one sentence for each way in which it fails.

onnxruntime is a fake that records its calls; texts of errors are the library's own, as onnxruntime-gpu
1.31.1 gave them on a machine without a GPU (and the CUDA library's names for what was not at hand).
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from runtimes.engine import EngineError
from runtimes.engines.onnxruntime import cuda, decoder
from runtimes.engines.onnxruntime.cuda import LIBRARIES, OPTIONS, PROVIDER, Cuda, load, load_libraries, open_model
from runtimes.manifest import Run

VOCABULARY, CONTEXT, SLOTS = 7, 256, 3
ROW = 2 * CONTEXT * 16 * 2  # bytes: two heads of 16 dimensions in float16
NO_DRIVER = (
    'Failed to parse provider option "device_id": CUDA failure 35: CUDA driver version is insufficient for '
    "CUDA runtime version ; GPU=-1 ; expr=cudaGetDeviceCount(&num_devices);"
)
FELL_BACK = (
    "[ONNXRuntimeError] : 1 : FAIL : This session contains graph nodes that are assigned to the default "
    "CPU EP, but fallback to CPU EP has been explicitly disabled by the user."
)
FULL = "[ONNXRuntimeError] : 1 : FAIL : CUDA failure 2: out of memory ; GPU=0 ; expr=cudaMalloc((void**)&p, size);"
ARENA = (
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : bfc_arena.cc:376 AllocateRawInternal Failed to allocate memory "
    "for requested buffer of size 155582464"
)


class Binding:
    """Where inputs and outputs lie, by name, and what the session computes from them."""

    def __init__(self, fake: Fake) -> None:
        self.fake, self.inputs, self.outputs = fake, dict[str, Any](), dict[str, Any]()
        self.values: dict[str, list[Any]] = {}

    def bind_input(self, name: str, device: str, number: int, kind: Any, shape: Any, address: int) -> None:
        self.inputs[name] = (device, np.dtype(kind).name, tuple(shape), address)
        if device == "cpu":
            count = int(np.prod(shape, dtype=int)) * np.dtype(kind).itemsize
            self.values[name] = np.frombuffer(ctypes.string_at(address, count), kind).tolist()

    def bind_output(self, name: str, device: str, number: int, kind: Any, shape: Any, address: int) -> None:
        self.outputs[name] = (device, np.dtype(kind).name, tuple(shape), address)

    def synchronize_inputs(self) -> None:
        self.fake.done.append("inputs")

    def synchronize_outputs(self) -> None:
        self.fake.done.append("outputs")


class Fake:
    """onnxruntime as far as it is used. fails: what making a session, a value, or running raises."""

    __version__, __file__ = "1.31.1", "/nowhere/onnxruntime/__init__.py"
    GraphOptimizationLevel = SimpleNamespace(ORT_ENABLE_ALL=99, ORT_DISABLE_ALL=0)
    ExecutionOrder = SimpleNamespace(PRIORITY_BASED=1)

    def __init__(self) -> None:
        self.providers, self.granted = [PROVIDER, "CPUExecutionProvider"], [PROVIDER]
        self.fails: dict[str, Exception] = {}
        self.session: dict[str, Any] = {}
        self.done: list[str] = []
        self.ran: list[Binding] = []
        self.made: list[tuple[int, ...]] = []
        self.OrtValue = SimpleNamespace(ortvalue_from_numpy=self._value)

    def get_available_providers(self) -> list[str]:
        return self.providers

    def SessionOptions(self) -> Any:
        config: dict[str, str] = {}
        return SimpleNamespace(add_session_config_entry=config.__setitem__, config=config)

    def InferenceSession(self, path: str, options: Any, **more: Any) -> Any:
        if "session" in self.fails:
            raise self.fails["session"]
        self.session = {"config": options.config, "level": options.graph_optimization_level, **more}
        half = "tensor(float16)"
        cache = SimpleNamespace(name="past_key_values.0.key", type=half, shape=["batch", 2, "capacity", 16])
        inputs = [SimpleNamespace(name="wanted", type="tensor(int64)", shape=["kept"]), cache]
        logits = SimpleNamespace(name="logits", type=half, shape=["batch", "kept", VOCABULARY])
        return SimpleNamespace(
            get_inputs=lambda: inputs,
            get_outputs=lambda: [logits],
            io_binding=lambda: Binding(self),
            get_providers=lambda: self.granted,
            run_with_iobinding=self._run,
        )

    def _run(self, binding: Binding) -> None:
        if "run" in self.fails:
            raise self.fails["run"]
        self.done.append("run")
        self.ran.append(binding)
        _, kind, shape, address = binding.outputs["logits"]
        count = int(np.prod(shape))
        ctypes.memmove(address, np.arange(count, dtype=kind).tobytes(), count * np.dtype(kind).itemsize)

    def _value(self, array: Any, device: str, number: int) -> Any:
        if "value" in self.fails:
            raise self.fails["value"]
        assert (device, number, bool(array.any())) == ("cuda", 0, False)
        self.made.append(array.shape)
        return SimpleNamespace(data_ptr=lambda: 1_000_000)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    onnxruntime = Fake()
    for module in (cuda, decoder):
        monkeypatch.setattr(module, "quiet_onnxruntime", lambda: onnxruntime)
    monkeypatch.setattr(ctypes, "CDLL", lambda name, mode=0: onnxruntime.done.append(Path(name).name))
    return onnxruntime


@pytest.fixture
def run(tmp_path: Path) -> Run:
    model = tmp_path / "model.onnx"
    model.write_bytes(b"12345")
    model.with_name("model.onnx.data").write_bytes(b"1234567")
    return Run(engine="ort_cuda", model=model, tokenizer=tmp_path, chat_template=None, context=CONTEXT, slots=SLOTS)


def opened(run: Run) -> decoder.Model:
    return open_model(run, context=CONTEXT, slots=SLOTS, verbose=False)


def test_the_session_takes_the_gpu_or_nothing(fake: Fake, run: Run) -> None:
    """One provider, no fall-back of either kind, the graph as it is written; CUDA's libraries before, each once."""
    opened(run)
    assert fake.session["providers"] == [(PROVIDER, OPTIONS)]
    assert fake.session["enable_fallback"] == 0
    assert fake.session["config"]["session.disable_cpu_ep_fallback"] == "1"
    assert fake.session["level"] == Fake.GraphOptimizationLevel.ORT_DISABLE_ALL
    assert fake.done == [*LIBRARIES, "libcuda.so.1"]


def test_caches_stay_on_the_gpu_and_only_ids_and_logits_cross(fake: Fake, run: Run) -> None:
    """Rows of a later slot begin at their offset; input and output of a cache are one address."""
    model = opened(run)
    fake.done.clear()
    logits = model.run(np.array([[3, 4, 5]]), [10], slot=2, kept=2)
    assert fake.done == ["inputs", "run", "outputs"]
    (binding,) = fake.ran
    place = ("cuda", "float16", (1, 2, CONTEXT, 16), 1_000_000 + 2 * ROW)
    assert binding.inputs["past_key_values.0.key"] == binding.outputs["present.0.key"] == place
    assert {name for name, bound in binding.inputs.items() if bound[0] == "cpu"} == set(binding.values)
    assert binding.values == {"input_ids": [3, 4, 5], "seqlens_k": [12], "total_length": [13], "wanted": [1, 2]}
    assert logits.dtype == np.float32
    assert logits.tolist() == [[list(range(7)), list(range(7, 14))]]
    assert model.memory() == 12 + SLOTS * ROW
    with pytest.raises(EngineError, match="more than there is room for"):
        model.run(np.array([[1]]), [CONTEXT])


def test_a_server_finds_out_at_its_start_whether_the_gpu_has_room(fake: Fake, run: Run) -> None:
    """A whole piece of a prompt, and a token for every slot, before the first client comes."""
    cuda.warm_up(opened(run))
    assert [binding.inputs["input_ids"][2] for binding in fake.ran] == [(1, 128), (SLOTS, 1)]
    fake.fails["run"] = RuntimeError(ARENA)
    with pytest.raises(EngineError, match="fewer slots or a shorter context"):
        load(run, verbose=False)


def test_onnxruntime_for_the_processor_alone_is_told(fake: Fake) -> None:
    fake.providers = ["AzureExecutionProvider", "CPUExecutionProvider"]
    with pytest.raises(EngineError, match=r"expected a build with CUDAExecutionProvider.*found 1.31.1 without"):
        Cuda()


def test_a_session_that_went_to_the_processor_is_not_used(fake: Fake, run: Run) -> None:
    fake.granted = ["CPUExecutionProvider"]
    with pytest.raises(EngineError, match=r"expected model.onnx on CUDAExecutionProvider, found it on CPUExec"):
        opened(run)


@pytest.mark.parametrize("where", ["session", "value", "run"])
@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (NO_DRIVER, "driver 580.65.06 or newer, found none that CUDA 13 can use"),
        (FELL_BACK, "did not start or leaves some out"),
        (FULL, "memory is full.*--set slots=1"),
        (ARENA, "memory is full.*--set context=2048"),
        ("CUDA failure 209: no kernel image is available for execution on the device", "7.5 or newer"),
        ("CUDA failure 700: an illegal memory access\nstack", "failed on the GPU: CUDA failure 700: an illegal"),
    ],
)
def test_what_goes_wrong_on_a_gpu_is_one_sentence(fake: Fake, run: Run, where: str, text: str, sentence: str) -> None:
    """Wherever it happens: making the session, the caches, or computing."""
    fake.fails[where] = RuntimeError(text)
    with pytest.raises(EngineError, match=sentence) as caught:
        opened(run).run(np.array([[1]]), [0])
    assert "\n" not in str(caught.value)


def test_a_library_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheels' folder first; without a driver the message names the driver, not CUDA."""
    loaded: list[str] = []
    lacking = "libcurand.so.10"

    def load_one(name: str, mode: int = 0) -> None:
        loaded.append(name)
        if name.endswith(lacking):
            raise OSError(f"{lacking}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", load_one)
    folder = tmp_path / "nvidia" / "cu13" / "lib"
    folder.mkdir(parents=True)
    (folder / "libcudart.so.13").touch()
    with pytest.raises(EngineError, match=r"expected libcurand.so.10 from the bundle's wheels"):
        load_libraries(tmp_path)
    assert loaded == [str(folder / "libcudart.so.13"), *LIBRARIES[1:]]
    lacking = "libcuda.so.1"
    with pytest.raises(EngineError, match=r"found no driver \(libcuda.so.1 cannot be loaded\).*--device cpu"):
        load_libraries(tmp_path)


def test_the_processor_computes_only_with_device_cpu(fake: Fake, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--device cpu``, and what scores the file on the build machine; nothing of CUDA is loaded then."""
    from dataclasses import replace

    for variant in (replace(run, device="cpu"), replace(run, settings={"device": "cpu"})):
        fake.done.clear()
        opened(variant)
        assert fake.session["providers"] == ["CPUExecutionProvider"]
        assert not fake.done
    with pytest.raises(EngineError, match="no device 'tpu'; choose gpu, cpu"):
        opened(replace(run, device="tpu"))
