"""The codebook: nearest codes, moving averages stated as a gradient, dead codes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm import vq


def book(codes, counts=None):
    codes = jnp.asarray(codes, jnp.float32)
    counts = jnp.ones(len(codes)) if counts is None else jnp.asarray(counts, jnp.float32)
    return {"total": {"zero": codes * counts[:, None]}, "count": {"zero": counts}}


def stepped(codebook, z):
    """The codebook after one optimiser step on `follow`."""
    index = vq.lookup(codebook, z).index
    value, grads = jax.value_and_grad(vq.follow)(codebook, z, index, jax.random.key(0))
    assert float(value) == 0
    tx = vq.optimiser()
    return optax.apply_updates(codebook, tx.update(grads, tx.init(codebook))[0])


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 40), st.integers(1, 4), st.integers(0, 99))
def test_lookup_is_the_nearest_code(codes, channels, seed):
    rng = np.random.default_rng(seed)
    e, z = rng.standard_normal((codes, channels)), rng.standard_normal((2, 3, 4, channels))
    found = vq.lookup(book(e, rng.uniform(0.5, 2, codes)), jnp.asarray(z, jnp.float32))
    distance = ((z[..., None, :] - e) ** 2).sum(-1)
    nearest = np.take_along_axis(distance, np.asarray(found.index)[..., None], -1)[..., 0]
    np.testing.assert_allclose(nearest, distance.min(-1), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.z_q, e[np.asarray(found.index)], rtol=1e-4, atol=1e-5)


def test_lookup_in_blocks_is_the_same(monkeypatch):
    rng = np.random.default_rng(0)
    codebook, z = book(rng.standard_normal((50, 3))), jnp.asarray(rng.standard_normal((4, 5, 3)), jnp.float32)
    whole = vq.lookup(codebook, z).index
    monkeypatch.setattr(vq, "BLOCK", 16)
    np.testing.assert_array_equal(vq.lookup(codebook, z).index, whole)


def test_a_step_is_the_moving_average_of_the_paper():
    """N <- gamma N + (1 - gamma) n and m <- gamma m + (1 - gamma) sum z (van den Oord et al. 2017, App. A.1), up to the
    factor K / N of all counts."""
    rng = np.random.default_rng(0)
    e, z = rng.standard_normal((4, 2)), rng.standard_normal((2, 5, 5, 2))
    counts = np.array([1.0, 0.7, 1.3, 0.9])
    after = stepped(book(e, counts), jnp.asarray(z, jnp.float32))
    flat = z.reshape(-1, 2)
    index = ((flat[:, None] - e) ** 2).sum(-1).argmin(1)
    n = np.bincount(index, minlength=4) * 4 / 50
    sums = np.stack([flat[index == k].sum(0) for k in range(4)]) * 4 / 50
    np.testing.assert_allclose(after["count"]["zero"], vq.DECAY * counts + (1 - vq.DECAY) * n, rtol=1e-5)
    expected = vq.DECAY * e * counts[:, None] + (1 - vq.DECAY) * sums
    np.testing.assert_allclose(after["total"]["zero"], expected, rtol=1e-4, atol=1e-6)


def test_many_steps_find_the_clusters():
    """Four tight clusters, eight codes from nothing: every cluster ends with a code at its mean."""
    rng = np.random.default_rng(0)
    centres = np.array([[2, 2], [-2, 2], [2, -2], [-2, -2.0]])
    codebook = vq.init(8, 2)
    step = jax.jit(lambda c, z, k: stepped_pure(c, z, k))
    for i in range(200):
        z = centres[rng.integers(0, 4, 64)] + 0.05 * rng.standard_normal((64, 2))
        codebook = step(codebook, jnp.asarray(z, jnp.float32)[None], jax.random.key(i))
    distance = np.linalg.norm(np.asarray(vq.codes(codebook))[:, None] - centres, axis=-1)
    assert distance.min(0).max() < 0.05


def stepped_pure(codebook, z, key):
    grads = jax.grad(vq.follow)(codebook, z, vq.lookup(codebook, z).index, key)
    return jax.tree.map(lambda old, g: old - g, codebook, grads)


def test_dead_codes_move_into_the_data():
    far = book([[0.0, 0.0], [50.0, 50.0]], [1.0, vq.DEAD])
    z = jax.random.normal(jax.random.key(1), (1, 4, 4, 2))
    after = stepped(far, z)
    assert float(after["count"]["zero"][1]) == pytest.approx(1.0)
    moved = vq.codes(after)[1]
    assert float(jnp.abs(z.reshape(-1, 2) - moved).sum(-1).min()) < 1e-4, "it is one of the vectors of the batch"
    untouched = stepped(book([[0.0, 0.0], [50.0, 50.0]], [1.0, 10 * vq.DEAD]), z)
    np.testing.assert_allclose(vq.codes(untouched)[1], [50, 50], rtol=1e-5)


def test_the_first_batch_places_every_code():
    z = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    after = stepped(vq.init(16, 3), z)
    nearest = np.abs(np.asarray(vq.codes(after))[:, None] - np.asarray(z).reshape(1, -1, 3)).sum(-1).min(1)
    np.testing.assert_allclose(vq.codes(after)[0], z.mean((0, 1, 2)), atol=1e-5)  # all were at zero; it was the first
    assert nearest[1:].max() < 1e-4 and vq.usage(vq.lookup(after, z).index, 16)["codes_used"] > 0.5


def test_straight_through_and_commitment():
    z, z_q = jnp.array([[0.5, 1.0]]), jnp.array([[1.0, 0.0]])
    np.testing.assert_array_equal(vq.straight_through(z, z_q), z_q)
    np.testing.assert_array_equal(jax.grad(lambda z: (3 * vq.straight_through(z, z_q)).sum())(z), [[3, 3]])
    np.testing.assert_allclose(jax.grad(lambda z: vq.commitment(z, z_q))(z), z - z_q)
    assert not jax.grad(lambda z_q: vq.commitment(z, z_q))(z_q).any()


@pytest.mark.parametrize(
    ("index", "used", "perplexity"), [([0, 0, 0, 0], 0.25, 1), ([0, 1, 2, 3], 1, 4), ([0, 0, 1, 1], 0.5, 2)]
)
def test_usage(index, used, perplexity):
    told = vq.usage(jnp.array(index), 4)
    assert float(told["codes_used"]) == used and float(told["perplexity"]) == pytest.approx(perplexity)
