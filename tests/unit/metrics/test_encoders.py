"""An encoder's score on numbers that can be checked by hand, and the gate over it."""

from __future__ import annotations

import numpy as np
import pytest

from packager.core.errors import GateFailed, UsageError
from packager.metrics import encoders
from packager.metrics.encoders import (
    EncoderThresholds,
    LabelScore,
    VectorScore,
    compare_labels,
    compare_vectors,
    lines,
    refuse_for_decoders,
    require_exact,
    require_kept,
    shortfalls,
)
from packager.metrics.encoders import as_dict as plain


@pytest.fixture(autouse=True)
def fewer_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every bound that is asserted here holds of any number of draws; a thousand take seconds."""
    monkeypatch.setattr(encoders, "DRAWS", 50)


VECTORS = np.random.default_rng(1).standard_normal((20, 8)).tolist()


def test_equal_vectors_score_one() -> None:
    """Cosine and rank correlation 1, error 0; the interval is a point."""
    score = compare_vectors(VECTORS, VECTORS)
    assert (score.cosine_mean, score.cosine_min, score.rank, score.max_error) == (1.0, 1.0, 1.0, 0.0)
    assert score.cosine_mean_ci == (1.0, 1.0)
    require_exact(score, "it")


def test_a_turned_vector_is_seen() -> None:
    """One of two at a right angle: mean cosine one half, smallest 0."""
    score = compare_vectors([[1, 0], [0, 1]], [[1, 0], [1, 0]])
    assert (score.cosine_mean, score.cosine_min, score.rank) == (0.5, 0.0, None)
    with pytest.raises(GateFailed, match="smallest cosine"):
        require_exact(score, "it")


def test_rank_correlation_is_spearmans() -> None:
    """Three texts on a circle, so three similarities: their order turned around gives -1, and scale changes nothing."""
    angles = np.array([0.0, 0.3, 1.0])  # similarities: near, middle, far
    turned = np.array([0.0, 1.0, 1.3])
    one = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    other = np.stack([np.cos(turned), np.sin(turned)], axis=1)
    # pairs (0,1), (0,2), (1,2): ranks 3, 1, 2 against 2, 1, 3, so 1 - 6·2/(3·8) = 0.5
    assert compare_vectors(one.tolist(), other.tolist()).rank == pytest.approx(0.5)
    assert compare_vectors(one.tolist(), (5 * one).tolist()).rank == pytest.approx(1.0)


def test_noise_lowers_the_score_and_its_interval_covers_it() -> None:
    """More noise, less cosine; the mean lies in its own interval."""
    noise = np.random.default_rng(2).standard_normal((20, 8))
    small = compare_vectors(VECTORS, (np.array(VECTORS) + 0.05 * noise).tolist())
    large = compare_vectors(VECTORS, (np.array(VECTORS) + 0.5 * noise).tolist())
    assert 1 > small.cosine_mean > large.cosine_mean
    assert small.rank is not None and large.rank is not None and small.rank > large.rank
    assert small.cosine_mean_ci[0] <= small.cosine_mean <= small.cosine_mean_ci[1]


def test_labels_are_compared_with_ties_and_truth() -> None:
    """Four texts: kept, kept, lost, and a tie of the source's; accuracy where the label is known."""
    source = [[2.0, 0.0], [0.0, 2.0], [1.0, 0.0], [0.01, 0.0]]
    artifact = [[1.5, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 0.01]]
    score = compare_labels(source, artifact, [0, 1, 0, None], several=False)
    assert (score.agreement_strict, score.agreement) == (0.5, 0.75)
    assert (score.labelled, score.accuracy_source, score.accuracy) == (3, 1.0, round(2 / 3, 6))
    several = compare_labels([[3.0, -3.0]], [[3.0, 3.0]], [None], several=True)
    assert several.agreement == 0.0


def test_the_gate_names_all_that_fell_short() -> None:
    """Mean cosine and rank, each with what is allowed; what is not a number falls short too."""
    bad = VectorScore(5, 0.9, 0.8, 0.7, (0.8, 0.95), 0.5, (0.4, 0.6), 0.1)
    misses = shortfalls({"general": bad, "tuning": None}, EncoderThresholds())
    assert [line["measure"] for line in misses] == ["mean cosine, general texts", "rank correlation, general texts"]
    with pytest.raises(GateFailed, match=r"0\.9000 \(0\.9900 allowed\)") as caught:
        require_kept({"general": bad}, EncoderThresholds(), "the model", "Do this.")
    assert caught.value.details is not None and len(caught.value.details["shortfalls"]) == 2
    nan = VectorScore(5, float("nan"), 0, 0, (0, 0), None, None, float("nan"))
    assert shortfalls({"general": nan}, EncoderThresholds())
    lost = LabelScore(5, 1.0, 1.0, (1, 1), 0.1, 5, 0.9, 0.8)
    assert shortfalls({"tuning": lost}, EncoderThresholds())[0]["measure"] == "loss of accuracy, tuning texts"
    assert "accuracy 80.0% (source 90.0%)" in lines(plain({"tuning": lost}, EncoderThresholds()))[0]


def test_limits_belong_to_a_kind_of_model() -> None:
    """Each limit is accepted where it says something, and refused by name elsewhere."""
    given = EncoderThresholds().changed({"min_cosine": 0.5}, task="embed", labelled=False)
    assert given.min_cosine == 0.5 and given.min_rank == EncoderThresholds().min_rank
    for name, task in (("max_kl", "embed"), ("min_agreement", "embed"), ("min_rank", "classify")):
        with pytest.raises(UsageError, match="does not apply to"):
            EncoderThresholds().changed({name: 1.0}, task=task, labelled=True)
    with pytest.raises(UsageError, match="labels"):
        EncoderThresholds().changed({"max_accuracy_loss": 0.1}, task="classify", labelled=False)
    with pytest.raises(UsageError, match="language model"):
        refuse_for_decoders({"min_cosine": 0.9})
    refuse_for_decoders({"max_kl": 0.9})
