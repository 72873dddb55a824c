"""Autoencoder: shapes at any rank and factor, KL against its closed form, folding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch import layers
from ldm import autoencoder, blocks

SMALL = dict(widths=(8, 16), latent=3, blocks=1)


@pytest.mark.parametrize(
    ("shape", "strides", "patch", "latent"),
    [
        ((16, 24, 1), (2,), 1, (8, 12, 3)),
        ((16, 16, 2), (2,), 2, (4, 4, 3)),
        ((4, 16, 16, 1), ((1, 2, 2),), 1, (4, 8, 8, 3)),
        ((8, 8, 8, 1), (2,), (1, 2, 2), (4, 2, 2, 3)),
    ],
)
def test_shapes(shape, strides, patch, latent):
    model = autoencoder.build(shape, strides=strides, patch=patch, **SMALL)
    task = autoencoder.task(model, kl_weight=1e-3)
    params = jax.jit(lambda key: layers.init(task.init, key))(jax.random.key(0))
    x = jax.random.uniform(jax.random.key(1), (2, *shape), minval=-1)
    q = model.encode(params, x)
    assert model.latent_shape == latent == q.mu.shape[1:] == q.logvar.shape[1:]
    assert model.decode(params, q.mu).shape == x.shape
    loss, metrics = task.loss(params, x, jax.random.key(2))
    pixels = np.prod(shape)
    assert float(loss) == pytest.approx(float(metrics["l1"] + 1e-3 * metrics["kl"] / pixels), rel=1e-6)


def test_misfits_are_told():
    with pytest.raises(ValueError, match=r"config.data.size\[1\]=18"):
        autoencoder.build((16, 18, 1), strides=(2,), patch=2, **SMALL)
    with pytest.raises(ValueError, match=r"config.autoencoder.strides has 2 entries"):
        autoencoder.build((16, 16, 1), strides=(2, 2), **SMALL)


def test_kl_is_torchs_closed_form_by_quadrature():
    """KL by numerical integration of q log(q / p)."""
    mu, sigma = np.array([0.3, -1.2]), np.array([0.5, 1.7])
    x = np.linspace(-15, 15, 60001)
    q = np.exp(-((x - mu[:, None]) ** 2) / (2 * sigma[:, None] ** 2)) / (sigma[:, None] * np.sqrt(2 * np.pi))
    log_p = -0.5 * x**2 - 0.5 * np.log(2 * np.pi)
    expected = np.trapezoid(np.where(q > 0, q * (np.log(np.maximum(q, 1e-300)) - log_p), 0), x).sum()
    posterior = autoencoder.Posterior(jnp.array(mu)[None], jnp.log(jnp.array(sigma) ** 2)[None])
    assert float(autoencoder.kl(posterior)[0]) == pytest.approx(expected, rel=1e-4)
    assert float(autoencoder.kl(autoencoder.Posterior(jnp.zeros((1, 9)), jnp.zeros((1, 9))))[0]) == 0


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=2, max_size=3), st.integers(1, 3))
def test_unfold_inverts_fold(axes, channels):
    factors, cells = zip(*axes, strict=True)
    x = np.random.default_rng(0).standard_normal((2, *(f * c for f, c in axes), channels)).astype(np.float32)
    folded = blocks.fold(jnp.asarray(x), factors)
    assert folded.shape == (2, *cells, channels * int(np.prod(factors)))
    corner = x[(slice(None), *(slice(0, f) for f in factors))].reshape(2, -1)
    np.testing.assert_array_equal(np.asarray(folded)[(slice(None), *(0,) * len(cells))], corner)
    np.testing.assert_array_equal(blocks.unfold(folded, factors), x)
