"""Vector quantisation (van den Oord et al. 2017), its codebook a pure function of the parameters before it.

The codebook is two leaves of the parameters, moving averages of how often each code is chosen and of the sum of what
chose it (App. A.1 there); a code is their quotient. An average is what gradient descent with rate 1 does to
(old - new)^2 / 2, so `follow` states it as a loss: codebooks train, resume and shard as all parameters do.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from launch.loop import gradient_only

DECAY = 0.97  # of the averages: about 30 batches
BLOCK = 1024  # codes compared at a time
DEAD = 0.05  # a code chosen less often than this, in units of the mean, is given a new place


class Quantised(NamedTuple):
    """Nearest codes: `z_q` (B, *s, c) and their numbers `index` (B, *s)."""

    z_q: jax.Array
    index: jax.Array


def init(codes: int, channels: int) -> Any:
    """A codebook that nothing has chosen yet: every code is dead, so the first batch gives each a place in the data."""
    return {"total": {"zero": jnp.zeros((codes, channels))}, "count": {"zero": jnp.zeros(codes)}}


def codes(codebook: Any) -> jax.Array:
    """The codes (K, c)."""
    return codebook["total"]["zero"] / jnp.maximum(codebook["count"]["zero"], DEAD / 2)[:, None]


def lookup(codebook: Any, z: jax.Array) -> Quantised:
    """The code nearest to every vector of `z` (B, *s, c), the first of several as near; `BLOCK` codes at a time, which
    bounds the memory that a large codebook takes."""
    e_KxC = codes(codebook)
    best, index = jnp.full(z.shape[:-1], jnp.inf), jnp.zeros(z.shape[:-1], jnp.int32)
    for start in range(0, len(e_KxC), BLOCK):
        part = e_KxC[start : start + BLOCK]
        distance = (part**2).sum(-1) - 2 * jnp.einsum("...c,kc->...k", z, part, precision="highest")
        nearest, least = distance.argmin(-1).astype(jnp.int32), distance.min(-1)
        index = jnp.where(least < best, start + nearest, index)
        best = jnp.minimum(least, best)
    return Quantised(e_KxC[index], index)


def straight_through(z: jax.Array, z_q: jax.Array) -> jax.Array:
    """`z_q`, whose gradient goes to `z` as if nothing had been replaced."""
    return z + jax.lax.stop_gradient(z_q - z)


def commitment(z: jax.Array, z_q: jax.Array) -> jax.Array:
    """Mean squared distance of encodings from their codes, which draws the encoder to them."""
    return ((z - jax.lax.stop_gradient(z_q)) ** 2).mean()


def follow(codebook: Any, z: jax.Array, index: jax.Array, key: jax.Array) -> jax.Array:
    """Zero, with the gradient that takes the codebook, under `optimiser`, to its averages after this batch.

    Counts are in units of their mean, N / K for N vectors and K codes. Dead codes move to vectors of the batch, drawn
    with replacement, and start with a count of one.
    """
    z_NxC, index_N = jax.lax.stop_gradient(z.reshape(-1, z.shape[-1])), index.ravel()
    total, count = codebook["total"]["zero"], codebook["count"]["zero"]
    N, K = len(z_NxC), len(count)
    chosen = jax.ops.segment_sum(jnp.ones(N), index_N, K) * (K / N)
    sums = jax.ops.segment_sum(z_NxC, index_N, K) * (K / N)
    new_count = DECAY * count + (1 - DECAY) * chosen
    new_total = DECAY * total + (1 - DECAY) * sums
    dead = new_count < DEAD
    places = z_NxC[jax.random.randint(key, (K,), 0, N)]
    new_count = jnp.where(dead, 1.0, new_count)
    new_total = jnp.where(dead[:, None], places, new_total)
    new_total, new_count = jax.lax.stop_gradient((new_total, new_count))
    return gradient_only(((total - new_total) ** 2).sum() / 2 + ((count - new_count) ** 2).sum() / 2)


def optimiser() -> optax.GradientTransformation:
    """What `follow` is stated for."""
    return optax.sgd(1.0)


def usage(index: jax.Array, codes: int) -> dict[str, jax.Array]:
    """`codes_used`, the share of codes chosen at all in this batch, and `perplexity`, exp of the entropy of the choice."""
    share = jax.ops.segment_sum(jnp.ones(index.size), index.ravel(), codes) / index.size
    entropy = -jnp.where(share > 0, share * jnp.log(jnp.maximum(share, 1e-12)), 0.0).sum()
    return {"codes_used": (share > 0).mean(), "perplexity": jnp.exp(entropy)}
