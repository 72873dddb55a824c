"""Species richness: all subsets by brute force, closed forms, and coverage by simulation."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detection import richness


@given(st.integers(1, 7), st.integers(1, 6), st.integers(0, 99), st.booleans())
@settings(max_examples=30, deadline=None)
def test_rarefaction_is_the_mean_over_all_subsets(k, targets, seed, several):
    """Draws that hit one target or none, and draws that hit several."""
    rng = np.random.default_rng(seed)
    hit_kxS = (
        rng.random((k, targets)) < 0.4 if several else np.eye(targets + 1, dtype=bool)[rng.integers(0, targets + 1, k)]
    )
    hit_kxS = hit_kxS[:, :targets]
    for m in range(1, k + 1):
        exact = np.mean([hit_kxS[list(s)].any(0).sum() for s in itertools.combinations(range(k), m)])
        assert richness.distinct(hit_kxS.sum(0), k, m, targets)[0] == pytest.approx(exact)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=30), st.integers(20, 40))
@settings(max_examples=50, deadline=None)
def test_the_curve_starts_at_zero_grows_ever_more_slowly_and_stays_below_all(hits, k):
    hits = np.array(hits)
    curve = richness.distinct(hits, k, np.arange(3 * k + 1), len(hits))
    steps = np.diff(curve)
    assert curve[0] == pytest.approx(0) and curve[k] == (hits > 0).sum() and curve[-1] <= len(hits)
    assert (steps >= -1e-9).all() and (np.diff(steps) <= 1e-9).all()


def test_large_counts_keep_their_digits():
    """200,000 of a million draws of one target: 1 - 0.8^m to eight digits or so."""
    m = np.array([1, 5, 20])
    np.testing.assert_allclose(richness.distinct(np.array([200_000]), 10**6, m, 1), 1 - 0.8**m, rtol=2e-5)
    assert richness.distinct(np.array([3]), 10**6, 10**6, 1)[0] == 1


def test_chao2_by_hand():
    """q1 = 4, q2 = 2, k = 10: 0.9 x 16 / 4; without any pair 0.9 x 4 x 3 / 2; capped by what is left."""
    assert richness.unseen(np.array([1, 1, 1, 1, 2, 2, 5]), 10, 99) == pytest.approx(3.6)
    assert richness.unseen(np.array([1, 1, 1, 1, 5]), 10, 99) == pytest.approx(5.4)
    assert richness.unseen(np.array([1, 1, 1, 1, 5]), 10, 6) == 1
    assert richness.unseen(np.array([1, 1, 1, 1, 2, 2, 5]), 10, 99, false_once=2) == pytest.approx(0.9)
    assert richness.unseen(np.array([3, 3]), 10, 99) == 0 and richness.unseen_interval(np.array([3, 3]), 10, 99)[1] > 0


def test_unseen_interval_covers_where_all_targets_are_alike():
    """There Chao2 is no mere lower bound. 60 targets, 90 draws of which half hit one."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(300):
        hits = rng.multinomial(90, np.append(np.full(60, 0.5 / 60), 0.5))[:-1]
        low, high = richness.unseen_interval(hits, 90, 1000)
        covered += low <= (hits == 0).sum() <= high
    assert covered / 300 > 0.9


def test_the_assemblage_sees_as_many_as_the_truth_and_drawing_from_what_was_seen_does_not():
    """60 draws, of which 80 % hit one of 100 targets."""
    rng = np.random.default_rng(0)
    truth = 100 * (1 - (1 - 0.8 / 100) ** 60)
    better, naive = [], []
    for _ in range(100):
        hits = rng.multinomial(60, np.append(np.full(100, 0.8 / 100), 0.2))[:-1]
        chances = richness.assemblage(hits, 60, 1000)
        assert chances.sum() == pytest.approx(1) and 1 - chances[-1] == pytest.approx(hits.sum() / 60, rel=0.05)
        better.append((1 - (1 - chances[:-1]) ** 60).sum())
        naive.append((1 - (1 - hits / 60) ** 60).sum())
    assert np.mean(better) == pytest.approx(truth, rel=0.1) and np.mean(naive) < 0.75 * truth
    np.testing.assert_array_equal(richness.assemblage(np.zeros(3, int), 10, 3), [1.0])
