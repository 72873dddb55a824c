"""Blocks of the networks: residual block, self-attention, down- and up-sampling. Any rank, channel last."""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from launch.layers import Conv, Dense, GroupNorm, once


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
        return once(x + h)


class Attention(nn.Module):
    """Multi-head self-attention over all positions, softmax in fp32."""

    heads: int = 4
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        if channels % self.heads:
            raise ValueError(f"{self.heads} attention heads cannot share {channels} channels: change heads or widths")
        h = _attend(Dense(3 * channels, dtype=self.dtype)(GroupNorm()(x)), self.heads)
        return once(x + Dense(channels, zero=True, dtype=self.dtype)(h))


@jax.jit(static_argnums=1)
def _attend(qkv: jax.Array, heads: int) -> jax.Array:
    """Attention between all positions of (B, *S, 3 C), queries, keys and values one after the other: (B, *S, C)."""
    batch, *_, width = qkv.shape
    q, k, v = (a.reshape(batch, -1, heads, width // (3 * heads)) for a in jnp.split(qkv, 3, axis=-1))
    return jax.nn.dot_product_attention(q, k, v).reshape(*qkv.shape[:-1], width // 3)


def recomputed(block: type[nn.Module], remat: bool, static: tuple[int, ...] = ()) -> type[nn.Module]:
    """`block`; where `remat`, one of the same parameters that keeps its inputs for the backward pass and computes the rest
    again (Chen et al. 2016). `static` are the numbers of arguments that are no arrays, `self` being 0."""
    if not remat:
        return block
    lean = nn.remat(block, static_argnums=static)
    lean.__name__ = block.__name__  # parameters are named after it
    return lean


def pool(x: jax.Array, factors: Sequence[int]) -> jax.Array:
    """Means of blocks of `factors` positions of (B, *S, C); what is left over at the end of an axis is dropped."""
    for axis, factor in enumerate(factors, start=1):
        n = x.shape[axis] // factor
        x = jax.lax.slice_in_dim(x, 0, n * factor, axis=axis)
        x = x.reshape(*x.shape[:axis], n, factor, *x.shape[axis + 1 :]).mean(axis + 1)
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


def levels_of(
    section: str, size: tuple[int, ...], widths: Sequence[int], strides: Sequence, patch: int | Sequence[int] = 1
) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...], tuple[int, ...]]:
    """(`strides` between levels, and `patch` before them, as one int per axis each; the size of the smallest level).

    Raises:
      ValueError: naming the key of `section`, where the factors do not divide the size, or numbers of levels differ.
    """
    each = lambda v: (int(v),) * len(size) if isinstance(v, int) else tuple(int(n) for n in v)
    patch, strides = each(patch), tuple(each(s) for s in strides)
    if len(strides) != len(widths) - 1:
        raise ValueError(
            f"config.{section}.strides has {len(strides)} entries; widths {tuple(widths)} need {len(widths) - 1}"
        )
    if any(len(s) != len(size) for s in (*strides, patch)):
        raise ValueError(f"config.{section}: strides {strides} and patch {patch} must fit images of size {size}")
    factors = [math.prod(s[axis] for s in (*strides, patch)) for axis in range(len(size))]
    for axis, (extent, factor) in enumerate(zip(size, factors, strict=True)):
        if extent % factor:
            raise ValueError(
                f"config.data.size[{axis}]={extent} must be a multiple of {factor}, the factor of config.{section}"
            )
    return strides, patch, tuple(n // f for n, f in zip(size, factors, strict=True))
