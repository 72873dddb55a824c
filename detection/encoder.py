"""Encoders of the copy detector, 2D and 3D by the same modules: images (B, *S, C) -> embeddings (B, dim)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from launch.layers import Conv, Dense, GroupNorm


class ResNet(nn.Module):
    """Residual network (He et al. 2016) with GroupNorm for BatchNorm, so that it has parameters and nothing else.

    `bottleneck=True, widths=(64, 128, 256, 512), blocks=(3, 4, 6, 3), stem=7` is ResNet-50, whose 128 outputs Dar et al.
    use as the embedding directly (no projection head). They start from ImageNet weights, which this does not.
    """

    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    bottleneck: bool
    stem: int
    dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        del train
        h = Conv(self.widths[0], kernel=self.stem, strides=2, dtype=self.dtype)(x)
        h = nn.relu(GroupNorm()(h))
        if self.stem == 7:
            rank = x.ndim - 2
            h = nn.max_pool(h, (3,) * rank, (2,) * rank, [(1, 1)] * rank)
        for level, (width, count) in enumerate(zip(self.widths, self.blocks, strict=True)):
            for i in range(count):
                strides = 2 if level and i == 0 else 1
                h = _Residual(width, strides, self.bottleneck, self.dtype)(h)
        pooled = h.astype(jnp.float32).mean(tuple(range(1, x.ndim - 1)))
        return Dense(self.dim)(pooled)


class _Residual(nn.Module):
    width: int
    strides: int
    bottleneck: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        out = self.width * (4 if self.bottleneck else 1)
        plan = [(1, 1), (3, self.strides), (1, 1)] if self.bottleneck else [(3, self.strides), (3, 1)]
        h = x
        for i, (kernel, strides) in enumerate(plan):
            last = i == len(plan) - 1
            h = GroupNorm()(Conv(out if last else self.width, kernel, strides, dtype=self.dtype)(h))
            h = h if last else nn.relu(h)
        if x.shape != h.shape:
            x = GroupNorm()(Conv(out, kernel=1, strides=self.strides, dtype=self.dtype)(x))
        return nn.relu(x + h)


class Grid(nn.Module):
    """A small residual network whose embedding keeps where things are: what tells two patients apart is spatial detail,
    and the mean over positions of `ResNet` forgets it.

    `fold` positions an axis go into channels first (a copy is seen at a quarter of the resolution, and training is
    several times faster). The embedding is a linear map of the mean over positions, beside the positions themselves with
    `squeeze` channels, averaged to at most `grid` positions an axis.
    """

    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    fold: int
    squeeze: int
    dim: int
    grid: int = 8
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        del train
        h = nn.relu(GroupNorm()(Conv(self.widths[0], dtype=self.dtype)(folded(x, self.fold))))
        for level, (width, count) in enumerate(zip(self.widths, self.blocks, strict=True)):
            for i in range(count):
                h = _Residual(width, 2 if level and i == 0 else 1, False, self.dtype)(h)
        h = h.astype(jnp.float32)
        mean = h.mean(tuple(range(1, x.ndim - 1)))
        kept = Conv(self.squeeze, kernel=1)(h)
        size = tuple(min(n, self.grid) for n in kept.shape[1:-1])
        if size != kept.shape[1:-1]:
            kept = jax.image.resize(kept, (len(x), *size, self.squeeze), "linear", antialias=True)
        return Dense(self.dim)(jnp.concatenate([mean, kept.reshape(len(x), -1)], axis=-1))


def folded(x: jax.Array, fold: int) -> jax.Array:
    """(B, *S, C) with blocks of `fold` positions an axis moved into channels; sides that do not divide repeat their edge."""
    rank = x.ndim - 2
    x = jnp.pad(x, [(0, 0), *((0, -n % fold) for n in x.shape[1:-1]), (0, 0)], mode="edge")
    size = [n // fold for n in x.shape[1:-1]]
    x = x.reshape(len(x), *(part for n in size for part in (n, fold)), x.shape[-1])
    x = x.transpose(0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1)
    return x.reshape(len(x), *size, -1)


class Strided(nn.Module):
    """The paper's 3D detector: strided convolutions down to a small grid of 8 channels, then 512 -> 128 -> 32.

    `strides` gives one factor per axis and level; MRNet's 32x256x256 goes to 4x4x4 by 8 in depth and 64 in plane.
    """

    strides: tuple[tuple[int, ...], ...]
    hidden: int
    dim: int
    dropout: float = 0.5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        h, width = x, self.hidden
        for strides in self.strides:
            width *= 2
            h = nn.relu(GroupNorm()(Conv(width, strides=tuple(strides), dtype=self.dtype)(h)))
        h = Conv(8, kernel=1)(h).reshape(x.shape[0], -1)
        h = nn.relu(Dense(128)(h))
        return Dense(self.dim)(nn.Dropout(self.dropout, deterministic=not train)(h))


def build(arch: str, **settings: Any) -> nn.Module:
    """The encoder called `arch`, 'grid', 'resnet' or 'strided'. Raises ValueError for another."""
    kinds = {"grid": Grid, "resnet": ResNet, "strided": Strided}
    if arch not in kinds:
        raise ValueError(f"config.detector.arch={arch!r}: use one of {', '.join(kinds)}")
    return kinds[arch](**{k: v for k, v in settings.items() if k in kinds[arch].__dataclass_fields__})
