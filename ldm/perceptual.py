"""A perceptual loss with nothing to download: derivatives of a Gaussian at several scales, 2D and 3D.

First and second derivatives are a steerable basis (Freeman and Adelson 1991), what the first layer of a trained network
looks like. Two images differ by their responses (structure) and by the local energy of their responses (texture, as in
Portilla and Simoncelli 2000): a blurred edge is wrong in the first, missing fine grain in the second, which a sum of
pixel errors hardly sees. Each band is measured against what the real images have in it, so fine scales count like coarse ones.
"""

import itertools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from launch.layers import conv
from ldm.blocks import pool

SCALES = 3  # each half the size of the one before, on axes that keep `SHORTEST` positions
SHORTEST = 4
TAPS = ((0.25, 0.5, 0.25), (-0.5, 0.0, 0.5), (0.5, -1.0, 0.5))  # a Gaussian and its derivatives, binomial
CELL = 4  # positions along each axis over which energy is local
FLOOR = 1e-3  # of responses, in units of the image: a constant image has no band to be measured against


def distance(x_hat: jax.Array, x: jax.Array) -> jax.Array:
    """Perceptual distance of a batch `x_hat` from the real `x`, both (B, *S, C) in [-1, 1]: a scalar, 0 where they are
    equal and about 1 where `x_hat` has nothing of `x` in any band.

    Mean over scales and filters of |r_hat - r| / mean |r|, and of the same for the local energy of r, half each.
    """
    terms = []
    for r_hat, r in zip(bank(x_hat), bank(x), strict=True):
        for a, b in ((r_hat, r), (energy(r_hat), energy(r))):
            rest = tuple(range(b.ndim - 1))
            terms.append((jnp.abs(a - b).mean(rest) / (jnp.abs(b).mean(rest) + FLOOR)).mean())
    return jnp.stack(terms).mean()


def filters(rank: int) -> np.ndarray:
    """All products, over the axes, of `TAPS` that have order 1 or 2 in sum: (3, ..., 3, 1, F), F = 5 in 2D and 9 in 3D."""
    orders = [o for o in itertools.product(range(3), repeat=rank) if 1 <= sum(o) <= 2]
    outer = [math.prod(np.ix_(*(np.array(TAPS[o]) for o in order))) for order in orders]
    return np.stack(outer, -1)[..., None, :].astype(np.float32)


def bank(x: jax.Array) -> Iterator[jax.Array]:
    """Responses of `x` (B, *S, C) to every filter at every scale, each (B C, *S / 2^scale, F), finest first."""
    rank = x.ndim - 2
    x = jnp.moveaxis(x, -1, 1).reshape(-1, *x.shape[1:-1], 1)
    inside = (slice(None), *(slice(1, -1),) * rank)
    for scale in range(SCALES):
        if scale:
            x = pool(x, [2 if n >= 2 * SHORTEST else 1 for n in x.shape[1:-1]])
        bordered = jnp.pad(x, [(0, 0), *((1, 1),) * rank, (0, 0)], mode="edge")
        yield conv(bordered, filters(rank), (1,) * rank)[inside]


def energy(r: jax.Array) -> jax.Array:
    """Standard deviation of responses in cells of at most `CELL` positions a side."""
    return jnp.sqrt(pool(r**2, [min(CELL, n) for n in r.shape[1:-1]]) + FLOOR**2)
