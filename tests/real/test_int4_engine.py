"""GPTQ and AWQ folders through torch: the numbers of every family, and all that a server asks of an engine."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from packager.formats.int4 import awq, gptq
from packager.formats.int4 import folder as int4_folder
from packager.formats.int4.folder import Form
from packager.formats.int4.tuning import Tuned
from runtimes.engine import EngineError, Piece, RequestRefused, Sampling
from runtimes.engines.transformers.engine import Transformers, load, open_scorer
from runtimes.manifest import Run
from tests.real.test_reference import DECODERS, MORE, SMALL, random_checkpoint
from tests.real.test_tune import headers, tuned
from tests.tolerance import FLOAT32, require_close, sums
from tests.unit.runtimes.serving import write_tokenizer
from tests.unit.sketch import sketch

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FORMS = {"gptq": gptq.FORM, "awq": awq.FORM}
PROMPT = [5, 9, 200, 33, 7]


def packed(folder: Path, source: Path, form: Form, found: Tuned) -> Path:
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    checkpoint = replace(sketch(config, path=source), tensors=headers(source))
    folder.mkdir()
    int4_folder.write(form, checkpoint, found, (), folder)
    return folder


def run_of(folder: Path, tokenizer: Path, **more: Any) -> Run:
    values = {"context": 64, "slots": 3, "threads": 1, "stop_ids": (), **more}
    return Run("transformers", folder / "model.safetensors", tokenizer, None, **values)


def dequantized(source: Path, found: Tuned) -> Any:
    """transformers' own model with the tuned weights in float32; all else rounded to 16 bits, as the folder has it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16).float().eval()
    with torch.no_grad():
        for name in found.modules:
            model.get_submodule(name).weight.copy_(torch.from_numpy(found.weight(name)))
    return model


@pytest.mark.parametrize("architecture", DECODERS)
def test_every_family_gives_what_transformers_gives(
    architecture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From its packed weights, in both containers, prompt read in pieces and then token by token: at each of 80
    positions what float32 gives in any order of its sums.
    """
    source = random_checkpoint(tmp_path / "model", architecture)
    found = tuned(source, tmp_path / "tuned", iterations=0)
    ids = np.random.default_rng(4).integers(3, 320, 80).tolist()
    with torch.inference_mode():
        expected = torch.log_softmax(dequantized(source, found)(torch.tensor([ids])).logits[0].float(), -1).numpy()
    tokenizer = write_tokenizer(tmp_path)
    for name, form in FORMS.items():
        run = run_of(packed(tmp_path / name, source, form, found), tokenizer)
        with open_scorer(run, longest=80, max_rss_bytes=None, verbose=False) as scorer:
            rows = dict(scorer.top(ids, range(1, 81), 8))
        for position, row in rows.items():
            given = [expected[position - 1, token] for token in row]
            require_close(list(row.values()), given, FLOAT32, sums(SMALL | MORE[architecture], 80))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path, Tuned]:
    """A small random llama as AWQ, its tokenizer (a token a byte), its source and its integers."""
    home = tmp_path_factory.mktemp("small")
    source = random_checkpoint(home / "model", "LlamaForCausalLM")
    found = tuned(source, home / "tuned", iterations=0)
    return packed(home / "awq", source, awq.FORM, found), write_tokenizer(home), source, found


@pytest.fixture
def engine(small: tuple[Path, Path, Path, Tuned]) -> Iterator[Transformers]:
    with closing(load(run_of(small[0], small[1]), verbose=False)) as found:
        yield found


def ids_of(pieces: list[Piece]) -> list[int]:
    return [token for piece in pieces for token in piece.ids]


def greedy(engine: Transformers, **values: Any) -> list[Piece]:
    return list(engine.generate(PROMPT, Sampling(temperature=0, **{"max_tokens": 12, **values})))


def test_greedy_is_transformers_greedy(engine: Transformers, small: tuple[Path, Path, Path, Tuned]) -> None:
    """Token for token; the last piece counts both sides."""
    pieces = greedy(engine)
    with torch.inference_mode():
        made = dequantized(small[2], small[3]).generate(
            torch.tensor([PROMPT]), do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0
        )
    assert ids_of(pieces) == made[0, len(PROMPT) :].tolist()
    assert (pieces[-1].finish, pieces[-1].tokens, pieces[-1].prompt_tokens) == ("length", 12, len(PROMPT))


def test_stop_ids_and_stop_strings_end_an_answer(engine: Transformers, small: tuple[Path, Path, Path, Tuned]) -> None:
    """The end token counts and gives no text; a stop string is not part of the answer."""
    whole = greedy(engine)
    ids, text = ids_of(whole), "".join(piece.text for piece in whole)
    first = ids.index(ids[4])
    with closing(load(run_of(small[0], small[1], stop_ids=(ids[4],)), verbose=False)) as other:
        pieces = greedy(other)
    assert ids_of(pieces) == ids[: first + 1]
    assert (pieces[-1].finish, pieces[-1].tokens) == ("stop", first + 1)
    stop = text[len(text) // 2 :][:2]
    cut = greedy(engine, stop=(stop,))
    assert "".join(piece.text for piece in cut) == text[: text.index(stop)]
    assert cut[-1].finish == "stop"


def test_a_context_that_is_full_ends_an_answer(engine: Transformers) -> None:
    pieces = list(engine.generate([7] * 60, Sampling(temperature=0)))
    assert (pieces[-1].finish, pieces[-1].tokens) == ("length", 4)


@pytest.mark.parametrize(
    ("prompt", "sampling", "code"),
    [
        ([], Sampling(), "empty_prompt"),
        ([1] * 64, Sampling(), "context_length_exceeded"),
        ([1, 10**6], Sampling(), "invalid_value"),
        ([1], Sampling(schema='{"type": "object"}'), "unsupported"),
    ],
)
def test_what_cannot_be_served_is_refused(
    engine: Transformers, prompt: list[int], sampling: Sampling, code: str
) -> None:
    with pytest.raises(RequestRefused) as refusal:
        list(engine.generate(prompt, sampling))
    assert refusal.value.code == code


def test_logprobs_are_the_models_own(engine: Transformers) -> None:
    """Of the chosen token and the likeliest beside it, whatever bias chose it; as ``score`` gives them."""
    pieces = greedy(engine, logprobs=3, logit_bias={11: 100.0})
    [first] = pieces[1].logprobs
    last = list(engine.score(PROMPT, 320))[-1]
    assert first.id == 11
    require_close(first.logprob, last[11], FLOAT32, sums(SMALL, len(PROMPT)))
    assert [entry.id for entry in first.top] == list(last)[:3]
    assert bytes(first.bytes).decode(errors="replace") == first.text


def test_parallel_answers_are_those_of_one_after_another(engine: Transformers) -> None:
    """Three at once, each with its own cache."""
    prompts = [[3, 4, 5], [200, 100], [9] * 20]
    alone = [ids_of(list(engine.generate(prompt, Sampling(temperature=0, max_tokens=9)))) for prompt in prompts]
    together: dict[int, list[int]] = {}

    def work(number: int) -> None:
        found = list(engine.generate(prompts[number], Sampling(temperature=0, max_tokens=9)))
        together[number] = ids_of(found)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[number] for number in range(3)] == alone


def test_a_cancelled_answer_leaves_the_engine_as_it_was(engine: Transformers) -> None:
    """While the prompt is read and while it answers."""
    before = ids_of(greedy(engine))
    for pieces in (1, 4):
        answer = engine.generate(PROMPT, Sampling(temperature=0))
        for _ in range(pieces):
            next(answer)
        answer.close()  # type: ignore[attr-defined]
    assert ids_of(greedy(engine)) == before


def test_a_folder_that_is_not_understood_is_refused_in_a_sentence(
    small: tuple[Path, Path, Path, Tuned], tmp_path: Path
) -> None:
    """Other bits, reordered inputs, a missing tensor."""
    from safetensors.torch import load_file, save_file

    folder, tokenizer, source, found = small
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for change, said in (({"bits": 8}, "8 bits"), ({"quant_method": "hqq"}, "known are gptq and awq")):
        other = tmp_path / said.replace(" ", "-")
        other.mkdir()
        (other / "model.safetensors").hardlink_to(folder / "model.safetensors")
        changed = {**config, "quantization_config": {**config["quantization_config"], **change}}
        (other / "config.json").write_text(json.dumps(changed), encoding="utf-8")
        with pytest.raises(EngineError, match=said):
            load(run_of(other, tokenizer), verbose=False)
    whole = packed(tmp_path / "gptq", source, gptq.FORM, found)
    tensors = load_file(whole / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    shuffled = {**tensors, f"{name}.g_idx": tensors[f"{name}.g_idx"].flip(0).contiguous()}
    save_file(shuffled, whole / "model.safetensors")
    with pytest.raises(EngineError, match="desc_act"):
        load(run_of(whole, tokenizer), verbose=False)
    save_file({key: value for key, value in tensors.items() if key != f"{name}.scales"}, whole / "model.safetensors")
    with pytest.raises(EngineError, match=f"{name}.scales is in no file"):
        load(run_of(whole, tokenizer), verbose=False)


def test_zero_points_other_than_eight_are_read() -> None:
    """AWQ files of others are asymmetric."""
    from runtimes.engines.transformers.int4 import Int4Linear, integers

    random = np.random.default_rng(3)
    q, zeros = random.integers(0, 16, (16, 64), np.uint8), random.integers(0, 16, (16, 2), np.uint8)
    scales = random.random((16, 2)).astype(np.float16)
    stored = {
        "qweight": torch.from_numpy(int4_folder.words(np.ascontiguousarray(q.T), awq.ORDER)),
        "qzeros": torch.from_numpy(int4_folder.words(np.ascontiguousarray(zeros.T), awq.ORDER)),
        "scales": torch.from_numpy(np.ascontiguousarray(scales.T)),
    }
    wide = np.repeat(zeros.astype(np.float32), 32, axis=1)
    expected = (q - wide) * np.repeat(scales.astype(np.float32), 32, axis=1)
    linear = Int4Linear(*integers("awq", stored))
    assert np.array_equal(linear.weight(0, 16, torch.float32).numpy(), expected)
    linear.rows = 5  # several blocks
    x = torch.randn(3, 64)
    torch.testing.assert_close(linear(x), x @ torch.from_numpy(expected).T)


@pytest.mark.parametrize(("name", "layout"), [("gptq", "gptq"), ("awq", "gemm")])
def test_transformers_knows_the_formats(name: str, layout: str) -> None:
    """Its own reader of ``quantization_config`` takes both for what they are (loading them is gptqmodel's work)."""
    from transformers.quantizers.auto import AutoQuantizationConfig

    found = AutoQuantizationConfig.from_dict(FORMS[name].config(32, "x"))
    assert (found.quant_method.value, found.bits, found.group_size, found.format) == (name, 4, 32, layout)
