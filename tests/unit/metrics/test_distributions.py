"""The score: zero for equals, closed forms where there are any, never negative, and honest about what it cannot see."""

from __future__ import annotations

import math
import random

import pytest

from packager.core.errors import GateFailed
from packager.metrics.distributions import Score, compare, divergence, positions_of, require_equal


def logs(**shares: float) -> dict[int, float]:
    """{"a": 0.5} as {0: log 0.5}: token ids by letter."""
    return {ord(letter) - ord("a"): math.log(share) for letter, share in shares.items()}


def drawn(rng: random.Random, k: int, vocabulary: int) -> dict[int, float]:
    """The best k of a random full distribution."""
    weights = [math.exp(rng.gauss(0, rng.choice([0.1, 1, 4]))) for _ in range(vocabulary)]
    total = sum(weights)
    best = sorted(range(vocabulary), key=lambda token: -weights[token])[:k]
    return {token: math.log(weights[token] / total) for token in best}


def test_equal_distributions_have_no_divergence() -> None:
    """KL of a distribution with itself is zero, whether its tokens hold all of the mass or a part."""
    for p in (logs(a=0.5, b=0.5), logs(a=0.5, b=0.2), logs(a=1e-6)):
        assert divergence(p, p) == pytest.approx(0, abs=1e-12)


def test_a_closed_form_over_all_of_the_mass() -> None:
    """p = (1/2, 1/2), q = (1/4, 3/4): KL = log 2 - log 3 / 2."""
    nats = divergence(logs(a=0.5, b=0.5), logs(a=0.25, b=0.75))
    assert nats == pytest.approx(math.log(2) - math.log(3) / 2, rel=1e-9)


def test_the_rest_is_one_bucket() -> None:
    """p = (1/2, rest 1/2), q = (1/4, rest 3/4): as if the rest were one token."""
    nats = divergence(logs(a=0.5), logs(a=0.25))
    assert nats == pytest.approx(math.log(2) - math.log(3) / 2, rel=1e-9)


def test_a_token_the_artifact_did_not_return_has_at_most_the_probability_of_its_last() -> None:
    """b is not among the artifact's best: it gets what the last of them has, or what they leave over where that is
    less.
    """
    p = logs(a=0.5, b=0.4)
    expected = 0.4 * math.log(0.4 / 0.1) + 0.1 * math.log(0.1 / (1 - 0.5 - 0.1))
    assert divergence(p, logs(a=0.5, c=0.1)) == pytest.approx(expected, rel=1e-9)
    expected = 0.4 * math.log(0.4 / 0.2) + 0.1 * math.log(0.1 / (1 - 0.5 - 0.2))
    assert divergence(p, logs(a=0.5, c=0.3)) == pytest.approx(expected, rel=1e-9)


def test_disjoint_distributions_are_far_but_finite() -> None:
    """Nothing in common is a large number, not infinity and not an exception."""
    nats = divergence(logs(a=1.0), logs(b=1.0))
    assert 10 < nats < 100


def test_divergence_is_never_negative() -> None:
    """For 300 pairs of random distributions cut to their best k."""
    rng = random.Random(5)
    for _ in range(300):
        p, q = drawn(rng, rng.choice([1, 4, 32]), 64), drawn(rng, rng.choice([1, 4, 32]), 64)
        assert divergence(p, q) >= 0


def test_the_bucket_only_ever_hides_divergence() -> None:
    """Against the full distribution the cut one gives a lower bound, when the artifact knows all the source's
    tokens.
    """
    rng = random.Random(6)
    for _ in range(100):
        whole_p, whole_q = drawn(rng, 64, 64), drawn(rng, 64, 64)
        best = dict(list(whole_p.items())[:8])
        assert divergence(best, whole_q) <= divergence(whole_p, whole_q) + 1e-9


def test_a_comparison_counts_agreement_and_quantiles() -> None:
    """Four positions: one differs; mean, 95th percentile and maximum are those of the four."""
    same, other = logs(a=0.6, b=0.3), logs(a=0.3, b=0.6)
    score = compare([same] * 4, [same, same, other, same], [0, 0, 0, None])
    far = divergence(same, other)
    assert (score.positions, score.k) == (4, 2)
    assert score.top1 == score.top1_strict == 0.75
    assert score.kl_mean == pytest.approx(far / 4, abs=1e-6)
    assert score.kl_p95 == score.kl_max == pytest.approx(far, abs=1e-6)
    # the target a: log(0.6/0.3) at one of three positions that have a target
    assert score.perplexity_ratio == pytest.approx(math.exp(math.log(2) / 3), abs=1e-4)


def test_a_tie_of_the_source_is_no_disagreement() -> None:
    """Where the source itself hardly prefers its best token, taking the other counts as agreement, but not strictly."""
    source, artifact = logs(a=0.401, b=0.400), logs(a=0.400, b=0.401)
    score = compare([source], [artifact], [None])
    assert (score.top1, score.top1_strict) == (1.0, 0.0)
    clear = compare([logs(a=0.42, b=0.38)], [logs(a=0.38, b=0.42)], [None])
    assert clear.top1 == 0.0


def test_a_better_artifact_has_a_ratio_under_one() -> None:
    """The perplexity ratio is artifact over source: above one is worse, under one better."""
    assert compare([logs(a=0.2)], [logs(a=0.4)], [0]).perplexity_ratio == 0.5
    assert compare([logs(a=0.4)], [logs(a=0.2)], [0]).perplexity_ratio == 2.0
    assert compare([logs(a=0.4)], [logs(a=0.2)], [7]).perplexity_ratio == 1.0


@pytest.mark.parametrize("sizes", [(0, 0, 0), (2, 1, 2), (1, 2, 1), (2, 2, 1)])
def test_positions_that_do_not_match_are_a_defect(sizes: tuple[int, int, int]) -> None:
    """A comparison of different positions would be a lie: it raises."""
    one = logs(a=0.5)
    with pytest.raises(ValueError, match="do not match"):
        compare([one] * sizes[0], [one] * sizes[1], [None] * sizes[2])


def score(kl: float, top1: float) -> Score:
    same = {"kl_mean": kl, "kl_p95": kl, "kl_max": kl, "top1": top1, "top1_strict": top1}
    return Score(
        positions=10,
        k=64,
        perplexity_ratio=1.0,
        kl_mean_ci=(kl, kl),
        top1_ci=(top1, top1),
        perplexity_ratio_ci=(1.0, 1.0),
        **same,
    )


def test_the_gate_of_an_unquantized_form() -> None:
    """At the limits it passes; past either it names the figure that failed, with exit code 6."""
    require_equal(score(0.001, 0.995), "the GGUF")
    with pytest.raises(GateFailed, match=r"mean KL divergence is 0\.0011") as caught:
        require_equal(score(0.0011, 1.0), "the GGUF")
    assert caught.value.exit_code == 6
    assert "top-1" not in caught.value.what
    with pytest.raises(GateFailed, match=r"top-1 agreement is 99\.40%"):
        require_equal(score(0.0, 0.994), "the GGUF")
    with pytest.raises(GateFailed, match=r"KL.*; top-1"):
        require_equal(score(0.5, 0.5), "the GGUF")


def test_a_score_that_is_not_a_number_does_not_pass() -> None:
    """An artifact that computes NaN fails the gate."""
    nan = {0: float("nan"), 1: math.log(0.5)}
    score = compare([logs(a=0.5, b=0.3)], [nan], [0])
    with pytest.raises(GateFailed):
        require_equal(score, "the GGUF")


def test_positions_come_in_order() -> None:
    """A score output is flattened sequence by sequence."""
    scored = {
        "sequences": [
            {"ids": [[1, 2], [3, 4]], "logprobs": [[-0.1, -3.0], [-0.2, -2.0]]},
            {"ids": [[5]], "logprobs": [[-0.5]]},
        ]
    }
    assert positions_of(scored) == [{1: -0.1, 2: -3.0}, {3: -0.2, 4: -2.0}, {5: -0.5}]
