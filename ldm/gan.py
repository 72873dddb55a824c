"""A minimal modern GAN, 2D and 3D by the same modules: R3GAN (Huang et al. 2024, 'The GAN is dead; long live the GAN!').

Relativistic pairing loss (Jolicoeur-Martineau 2019), zero-centred gradient penalties on real images (R1) and on generated
ones (R2), residual networks without normalisation; nothing else. Theirs alternate the two players' steps, these are
simultaneous, so that one backward pass and the one training loop serve both.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from launch import loop
from launch.layers import Conv, Dense, upsample
from ldm.blocks import fold, levels_of, pool, recomputed, unfold

SLOPE = 0.2  # of the leaky rectifiers


class Block(nn.Module):
    """Residual block without normalisation; its last layer starts at zero, which keeps the signal's size at the start."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = x
        for zero in (False, True):
            h = Conv(x.shape[-1], zero=zero, dtype=self.dtype)(nn.leaky_relu(h, SLOPE))
        return x + h


class Generator(nn.Module):
    """(B, latent) normal noise -> images (B, *S, C); `strides[i]` is between levels i and i + 1, level 0 the largest."""

    widths: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    patch: tuple[int, ...]
    base: tuple[int, ...]
    channels: int
    blocks: int
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        h = Dense(math.prod(self.base) * self.widths[-1], dtype=self.dtype)(z)
        h = h.reshape(z.shape[0], *self.base, self.widths[-1])
        for level in reversed(range(len(self.widths))):
            for _ in range(self.blocks):
                h = recomputed(Block, self.remat)(self.dtype)(h)
            if level:
                h = Conv(self.widths[level - 1], kernel=1, dtype=self.dtype)(h)
                h = upsample(h, self.strides[level - 1])
        cells = Conv(self.channels * math.prod(self.patch), dtype=self.dtype)(nn.leaky_relu(h, SLOPE))
        return unfold(cells, self.patch).astype(jnp.float32)


class Discriminator(nn.Module):
    """Images (B, *S, C) -> (B,), higher for real ones; the generator mirrored."""

    widths: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    patch: tuple[int, ...]
    blocks: int
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = Conv(self.widths[0], dtype=self.dtype)(fold(x, self.patch))
        for level in range(len(self.widths)):
            for _ in range(self.blocks):
                h = recomputed(Block, self.remat)(self.dtype)(h)
            if level + 1 < len(self.widths):
                h = Conv(self.widths[level + 1], kernel=1, dtype=self.dtype)(pool(h, self.strides[level]))
        h = nn.leaky_relu(h, SLOPE).reshape(x.shape[0], -1)
        return Dense(1, dtype=self.dtype)(h)[:, 0].astype(jnp.float32)


class Gan(NamedTuple):
    """Both networks; parameters are {'generator', 'discriminator'}."""

    generator: Generator
    discriminator: Discriminator
    image_shape: tuple[int, ...]
    latent: int
    gamma: float

    def init(self, key: jax.Array) -> Any:
        return {
            "generator": self.generator.init(key, jnp.zeros((1, self.latent))),
            "discriminator": self.discriminator.init(key, jnp.zeros((1, *self.image_shape))),
        }

    def draw(self, generator: Any, keys_B: jax.Array) -> jax.Array:
        """Images of these parameters of the generator, one for each key."""
        z = jax.vmap(lambda key: jax.random.normal(key, (self.latent,)))(keys_B)
        return self.generator.apply(generator, z)

    def judge(self, discriminator: Any, x: jax.Array) -> jax.Array:
        """Scores (B,) of images."""
        return self.discriminator.apply(discriminator, x)


def build(
    image_shape: tuple[int, ...],
    *,
    widths: tuple[int, ...],
    strides: tuple,
    patch: int | tuple[int, ...] = 1,
    latent: int,
    blocks: int,
    gamma: float,
    remat: bool = False,
    dtype: Any = jnp.float32,
) -> Gan:
    """GAN for images of `image_shape` (*S, C).

    Args:
      widths, strides, patch: channels of each level from full size down, down-sampling between levels, and positions
        folded into channels before them, as of an autoencoder.
      latent: length of the noise.
      gamma: weight of both gradient penalties.
      remat: compute activations again for the backward pass (`blocks.recomputed`).
    Raises:
      ValueError: where the factors do not divide the image, or the numbers of levels differ.
    """
    *size, channels = image_shape
    strides, patch, base = levels_of("gan", tuple(size), widths, strides, patch)
    levels = {"widths": tuple(widths), "strides": strides, "patch": patch, "blocks": blocks}
    levels |= {"remat": remat, "dtype": dtype}
    networks = Generator(**levels, base=base, channels=channels), Discriminator(**levels)
    return Gan(*networks, tuple(image_shape), latent, gamma)


def task(gan: Gan) -> loop.Task:
    """Both players' losses (Huang et al. 2024, Eq. 2, 3 and 5); the value is the discriminator's, without its penalties."""

    def loss(params: Any, x: jax.Array, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        fixed = jax.lax.stop_gradient
        fake = gan.draw(params["generator"], jax.random.split(key, len(x)))
        judge = lambda images: gan.judge(params["discriminator"], images)
        scores, back = jax.vjp(judge, jnp.concatenate([x, fixed(fake)]))
        real, made = jnp.split(scores, 2)
        (slopes,) = back(jnp.ones_like(scores))
        r1, r2 = (half.mean() for half in jnp.split((slopes**2).reshape(len(scores), -1).sum(-1), 2))
        d_loss = jax.nn.softplus(made - real).mean()
        g_loss = jax.nn.softplus(fixed(real) - gan.judge(fixed(params["discriminator"]), fake)).mean()
        total = d_loss + loop.gradient_only(gan.gamma / 2 * (r1 + r2) + g_loss)
        return total, {"g_loss": g_loss, "r1": r1, "r2": r2, "score_gap": (real - made).mean()}

    return loop.Task(gan.init, loss)


def optimiser(**settings: Any) -> optax.GradientTransformation:
    """`loop.optimiser(**settings)` for each player, so that clipping one does not hold back the other."""
    players = ("generator", "discriminator")
    return optax.partition({p: loop.optimiser(**settings) for p in players}, {p: p for p in players})
