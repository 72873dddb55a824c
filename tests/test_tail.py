"""The extrapolated tail: exact where the tail is what it is taken for, safe on embeddings, refused or blind where said."""

import numpy as np
import pytest
from scipy import stats

from detection import calibrate, neighbours, tail


def power_law(rng, n, exponent=8.0):
    """Similarities with P(S > s) = (1 - s)^exponent: nearest neighbours in 16 dimensions, and every tail of theirs."""
    return 1 - np.exp(-rng.standard_exponential(n) / exponent)


def embeddings(rng, n, dim, spectrum):
    return neighbours.standardise(rng.standard_normal((n, dim)) * np.arange(1, dim + 1) ** (-spectrum / 2))


def score_of(p, fitted):
    """The similarity whose extrapolated p-value is p."""
    excess = fitted.total * ((p / fitted.share) ** (-1 / fitted.patients) - 1)
    return 1 - (1 - fitted.threshold) * np.exp(-excess)


def test_p_values_are_exact_far_below_what_the_patients_can_show():
    """60 patients: the exact p-value ends at 1 / 61. P(p <= a) is a, for a to 1 / 6100, averaged over null sets."""
    rng, true = np.random.default_rng(0), []
    levels = np.array([1e-2, 1e-3, 1 / 6100])
    for seed in range(2000):
        fitted = tail.fit(power_law(rng, 60), np.arange(60), seed=seed)
        true.append((1 - score_of(levels, fitted)) ** 8.0)
    error = np.std(true, 0) / 2000**0.5
    assert (np.abs(np.mean(true, 0) - levels) < 4 * error).all() and (error < 0.1 * levels).all()
    null = power_law(rng, 60)
    fitted = tail.fit(null, np.arange(60), seed=0)
    np.testing.assert_allclose(tail.p_values(fitted, score_of(levels, fitted), null, np.arange(60))[0], levels)


def test_p_values_join_the_conformal_ones_and_fall():
    rng = np.random.default_rng(1)
    null = power_law(rng, 100)
    fitted = tail.fit(null, np.arange(100), seed=0)
    scores = np.linspace(0, 0.9999, 400)
    p, high = tail.p_values(fitted, scores, null, np.arange(100))
    assert (np.diff(p) <= 1e-12).all() and (high >= p).all()
    below = scores <= fitted.threshold
    np.testing.assert_array_equal(p[below], calibrate.conformal_p(scores[below], null, np.arange(100)))
    just_above = tail.p_values(fitted, np.array([fitted.threshold + 1e-9]), null, np.arange(100))[0][0]
    assert just_above == pytest.approx(
        calibrate.conformal_p(np.array([fitted.threshold + 1e-9]), null, np.arange(100))[0]
    )


def test_repeated_images_of_a_patient_add_nothing():
    null = power_law(np.random.default_rng(2), 100)
    alone, repeated = (tail.fit(null.repeat(r), np.arange(100).repeat(r), seed=0) for r in (1, 4))
    for field in ("threshold", "share", "patients", "total", "n_patients"):
        assert getattr(repeated, field) == pytest.approx(getattr(alone, field))


def test_upper_limits_cover_the_true_tail():
    rng, covered = np.random.default_rng(3), 0
    score = np.array([1 - 1e-4 ** (1 / 8)])  # true p-value 1e-4
    for seed in range(500):
        null = power_law(rng, 80)
        _, high = tail.p_values(tail.fit(null, np.arange(80), seed=seed), score, null, np.arange(80))
        covered += high[0] >= 1e-4
    assert stats.binom.cdf(covered, 500, 0.95) > 1e-3


@pytest.mark.parametrize("dim, spectrum, images", [(16, 0.0, 1), (16, 2.0, 1), (64, 1.0, 1), (64, 1.0, 4)])
def test_unseen_patients_are_not_flagged_on_embeddings(dim, spectrum, images):
    """The tail of Gaussian embeddings is lighter than the power law, as it is at any distance that is not tiny."""
    rng, flagged, refused = np.random.default_rng(4), 0, 0
    for seed in range(60):
        train = embeddings(rng, 500, dim, spectrum)

        def scores(patients, train=train):
            one = embeddings(rng, patients, dim, spectrum).repeat(images, 0)
            moved = neighbours.standardise(one + (images > 1) * 0.3 * embeddings(rng, len(one), dim, spectrum))
            return neighbours.nearest(moved, train).sim[:, 0]

        said, flags = tail.extrapolated_test(scores(60), scores(60), np.arange(60).repeat(images), fdr=0.1, seed=seed)
        flagged, refused = flagged + flags.any(), refused + (said["refused"] is not None)
    assert stats.binom.sf(flagged - 1, 60, 0.1) > 1e-3 and refused < 20


def test_few_copies_are_found_that_the_exact_test_cannot_see():
    """2 copies among 100 images and 60 unseen patients: the exact test needs 33."""
    rng, found, exact = np.random.default_rng(5), [], 0
    for seed in range(20):
        train = embeddings(rng, 500, 64, 1.0)
        copies = neighbours.standardise(train[:2] + 0.05 * embeddings(rng, 2, 64, 0.0))
        syn = np.concatenate([copies, embeddings(rng, 98, 64, 1.0)])
        scores, null = (neighbours.nearest(x, train).sim[:, 0] for x in (syn, embeddings(rng, 60, 64, 1.0)))
        said, flags = tail.extrapolated_test(scores, null, np.arange(60), fdr=0.05, seed=seed)
        assert said["method"].startswith("EXTRAPOLATION")
        exact += calibrate.calibrated_test(scores, null, np.arange(60), fdr=0.05, seed=0).flagged_K.any()
        found.append(flags[:2].mean())
    assert exact == 0 and np.mean(found) > 0.8


def test_unseen_patients_that_are_near_copies_are_noticed():
    """5 of 100 unseen patients have a twin in the training set: refused, not extrapolated from the other 95."""
    refused = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        null = np.concatenate([power_law(rng, 95), 1 - rng.uniform(1e-3, 1e-2, 5)])
        refused += tail.fit(null, np.arange(100), seed=seed).refused is not None
    assert refused >= 36
    clean = sum(
        tail.fit(power_law(np.random.default_rng(s), 100), np.arange(100), seed=s).refused is not None
        for s in range(200)
    )
    assert stats.binom.sf(clean - 1, 200, tail.REFUSED_AT) > 1e-3


def test_a_kind_of_patient_that_the_null_lacks_is_not_seen_by_any_tail():
    """The limit that the module names: twins among the synthetic images' patients and none in the null."""
    rng = np.random.default_rng(6)
    twins = np.concatenate([power_law(rng, 98), [0.999, 0.998]])
    assert tail.extrapolated_test(twins, power_law(rng, 100), np.arange(100), fdr=0.05, seed=0)[1][-2:].all()


@pytest.mark.parametrize(
    "null, why",
    [
        (np.linspace(0.1, 0.9, 20), "20 unseen patients; 30 are needed"),
        (np.append(np.linspace(0.1, 0.9, 60), 1.0), "equals a training image"),
        (np.append(np.linspace(0.1, 0.5, 30), np.full(30, 0.9)), "tied"),
    ],
)
def test_what_cannot_be_fitted_is_refused_with_the_reason(null, why):
    said, flags = tail.extrapolated_test(np.array([0.99]), null, np.arange(len(null)), fdr=0.05, seed=0)
    assert why in said["refused"] and not flags.any() and "smallest_p_value" not in said
