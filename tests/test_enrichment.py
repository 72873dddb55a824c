"""What the set says together: closed forms, the definition of the lower bound, and sizes that docs/audit.md names."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from detection import calibrate, enrichment
from tests.conftest import ROOT


def test_six_above_all_unseen_patients_are_seen_though_none_can_be_named():
    """128 images, 160 unseen patients: Benjamini-Hochberg asks for 16 at once."""
    null = np.linspace(0, 1, 160)
    for n, named in ((6, False), (15, False), (16, True)):
        scores = np.append(np.full(n, 2.0), np.linspace(0, 0.9, 128 - n))
        p_K = calibrate.conformal_p(scores, null, np.arange(160))
        assert calibrate.benjamini_hochberg(p_K, 0.05).any() == named
        said = enrichment.bounds(p_K, 160, {1: 0.9, 2: 0.9, 5: 0.9})
        assert said["at_least"] >= 1 and said["p_value"] <= 0.05
        assert said["at_most_rate"] > n / 128, "the flagged share's interval ends at 2.8 %"
    alone = enrichment.set_test([6], [1], 128, 160)[0]
    assert alone == pytest.approx(np.prod([(128 - i) / (288 - i) for i in range(6)])), "of the 6 highest, all are new"


@given(st.integers(1, 40), st.integers(2, 60), st.data())
@settings(max_examples=100, deadline=None)
def test_at_least_is_its_definition(k, patients, data):
    """The copies that would have to be there for the rest of the count to be no wonder, at the line that says most."""
    lines = enrichment.ranks(patients, 0.2)
    counts = sorted(data.draw(st.integers(0, k)) for _ in lines)

    def rejected(c, count, j, edge):
        tail = stats.betabinom.pmf(np.arange(max(count - c, 0), k - c + 1), k - c, j, patients + 1 - j).sum()
        return count > c and tail <= edge / len(lines)

    def least(edge):
        return max(
            next(c for c in range(k + 1) if not rejected(c, n, j, edge)) for n, j in zip(counts, lines, strict=True)
        )

    p_value, at_least = enrichment.set_test(counts, lines, k, patients)
    # one number, but for an exact tie of chances, which rounding decides
    assert least(0.05 * (1 - 1e-9)) <= at_least <= least(0.05 * (1 + 1e-9)) <= max(counts)
    assert (p_value <= 0.05) == (at_least > 0)


@given(st.integers(0, 300), st.integers(1, 300), st.floats(0.01, 1))
@settings(max_examples=50, deadline=None)
def test_at_most_is_clopper_pearson_over_recall(count, k, recall):
    count = min(count, k)
    exact = calibrate.clopper_pearson(count, k)[1]
    assert enrichment.at_most(count, k, recall) == pytest.approx(min(exact / recall, 1))
    assert enrichment.at_most(count, k, 0.0) == 1, "nothing is seen: nothing is excluded"


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_fewest_seen_is_the_edge(k, patients, tests):
    n = enrichment.fewest_seen(k, 1, patients, tests)
    chance = lambda n: calibrate.excess_p(n, k, 1, patients)
    assert chance(n - 1) > 0.05 / tests and (n == k + 1 or chance(n) <= 0.05 / tests)


@pytest.mark.parametrize(
    ("patients", "nominal", "lines"),
    [(5, 0.05, [1]), (160, 0.05, [1, 2, 5]), (399, 0.05, [1, 2, 5, 10, 20]), (100, 0.1, [1, 2, 5, 10])],
)
def test_lines_are_at_p_values_up_to_nominal(patients, nominal, lines):
    assert enrichment.ranks(patients, nominal) == lines


@pytest.mark.parametrize("images", [1, 3])
def test_a_line_is_a_score(images):
    """Counting by score and by p-value is the same, ties or not."""
    rng = np.random.default_rng(images)
    null, who = rng.normal(size=60 * images).round(2), np.arange(60 * images) % 60
    scores = rng.normal(0.5, 1, 500).round(2)
    p_K = calibrate.conformal_p(scores, null, who)
    for j in (1, 2, 5):
        assert enrichment.above(p_K, j, 60) == (scores >= calibrate.score_at(null, who, j / 61)).sum() > 0


def test_the_line_is_chosen_blind_to_the_synthetic_images():
    """By recall: a hair above where copies are seen as well, further down where they are not."""
    rng = np.random.default_rng(0)
    for lows, rank in (({1: 0.9, 2: 0.9, 5: 0.9}, 1), ({1: 0.1, 2: 0.9, 5: 0.95}, 2), ({1: 0.0, 2: 0.0, 5: 0.5}, 5)):
        for p_K in (np.ones(128), np.full(128, 1 / 161), rng.random(128)):
            assert enrichment.bounds(p_K, 160, lows)["rank"] == rank


@pytest.mark.parametrize(("parts", "images"), [((30,), (1,)), ((10,), (10,)), ((1, 5, 20), (1, 5, 20))])
def test_parts_of_draws_accuse_no_more_than_draws(parts, images):
    """Innocent volumes of alike slices, against unseen patients: copies are seen in at most one of twenty sets."""
    rng, seen, as_images = np.random.default_rng(3), 0, 0
    for _ in range(400):
        sizes, patients = rng.choice(parts, 10), rng.choice(images, 60)
        scores, null = (
            np.repeat(rng.normal(size=len(of)), of) + 0.1 * rng.normal(size=of.sum()) for of in (sizes, patients)
        )
        p_K = calibrate.conformal_p(scores, null, np.repeat(np.arange(60), patients))
        n_draws = calibrate.effective_number(np.repeat(np.arange(10), sizes))
        seen += enrichment.bounds(p_K, 60, {1: 0.9, 2: 0.9}, n_draws)["at_least"] > 0
        as_images += enrichment.bounds(p_K, 60, {1: 0.9, 2: 0.9})["at_least"] > 0
    assert stats.binom.sf(seen - 1, 400, 0.05) > 1e-3
    if parts == (30,):
        assert as_images > 0.1 * 400, "taken for independent images they do accuse"


@given(st.integers(1, 60), st.integers(1, 6), st.integers(5, 200), st.data())
@settings(max_examples=50, deadline=None)
def test_draws_of_equal_parts_are_as_many_images(draws, per, patients, data):
    """All parts of a draw alike: everything is as if one of each were there, but for counts, which are of images."""
    p = np.array(data.draw(st.lists(st.integers(1, patients + 1), min_size=draws, max_size=draws))) / (patients + 1)
    lows = dict.fromkeys(enrichment.ranks(patients, 0.1), 0.9)
    one, many = enrichment.bounds(p, patients, lows), enrichment.bounds(np.repeat(p, per), patients, lows, draws)
    same = ("p_value", "at_least_rate", "at_most_rate", "contradict", "rank")
    assert {key: many[key] for key in same} == pytest.approx({key: one[key] for key in same})
    for counts, times in ((one, per), (many, 1)):
        counts |= {"n_above": counts["n_above"] * times, "at_least": counts["at_least"] * times}
    assert (many["n_above"], many["at_least"]) == (one["n_above"], one["at_least"])


def test_copies_less_alike_than_planted_ones_bound_nothing():
    """None above all 399 unseen patients, 40 above the twentieth, where 6 would be by chance: planted copies are no guide."""
    p_K = np.append(np.full(40, 15 / 400), np.full(88, 0.5))
    said = enrichment.bounds(p_K, 399, dict.fromkeys(enrichment.ranks(399, 0.05), 0.9))
    assert said["rank"] == 1 and said["n_above"] == 0 and said["at_least_rate"] > 0.15
    assert said["contradict"] and said["at_most_rate"] == 1.0
    honest = enrichment.bounds(np.append(np.full(5, 1 / 400), np.full(123, 0.5)), 399, {1: 0.9, 20: 0.95})
    assert not honest["contradict"] and honest["at_least_rate"] < honest["at_most_rate"] < 0.2


def test_expected_bound_is_the_mean_of_bounds():
    rng = np.random.default_rng(1)
    q = rng.beta(2, 159, 40_000)
    simulated = enrichment.at_most(rng.binomial(128, q), 128, 0.9)
    expected = enrichment.expected_bound(2, 128, 160, 0.9)
    assert abs(simulated.mean() - expected) < 4 * simulated.std() / 200


def enough(k, patients):
    return enrichment.enough(k, patients, recall_low=0.87, max_rate=0.05, min_power=0.5, nominal=0.05)


def test_sizes_that_the_docs_call_enough_are():
    text = (ROOT / "docs" / "audit.md").read_text()
    patients, images = (
        [int(n) for n in re.search(rf"^\| {name} \|([\d |]+)\|$", text, re.M)[1].split("|")]
        for name in ("unseen patients", "synthetic images")
    )
    assert [enough(32, p)["n_syn"] for p in patients] == images
    assert enough(128, 160) == {"n_syn": 128, "n_val_patients": 160}, "the sizes of configs/brain.py"
    assert enough(1000, 20)["n_val_patients"] == 88 and "Under 88 unseen patients" in text
    assert enough(83, 20)["n_val_patients"] and enough(82, 20)["n_val_patients"] is None and "under 83 images" in text


def test_enough_is_what_simulated_audits_need():
    """Of innocent audits at those sizes four in five have an upper bound within 5 %, and of audits a fifth smaller fewer."""
    rng = np.random.default_rng(2)
    share = {}
    for k in (126, 100):
        above = rng.binomial(k, rng.beta(1, 160, 20_000))
        share[k] = (enrichment.at_most(above, k, 0.87) <= 0.05).mean()
    assert share[126] > 0.79 and share[100] < 0.7
