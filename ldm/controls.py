"""A generator whose memorization is known: the optimal denoiser of the training set, which can draw nothing else.

Its counterpart, which memorizes nothing, needs no generator: unseen real images through the autoencoder's round trip.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm import diffusion

CONTROLS = ("optimal", "held_out")
BLOCK = 1024  # training latents compared at a time


class Known(NamedTuple):
    """Training latents in blocks, normalised and flattened: (blocks, block, D), and which rows are latents."""

    z: jax.Array
    real: jax.Array


def known(z: np.ndarray, block: int = BLOCK) -> Known:
    """Blocks of the latents z (N, *s, c), the last one filled up."""
    flat = np.asarray(z, np.float32).reshape(len(z), -1)
    block = min(block, len(z))
    short = -len(z) % block
    padded = np.concatenate([flat, np.zeros((short, flat.shape[1]), np.float32)])
    real = np.arange(len(padded)) < len(z)
    return Known(jnp.asarray(padded.reshape(-1, block, flat.shape[1])), jnp.asarray(real.reshape(-1, block)))


def optimal(schedule: diffusion.Coefficients) -> diffusion.Denoiser:
    """The minimiser of the denoising loss over all functions, in closed form (Gu et al. 2023, Eq. 2); its parameters are
    `Known`.

    E[z | z_t] for z uniform on the training latents: their mean, weighted by softmax of -|z_t - alpha z_i|^2 / (2 sigma^2).
    The sums run over blocks with the largest exponent so far taken out, so memory is a block of products.
    """
    T = len(schedule.alpha)

    def apply(params: Known, z_t: jax.Array, t: jax.Array, key: Any = None) -> jax.Array:
        del key
        c = diffusion.at(schedule, jnp.round(t * T).astype(jnp.int32), -1)
        alpha, sigma = c.alpha[:, None], c.sigma[:, None]
        query = z_t.reshape(len(z_t), -1)

        def add(carry: tuple, block: Known) -> tuple[tuple, None]:
            top, total, mean = carry
            products = jnp.matmul(query, block.z.T, precision="highest")
            exponent = (alpha * products - 0.5 * alpha**2 * (block.z**2).sum(1)) / sigma**2
            exponent = jnp.where(block.real, exponent, -jnp.inf)
            now = jnp.maximum(top, exponent.max(1, keepdims=True))
            weight, shrink = jnp.exp(exponent - now), jnp.exp(top - now)
            mean = mean * shrink + jnp.matmul(weight, block.z, precision="highest")
            return (now, total * shrink + weight.sum(1, keepdims=True), mean), None

        start = jnp.full((len(query), 1), -jnp.inf), jnp.zeros((len(query), 1)), jnp.zeros_like(query)
        (_, total, mean), _ = jax.lax.scan(add, start, params)
        return (mean / total).reshape(z_t.shape)

    return diffusion.denoiser(apply, schedule, "x0")


def check(control: str) -> None:
    """Raises ValueError for an unknown control."""
    if control not in CONTROLS:
        raise ValueError(f"config.sample.control={control!r}: use one of {', '.join(CONTROLS)}, or leave it out")
