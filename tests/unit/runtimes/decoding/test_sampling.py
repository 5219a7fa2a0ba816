"""The choice of a token from logits, the text of tokens as they come, and turns that nobody misses."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtimes.decoding.detokenize import Detokenizer
from runtimes.decoding.sampling import Sampler, top_logprobs
from runtimes.engine import Sampling
from runtimes.engines.transformers.engine import FairLock
from tests.unit.runtimes.serving import write_tokenizer

LOGITS = np.array([0.0, 3.0, 2.0, 3.0, -1.0], np.float32)


def drawn(count: int = 400, **values: Any) -> set[int]:
    sampler = Sampler(Sampling(seed=1, **values), [])
    return {sampler.choose(LOGITS) for _ in range(count)}


def test_greedy_takes_the_likeliest_and_of_equals_the_first() -> None:
    assert Sampler(Sampling(temperature=0.0), []).choose(LOGITS) == 1


@pytest.mark.parametrize(
    ("values", "tokens"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 3}, {1, 2, 3}),
        ({"top_p": 0.01}, {1}),  # the likeliest is kept, however small the share
        ({"top_p": 0.8}, {1, 3}),  # 0.42 and 0.42
        ({"min_p": 0.3}, {1, 2, 3}),  # e^-1 of the likeliest's share is enough
        ({"temperature": 0.05}, {1, 3}),
    ],
)
def test_what_is_cut_off_is_never_drawn(values: dict[str, Any], tokens: set[int]) -> None:
    """And everything else is, in four hundred draws."""
    assert drawn(**values) == tokens


def test_a_seed_repeats_the_answer() -> None:
    one, other = (Sampler(Sampling(seed=7), []) for _ in range(2))
    assert [one.choose(LOGITS) for _ in range(50)] == [other.choose(LOGITS) for _ in range(50)]


def test_shares_are_those_of_the_softmax() -> None:
    """Four thousand draws, within four standard deviations."""
    sampler = Sampler(Sampling(seed=3), [])
    counts = np.bincount([sampler.choose(LOGITS) for _ in range(4000)], minlength=5) / 4000
    shares = np.exp(LOGITS) / np.exp(LOGITS).sum()
    assert (abs(counts - shares) < 4 * np.sqrt(shares * (1 - shares) / 4000)).all()


def test_bias_and_penalties_change_the_greedy_choice() -> None:
    """A banned token, a wanted one, and one that occurred before (in the prompt for repetition_penalty)."""
    assert Sampler(Sampling(temperature=0, logit_bias={1: -100.0, 3: -100.0}), []).choose(LOGITS) == 2
    assert Sampler(Sampling(temperature=0, logit_bias={4: 100.0, 99: 5.0}), []).choose(LOGITS) == 4
    assert Sampler(Sampling(temperature=0, repetition_penalty=2.0), [1]).choose(LOGITS) == 3
    often = Sampler(Sampling(temperature=0, frequency_penalty=0.6), [1])
    assert [often.choose(LOGITS) for _ in range(5)] == [1, 3, 1, 3, 2]
    once = Sampler(Sampling(temperature=0, presence_penalty=1.5), [])
    assert [once.choose(LOGITS) for _ in range(4)] == [1, 3, 2, 1]


def test_logprobs_are_the_models_own_likeliest_first() -> None:
    """Natural logarithms over the whole vocabulary; equal ones in the order of their ids."""
    likeliest = top_logprobs(LOGITS, 3)
    assert list(likeliest) == [1, 3, 2]
    assert likeliest[1] == pytest.approx(3 - math.log(np.exp(LOGITS.astype(np.float64)).sum()))
    assert sum(map(math.exp, top_logprobs(LOGITS, 9).values())) == pytest.approx(1)
    assert top_logprobs(LOGITS, 0) == {}


def test_characters_come_whole_and_special_tokens_as_nothing(tmp_path: Path) -> None:
    """A token a byte: nothing is sent before the last byte of a character."""
    words = Detokenizer(write_tokenizer(tmp_path))
    ids, stream = words.encode("é🌍<|assistant|>"), words.stream()
    assert [stream.step(words.tokenizer, token) for token in ids] == [None, "é", None, None, None, "🌍", None]
    assert b"".join(map(words.bytes_of, ids)) == "é🌍<|assistant|>".encode()
    assert words.bytes_of(10**6) == b""


def test_turns_are_given_in_the_order_of_asking() -> None:
    """Who releases and asks again comes after those who waited."""
    turns, order = FairLock(), []
    started = [threading.Event() for _ in range(3)]

    def work(name: int) -> None:
        started[name].set()
        with turns:
            order.append(name)

    with turns:
        threads = []
        for name in range(3):
            threads.append(threading.Thread(target=work, args=(name,)))
            threads[-1].start()
            started[name].wait()
            while len(turns._waiting) <= name:
                pass
    with turns:
        order.append(9)
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 9]
