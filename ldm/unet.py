"""The latent UNet (Ho et al. 2020; Dhariwal and Nichol 2021), 2D and 3D by the same module."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from launch.layers import Conv, Dense, GroupNorm
from ldm.blocks import Attention, ResBlock, recomputed


def time_embedding(t: jax.Array, width: int, longest: float = 10_000.0) -> jax.Array:
    """Sinusoids of t (B,), in units of 1/1000 of the schedule: (B, width) (Vaswani et al. 2017)."""
    frequency = jnp.exp(-jnp.log(longest) * jnp.arange(width // 2) / (width // 2))
    angle = t[:, None] * frequency
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class UNet(nn.Module):
    """(B, *s, c) noisy latents and times t (B,) in [0, 1] -> (B, *s, c).

    Attributes:
      width, mults: channels of level i are `width * mults[i]`; each level halves every axis that is even.
      blocks: residual blocks per level on the way down (one more on the way up).
      attention: per level, whether each block is followed by self-attention; the middle always has it.
      remat: compute activations again for the backward pass (`blocks.recomputed`).
    """

    width: int
    mults: tuple[int, ...]
    blocks: int
    attention: tuple[bool, ...]
    heads: int = 4
    dropout: float = 0.0
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z: jax.Array, t: jax.Array, train: bool = False) -> jax.Array:
        residual, attention = recomputed(ResBlock, self.remat, static=(3,)), recomputed(Attention, self.remat)

        def block(h: jax.Array, features: int, attend: bool) -> jax.Array:
            h = residual(features, dropout=self.dropout, dtype=self.dtype)(h, emb, train)
            return attention(self.heads, dtype=self.dtype)(h) if attend else h

        emb = Dense(4 * self.width, dtype=self.dtype)(time_embedding(1000.0 * t, self.width))
        emb = Dense(4 * self.width, dtype=self.dtype)(nn.silu(emb))
        levels = list(zip(self.mults, self.attention, strict=True))
        h = Conv(self.width, dtype=self.dtype)(z)
        skips = [h]
        factors = []
        for level, (mult, attend) in enumerate(levels):
            if level:
                factors.append(tuple(2 if n % 2 == 0 else 1 for n in h.shape[1:-1]))
                h = Conv(self.width * mult, strides=factors[-1], dtype=self.dtype)(h)
                skips.append(h)
            for _ in range(self.blocks):
                h = block(h, self.width * mult, attend)
                skips.append(h)
        h = block(h, h.shape[-1], True)
        h = block(h, h.shape[-1], False)
        for level, (mult, attend) in reversed(list(enumerate(levels))):
            for _ in range(self.blocks + 1):
                h = block(jnp.concatenate([h, skips.pop()], axis=-1), self.width * mult, attend)
            if level:
                h = Conv(self.width * mult, up=factors.pop(), dtype=self.dtype)(h)
        return Conv(z.shape[-1], zero=True, dtype=self.dtype)(nn.silu(GroupNorm()(h))).astype(jnp.float32)
