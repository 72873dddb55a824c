"""Extraction curves: against brute force, against repeated sampling of a known generator, and at their ends."""

import json

import numpy as np
import pytest

from detection import calibrate, extraction, richness


def generator(rng, n=300, k=400, rate=0.4):
    """Nearest training image and score of k samples: copies, unevenly often of each image, and others."""
    weight = np.random.default_rng(0).gamma(1, 1, n)
    copies = rng.random(k) < rate
    index = np.where(copies, rng.choice(n, k, p=weight / weight.sum()), rng.integers(0, n, k))
    return index, rng.normal(np.where(copies, 5, 0), 1), copies


def test_the_curve_is_what_repeated_sampling_gives():
    """Expected numbers, before and beyond the 400 drawn, and the coverage of their intervals."""
    rng, patients = np.random.default_rng(1), np.arange(300) // 2
    found, covered = [], []
    larger = [generator(rng, k=800) for _ in range(100)]
    distinct = lambda i, c, of, m: len(np.unique(of[i[:m][c[:m]]]))
    truth = {m: np.mean([distinct(i, c, patients, m) for i, _, c in larger]) for m in (100, 400, 800)}
    for seed in range(30):
        index, _, copies = generator(rng)
        curve = extraction.extraction(index, copies, patients, fdr=0.05, seed=seed)
        at = [curve["draws"].index(m) for m in truth]
        assert curve["patients"][at[1]] == distinct(index, copies, patients, 400)
        assert curve["images"][at[1]] == len(np.unique(index[copies]))
        found.append([curve["patients"][i] for i in at])
        covered.append(
            [
                low <= t <= high
                for t, (low, high) in zip(truth.values(), np.array(curve["patients_ci"])[at], strict=True)
            ]
        )
    np.testing.assert_allclose(np.mean(found, 0), list(truth.values()), rtol=0.04)
    assert (np.mean(covered, 0) > 0.8).all()
    assert curve["extrapolated"] == [m > 400 for m in curve["draws"]] and max(curve["draws"]) == 800
    json.dumps(curve, allow_nan=False)


def test_few_hits_have_wide_intervals_and_none_a_bound():
    index, flagged = np.arange(200), np.zeros(200, bool)
    none = extraction.extraction(index, flagged, np.arange(200), fdr=0.05, seed=0)
    at = none["draws"].index(200)
    assert none["images"][at] == 0 and none["unseen_images"]["estimate"] == 0
    assert none["images_ci"][at] == pytest.approx([0, 200 * (1 - 0.025 ** (1 / 200))])
    flagged[:2] = True
    low, high = extraction.extraction(index, flagged, np.arange(200), fdr=0.05, seed=0)["images_ci"][at]
    assert low < 0.5 and high > 6


def test_false_flags_are_told_apart_from_what_is_unseen():
    """40 images flagged twice each and 8 once, of which 4.4 may be false: 0.25 x 3.6^2 / 8^2 of the estimate is left."""
    index, flagged = (
        np.concatenate([np.repeat(np.arange(40), 2), np.arange(40, 48), np.zeros(112, int)]),
        np.arange(200) < 88,
    )
    unseen = extraction.extraction(index, flagged, np.arange(300), fdr=0.05, seed=0)["unseen_images"]
    assert unseen["estimate"] == pytest.approx(0.995 * 64 / 80)
    assert unseen["without_false_flags"] == pytest.approx(0.995 * 3.6**2 / 80)


@pytest.mark.slow
def test_memorized_interval_covers_what_the_generator_gives_on_average():
    """Over synthetic images and validation patients both, the test repeated: 95 % promised."""
    rng, patients = np.random.default_rng(3), np.arange(300) // 2
    numbers, intervals = [], []
    for seed in range(40):
        index, scores, _ = generator(rng)
        null = rng.normal(size=200)
        p = calibrate.conformal_p(scores, null, np.arange(200))
        flagged = calibrate.benjamini_hochberg(p, 0.1)
        numbers.append((len(np.unique(index[flagged])), len(np.unique(patients[index[flagged]]))))
        said = extraction.memorized_interval(scores, index, null, np.arange(200), patients, fdr=0.1, seed=seed)
        intervals.append((said["n_mem_ci"], said["n_mem_patients_ci"]))
    ends, mean = np.array(intervals), np.mean(numbers, 0)
    covered = ((ends[..., 0] <= mean) & (mean <= ends[..., 1])).mean(0)
    assert (covered >= 0.87).all()
    assert (np.diff(ends[..., :])[..., 0] < 8 * np.std(numbers, 0)).all()


def test_size_matched_is_the_mean_over_subsets_and_its_rate_the_papers():
    rng = np.random.default_rng(4)
    index, flagged, patients = rng.integers(0, 12, 40), rng.random(40) < 0.5, np.arange(12) // 3
    said = extraction.size_matched(index, flagged, patients, 10, seed=0)
    subsets = [rng.permutation(40)[:10] for _ in range(4000)]
    mean = np.mean([len(np.unique(patients[index[s][flagged[s]]])) for s in subsets])
    assert said["n_mem_patients_size_matched"] == pytest.approx(mean, abs=0.05)
    above_NxK = rng.random((12, 40)) < 0.05
    said = extraction.mem_rate_size_matched(above_NxK.sum(1), patients, 40, 10, seed=0)
    mean = np.mean([above_NxK[:, s].any(1).mean() for s in subsets])
    low, high = said["mem_rate_size_matched_ci"]
    assert low < said["mem_rate_size_matched"] < high and said["mem_rate_size_matched"] == pytest.approx(mean, abs=0.02)
    more = extraction.mem_rate_size_matched(above_NxK.sum(1), patients, 40, 60, seed=0)
    assert more["mem_rate_size_matched_extrapolated"] and more["mem_rate_size_matched_ci"] is None
    assert more["mem_rate_size_matched"] >= above_NxK.any(1).mean()
    assert richness.distinct(above_NxK.sum(1), 40, 40, 12)[0] == above_NxK.any(1).sum()


def test_size_matched_rate_of_a_perfect_generator_is_five_percent():
    """904 training, 226 validation and 904 synthetic images: 13 % by the rule as it is, about 5 % at 226."""
    from detection import neighbours

    rng = np.random.default_rng(5)
    draw = lambda n: neighbours.standardise(rng.standard_normal((n, 32)) * np.arange(1, 33) ** -0.5)
    best = lambda a, b: neighbours.nearest(a, b).sim[:, 0]
    rates = []
    for _ in range(5):
        train, val, syn = draw(904), draw(226), draw(904)
        rule = calibrate.paper_rule(best(train, val), best(train, syn), best(syn, train))
        above = neighbours.count_above(train, syn, rule.threshold)
        said = extraction.mem_rate_size_matched(above, np.arange(904), 904, 226, seed=0)
        rates.append((rule.mem_N.mean(), said["mem_rate_size_matched"]))
    as_it_is, matched = np.mean(rates, 0)
    assert as_it_is > 0.1 and matched == pytest.approx(0.05, abs=0.015)
