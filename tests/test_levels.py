"""Denoising loss by noise level: closed forms, the gap of a network that knows its images, independence of the batch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm import autoencoder, diffusion, generator, levels

A = diffusion.schedule("cosine", 100)
LEVELS = (0.1, 0.5, 0.9)


class Whole(NamedTuple):
    autoencoder: NamedTuple
    denoiser: diffusion.Denoiser


class Plain(NamedTuple):
    """An autoencoder that only subtracts one."""

    def encode(self, params, x):
        return autoencoder.Posterior(x - 1, jnp.zeros_like(x))


def knows(z_known):
    """A denoiser of 'x0' that answers with the nearest latent it knows."""

    def apply(params, z_t, t, key):
        c = diffusion.at(A, jnp.round(t * 100).astype(int), z_t.ndim - 2)
        gaps = ((z_t / c.alpha)[:, None] - z_known[None]) ** 2
        return z_known[gaps.reshape(*gaps.shape[:2], -1).sum(-1).argmin(1)]

    return diffusion.Denoiser(apply, A, "x0")


def measure(denoiser, **settings):
    weights = generator.Weights(None, None, jnp.array([0.5]), jnp.array([2.0]))
    settings = {"key": jax.random.key(3), "levels": LEVELS, **settings}
    return levels.loss_levels(Whole(Plain(), denoiser), weights, **settings)


@pytest.mark.parametrize("size", [(6, 6), (3, 4, 4)])
def test_an_ignorant_network_errs_by_the_noise(size):
    """Its 'eps' of zero errs by eps^2: one, at every level, with a standard deviation of sqrt(2 / elements / draws)."""
    zero = diffusion.Denoiser(lambda p, z_t, t, key: jnp.zeros_like(z_t), A, "eps")
    found = np.asarray(measure(zero, draws=8)(jax.random.normal(jax.random.key(0), (64, *size, 1))))
    assert found.shape == (64, 3)
    np.testing.assert_allclose(found.mean(0), 1, atol=5 * np.sqrt(2 / np.prod(size) / 8 / 64))
    assert found.std() == pytest.approx(np.sqrt(2 / np.prod(size) / 8), rel=0.25)


def test_what_a_network_knows_by_heart_it_denoises_better():
    train, held_out = jax.random.uniform(jax.random.key(1), (2, 16, 24, 24, 1), minval=-1)
    found = measure(knows((train - 1.5) / 2))
    known, other = np.asarray(found(train)), np.asarray(found(held_out))
    np.testing.assert_allclose(known[:, :2], 0, atol=1e-9)
    assert np.all(other > 1e-3)


def test_a_loss_depends_on_the_image_alone():
    x = jax.random.uniform(jax.random.key(2), (8, 5, 5, 1), minval=-1)
    blur = knows(x[:3] - 1)
    found = np.asarray(measure(blur)(x))
    order = np.array([5, 0, 3, 7])
    np.testing.assert_allclose(measure(blur)(x[order]), found[order], rtol=1e-5)
    assert not np.allclose(measure(blur, key=jax.random.key(4))(x), found, rtol=1e-3)


def test_fingerprints_tell_images_apart():
    x = np.random.default_rng(0).choice([-1, 0, 1], (500, 4, 4, 1)).astype(np.float32)
    distinct = len(np.unique(x.reshape(500, -1), axis=0))
    swapped = np.concatenate([x, x[:, ::-1]])
    assert len(np.unique(levels.fingerprint(x))) == distinct
    assert len(np.unique(levels.fingerprint(swapped))) == len(np.unique(swapped.reshape(1000, -1), axis=0))


@pytest.mark.parametrize("bad", [(), (0.0,), (0.5, 1.0)])
def test_levels_lie_inside(bad):
    with pytest.raises(ValueError, match="between 0 and 1"):
        levels.check(bad)
