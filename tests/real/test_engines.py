"""What every engine must do alike, asked of each: one suite, so no engine surprises its clients."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from packager.checkpoint.checkpoint import open_checkpoint
from packager.core.progress import Silent
from packager.core.store import Store, cache_root
from packager.formats.int4 import awq
from packager.formats.onnx import decoder_graph, matrices
from runtimes.engine import Engine, Piece, RequestRefused, Sampling
from runtimes.engines.registry import module
from runtimes.manifest import Run
from tests.real.conftest import built
from tests.real.test_int4_engine import dequantized, packed
from tests.real.test_onnx import HEADS, opened
from tests.real.test_reference import random_checkpoint
from tests.real.test_tensorrt_decoder import typed
from tests.real.test_tune import tuned
from tests.tolerance import FLOAT16, apart, results
from tests.unit.runtimes.serving import write_tokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@dataclass
class Case:
    """One engine over one model. prompts: three, of its vocabulary. reference: greedy ids by transformers. layers: of
    the model.
    """

    run: Run
    exact: Run
    prompts: list[list[int]]
    vocabulary: int
    reference: Callable[[Sequence[int], int], list[int]]
    layers: int

    def load(self, run: Run | None = None, **changes: Any) -> Engine:
        wanted = replace(run or self.run, **changes)
        engine: Engine = module(wanted.engine).load(wanted, verbose=False)
        return engine


def greedy_reference(model: Any) -> Callable[[Sequence[int], int], list[int]]:
    def reference(prompt: Sequence[int], count: int) -> list[int]:
        with torch.inference_mode():
            made = model.generate(
                torch.tensor([list(prompt)]),
                do_sample=False,
                max_new_tokens=count,
                eos_token_id=None,
                pad_token_id=0,
                attention_mask=torch.ones(1, len(prompt)),
            )
        return [int(token) for token in made[0, len(prompt) :]]

    return reference


@pytest.fixture(scope="module")
def real(smollm2: Path) -> tuple[Any, list[list[int]]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    texts = ("Once upon a time there was", "The capital of France is", "def fibonacci(n):\n    ")
    return model, [tokenizer(text)["input_ids"] for text in texts]


def llamacpp(request: pytest.FixtureRequest, folder: Path) -> Case:
    source: Path = request.getfixturevalue("smollm2")
    store: Store = request.getfixturevalue("store")
    bundle = built(store, folder, source, sets=("quant=F16",), verify=False)
    run = Run("llamacpp", bundle / "model/model.gguf", source / "tokenizer.json", None, context=256, slots=3, threads=2)
    model, prompts = request.getfixturevalue("real")
    return Case(run, run, prompts, 49152, greedy_reference(model), layers=30)


def ort(request: pytest.FixtureRequest, folder: Path) -> Case:
    source: Path = request.getfixturevalue("smollm2")
    checkpoint = open_checkpoint(str(source), progress=Silent(), cache=cache_root())
    exact, eight = folder / "exact", folder / "eight"
    exact.mkdir()
    eight.mkdir()
    matrices.link(source / "model.safetensors", exact)
    with (eight / matrices.DATA).open("wb") as file:
        packed_weights = matrices.Packed(checkpoint, file, 32, None, lambda _: None)
        for place, weights in ((eight, packed_weights), (exact, matrices.Exact(checkpoint))):
            model = decoder_graph.Decoder(checkpoint, weights, 256).model()
            (place / "model.onnx").write_bytes(model.SerializeToString(deterministic=True))
    run = Run("ort", eight / "model.onnx", source / "tokenizer.json", None, context=256, slots=3, threads=2)
    whole = Run(
        "ort",
        exact / "model.onnx",
        source / "tokenizer.json",
        None,
        context=256,
        slots=1,
        threads=2,
        settings={"optimized": False},
    )
    reference, prompts = request.getfixturevalue("real")
    return Case(run, whole, prompts, 49152, greedy_reference(reference), layers=30)


def torch_awq(request: pytest.FixtureRequest, folder: Path) -> Case:
    source = random_checkpoint(folder / "source", "LlamaForCausalLM")
    found = tuned(source, folder / "tuned", iterations=0)
    place = packed(folder / "awq", source, awq.FORM, found)
    tokenizer = write_tokenizer(folder)
    run = Run("transformers", place / "model.safetensors", tokenizer, None, context=64, slots=3, threads=1)
    prompts = [[5, 9, 200, 33, 7], [200, 100], [9] * 20]
    return Case(run, run, prompts, 320, greedy_reference(dequantized(source, found)), layers=3)


def tensorrt(request: pytest.FixtureRequest, folder: Path) -> Case:
    """The typed graph by onnxruntime on the processor (``--device cpu``): no GPU is here."""
    source = random_checkpoint(folder / "source", "LlamaForCausalLM", **HEADS)
    plan = typed(opened(source), folder / "typed", rows=3, context=64)
    tokenizer = write_tokenizer(folder)
    run = Run("tensorrt_decoder", plan, tokenizer, None, context=64, slots=3, threads=1, settings={"device": "cpu"})
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    prompts = [[5, 9, 200, 33, 7], [200, 100], [9] * 20]
    return Case(run, run, prompts, 320, greedy_reference(model), layers=3)


ENGINES = {"llamacpp": llamacpp, "ort": ort, "transformers": torch_awq, "tensorrt": tensorrt}


@pytest.fixture(scope="module", params=ENGINES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return ENGINES[request.param](request, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def engine(case: Case) -> Iterator[Engine]:
    with closing(case.load()) as loaded:
        yield loaded


def ask(engine: Engine, prompt: Sequence[int], **values: Any) -> list[Piece]:
    wanted = {"temperature": 0.0, "max_tokens": 10, "exact_ids": True, **values}
    return list(engine.generate(prompt, Sampling(**wanted)))


def ids_of(pieces: Sequence[Piece]) -> list[int]:
    return [token for piece in pieces for token in piece.ids]


def text_of(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_greedy_is_the_references_for_the_unquantized_form(case: Case) -> None:
    """Token for token, from the same ids."""
    with closing(case.load(case.exact, slots=1)) as engine:
        for prompt in case.prompts:
            pieces = ask(engine, prompt, max_tokens=6)
            assert ids_of(pieces) == case.reference(prompt, 6)
            assert (pieces[-1].finish, pieces[-1].tokens, pieces[-1].prompt_tokens) == ("length", 6, len(prompt))


def test_a_stop_id_ends_an_answer(case: Case, engine: Engine) -> None:
    """It counts as sampled and gives no text."""
    ids = ids_of(ask(engine, case.prompts[0]))
    first = ids.index(ids[4])
    with closing(case.load(stop_ids=(ids[4],))) as other:
        pieces = ask(other, case.prompts[0])
    assert (pieces[-1].finish, pieces[-1].tokens) == ("stop", first + 1)
    assert text_of(pieces) == (text_of(ask(engine, case.prompts[0], max_tokens=first)) if first else "")


def test_a_stop_string_is_no_part_of_the_answer(case: Case, engine: Engine) -> None:
    text = text_of(ask(engine, case.prompts[0]))
    stop = text[len(text) // 2 :][:3]
    pieces = ask(engine, case.prompts[0], stop=(stop,))
    assert (text_of(pieces), pieces[-1].finish) == (text[: text.index(stop)], "stop")


def test_max_tokens_and_a_full_context_end_an_answer(case: Case, engine: Engine) -> None:
    assert [ask(engine, case.prompts[0], max_tokens=count)[-1].tokens for count in (1, 3)] == [1, 3]
    with closing(case.load(slots=1)) as other:
        long = (case.prompts[0] * other.context)[: other.context - 4]
        pieces = ask(other, long, max_tokens=None, logit_bias={token: -100.0 for token in (0, 1, 2)})
    assert pieces[-1].finish == "length"
    assert 1 <= pieces[-1].tokens <= 4


def test_what_cannot_be_served_is_refused(case: Case, engine: Engine) -> None:
    """An empty prompt, one as long as the context, an id outside the vocabulary: before anything is computed."""
    for prompt, code in (
        ([], "empty_prompt"),
        ([5] * engine.context, "context_length_exceeded"),
        ([5, case.vocabulary + 7], "invalid_value"),
    ):
        with pytest.raises(RequestRefused) as refusal:
            ask(engine, prompt)
        assert refusal.value.code == code


def test_a_cancelled_answer_leaves_the_engine_as_it_was(case: Case, engine: Engine) -> None:
    """Cancelled while it answers; and its slot is free again, as often as there are slots and once more."""
    before = ids_of(ask(engine, case.prompts[1]))
    for _ in range(engine.slots + 1):
        answer = engine.generate(case.prompts[0], Sampling(temperature=0.0))
        next(answer)
        answer.close()  # type: ignore[attr-defined]
    assert ids_of(ask(engine, case.prompts[1])) == before


def test_parallel_answers_are_those_of_one_after_another(case: Case, engine: Engine) -> None:
    """More at once than there are slots."""
    prompts = [*case.prompts, *case.prompts]
    alone = [ids_of(ask(engine, prompt)) for prompt in case.prompts]
    together: dict[int, list[int]] = {}

    def work(number: int) -> None:
        together[number] = ids_of(ask(engine, prompts[number]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[number] for number in range(len(prompts))] == [*alone, *alone]


def test_score_and_logprobs_tell_the_same_of_a_greedy_token(case: Case, engine: Engine) -> None:
    """The distribution after the prompt: its best token is the greedy one, with the same log-probability."""
    prompt = case.prompts[0]
    rows = list(engine.score(prompt, 20))
    assert len(rows) == len(prompt)
    pieces = ask(engine, prompt, max_tokens=1, logprobs=3)
    [found] = [entry for piece in pieces for entry in piece.logprobs]
    assert found.id == max(rows[-1], key=lambda token: rows[-1][token])
    # scored as one prompt and met while answering: other shapes, and float16 (or finer) is what every layer stores
    allowed = apart(list(rows[-1].values()), FLOAT16, results(case.layers))
    assert found.logprob == pytest.approx(rows[-1][found.id], abs=allowed)
    assert len(found.top) == 3 and engine.memory() > 0
