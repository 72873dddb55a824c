"""ROC area and recall: brute force over pairs, the textbook's variance, coverage by patient."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from detection import roc

rows = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), min_size=1, max_size=20)


def cohort(rng, patients, mean, images=1, alike=0.7):
    """Scores with the same distribution for one image of a patient, however many images a patient has."""
    count = rng.integers(1, images + 1, patients)
    who = np.repeat(np.arange(patients), count)
    noise = np.sqrt(alike) * rng.normal(size=patients)[who] + np.sqrt(1 - alike) * rng.normal(size=len(who))
    return mean + noise, who


@given(rows, rows)
@settings(max_examples=50, deadline=None)
def test_area_is_the_mean_over_pairs_of_patients(high, low):
    patients_P, high_P = (np.array(column) for column in zip(*high, strict=True))
    patients_Q, low_Q = (np.array(column) for column in zip(*low, strict=True))
    wins_PxQ = (high_P[:, None] > low_Q) + 0.5 * (high_P[:, None] == low_Q)
    pairs = [
        wins_PxQ[np.ix_(patients_P == p, patients_Q == q)].mean() for p in set(patients_P) for q in set(patients_Q)
    ]
    area, (least, most) = roc.area(high_P, patients_P, low_Q, patients_Q)
    assert area == pytest.approx(np.mean(pairs)) and 0 <= least <= area + 1e-12 and area - 1e-12 <= most <= 1
    mirrored, (least_too, most_too) = roc.area(low_Q, patients_Q, high_P, patients_P)
    assert (mirrored, least_too, most_too) == pytest.approx((1 - area, 1 - most, 1 - least), abs=1e-6)


def test_interval_with_one_image_a_patient_is_delongs():
    """Its variance is that of the Mann-Whitney statistic's two projections; hand-made here, pair by pair."""
    rng = np.random.default_rng(0)
    high, low = rng.normal(0.4, 1, 300), rng.normal(size=80)
    wins_PxQ = high[:, None] > low
    area = wins_PxQ.mean()
    error = np.sqrt(wins_PxQ.mean(1).var(ddof=1) / 300 + wins_PxQ.mean(0).var(ddof=1) / 80)
    odds = np.log(area / (1 - area)) + np.array([-1, 1]) * 1.959964 * error / (area * (1 - area))
    _, interval = roc.area(high, np.arange(300), low, np.arange(80))
    expected = 1 / (1 + np.exp(-odds))
    assert interval[0] <= expected[0] + 1e-9 and interval[1] >= expected[1] - 1e-9
    np.testing.assert_allclose(interval, expected, atol=0.01)


def test_perfect_separation_still_has_an_interval():
    area, (low, high) = roc.area(np.arange(20.0) + 100, np.arange(20), np.arange(20.0), np.arange(20))
    assert area == 1 and high == 1 and 0.7 < low < 0.95


@pytest.mark.parametrize("patients, images, mean", [((30, 30), 1, 1.0), ((200, 60), 1, 0.0), ((60, 60), 8, 0.5)])
def test_area_interval_covers_the_truth(patients, images, mean):
    rng, covered = np.random.default_rng(1), 0
    truth = stats.norm.cdf(mean / np.sqrt(2))
    for _ in range(300):
        _, (low, high) = roc.area(*cohort(rng, patients[0], mean, images), *cohort(rng, patients[1], 0, images))
        covered += low <= truth <= high
    assert stats.binom.cdf(covered, 300, 0.95) > 1e-3


@given(rows, rows, st.sampled_from([0.01, 0.2, 0.5]))
@settings(max_examples=50, deadline=None)
def test_recall_is_taken_at_the_lowest_threshold_that_keeps_to_the_rate(high, low, fpr):
    patients_P, high_P = (np.array(column, float) for column in zip(*high, strict=True))
    patients_Q, low_Q = (np.array(column, float) for column in zip(*low, strict=True))
    share = lambda scores, patients, t: np.mean([(scores[patients == p] >= t).mean() for p in set(patients)])
    allowed = [t for t in np.arange(0, 11) if share(low_Q, patients_Q, t) <= fpr + 1e-9]
    recall, _ = roc.recall_at(fpr, high_P, patients_P, low_Q, patients_Q, seed=0)
    assert recall == pytest.approx(share(high_P, patients_P, min(allowed)))
    rate, (_, most) = roc.false_rate(fpr, low_Q, patients_Q)
    assert rate == pytest.approx(share(low_Q, patients_Q, min(allowed))) and most > 0


@pytest.mark.slow
def test_recall_interval_covers_the_truth():
    rng, covered = np.random.default_rng(2), 0
    truth = stats.norm.sf(stats.norm.ppf(0.95) - 2)
    for seed in range(100):
        _, (low, high) = roc.recall_at(0.05, *cohort(rng, 150, 2.0, 3), *cohort(rng, 150, 0.0, 3), seed=seed)
        covered += low <= truth <= high
    assert covered >= 88


def test_summary_says_what_few_unseen_patients_cannot():
    said = roc.summary(np.arange(5.0) + 9, np.arange(5), np.arange(5.0), np.arange(5), seed=0)
    assert said["auc"] == 1 and said["recall_at_fpr_01"] == 1 and said["recall_at_fpr_01_ci"][0] < 0.5
    assert said["fpr_01_ci"][1] > 0.5
