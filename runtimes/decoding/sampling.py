"""Samples the next token from logits, for engines whose library does not sample (numpy only).

Order and meaning as in transformers' generate: bias, penalties, temperature, then top_k, top_p and min_p, each applied
to the tokens that the previous filter kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from runtimes.engine import Sampling

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Sampler:
    """Chooses the tokens of one answer. prompt: repetition_penalty counts its tokens too."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self.sampling = sampling
        self.random = np.random.Generator(np.random.PCG64(sampling.seed))
        self.seen = set(prompt) if sampling.repetition_penalty != 1.0 else set()
        self.counts: dict[int, int] = {}

    def choose(self, logits: NDArray[np.float32]) -> int:
        """The next token from the model's logits (vocabulary,), which are not modified."""
        values = logits.astype(np.float64)
        self._bias(values)
        token = int(values.argmax()) if self.sampling.temperature <= 0 else self._draw(values)
        self.counts[token] = self.counts.get(token, 0) + 1
        if self.sampling.repetition_penalty != 1.0:
            self.seen.add(token)
        return token

    def _bias(self, values: NDArray[np.float64]) -> None:
        wanted = self.sampling
        for token, bias in wanted.logit_bias.items():
            if 0 <= token < len(values):
                values[token] += bias
        if self.seen:
            seen_ids = np.fromiter((token for token in self.seen if 0 <= token < len(values)), dtype=np.int64)
            seen, penalty = values[seen_ids], wanted.repetition_penalty
            values[seen_ids] = np.where(seen > 0, seen / penalty, seen * penalty)
        if wanted.presence_penalty or wanted.frequency_penalty:
            for token, count in self.counts.items():
                values[token] -= wanted.presence_penalty + wanted.frequency_penalty * count

    def _draw(self, values: NDArray[np.float64]) -> int:
        wanted = self.sampling
        kept = np.argsort(-values, kind="stable")[: wanted.top_k if wanted.top_k > 0 else len(values)]
        shares = _softmax(values[kept] / wanted.temperature)
        if wanted.top_p < 1.0:  # the likeliest tokens until their sum reaches top_p, at least one
            count = max(1, int(np.searchsorted(shares.cumsum(), wanted.top_p)) + 1)
            kept, shares = kept[:count], shares[:count] / shares[:count].sum()
        if wanted.min_p > 0.0:
            enough = shares >= wanted.min_p * shares[0]
            kept, shares = kept[enough], shares[enough]
        place = int(np.searchsorted(shares.cumsum(), self.random.random() * shares.sum(), side="right"))
        return int(kept[min(place, len(kept) - 1)])


def _softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    powers: NDArray[np.float64] = np.exp(values - values.max())
    shares: NDArray[np.float64] = powers / powers.sum()
    return shares


def top_logprobs(logits: NDArray[np.float32], top: int) -> dict[int, float]:
    """The ``top`` likeliest tokens and their natural log-probabilities (softmax over all), likeliest first; of equal
    ones the lower id first.
    """
    values = logits.astype(np.float64)
    total = _total(values)
    count = min(top, len(values))
    if count < 1:
        return {}
    edge = np.partition(values, len(values) - count)[len(values) - count]
    near = np.flatnonzero(values >= edge)
    best = near[np.argsort(-values[near], kind="stable")][:count]
    return {int(token): float(values[token]) - total for token in best}


def logprob(logits: NDArray[np.float32], token: int) -> float:
    """The natural log-probability of one token."""
    return float(logits[token]) - _total(logits.astype(np.float64))


def _total(values: NDArray[np.float64]) -> float:
    """The log-sum-exp of the logits."""
    highest = values.max()
    return float(highest + np.log(np.exp(values - highest).sum()))
