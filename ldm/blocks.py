"""Blocks of the autoencoder and the UNet: residual block, self-attention, up-sampling. Any rank, channel last."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from launch.layers import Conv, Dense, GroupNorm


class ResBlock(nn.Module):
    """Pre-activation residual block; `emb` (B, E), where given, scales and shifts the second norm (Dhariwal and Nichol 2021, App. A)."""

    features: int
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, emb: jax.Array | None = None, train: bool = False) -> jax.Array:
        h = Conv(self.features, dtype=self.dtype)(nn.silu(GroupNorm()(x)))
        h = GroupNorm()(h)
        if emb is not None:
            film = Dense(2 * self.features, zero=True, dtype=self.dtype)(nn.silu(emb))
            scale, shift = jnp.split(film[(slice(None), *(None,) * (x.ndim - 2))], 2, axis=-1)
            h = h * (1 + scale) + shift
        h = nn.Dropout(self.dropout, deterministic=not train)(nn.silu(h))
        h = Conv(self.features, zero=True, dtype=self.dtype)(h)
        if x.shape[-1] != self.features:
            x = Conv(self.features, kernel=1, dtype=self.dtype)(x)
        return x + h


class Attention(nn.Module):
    """Multi-head self-attention over all positions, softmax in fp32."""

    heads: int = 4
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, *_, channels = x.shape
        qkv = Dense(3 * channels, dtype=self.dtype)(GroupNorm()(x))
        q, k, v = (a.reshape(batch, -1, self.heads, channels // self.heads) for a in jnp.split(qkv, 3, axis=-1))
        h = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
        return x + Dense(channels, zero=True, dtype=self.dtype)(h)


def upsample(x: jax.Array, factors: tuple[int, ...]) -> jax.Array:
    """Nearest-neighbour up-sampling of (B, *S, C) by an integer factor per spatial axis."""
    for axis, factor in enumerate(factors, start=1):
        if factor > 1:
            x = jnp.repeat(x, factor, axis=axis)
    return x


def fold(x: jax.Array, factors: tuple[int, ...]) -> jax.Array:
    """Moves each `factors` patch of positions into channels: (B, *S, C) -> (B, *S / factors, prod(factors) C)."""
    batch, *space, channels = x.shape
    split = [n for size, f in zip(space, factors, strict=True) for n in (size // f, f)]
    rank = len(space)
    order = (0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1)
    cells = [size // f for size, f in zip(space, factors, strict=True)]
    return x.reshape(batch, *split, channels).transpose(order).reshape(batch, *cells, -1)


def unfold(x: jax.Array, factors: tuple[int, ...]) -> jax.Array:
    """Inverse of `fold`."""
    batch, *cells, _ = x.shape
    rank = len(cells)
    order = (
        0,
        *(axis for pair in zip(range(1, rank + 1), range(rank + 1, 2 * rank + 1), strict=True) for axis in pair),
    )
    split = x.reshape(batch, *cells, *factors, -1).transpose(*order, 2 * rank + 1)
    return split.reshape(batch, *(c * f for c, f in zip(cells, factors, strict=True)), -1)
