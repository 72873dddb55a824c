"""Denoising loss by noise level: where a network has learned its training images by heart, it denoises them better than
others, and at intermediate noise most of all (Carlini et al. 2023; Dubinski et al. 2024)."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm import diffusion


def losses(
    denoiser: diffusion.Denoiser, params: Any, z: jax.Array, keys_B: jax.Array, levels: Sequence[float], draws: int
) -> jax.Array:
    """Squared error of the network's output at each level, mean over latent elements and `draws` noises: (B, L).

    Args:
      z: (B, *s, c), normalised latents.
      keys_B: each image's own randomness; its noises are `fold_in` of it, whatever else is in the batch.
      levels: t / T, each in (0, 1).
    """
    T = denoiser.T
    times = np.repeat(np.clip(np.round(np.asarray(levels) * T).astype(int), 0, T - 1), draws)

    def one(job: tuple[jax.Array, jax.Array]) -> jax.Array:
        number, t = job
        eps = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, number), z.shape[1:]))(keys_B)
        return diffusion.losses(denoiser, params, z, jnp.full(len(z), t), eps, None)

    each = jax.lax.map(one, (jnp.arange(len(times)), jnp.asarray(times)))
    return each.reshape(len(levels), draws, len(z)).mean(1).T


def loss_levels(
    generator: Any, weights: Any, *, key: jax.Array, levels: Sequence[float], draws: int = 4
) -> Callable[[jax.Array], jax.Array]:
    """A jitted function: images (B, *S, C) -> (B, L), the `losses` of their latents (posterior means).

    An image's noises follow from `key` and its own pixels: the result is the same in whatever batch and place it comes,
    and equal images get equal losses.

    Args:
      generator, weights: `ldm.Generator` and `ldm.Weights`.
      levels: t / T, each in (0, 1); ValueError otherwise.
    """
    check(levels)

    @jax.jit
    def measure(weights: Any, x: jax.Array) -> jax.Array:
        z = (generator.autoencoder.encode(weights.autoencoder, x).mu - weights.mean) / weights.std
        keys = jax.vmap(lambda mark: jax.random.fold_in(key, mark))(fingerprint(x))
        return losses(generator.denoiser, weights.unet, z, keys, levels, draws)

    return lambda x: measure(weights, x)


def check(levels: Sequence[float]) -> None:
    """Raises ValueError unless there are levels and each lies in (0, 1)."""
    if not len(levels) or not all(0 < level < 1 for level in levels):
        raise ValueError(f"noise levels {tuple(levels)}: each must lie between 0 and 1, as t / T")


def fingerprint(x: jax.Array) -> jax.Array:
    """A number per image that follows from its bits alone: (B,) uint32; x is (B, *S, C) float32."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32).reshape(len(x), -1)
    h = bits + jnp.arange(bits.shape[1], dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # MurmurHash3's mixing (Appleby 2011)
        h = (h ^ (h >> shift)) * jnp.uint32(factor)
    return (h ^ (h >> 16)).sum(1, dtype=jnp.uint32)  # the sum wraps, so its order is no matter
