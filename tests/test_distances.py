"""Frechet and kernel distance, precision, recall, density and coverage: trusted implementations and closed forms."""

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm import distances

PRDC = [38 / 45, 57 / 60, 0.6666666666666667, 50 / 60]  # precision, recall, density, coverage
POLY_MMD, FID = 0.23830099817400052, 1.0577234201780374


def two_sets():
    rng = np.random.default_rng(7)
    return rng.standard_normal((60, 6)), 1.2 * rng.standard_normal((45, 6)) + 0.2


def test_as_published_implementations():
    """prdc 0.2 (Naeem et al.'s own) with k = 5; torchmetrics 1.9.0's `poly_mmd` and `_compute_fid`."""
    x, y = two_sets()
    fx, fy = distances.features(x), distances.features(y)
    shares = [e.value for e in distances.prdc(fx, fy, k=5)]
    np.testing.assert_allclose(shares, PRDC, rtol=1e-12)
    assert distances.kernel_distance(distances.features(x[:45]), fy).value == pytest.approx(POLY_MMD, rel=1e-9)
    assert distances.frechet(x, y) == pytest.approx(FID, rel=1e-9)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(3, 40), m=st.integers(3, 40), d=st.integers(1, 12), seed=st.integers(0, 99))
def test_frechet_is_the_textbook_formula(n, m, d, seed):
    """Few rows (singular covariances) included; scipy's matrix square root of the symmetric form."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(0, 1, (n, d)), rng.normal(0.5, 2, (m, d))
    cov_x, cov_y = (np.cov(a.T).reshape(d, d) for a in (x, y))
    values, vectors = np.linalg.eigh(cov_x)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    cross = np.sqrt(np.maximum(scipy.linalg.eigvalsh(root @ cov_y @ root), 0)).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_x) + np.trace(cov_y) - 2 * cross
    assert distances.frechet(x, y) == pytest.approx(expected, abs=1e-5)


def test_frechet_of_two_gaussians_without_small_sample_bias():
    """Known distance of diagonal normals: the plain estimate is far too large, the extrapolated one is not."""
    rng = np.random.default_rng(0)
    d, truth = 32, 3 * 0.5**2 + 32 * 0.2**2
    plain, infinite, covered = [], [], []
    for seed in range(25):
        x, y = rng.standard_normal((200, d)), 1.2 * rng.standard_normal((250, d))
        y[:, :3] += 0.5
        fx, fy = (distances.features(a, seed=seed) for a in (x, y))
        plain.append(distances.frechet(x, y))
        without = distances.without_each_group(distances.frechet_infinity, fx, fy)
        estimate = distances.jackknife(distances.frechet_infinity(fx, fy), without)
        infinite.append(estimate.value)
        covered.append(estimate.low <= truth <= estimate.high)
    error = np.std(infinite) / 5
    assert np.mean(plain) > truth + 2, "the bias that is to be removed"
    assert abs(np.mean(infinite) - truth) < 3 * error + 0.1
    assert np.mean(covered) >= 0.8


def test_kernel_distance_of_one_distribution_is_zero_on_average_and_its_interval_covers():
    """Patients with three images each; leaving their pairs in would move the mean by much more than its error."""
    rng = np.random.default_rng(1)
    estimates = []
    for seed in range(40):
        patients = np.repeat(np.arange(30), 3)
        of_patient, of_image = rng.standard_normal((2, 30, 8)), rng.standard_normal((2, 90, 8))
        x, y = np.repeat(of_patient, 3, 1) + 0.3 * of_image
        estimates.append(distances.kernel_distance(*(distances.features(a, patients, seed=seed) for a in (x, y))))
    value, low, high = np.array(estimates).T
    assert abs(value.mean()) < 3 * value.std() / np.sqrt(40)
    assert ((low <= 0) & (high >= 0)).mean() >= 0.9
    naive = distances.kernel_distance(distances.features(x), distances.features(y)).value
    assert naive > value[-1] + 2 * value.std() / np.sqrt(40), "what pairs of one patient would add"


def test_kernel_distance_sees_a_shift():
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((2, 200, 8))
    estimate = distances.kernel_distance(distances.features(x), distances.features(y + 0.5))
    assert estimate.low > 0


def test_identical_sets():
    x, _ = two_sets()
    fx = distances.features(x)
    assert [e.value for e in distances.prdc(fx, fx, k=3)][:2] == [1, 1]
    assert distances.prdc(fx, fx, k=3).coverage.value == 1
    assert distances.frechet(x, x) == pytest.approx(0, abs=1e-9)
    assert 0.9 < distances.prdc(fx, fx, k=3).precision.low < 1, "sixty images do not prove a share of one"


def test_copies_that_fill_their_balls_to_radius_zero():
    """Each row six times over: the fifth neighbour is at distance zero, and so is the copy that must count as inside."""
    x = np.repeat(np.random.default_rng(0).standard_normal((30, 200)) * 1e3 + 7, 6, axis=0)
    shares = distances.prdc(distances.features(x), distances.features(x.copy()), k=5)
    assert shares.precision.value == shares.recall.value == shares.coverage.value == 1


def test_far_apart_sets():
    x, y = two_sets()
    shares = distances.prdc(distances.features(x), distances.features(y + 100), k=5)
    assert [e.value for e in shares] == [0, 0, 0, 0]
    assert 0 < shares.precision.high < 0.1


def test_coverage_of_one_distribution_has_its_closed_form():
    rng = np.random.default_rng(3)
    found = [
        distances.prdc(*(distances.features(rng.standard_normal((n, 4)), seed=s) for n in (80, 50)), k=5)
        for s in range(30)
    ]
    coverage = [f.coverage.value for f in found]
    expected = distances.coverage_if_equal(80, 50, 5)
    assert np.mean(coverage) == pytest.approx(expected, abs=3 * np.std(coverage) / np.sqrt(30))
    assert np.mean([f.density.value for f in found]) == pytest.approx(1, abs=0.1), "one, in the limit (Naeem et al.)"


def test_blocks_do_not_matter(monkeypatch):
    x, y = (distances.features(a) for a in two_sets())
    whole = distances.prdc(x, y), distances.kernel_distance(x, y)
    monkeypatch.setattr(distances, "ROWS", 7)
    monkeypatch.setattr(distances, "COLUMNS", 11)
    parts = distances.prdc(x, y), distances.kernel_distance(x, y)
    np.testing.assert_allclose(np.array(parts[0]), np.array(whole[0]), rtol=1e-9)
    np.testing.assert_allclose(parts[1], whole[1], rtol=1e-9)


def test_leaving_a_group_out_is_computing_again_without_it():
    """The shortcuts of the jackknife, tables by group, against deletion of the rows."""
    x, y = (distances.features(a) for a in two_sets())
    groups = distances.groups_of(x, y)
    radii = distances._radii(x, 5, groups)
    inside, nearest = distances._containing(y, x, radii, groups)
    for g in (0, 7, 19):
        rest = x.take(x.group(groups) != g)
        np.testing.assert_allclose(distances._radii(rest, 5, groups)[:, 0], radii[x.group(groups) != g, 1 + g])
        again, near = distances._containing(y, rest, distances._radii(rest, 5, groups), groups)
        np.testing.assert_array_equal(again[:, 0], inside[:, 1 + g])
        np.testing.assert_allclose(near[:, 0], nearest[:, 1 + g])


@pytest.mark.slow
def test_intervals_cover_what_they_estimate():
    """Patients with five images each: the shares of many draws, against each draw's interval. Too wide is allowed."""
    rng, found = np.random.default_rng(4), []
    for seed in range(60):
        patients = np.repeat(np.arange(60), 5)
        draw = lambda s: s * (0.8 * np.repeat(rng.standard_normal((60, 6)), 5, 0) + 0.6 * rng.standard_normal((300, 6)))
        sets = [distances.features(draw(s), patients, seed=seed) for s in (1.0, 1.3)]
        found.append(distances.prdc(*sets))
    value, low, high = np.moveaxis(np.array(found), 2, 0)
    covered = ((low <= value.mean(0)) & (high >= value.mean(0))).mean(0)
    assert np.all(covered >= 0.88), covered


@pytest.mark.parametrize(
    ("x", "told"),
    [
        (np.full((9, 2), np.nan), "row 0 holds NaN"),
        (np.zeros((7, 2)), "a set of 7 patients; quality needs 8 at least"),
    ],
)
def test_refused(x, told):
    with pytest.raises(ValueError, match=told):
        distances.features(x)


def test_too_few_neighbours():
    x, y = (distances.features(a) for a in two_sets())
    with pytest.raises(ValueError, match="too small for the 59 nearest neighbours"):
        distances.prdc(x, y, k=59)
