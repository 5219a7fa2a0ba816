"""An encoder's server over a scripted engine: shapes, refusals, batches; and the arithmetic around the model."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtimes.engine import EngineError, RequestRefused
from runtimes.engines.encoder import Reader, Settings, Text, labelled, padded, pooled
from runtimes.server.batcher import Batcher
from runtimes.server.encoder_app import EncoderService, make_app
from runtimes.server.metrics import EncoderMetrics
from tests.unit.runtimes.serving import Client, listening, make_run

EMBED = {"pooling": "mean", "normalize": True, "token_types": True, "pad_id": 0, "lower_case": False, "prompt": ""}
CLASSIFY = {"labels": ["bad", "good"], "scores": "softmax", "token_types": False, "pad_id": 0}


class Scripted:
    """A vector is (number of tokens, sum of the ids); remembers its batches."""

    version, slots = "scripted 1", 4

    def __init__(self, run: Any, task: str = "embed") -> None:
        self.task, self.context = task, run.context
        self.details: dict[str, str] = {}
        self.settings = Settings.of(run)
        self.reader = Reader(run, self.settings)
        self.batches: list[list[int]] = []
        self.fail = self.closed = False
        self.gate = threading.Event()
        self.gate.set()

    def compute(self, texts: Sequence[Text]) -> list[Any]:
        self.gate.wait(10)
        self.batches.append([len(text.ids) for text in texts])
        if self.fail:
            raise EngineError("the memory is gone")
        return [np.array([len(text.ids), sum(text.ids)], np.float32) for text in texts]

    def memory(self) -> int:
        return 12345

    def close(self) -> None:
        self.closed = True


@contextlib.contextmanager
def serving(folder: Path, task: str, settings: dict[str, Any]) -> Iterator[tuple[Client, Scripted]]:
    run = make_run(folder, chat_template=None, context=16, settings=settings, task=task)
    engine = Scripted(run, task)
    with listening(make_app(EncoderService(run, engine), max_body=1 << 20, log_json=False)) as port:
        yield Client(port, engine), engine  # type: ignore[arg-type]
    assert engine.closed


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, Scripted]]:
    with serving(tmp_path_factory.mktemp("embed"), "embed", EMBED) as both:
        yield both


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, Scripted]]:
    with serving(tmp_path_factory.mktemp("classify"), "classify", CLASSIFY) as both:
        yield both


def test_embeddings_have_openai_shape(embedder: tuple[Client, Scripted]) -> None:
    """A list of vectors in the request's order, as numbers or as base64 of float32, and the tokens used."""
    status, body, _ = embedder[0].send("POST", "/v1/embeddings", {"input": ["abc", "a"], "model": "tiny"})
    assert status == 200 and body["object"] == "list" and body["model"] == "tiny"
    assert [row["index"] for row in body["data"]] == [0, 1]
    assert [row["embedding"][0] for row in body["data"]] == [3.0, 1.0]
    assert body["usage"] == {"prompt_tokens": 4, "total_tokens": 4}
    _, coded, _ = embedder[0].send("POST", "/v1/embeddings", {"input": "abc", "encoding_format": "base64"})
    vector = np.frombuffer(base64.b64decode(coded["data"][0]["embedding"]), "<f4")
    assert vector.tolist() == body["data"][0]["embedding"]


def test_token_ids_are_taken_as_they_are(embedder: tuple[Client, Scripted]) -> None:
    """One list, or several."""
    status, body, _ = embedder[0].send("POST", "/v1/embeddings", {"input": [5, 6, 7]})
    assert status == 200 and body["data"][0]["embedding"] == [3.0, 18.0]
    _, body, _ = embedder[0].send("POST", "/v1/embeddings", {"input": [[5], [6, 7]]})
    assert [row["embedding"] for row in body["data"]] == [[1.0, 5.0], [2.0, 13.0]]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"input": ""}, "empty"),
        ({"input": []}, "1 to 2048"),
        ({"input": ["a"] * 2049}, "1 to 2048"),
        ({"input": ["a", 3]}, "a list of texts"),
        ({"input": [True]}, "a list of texts"),
        ({"input": [-1]}, "from 0 to"),
        ({"input": [[]]}, "empty"),
        ({"input": "\ud800"}, "half a character"),
        ({"input": "a" * 17}, "17 tokens and this model takes 16"),
        ({"input": "a", "dimensions": 1}, "2 dimensions"),
        ({"input": "a", "task_type": "x"}, "Unrecognized"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
    ],
)
def test_what_cannot_be_honoured_is_refused(embedder: tuple[Client, Scripted], body: Any, says: str) -> None:
    """With one sentence and OpenAI's error object."""
    status, answer, _ = embedder[0].send("POST", "/v1/embeddings", body)
    assert status == 400 and says in answer["error"]["message"], answer
    assert answer["error"]["type"] == "invalid_request_error"


def test_a_long_text_is_cut_only_when_asked_and_then_told(embedder: tuple[Client, Scripted]) -> None:
    """The request names the texts that were cut; others have no such key."""
    client = embedder[0]
    _, body, _ = client.send("POST", "/v1/embeddings", {"input": ["a", "b" * 40], "truncate": True})
    assert body["truncated"] == [1] and body["usage"]["prompt_tokens"] == 17
    _, body, _ = client.send("POST", "/v1/embeddings", {"input": ["a"], "truncate": True})
    assert "truncated" not in body
    _, body, _ = client.send("POST", "/v1/embeddings", {"input": [7] * 20, "truncate": True})
    assert body["truncated"] == [0]


def test_status_pages_and_what_an_embedder_has_not(embedder: tuple[Client, Scripted]) -> None:
    """The card says what the vectors are; chat and labels are not there."""
    client = embedder[0]
    card = client.send("GET", "/v1/models")[1]["data"][0]
    assert (card["task"], card["dimensions"], card["pooling"], card["normalized"]) == ("embed", 2, "mean", True)
    assert client.send("GET", "/health")[0] == 200
    assert "packager_batch_texts" in client.send("GET", "/metrics")[1]
    assert "https://" not in client.send("GET", "/docs")[1]
    for path in ("/v1/chat/completions", "/classify", "/predict"):
        assert client.send("POST", path, {})[0] == 404
    assert client.send("POST", "/v1/embeddings", {"input": "a", "model": "gpt"})[0] == 404


def test_an_engine_that_fails_is_a_500_and_the_next_request_is_served(embedder: tuple[Client, Scripted]) -> None:
    """All texts of the request are given up; the thread lives on."""
    client, engine = embedder
    engine.fail = True
    status, body, _ = client.send("POST", "/v1/embeddings", {"input": ["a"] * 9})
    engine.fail = False
    assert status == 500 and "the memory is gone" in body["error"]["message"]
    assert client.send("POST", "/v1/embeddings", {"input": "a"})[0] == 200


def test_labels_and_scores(classifier: tuple[Client, Scripted]) -> None:
    """The best label, every score by name, and /predict with the label alone."""
    client = classifier[0]
    status, body, _ = client.send("POST", "/classify", {"input": ["ab", "c"]})
    assert status == 200
    row = body["data"][0]
    assert row["label"] == "good" and set(row["scores"]) == {"bad", "good"} and row["num_classes"] == 2
    assert sum(row["probs"]) == pytest.approx(1) and row["score"] == max(row["probs"])
    assert client.send("POST", "/predict", {"text": "ab"})[1] == {"result": "good"}
    pair = client.send("POST", "/classify", {"input": "ab", "pair": "cd"})[1]
    assert pair["usage"]["prompt_tokens"] == 4
    assert client.send("POST", "/classify", {"input": ["a"], "pair": ["b", "c"]})[0] == 400
    assert client.send("POST", "/v1/embeddings", {"input": "a"})[0] == 404
    assert client.send("GET", "/v1/models")[1]["data"][0]["labels"] == ["bad", "good"]


def test_texts_that_arrive_together_share_batches(tmp_path: Path) -> None:
    """A single text is not held up by a request of many, and a short one is not padded to a long one's length."""
    run = make_run(tmp_path, chat_template=None, context=16, settings=EMBED, task="embed")
    engine = Scripted(run)
    many = [Text((1,) * 12, (0,) * 12)] * 9
    few = [Text((1,) * 10, (0,) * 10)]
    short = [Text((1,), (0,))]

    async def all_at_once() -> list[list[Any]]:
        batcher = Batcher(engine, EncoderMetrics(engine.memory))
        engine.gate.clear()
        tasks = [asyncio.ensure_future(batcher.compute(texts)) for texts in (short, many, few, short)]
        await asyncio.sleep(0.05)
        engine.gate.set()
        results = await asyncio.gather(*tasks)
        await asyncio.to_thread(batcher.close)
        assert batcher.waiting == 0
        return list(results)

    results = asyncio.run(all_at_once())
    assert [len(rows) for rows in results] == [1, 9, 1, 1]
    assert [row.tolist() for row in results[1]] == [[12.0, 12.0]] * 9
    assert max(map(len, engine.batches)) <= engine.slots and sum(map(len, engine.batches)) == 12
    assert all(len(sizes) * max(sizes) <= 2 * sum(sizes) for sizes in engine.batches)
    assert any({10, 12} <= set(sizes) for sizes in engine.batches[:3])  # the one text did not wait for the nine


def test_a_request_that_is_given_up_leaves_the_queue(tmp_path: Path) -> None:
    """Its waiting texts are never computed."""
    engine = Scripted(make_run(tmp_path, chat_template=None, context=16, settings=EMBED, task="embed"))

    async def give_up() -> None:
        batcher = Batcher(engine, EncoderMetrics(engine.memory))
        engine.gate.clear()
        task = asyncio.ensure_future(batcher.compute([Text((1, 2), (0, 0))] * 40))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert batcher.waiting == 0
        engine.gate.set()
        await asyncio.to_thread(batcher.close)

    asyncio.run(give_up())
    assert len(engine.batches) == 1


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [("mean", [2.0, 3.0]), ("cls", [1.0, 2.0]), ("max", [3.0, 4.0]), ("mean_sqrt_len", [2.0 * 2**0.5, 3.0 * 2**0.5])],
)
def test_pooling_ignores_padding(tmp_path: Path, pooling: str, expected: list[float]) -> None:
    """Two tokens and one of padding with huge states; normalising gives a unit vector."""
    states = np.array([[[1, 2], [3, 4], [1e9, 1e9]]], np.float32)
    mask = np.array([[1, 1, 0]])
    run = make_run(tmp_path, settings={**EMBED, "pooling": pooling, "normalize": False})
    assert pooled(states, mask, Settings.of(run))[0].tolist() == pytest.approx(expected)
    unit = pooled(states, mask, Settings.of(make_run(tmp_path, settings={**EMBED, "pooling": pooling})))
    assert np.linalg.norm(unit[0]) == pytest.approx(1)


def test_scores_by_kind_of_problem(tmp_path: Path) -> None:
    """Softmax sums to one, sigmoid is each label's own, a regression is left alone."""
    logits = np.array([0.0, 0.0], np.float32)
    for scores, expected in (("softmax", 0.5), ("sigmoid", 0.5), ("none", 0.0)):
        settings = Settings.of(make_run(tmp_path, settings={**CLASSIFY, "scores": scores}))
        assert labelled(logits, settings)["probs"] == [expected, expected]
    with pytest.raises(EngineError, match="pooling"):
        Settings.of(make_run(tmp_path, settings={"pooling": "lasttoken"}))


def test_inputs_are_padded_to_the_longest(tmp_path: Path) -> None:
    """The pad id, a mask, and the types of a pair."""
    settings = Settings.of(make_run(tmp_path, settings={**EMBED, "pad_id": 9}))
    inputs = padded([Text((1, 2, 3), (0, 0, 1)), Text((4,), (0,))], settings)
    assert inputs["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert inputs["token_type_ids"].tolist() == [[0, 0, 1], [0, 0, 0]]


def test_prompt_and_lower_case_come_before_the_tokenizer(tmp_path: Path) -> None:
    """What the model's files ask for is done to every text."""
    run = make_run(tmp_path, context=32, settings={**EMBED, "prompt": "Q: ", "lower_case": True})
    reader = Reader(run, Settings.of(run))
    plain = Reader(run, Settings.of(make_run(tmp_path, settings=EMBED)))
    assert reader.read("AbC").ids == plain.read("q: abc").ids
    with pytest.raises(RequestRefused):
        reader.read("")
