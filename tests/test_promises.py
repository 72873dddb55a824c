"""What the audit promises of itself, held against simulation that knows only scores: power, null rates, intervals."""

import numpy as np
import pytest
from scipy import stats

from detection import calibrate

pytestmark = pytest.mark.slow


def cohort(rng, patients, images, alike=0.7):
    """Scores of patients with one to `images` images each, standard normal for any one image."""
    count = rng.integers(1, images + 1, patients)
    who = np.repeat(np.arange(patients), count)
    return np.sqrt(alike) * rng.normal(size=patients)[who] + np.sqrt(1 - alike) * rng.normal(size=len(who)), who


def found(rng, rate, patients, k, fdr, recall, images, times=600):
    """Share of audits that flag a copy, when the generator copies at `rate` and `recall` of copies outscore everyone."""
    hit = 0
    for _ in range(times):
        null, who = cohort(rng, patients, images)
        copy = rng.random(k) < rate
        scores = np.where(copy & (rng.random(k) < recall), 10.0, rng.normal(size=k))
        flagged = calibrate.benjamini_hochberg(calibrate.conformal_p(scores, null, who), fdr)
        hit += (flagged & copy).any()
    return hit


@pytest.mark.parametrize(
    "patients, k, fdr, recall, images",
    [(50, 50, 0.1, 1.0, 1), (160, 128, 0.05, 0.9, 5), (60, 200, 0.1, 0.5, 4), (1000, 1000, 0.05, 0.8, 1)],
)
def test_copies_at_the_detectable_rate_are_found_with_the_promised_probability(patients, k, fdr, recall, images):
    """At least 80 %, and not far more; at half that rate hardly ever, at any of three rates at least `power_at`."""
    rng = np.random.default_rng(0)
    rate = calibrate.detectable_rate(patients, k, fdr, recall)
    hits = found(rng, rate, patients, k, fdr, recall, images)
    assert stats.binom.cdf(hits, 600, 0.8) > 1e-3 and hits / 600 < 0.95
    assert found(rng, rate / 2, patients, k, fdr, recall, images) / 600 < 0.25
    for factor in (0.8, 0.9):
        promised = calibrate.power_at(factor * rate, patients, k, fdr, recall)
        assert stats.binom.cdf(found(rng, factor * rate, patients, k, fdr, recall, images), 600, promised) > 1e-3


@pytest.mark.parametrize("patients, k, images", [(100, 200, 1), (100, 200, 5)])
def test_as_many_copies_as_the_smallest_flaggable_rate_are_flagged_and_one_fewer_seldom(patients, k, images):
    rng, fdr = np.random.default_rng(1), 0.05
    r = round(calibrate.smallest_flaggable_rate(patients, k, fdr) * k)
    share = {}
    for copies in (r, r - 1):
        flagged = []
        for _ in range(300):
            null, who = cohort(rng, patients, images)
            scores = np.where(np.arange(k) < copies, 10.0, rng.normal(size=k))
            flagged.append(calibrate.benjamini_hochberg(calibrate.conformal_p(scores, null, who), fdr).any())
        share[copies] = np.mean(flagged)
    assert share[r] == 1 and share[r - 1] < 0.9
    p = np.where(np.arange(k) < r - 1, 1 / (1 + patients), 1.0)
    assert not calibrate.benjamini_hochberg(p, fdr).any(), "with no help from others' p-values, none"


@pytest.mark.parametrize(
    "controls, patients, images, alike", [((20, 10), 200, 1, 0.99), ((40, 6), 60, 6, 0.9), ((120, 1), 160, 1, 0.7)]
)
def test_fair_controls_are_suspected_no_more_than_promised(controls, patients, images, alike):
    """Patients of the control with one to ten images, nearly alike."""
    rng, small = np.random.default_rng(2), np.zeros(2)
    for _ in range(1500):
        (null, who), (scores, owner) = cohort(rng, patients, images, alike), cohort(rng, *controls, alike)
        rate = (calibrate.conformal_p(scores, null, who) <= 0.05).mean()
        n, j = calibrate.effective_number(owner), int(0.05 * (patients + 1) + 1e-9)
        small += calibrate.excess_p(rate * n, n, j, patients) <= np.array([0.05, 0.01])
    assert (stats.binom.sf(small - 1, 1500, [0.05, 0.01]) > 1e-3).all() and small[0] > 0


def test_control_interval_covers_the_nominal_rate():
    rng, covered = np.random.default_rng(3), 0
    for seed in range(60):
        (null, who), (scores, owner) = cohort(rng, 100, 4), cohort(rng, 60, 4)
        said = calibrate.negative_control(scores, owner, null, who, nominal=0.1, seed=seed)
        covered += said["flag_rate_ci"][0] <= 0.1 <= said["flag_rate_ci"][1]
    assert stats.binom.cdf(covered, 60, 0.95) > 1e-3


@pytest.mark.parametrize("images", [1, 5])
def test_copy_rate_interval_covers_the_mean_flagged_share(images):
    """Over synthetic images and validation patients: 20 % copies, some of them hard to see."""
    rng, rates, intervals = np.random.default_rng(4), [], []
    for seed in range(50):
        null, who = cohort(rng, 150, images)
        scores = np.where(rng.random(200) < 0.2, rng.normal(3.5, 1, 200), rng.normal(size=200))
        test = calibrate.calibrated_test(scores, null, who, fdr=0.1, seed=seed)
        rates.append(test.rate)
        intervals.append(test.rate_ci)
    low, high = np.array(intervals).T
    covered = ((low <= np.mean(rates)) & (np.mean(rates) <= high)).sum()
    assert stats.binom.cdf(covered, 50, 0.95) > 1e-3
