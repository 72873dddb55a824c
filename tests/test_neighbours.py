"""Nearest neighbours against brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from detection import neighbours


def brute(query, key, k):
    sim = (query.astype(np.float64) @ key.astype(np.float64).T).astype(np.float32)
    index = np.argsort(-sim, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(sim, index, 1), index


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    m=st.integers(1, 300),
    d=st.integers(2, 9),
    k=st.integers(1, 5),
    block=st.tuples(st.integers(1, 64), st.integers(1, 200)),
    repeat=st.booleans(),
    seed=st.integers(0, 99),
)
def test_is_brute_force_with_ties_to_the_smaller_index(n, m, d, k, block, repeat, seed):
    rng = np.random.default_rng(seed)
    key = rng.standard_normal((m, d))
    if repeat:  # many exactly equal keys
        key = key[rng.integers(0, max(1, m // 10), m)]
    query, key = neighbours.standardise(rng.standard_normal((n, d))), neighbours.standardise(key)
    k = min(k, m)
    found = neighbours.nearest(query, key, k=k, block=block)
    sim, index = brute(query, key, k)
    np.testing.assert_array_equal(found.sim, sim)
    np.testing.assert_array_equal(found.index, index)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), tau=st.floats(-0.9, 0.9))
def test_count_above_is_brute_force(seed, tau):
    rng = np.random.default_rng(seed)
    query, key = (neighbours.standardise(rng.standard_normal((n, 5))) for n in (17, 210))
    sim = (query.astype(np.float64) @ key.astype(np.float64).T).astype(np.float32)
    np.testing.assert_array_equal(neighbours.count_above(query, key, tau, block=(7, 50)), (sim > tau).sum(1))


def test_standardised_dot_products_are_pearson_correlations():
    x, y = np.random.default_rng(0).standard_normal((2, 6, 12)) * 5 + 3
    ours = neighbours.standardise(x) @ neighbours.standardise(y).T
    np.testing.assert_allclose(ours, 1 - cdist(x, y, "correlation"), atol=1e-6)
    assert not neighbours.standardise(np.full((2, 4), 7.0)).any()


def test_wrong_input_is_told():
    x = neighbours.standardise(np.random.default_rng(0).standard_normal((4, 3)))
    with pytest.raises(ValueError, match="k = 5"):
        neighbours.nearest(x, x, k=5)
    with pytest.raises(ValueError, match="NaN"):
        neighbours.standardise(np.full((2, 3), np.nan))
    with pytest.raises(ValueError, match="dimensions"):
        neighbours.nearest(x, x[:, :2])
