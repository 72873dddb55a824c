"""What the audit promises of itself, held against simulation that knows only scores: power, null rates, intervals."""

import numpy as np
import pytest
from scipy import stats

from detection import calibrate, controls, enrichment

pytestmark = pytest.mark.slow


def cohort(rng, patients, images, alike=0.7):
    """Scores of patients with one to `images` images each, standard normal for any one image."""
    count = rng.integers(1, images + 1, patients)
    who = np.repeat(np.arange(patients), count)
    return np.sqrt(alike) * rng.normal(size=patients)[who] + np.sqrt(1 - alike) * rng.normal(size=len(who)), who


def found(rng, rate, patients, k, fdr, recall, images, times=400):
    """How many audits flag a copy or see by the whole set that there are some, when the generator copies at `rate` and
    `recall` of copies outscore everyone."""
    lines, hit = enrichment.ranks(patients, fdr), 0
    for _ in range(times):
        null, who = cohort(rng, patients, images)
        copy = rng.random(k) < rate
        scores = np.where(copy & (rng.random(k) < recall), 10.0, rng.normal(size=k))
        p_K = calibrate.conformal_p(scores, null, who)
        counts = [enrichment.above(p_K, j, patients) for j in lines]
        seen = enrichment.set_test(counts, lines, k, patients)[1] > 0
        hit += seen or (calibrate.benjamini_hochberg(p_K, fdr) & copy).any()
    return hit


@pytest.mark.parametrize(
    "patients, k, fdr, recall, images",
    [(50, 50, 0.1, 1.0, 1), (160, 128, 0.05, 0.9, 5), (60, 200, 0.1, 0.5, 4), (1000, 1000, 0.05, 0.8, 1)],
)
def test_copies_at_the_detectable_rate_are_found_with_the_promised_probability(patients, k, fdr, recall, images):
    """At least 80 %; at a third of that rate seldom, at any of three rates at least `power_at`. Innocent images that come to
    lie above the lines help, and the promise leaves them out."""
    rng = np.random.default_rng(0)
    lows = dict.fromkeys(enrichment.ranks(patients, fdr), recall)
    ways = [(calibrate.fewest_flaggable(patients, k, fdr), recall), *enrichment.ways_of_seeing(k, patients, lows)]
    rate = calibrate.detectable_rate(k, ways)
    for factor in (0.8, 0.9, 1.0):
        promised = calibrate.power_at(factor * rate, k, ways)
        hits = found(rng, factor * rate, patients, k, fdr, recall, images)
        assert stats.binom.cdf(hits, 400, promised) > 1e-3
    assert promised == pytest.approx(0.8)
    assert found(rng, rate / 3, patients, k, fdr, recall, images) / 400 < 0.4
    assert rate <= calibrate.detectable_rate(k, ways[:1]), "what is seen together is seen sooner than what is named"


@pytest.mark.parametrize("patients, k, images", [(100, 200, 1), (100, 200, 5)])
def test_as_many_copies_as_the_smallest_flaggable_rate_are_flagged_and_one_fewer_seldom(patients, k, images):
    rng, fdr = np.random.default_rng(1), 0.05
    r = calibrate.fewest_flaggable(patients, k, fdr)
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
def test_flagged_share_interval_covers_the_mean_flagged_share(images):
    """Over synthetic images and validation patients: 20 % copies, some of them hard to see. It is no bound of the 20 %."""
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


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.05, 0.2])
@pytest.mark.parametrize(
    "patients, k, images, seen_at", [(60, 64, 1, 5.0), (160, 128, 1, 5.0), (160, 128, 5, 3.0), (600, 400, 3, 3.0)]
)
def test_bounds_cover_the_true_copy_rate(patients, k, images, seen_at, rate):
    """What is bounded is what was copied, seen or not: copies score about `seen_at` where innocent images score about 0. 64
    planted copies of each of three kinds stand for them, and tell at every line how many are seen."""
    rng, times = np.random.default_rng([patients, images, int(100 * rate)]), 100
    missed = np.zeros(3, int)
    for seed in range(times):
        null, who = cohort(rng, patients, images)
        copy = rng.random(k) < rate
        draw = lambda size: seen_at + rng.integers(-1, 2, size) * 0.5 + rng.normal(size=size)
        scores = np.where(copy, draw(k), rng.normal(size=k))
        kinds = [controls.Planted(str(kind), 0.0, True, draw(64), np.arange(64)) for kind in range(3)]
        lows = {}
        for j in enrichment.ranks(patients, 0.05):
            score = calibrate.score_at(null, who, j / (patients + 1))
            lows[j] = controls.overall(kinds, score, np.arange(64), np.arange(64), seed)["recall_ci"][0]
        said = enrichment.bounds(calibrate.conformal_p(scores, null, who), patients, lows)
        wrong = said["at_least"] > copy.sum(), said["at_most_rate"] < rate, said["at_most_rate"] < copy.mean()
        missed += np.array(wrong)
    assert (stats.binom.sf(missed - 1, times, 0.05) > 1e-3).all(), missed


@pytest.mark.parametrize(
    "images, alike", [("one", 0.0), ("1 to 6", 0.5), ("1 to 6", 0.99), ("heavy", 0.5), ("heavy", 0.99)]
)
@pytest.mark.parametrize("patients, k", [(20, 50), (160, 128), (160, 1000)])
def test_the_set_level_test_keeps_its_level(patients, k, images, alike):
    """An innocent generator, and patients with one image, one to six, or a heavy-tailed number of up to 200."""
    rng, lines, times = np.random.default_rng(5), enrichment.ranks(patients, 0.05), 300
    hits = np.zeros(3, int)
    for _ in range(times):
        count = {
            "one": np.ones(patients, int),
            "1 to 6": rng.integers(1, 7, patients),
            "heavy": np.minimum(rng.zipf(1.6, patients), 200),
        }[images]
        who = np.repeat(np.arange(patients), count)
        null = np.sqrt(alike) * rng.normal(size=patients)[who] + np.sqrt(1 - alike) * rng.normal(size=len(who))
        p_K = calibrate.conformal_p(rng.normal(size=k), null, who)
        counts = [enrichment.above(p_K, j, patients) for j in lines]
        p_value, at_least = enrichment.set_test(counts, lines, k, patients)
        named = calibrate.benjamini_hochberg(p_K, 0.05).any()
        assert (at_least > 0) == (p_value <= enrichment.ALPHA)
        hits += np.array([p_value <= 0.05, p_value <= 0.01, at_least > 0 or named])
    assert (stats.binom.sf(hits - 1, times, [0.05, 0.01, 0.05]) > 1e-3).all(), hits
