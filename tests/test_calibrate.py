"""The statistics: closed forms, independent references, and simulated nulls."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from detection import calibrate, neighbours


def embeddings(rng, n, dim=32, exponent=1.0):
    """Gaussian embeddings with a power-law spectrum."""
    return neighbours.standardise(rng.standard_normal((n, dim)) * np.arange(1, dim + 1) ** (-exponent / 2))


def best(a, b):
    return neighbours.nearest(a, b).sim[:, 0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.lists(st.floats(0, 1), min_size=1, max_size=30))
@settings(max_examples=50, deadline=None)
def test_conformal_p_with_one_image_a_patient_is_the_usual_one(scores, null):
    scores, null = np.array(scores), np.array(null)
    ours = calibrate.conformal_p(scores, null, np.arange(len(null)))
    expected = [(1 + (null >= s).sum()) / (1 + len(null)) for s in scores]
    np.testing.assert_allclose(ours, expected, atol=1e-12)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), min_size=1, max_size=40), st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_conformal_p_by_patient_is_its_definition(rows, score):
    patients, null = (np.array(column) for column in zip(*rows, strict=True))
    shares = [(null[patients == p] >= score).mean() for p in set(patients)]
    ours = calibrate.conformal_p(np.array([score]), null, patients)[0]
    assert ours == pytest.approx((1 + sum(shares)) / (1 + len(shares)))


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=40), st.sampled_from([0.05, 0.1, 0.3]))
@settings(max_examples=50, deadline=None)
def test_benjamini_hochberg_is_its_definition(p, fdr):
    p = np.array(p)
    ranked = np.sort(p)
    fits = np.flatnonzero(ranked <= fdr * np.arange(1, len(p) + 1) / len(p) * (1 + 1e-12))
    expected = p <= ranked[fits[-1]] if len(fits) else np.zeros(len(p), bool)
    flagged = calibrate.benjamini_hochberg(p, fdr)
    assert (flagged == expected).all() or abs(ranked[fits[-1]] - fdr * (fits[-1] + 1) / len(p)) < 1e-9


def test_clopper_pearson_closed_forms():
    low, high = calibrate.clopper_pearson(0, 20)
    assert low == 0 and high == pytest.approx(1 - 0.025 ** (1 / 20))
    assert calibrate.beta_interval(3 / 20, 20) == pytest.approx(calibrate.clopper_pearson(3, 20))
    assert calibrate.beta_interval(1.0, 20)[1] == 1


def test_syn_equal_to_train_is_all_copies():
    rng = np.random.default_rng(0)
    train, val = embeddings(rng, 100), embeddings(rng, 80)
    test = calibrate.calibrated_test(best(train, train), best(val, train), np.arange(80), fdr=0.05, seed=0)
    assert test.rate == 1 and test.rate_ci[1] == 1 and test.rate_ci[0] > 0.95
    rule = calibrate.paper_rule(best(train, val), best(train, train), best(train, train))
    assert rule.mem_N.all() and rule.copies_K.all()


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("images", [1, 4])
def test_unseen_patients_are_flagged_at_the_nominal_rate(exponent, images):
    """p <= alpha for a share of at most alpha of unseen images, within its binomial interval over patients."""
    rng = np.random.default_rng(int(10 * exponent) + images)
    alpha, flags, any_flagged = 0.05, [], []
    for _ in range(60):
        train = embeddings(rng, 120, exponent=exponent)

        def cohort(patients):
            one = embeddings(rng, patients, exponent=exponent).repeat(images, 0)
            return neighbours.standardise(one + 0.1 * embeddings(rng, patients * images, exponent=exponent))

        val, syn = cohort(60), cohort(30)
        p = calibrate.conformal_p(best(syn, train), best(val, train), np.arange(60).repeat(images))
        flags.append((p <= alpha)[::images])
        any_flagged.append(calibrate.benjamini_hochberg(p, alpha).any())
    flags = np.concatenate(flags)
    # the 60 draws share train and val within a draw, so allow for the variance between draws as well
    assert stats.binom.sf(flags.sum() - 1, len(flags), alpha * 1.5) > 1e-3
    assert stats.binom.sf(sum(any_flagged) - 1, 60, alpha * 2) > 1e-3


def test_planted_copies_are_found_at_the_promised_false_discovery_rate():
    rng = np.random.default_rng(1)
    false, found = [], []
    for _ in range(30):
        train, val = embeddings(rng, 200), embeddings(rng, 200)
        copies = neighbours.standardise(train[:40] + 0.02 * embeddings(rng, 40))
        syn = np.concatenate([copies, embeddings(rng, 160)])
        test = calibrate.calibrated_test(best(syn, train), best(val, train), np.arange(200), fdr=0.1, seed=0)
        false.append(test.flagged_K[40:].sum() / max(test.flagged_K.sum(), 1))
        found.append(test.flagged_K[:40].mean())
    assert np.mean(found) > 0.95
    assert np.mean(false) <= 0.1 + 2 * np.std(false) / 30**0.5


def test_null_floor_of_the_papers_rule_is_what_a_perfect_generator_gets():
    """904 / 226 / 904 in 32 dimensions, spectrum exponent 1: about 13 % accused, though nothing is memorized."""
    rng = np.random.default_rng(2)
    truth, floor = [], []
    for _ in range(6):
        train, val, syn, control = (embeddings(rng, n) for n in (904, 226, 904, 904))
        rule = calibrate.paper_rule(best(train, val), best(train, syn), best(syn, train))
        truth.append((rule.mem_N.mean(), rule.copies_K.mean()))
        above = neighbours.count_above(train, control, rule.threshold)
        null = calibrate.null_floor(rule.threshold, best(control, train), np.arange(904), above, 904, seed=0)
        assert not null.extrapolated
        floor.append((null.mem_rate, null.copy_rate))
    truth, floor = np.mean(truth, 0), np.mean(floor, 0)
    assert (truth > 0.09).all() and (truth < 0.2).all()
    np.testing.assert_allclose(floor, truth, atol=0.02)


def test_null_mem_rate_is_the_mean_over_all_subsets():
    import itertools

    above_NxC = np.random.default_rng(0).random((5, 7)) < 0.3
    for k in (1, 3, 7):
        exact = np.mean([above_NxC[:, list(s)].any(1).mean() for s in itertools.combinations(range(7), k)])
        null = calibrate.null_floor(0.5, np.zeros(7), np.arange(7), above_NxC.sum(1), k, seed=0)
        assert null.mem_rate == pytest.approx(exact)


def test_null_mem_rate_beyond_the_control_set_is_extrapolated_without_much_bias():
    """904 synthetic images against 226 control images: the naive 1 - (1 - a / C)^k says less than half of the truth."""
    rng = np.random.default_rng(3)
    truth, floor, naive = [], [], []
    for _ in range(4):
        train, val, syn, control = (embeddings(rng, n) for n in (904, 226, 904, 226))
        tau = calibrate.paper_rule(best(train, val), best(train, syn), best(syn, train)).threshold
        above = neighbours.count_above(train, control, tau)
        null = calibrate.null_floor(tau, best(control, train), np.arange(226), above, 904, seed=0)
        assert null.extrapolated
        truth.append((best(train, syn) > tau).mean())
        floor.append(null.mem_rate)
        naive.append((1 - (1 - above / 226) ** 904).mean())
    assert np.mean(naive) < 0.6 * np.mean(truth)
    assert np.mean(floor) == pytest.approx(np.mean(truth), abs=0.03)


def test_rate_interval_widens_where_patients_repeat():
    flags = np.tile([True, False, False, False], 25)
    alone = calibrate.rate_interval(flags, np.arange(100), seed=0)
    together = calibrate.rate_interval(np.sort(flags), np.arange(100) // 25, seed=0)
    assert together[1] - together[0] > 2 * (alone[1] - alone[0])
    assert alone[0] < 0.25 < alone[1]


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([0.05, 0.1]))
@settings(max_examples=50, deadline=None)
def test_fewest_flaggable_is_the_edge(patients, k, fdr):
    r = calibrate.fewest_flaggable(patients, k, fdr)

    def flagged(r):
        p = np.ones(k)
        p[:r] = 1 / (1 + patients)
        return calibrate.benjamini_hochberg(p, fdr * (1 + 1e-9)).any()

    if r > k:
        assert not flagged(k)
    else:
        assert flagged(r) and (r == 1 or not flagged(r - 1))


@given(st.integers(1, 400), st.integers(1, 200), st.sampled_from([0.05, 0.2]), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_needed_score_is_the_lowest_that_the_fewest_images_need(patients, k, fdr, seed):
    rng = np.random.default_rng(seed)
    null = np.round(rng.normal(size=2 * patients), 2)
    owner = np.arange(2 * patients) % patients
    needed = calibrate.needed_score(null, owner, k, fdr)
    fewest = calibrate.fewest_flaggable(patients, k, fdr)
    if needed is None:
        assert fewest > k
        return
    scores = np.full(k, -9.0)
    flag = lambda s: calibrate.benjamini_hochberg(
        calibrate.conformal_p(np.concatenate([np.full(fewest, s), scores])[:k], null, owner), fdr
    )
    assert flag(needed).any() and not flag(np.nextafter(needed, -9)).any()


@given(st.integers(1, 300), st.lists(st.tuples(st.integers(1, 40), st.floats(0, 1)), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_detectable_rate_is_detected_with_the_power_it_says(k, ways):
    """By one of the ways; at the rate 1 not, if there is none."""
    rate = calibrate.detectable_rate(k, ways)
    reached = max(stats.binom.sf(fewest - 1, k, min(rate, 1) * recall) for fewest, recall in ways)
    assert calibrate.power_at(min(rate, 1), k, ways) == pytest.approx(reached)
    assert reached == pytest.approx(0.8) if rate <= 1 else reached < 0.8


@given(st.integers(1, 60), st.integers(1, 60), st.data())
@settings(max_examples=100, deadline=None)
def test_excess_is_beta_binomial(n, n_null, data):
    j = data.draw(st.integers(1, n_null))
    count = data.draw(st.integers(0, n + 1))
    exact = stats.betabinom.pmf(np.arange(count, n + 1), n, j, n_null + 1 - j).sum()
    assert calibrate.excess_p(count, n, j, n_null) == pytest.approx(exact, rel=1e-9, abs=1e-300)


def test_exact_ties_are_flagged():
    p = np.full(3, (1 + 1 / 3 + 1 / 3 + 1 / 3) / 40)
    assert calibrate.benjamini_hochberg(p, 0.05).all() and calibrate.benjamini_hochberg(np.nextafter(p, 1), 0.05).all()


def test_negative_control_allows_for_the_chance_of_a_small_null_set():
    """30 validation patients, so p <= 0.05 means above them all: fair controls are suspected no more than promised."""
    suspected = interval = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        null, control = rng.normal(size=30), rng.normal(size=200)
        fair = calibrate.negative_control(control, np.arange(200), null, np.arange(30), nominal=0.05, seed=seed)
        suspected += fair["excess_p_value"] <= 0.05
        interval += fair["flag_rate_ci"][0] > 0.05
    assert stats.binom.sf(suspected - 1, 100, 0.05) > 1e-3 and suspected > 0
    assert interval < 15


def test_negative_control_flags_a_leak():
    rng = np.random.default_rng(0)
    null = rng.normal(size=200)
    fair = calibrate.negative_control(rng.normal(size=200), np.arange(200), null, np.arange(200), nominal=0.05, seed=0)
    leak = calibrate.negative_control(rng.normal(2, 1, 200), np.arange(200), null, np.arange(200), nominal=0.05, seed=0)
    assert fair["flag_rate_ci"][0] <= 0.05 and leak["flag_rate_ci"][0] > 0.05
    assert fair["excess_p_value"] > 0.05 and leak["excess_p_value"] < 1e-3


@pytest.mark.parametrize("images", [1, 3, 7])
def test_rounded_weights_hide_no_leak(images):
    """19 unseen patients: an image above all of them has p = 1 / 20, the nominal level, whatever the sum of weights is."""
    who = np.repeat(np.arange(19), images)
    null = np.random.default_rng(0).normal(size=len(who))
    control = calibrate.negative_control(np.full(40, 9.0), np.arange(40), null, who, nominal=0.05, seed=0)
    assert control["flag_rate"] == 1 and control["excess_p_value"] == control["smallest_excess_p_value"] < 1


def test_flagged_shares_of_parts_are_as_sure_as_their_draws():
    null, who = np.linspace(0, 1, 400), np.arange(400)
    scores = np.repeat([2.0, 0.2], [100, 100])
    sure = calibrate.calibrated_test(scores, null, who, fdr=0.1, seed=0)
    parts = calibrate.calibrated_test(scores, null, who, fdr=0.1, seed=0, draws_K=np.arange(200) // 20)
    one = calibrate.calibrated_test(scores[::20], null, who, fdr=0.1, seed=0)
    assert sure.rate == parts.rate == one.rate == 0.5 and np.array_equal(sure.flagged_K, parts.flagged_K)
    assert sure.rate_ci[0] > 0.4 > 0.2 > parts.rate_ci[0] and parts.rate_ci == pytest.approx(one.rate_ci, abs=0.03)


def test_broken_scores_are_told():
    with pytest.raises(ValueError, match="not finite"):
        calibrate.conformal_p(np.array([np.nan]), np.array([0.0]), np.array([0]))
    with pytest.raises(ValueError, match=r"config\.audit\.fdr=0"):
        calibrate.benjamini_hochberg(np.array([0.5]), 0)
