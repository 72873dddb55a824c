"""Schedules, forward process, parametrisations and the sampler, by identities and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm import diffusion


@pytest.mark.parametrize("kind", diffusion.SCHEDULES)
@pytest.mark.parametrize("T", [10, 1000])
def test_alpha_bar_falls_from_one_towards_zero(kind, T):
    a = diffusion.alpha_bar(kind, T)
    assert a.shape == (T,) and np.all(np.diff(a) < 0) and a[-1] > 0 and a[0] < 1
    if T == 1000:
        assert a[0] > 0.99 and a[-1] < 0.02


def test_alpha_bar_closed_forms():
    t = np.arange(1, 901) / 1000
    f = lambda t: np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(diffusion.alpha_bar("cosine", 1000)[:900], f(t) / f(0), rtol=1e-4)
    betas = [0.1, 0.15, 0.2]
    np.testing.assert_allclose(diffusion.alpha_bar("linear", 3, (0.1, 0.2)), np.cumprod(1 - np.array(betas)), rtol=1e-6)
    with pytest.raises(ValueError, match="schedule='quadratic'"):
        diffusion.alpha_bar("quadratic", 10)


def test_q_sample_moments():
    """q(z_t | z) has mean alpha z and variance sigma^2; unit-variance z stay at unit variance."""
    a = diffusion.alpha_bar("cosine", 1000)
    z_key, eps_key = jax.random.split(jax.random.key(0))
    eps = jax.random.normal(eps_key, (4, 100, 100, 1))
    c = diffusion.at(a, jnp.array([0, 300, 600, 999]), 2)
    z_t = diffusion.q_sample(jnp.full(eps.shape, 0.7), eps, c)
    np.testing.assert_allclose(z_t.mean((1, 2, 3)), 0.7 * c.alpha.ravel(), atol=0.04)
    np.testing.assert_allclose(z_t.std((1, 2, 3)), c.sigma.ravel(), atol=0.03)
    z_t = diffusion.q_sample(jax.random.normal(z_key, eps.shape), eps, c)
    np.testing.assert_allclose(z_t.var((1, 2, 3)), 1, atol=0.06)


@settings(max_examples=30, deadline=None)
@given(predict=st.sampled_from(diffusion.PREDICTIONS), t=st.integers(0, 900), seed=st.integers(0, 99))
def test_split_inverts_target(predict, t, seed):
    z, eps = jax.random.normal(jax.random.key(seed), (2, 1, 3, 3, 2))
    c = diffusion.at(diffusion.alpha_bar("cosine", 1000), jnp.array([t]), 2)
    z_hat, eps_hat = diffusion.split(predict, diffusion.q_sample(z, eps, c), diffusion.target(predict, z, eps, c), c)
    np.testing.assert_allclose(z_hat, z, atol=2e-3)
    np.testing.assert_allclose(eps_hat, eps, atol=2e-2 if t < 2 else 2e-3)


def perfect(z, predict, T=200):
    """A denoiser that knows the one training latent `z`."""
    a = diffusion.alpha_bar("cosine", T)

    def apply(params, z_t, t, key):
        c = diffusion.at(a, jnp.round(t * T).astype(int), z_t.ndim - 2)
        eps = (z_t - c.alpha * z) / c.sigma
        return diffusion.target(predict, jnp.broadcast_to(z, z_t.shape), eps, c)

    return diffusion.Denoiser(apply, a, predict)


@pytest.mark.parametrize("predict", ["v", "x0"])
@pytest.mark.parametrize(("steps", "eta"), [(1, 0.0), (7, 0.0), (50, 0.0), (200, 1.0)])
@pytest.mark.parametrize("shape", [(4, 4, 2), (3, 4, 4, 1)])
def test_sampling_with_a_perfect_denoiser_returns_x0(predict, steps, eta, shape):
    z = jax.random.normal(jax.random.key(5), shape)
    keys = jax.random.split(jax.random.key(1), 3)
    out = diffusion.sample(perfect(z, predict), None, keys, shape, steps=steps, eta=eta)
    np.testing.assert_allclose(out, np.broadcast_to(z, out.shape), atol=1e-4)


def test_ancestral_sampling_of_a_gaussian():
    """For z ~ N(0.5, 0.3^2) the optimal denoiser is known; ancestral samples must have those moments."""
    mean, std, T = 0.5, 0.3, 200
    a = diffusion.alpha_bar("cosine", T)

    def apply(params, z_t, t, key):
        c = diffusion.at(a, jnp.round(t * T).astype(int), z_t.ndim - 2)
        variance = c.alpha**2 * std**2 + c.sigma**2
        return mean + c.alpha * std**2 / variance * (z_t - c.alpha * mean)

    keys = jax.random.split(jax.random.key(0), 64)
    z = diffusion.sample(diffusion.Denoiser(apply, a, "x0"), None, keys, (16, 16, 1), steps=T, eta=1.0)
    assert float(z.mean()) == pytest.approx(mean, abs=0.02)
    assert float(z.std()) == pytest.approx(std, rel=0.05)


def test_a_sample_depends_on_its_own_key_alone():
    keys = jax.random.split(jax.random.key(3), 5)
    model = perfect(jnp.zeros((4, 4, 1)), "v")
    blur = model._replace(apply=lambda *a: 0.7 * model.apply(*a))
    whole = diffusion.sample(blur, None, keys, (4, 4, 1), steps=10, eta=0.5)
    np.testing.assert_allclose(
        whole[2:4], diffusion.sample(blur, None, keys[2:4], (4, 4, 1), steps=10, eta=0.5), atol=1e-6
    )


def test_timesteps_span_the_schedule():
    assert diffusion.timesteps(1000, 1000).tolist() == list(range(999, -1, -1))
    assert diffusion.timesteps(1000, 4).tolist() == [999, 749, 499, 249]
    with pytest.raises(ValueError, match=r"config.sample.steps=0"):
        diffusion.timesteps(1000, 0)


def test_loss_of_an_ignorant_network_is_the_variance_of_its_target():
    zero = diffusion.Denoiser(lambda p, z_t, t, key: jnp.zeros_like(z_t), diffusion.alpha_bar("cosine", 1000), "eps")
    task = diffusion.task(zero, None, lambda batch, key: batch)
    loss, _ = task.loss(None, jnp.zeros((64, 8, 8, 4)), jax.random.key(0))
    assert float(loss) == pytest.approx(1.0, abs=0.05)
