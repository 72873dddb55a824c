"""The GAN: its losses in closed form, who moves whom, shapes at any rank, and that it finds both of two modes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

from launch import layers, loop
from ldm import gan


class Linear(layers.nn.Module):
    """A player that is one matrix: images or noise -> `features`, or scores where there are none."""

    features: int = 0

    @layers.nn.compact
    def __call__(self, x):
        y = layers.Dense(self.features or 1)(x.reshape(len(x), -1))
        return y.reshape(len(x), self.features // 2, 2, 1) if self.features else y[:, 0]


def linear(gamma):
    return gan.Gan(Linear(6), Linear(), (3, 2, 1), latent=4, gamma=gamma)


def test_losses_and_gradients_are_their_closed_forms():
    """With scores w x: the loss is softplus(w (fake - real)), the penalties are |w|^2 each, and the derivatives follow."""
    model = linear(gamma=0.6)
    task = gan.task(model)
    params = layers.init(task.init, jax.random.key(0))
    x, key = jax.random.normal(jax.random.key(1), (5, 3, 2, 1)), jax.random.key(2)
    (loss, metrics), grads = jax.jit(jax.value_and_grad(task.loss, has_aux=True))(params, x, key)
    z = np.stack([jax.random.normal(k, (4,)) for k in jax.random.split(key, 5)])
    a, b = (np.asarray(params["generator"]["params"]["Dense_0"][n], np.float64) for n in ("kernel", "bias"))
    w = np.asarray(params["discriminator"]["params"]["Dense_0"]["kernel"], np.float64)[:, 0]
    fake, real = z @ a + b, np.asarray(x, np.float64).reshape(5, 6)
    margin = (fake - real) @ w
    assert float(loss) == pytest.approx(np.log1p(np.exp(margin)).mean(), rel=1e-5)
    assert float(metrics["g_loss"]) == pytest.approx(np.log1p(np.exp(-margin)).mean(), rel=1e-5)
    assert float(metrics["r1"]) == float(metrics["r2"]) == pytest.approx((w**2).sum(), rel=1e-5)
    of_w = (expit(margin)[:, None] * (fake - real)).mean(0) + 0.6 * 2 * w
    np.testing.assert_allclose(grads["discriminator"]["params"]["Dense_0"]["kernel"][:, 0], of_w, rtol=1e-4, atol=1e-6)
    of_fake = -expit(-margin)[:, None] * w / 5
    np.testing.assert_allclose(grads["generator"]["params"]["Dense_0"]["kernel"], z.T @ of_fake, rtol=1e-4, atol=1e-6)


def test_each_player_has_its_own_optimiser():
    """Gradients of the discriminator a million times the generator's do not hold the generator back."""
    params = layers.init(gan.task(linear(1.0)).init, jax.random.key(0))
    tx = gan.optimiser(steps=10, rate=1e-3)
    gradients = {"generator": 1.0, "discriminator": 1e6}
    grads = {name: jax.tree.map(lambda p, g=g: jnp.full_like(p, g), params[name]) for name, g in gradients.items()}
    updates, _ = tx.update(grads, tx.init(params), params)
    for leaf in jax.tree.leaves(updates):
        np.testing.assert_allclose(leaf, -1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("shape", "strides", "patch"), [((16, 8, 1), (2, 2), 2), ((4, 8, 8, 2), ((1, 2, 2), (2, 2, 2)), 1)]
)
def test_shapes(shape, strides, patch):
    model = gan.build(shape, widths=(4, 8, 8), strides=strides, patch=patch, latent=5, blocks=1, gamma=1.0)
    params = layers.init(model.init, jax.random.key(0))
    x = model.draw(params["generator"], jax.random.split(jax.random.key(1), 3))
    assert x.shape == (3, *shape) and model.judge(params["discriminator"], x).shape == (3,)
    again = model.draw(params["generator"], jax.random.split(jax.random.key(1), 3)[1:])
    np.testing.assert_allclose(again, x[1:], atol=1e-5)
    with pytest.raises(ValueError, match=r"the factor of config\.gan"):
        gan.build(
            (6, *shape[1:]), widths=(4, 8, 8), strides=((4,) * (len(shape) - 1), 1), latent=5, blocks=1, gamma=1.0
        )


@pytest.mark.slow
def test_it_finds_both_modes(tmp_path):
    """Images that are light or dark, each kind half of them, with a grain that tells one from another."""
    rng = np.random.default_rng(0)

    def batches(start):
        while True:
            sign = rng.choice([-0.5, 0.5], (32, 1, 1, 1))
            yield (sign + 0.1 * rng.standard_normal((32, 4, 4, 1))).astype(np.float32)

    model = gan.build((4, 4, 1), widths=(16, 16), strides=(2,), latent=8, blocks=1, gamma=0.3)
    tx = gan.optimiser(steps=600, rate=2e-3, warmup=20, decay_to=0.1, b1=0.0, b2=0.99)
    state = loop.fit(
        "gan", gan.task(model), batches, folder=tmp_path, steps=600, tx=tx, key=jax.random.key(0), ema=(0.99,)
    )
    draw = jax.jit(functools.partial(model.draw, state.ema["0.99"]["generator"]))
    means = np.asarray(draw(jax.random.split(jax.random.key(1), 200))).mean((1, 2, 3))
    assert 0.25 < (means > 0).mean() < 0.75
    assert np.median(np.abs(np.abs(means) - 0.5)) < 0.15
