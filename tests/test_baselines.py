"""d1/d2, AuthPct and C_T against their definitions, written out with all distances; and what they say of a null."""

import json

import numpy as np
import pytest
from scipy import stats
from scipy.cluster import vq
from scipy.spatial import distance

from detection import baselines, euclidean


def cloud(rng, n, dim=8):
    return rng.standard_normal((n, dim)) * np.arange(1, dim + 1) ** -0.5


@pytest.fixture
def sets():
    rng = np.random.default_rng(0)
    train = cloud(rng, 120)
    train[7] = train[3]  # a duplicate
    copies = train[:30] + 0.01 * rng.standard_normal((30, 8))
    return train, np.concatenate([copies, cloud(rng, 70)]), cloud(rng, 80)


def test_d1_d2_is_its_definition(sets):
    train, syn, _ = sets
    d = np.sort(distance.cdist(syn, train), axis=1)
    flags = baselines.close_to_one(euclidean.nearest(syn, train, k=2))
    np.testing.assert_array_equal(flags, d[:, 0] / d[:, 1] < 1 / 3)
    assert flags[:30].sum() == 28 and not flags[3] and not flags[7], "blind to copies of what is there twice"
    exact = baselines.close_to_one(euclidean.nearest(train[[3, 5]], train, k=2))
    assert exact.all(), "a distance of zero counts, duplicate or not"


def test_authpct_is_its_definition(sets):
    train, syn, val = sets
    own = distance.cdist(train, train)
    np.fill_diagonal(own, np.inf)
    for x in (syn, val, train):
        d = distance.cdist(x, train)
        expected = d.min(1) > own.min(1)[d.argmin(1)]
        np.testing.assert_array_equal(baselines.authentic(euclidean.nearest(x, train, k=2), train), expected)


def written_out(train, val, syn, n_cells, seed):
    """Meehan et al. (2020), section 4, pair by pair."""
    centres, of_train = vq.kmeans2(train, n_cells, minit="++", seed=np.random.default_rng(seed))
    cell = lambda x: distance.cdist(x, centres).argmin(1)
    total, weight = 0.0, 0.0
    for c in range(n_cells):
        near = lambda x, c=c: distance.cdist(x[cell(x) == c], train[of_train == c]).min(1)
        q, p = near(syn), near(val)
        if min(len(q), len(p)) < 20:
            continue
        u = (q[:, None] > p).sum() + 0.5 * (q[:, None] == p).sum()
        m, n = len(q), len(p)
        total += n * (u - m * n / 2) / np.sqrt(m * n * (m + n + 1) / 12)
        weight += n
    return total / weight


@pytest.mark.parametrize("n_cells", [2, 4])
def test_c_t_is_its_definition(n_cells):
    rng = np.random.default_rng(1)
    train, val, syn = cloud(rng, 200), cloud(rng, 180), cloud(rng, 150) * 0.9
    ours = baselines.c_t(train, val, np.arange(180), syn, np.arange(150), n_cells=n_cells, seed=5)
    assert ours["statistic"] == pytest.approx(written_out(train, val, syn, n_cells, 5))


def test_c_t_with_one_cell_is_mann_whitney():
    rng = np.random.default_rng(2)
    train, val, syn = cloud(rng, 100), cloud(rng, 60), cloud(rng, 90)
    ours = baselines.c_t(train, val, np.arange(60), syn, np.arange(90), n_cells=1, seed=0)
    near = lambda x: distance.cdist(x, train).min(1)
    reference = stats.mannwhitneyu(near(syn), near(val), alternative="less", method="asymptotic", use_continuity=False)
    assert ours["p_value"] == pytest.approx(reference.pvalue, abs=1e-3) and ours["cells"] == 1


@pytest.mark.parametrize("images", [1, 5])
def test_c_t_of_unseen_patients_is_small_at_no_more_than_the_nominal_rate(images):
    """Several images a patient, nearly alike: taken for independent, p <= 0.05 would come 25 % of the time."""
    small, rng = 0, np.random.default_rng(3)
    for seed in range(100):
        train, val, syn = cloud(rng, 100), cloud(rng, 50), cloud(rng, 60)
        many = val.repeat(images, 0) + 0.05 * rng.standard_normal((50 * images, 8))
        said = baselines.c_t(train, many, np.arange(50).repeat(images), syn, np.arange(60), n_cells=2, seed=seed)
        small += said["p_value"] <= 0.05
    assert stats.binom.sf(small - 1, 100, 0.05) > 1e-3


def test_all_three_beside_their_nulls(sets):
    train, syn, val = sets
    control = cloud(np.random.default_rng(4), 60)
    said = baselines.baselines(train, syn, np.arange(len(syn)), val, np.arange(80) // 2, control, np.arange(60), seed=0)
    assert said["d1_d2"]["rate"] == pytest.approx(0.28) and said["d1_d2"]["null_rate"] < 0.05
    assert said["auth_pct"]["value"] < said["auth_pct"]["null"] - 0.1
    assert said["c_t"]["p_value"] < 0.01 < said["c_t"]["null_p_value"]
    low, high = said["auth_pct"]["null_ci"]
    assert low < said["auth_pct"]["null"] < high
    few = baselines.baselines(train, syn[:5], np.arange(5), val, np.arange(80), control, np.arange(60), seed=0)
    assert few["c_t"]["statistic"] is None and few["c_t"]["cells"] == 0
    json.dumps([said, few], allow_nan=False)
