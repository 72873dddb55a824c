"""Nearest by distance, against all distances by brute force, where rounding is kind and where it is not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import distance

from detection import euclidean


def brute(query, key, k):
    all_NxM = distance.cdist(np.asarray(query, np.float64), np.asarray(key, np.float64))
    order = np.argsort(all_NxM, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(all_NxM, order, 1), order


@pytest.fixture
def streamed(monkeypatch):
    """Few pairs too go the way of many."""
    monkeypatch.setattr(euclidean, "_FEW", 0)


@given(st.integers(1, 40), st.integers(3, 60), st.integers(2, 9), st.integers(0, 99), st.sampled_from([0.0, 1e3]))
@settings(max_examples=25, deadline=None)
def test_nearest_of_few_is_brute_force(n, m, d, seed, offset):
    compare(n, m, d, seed, offset)


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_nearest_of_many_is_brute_force(streamed, offset):
    compare(300, 500, 9, 0, offset)


def compare(n, m, d, seed, offset):
    """Vectors of uneven lengths, far from the origin too."""
    rng = np.random.default_rng(seed)
    query, key = (offset + rng.standard_normal((x, d)) * rng.gamma(1, 1, (x, 1)) for x in (n, m))
    query, key = query.astype(np.float32), key.astype(np.float32)
    found, (expected, index) = euclidean.nearest(query, key, k=3), brute(query, key, 3)
    np.testing.assert_allclose(found.distance, expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(found.index, index)


def test_near_copies_are_told_apart_below_the_rounding_of_dot_products(streamed):
    """40 keys within 1e-5 of each query, at norm 50: their dot products are equal in float32."""
    rng = np.random.default_rng(0)
    one = 50 * rng.standard_normal((1, 16)) / 4
    key = np.concatenate([one + 1e-5 * rng.standard_normal((40, 16)), rng.standard_normal((100, 16)) * 12])
    found = euclidean.nearest(one + 1e-6 * rng.standard_normal((20, 16)), key, k=2)
    again = euclidean.nearest(key[:40], key, k=1)
    assert (found.index < 40).all()
    np.testing.assert_array_equal(again.index[:, 0], np.arange(40))
    assert (again.distance == 0).all()


@pytest.mark.parametrize("few", [0, 10**6])
def test_equal_distances_go_to_the_smaller_index(monkeypatch, few):
    monkeypatch.setattr(euclidean, "_FEW", few)
    key = np.repeat(np.eye(3), 20, axis=0)
    assert euclidean.nearest(np.eye(3), key, k=2).index.tolist() == [[0, 1], [20, 21], [40, 41]]


def test_what_cannot_be_searched_is_told():
    with pytest.raises(ValueError, match="2 nearest neighbours asked of 1 vectors"):
        euclidean.nearest(np.eye(3), np.eye(3)[:1], k=2)
    with pytest.raises(ValueError, match="NaN"):
        euclidean.nearest(np.full((1, 3), np.nan), np.eye(3))
