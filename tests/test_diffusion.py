"""Schedules, forward process, parametrisations and the loss, by identities and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm import diffusion

VARIANCE_PRESERVING = [kind for kind in diffusion.SCHEDULES if kind != "flow"]


@pytest.mark.parametrize("kind", VARIANCE_PRESERVING)
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
    a = diffusion.schedule("cosine", 1000)
    z_key, eps_key = jax.random.split(jax.random.key(0))
    eps = jax.random.normal(eps_key, (4, 100, 100, 1))
    c = diffusion.at(a, jnp.array([0, 300, 600, 999]), 2)
    z_t = diffusion.q_sample(jnp.full(eps.shape, 0.7), eps, c)
    np.testing.assert_allclose(z_t.mean((1, 2, 3)), 0.7 * c.alpha.ravel(), atol=0.04)
    np.testing.assert_allclose(z_t.std((1, 2, 3)), c.sigma.ravel(), atol=0.03)
    z_t = diffusion.q_sample(jax.random.normal(z_key, eps.shape), eps, c)
    np.testing.assert_allclose(z_t.var((1, 2, 3)), 1, atol=0.06)


@pytest.mark.parametrize("T", [10, 1000])
def test_schedules_keep_variance_or_go_straight(T):
    for kind in VARIANCE_PRESERVING:
        c = diffusion.schedule(kind, T)
        np.testing.assert_allclose(c.alpha**2 + c.sigma**2, 1, rtol=1e-6)
    c = diffusion.schedule("flow", T)
    np.testing.assert_allclose(c.alpha + c.sigma, 1, rtol=1e-6)
    assert c.sigma[-1] == 1 and c.alpha[-1] == 0 and c.sigma[0] == np.float32(1 / T) and np.all(np.diff(c.sigma) > 0)


CASES = [(kind, predict) for kind in ("cosine", "flow") for predict in diffusion.PREDICTIONS]


@settings(max_examples=40, deadline=None)
@given(case=st.sampled_from(CASES), t=st.integers(0, 900), seed=st.integers(0, 99))
def test_split_inverts_target(case, t, seed):
    kind, predict = case
    z, eps = jax.random.normal(jax.random.key(seed), (2, 1, 3, 3, 2))
    c = diffusion.at(diffusion.schedule(kind, 1000), jnp.array([t]), 2)
    z_hat, eps_hat = diffusion.split(predict, diffusion.q_sample(z, eps, c), diffusion.target(predict, z, eps, c), c)
    np.testing.assert_allclose(z_hat, z, atol=2e-3)
    np.testing.assert_allclose(eps_hat, eps, atol=2e-2 if t < 2 else 2e-3)


def test_targets_are_the_published_ones():
    z, eps = jnp.array([[[2.0]]]), jnp.array([[[3.0]]])
    c = diffusion.Coefficients(0.8, 0.6)
    values = {name: diffusion.target(name, z, eps, c).item() for name in diffusion.PREDICTIONS}
    assert values == {"eps": 3.0, "x0": 2.0, "v": pytest.approx(0.8 * 3 - 0.6 * 2), "flow": 1.0}
    with pytest.raises(ValueError, match="predict='mu'"):
        diffusion.target("mu", z, eps, c)


def test_noise_cannot_be_predicted_where_there_is_nothing_else():
    with pytest.raises(ValueError, match=r"config.diffusion.predict='eps' cannot start from pure noise"):
        diffusion.denoiser(None, diffusion.schedule("flow", 10), "eps")
    for predict in ("v", "x0", "flow"):
        diffusion.denoiser(None, diffusion.schedule("flow", 10), predict)
    for kind in VARIANCE_PRESERVING:
        diffusion.denoiser(None, diffusion.schedule(kind, 1000), "eps")


@pytest.mark.parametrize(("kind", "predict"), CASES)
def test_min_snr_weighs_the_error_of_z_hat(kind, predict):
    """Whatever the network outputs, its weighted squared error is min(SNR, gamma) times that of z_hat."""
    z, eps, error = (jax.random.normal(jax.random.key(i), (5, 4, 4, 1)) for i in range(3))
    c = diffusion.at(diffusion.schedule(kind, 1000), jnp.array([3, 200, 500, 700, 900]), 2)
    z_t, right = diffusion.q_sample(z, eps, c), diffusion.target(predict, z, eps, c)
    z_hat, _ = diffusion.split(predict, z_t, right + error, c)
    weight = diffusion.min_snr_weight(predict, 5.0, c)
    snr = (c.alpha / c.sigma) ** 2
    expected = jnp.minimum(snr, 5.0) * (z_hat - z) ** 2
    np.testing.assert_allclose(weight * error**2, expected, rtol=0.02, atol=1e-3 * float(expected.max()))
    if kind == "cosine":  # the closed forms of the paper's Sec. 3.4
        known = {"x0": jnp.minimum(snr, 5), "eps": jnp.minimum(snr, 5) / snr, "v": jnp.minimum(snr, 5) / (snr + 1)}
        if predict in known:
            np.testing.assert_allclose(weight, known[predict], rtol=1e-4)


def test_loss_of_an_ignorant_network_is_the_variance_of_its_target():
    zero = diffusion.Denoiser(lambda p, z_t, t, key: jnp.zeros_like(z_t), diffusion.schedule("cosine", 1000), "eps")
    task = diffusion.task(zero, None, lambda batch, key: batch)
    loss, _ = task.loss(None, jnp.zeros((64, 8, 8, 4)), jax.random.key(0))
    assert float(loss) == pytest.approx(1.0, abs=0.05)


def test_min_snr_in_the_loss():
    """A network that errs by one everywhere has the mean weight for its loss."""
    schedule = diffusion.schedule("linear", 100)

    def off_by_one(params, z_t, t, key):
        c = diffusion.at(schedule, jnp.round(t * 100).astype(int), 2)
        return diffusion.target("v", 0.0, z_t / c.sigma, c) + 1.0  # the data are all zero, so z_t is all noise

    task = diffusion.task(diffusion.Denoiser(off_by_one, schedule, "v"), None, lambda batch, key: batch, min_snr=5.0)
    loss, _ = task.loss(None, jnp.zeros((100, 4, 4, 1)), jax.random.key(0))  # stratified: every time once
    assert float(loss) == pytest.approx(float(diffusion.min_snr_weight("v", 5.0, schedule).mean()), rel=1e-3)
