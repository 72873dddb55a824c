"""The part of a neighbour search that runs on the devices: products of blocks, and what is kept of them.

On a mesh the queries are split over `data` and the keys over the other axes; each share of the keys keeps the tiles of
its own, and only these are merged.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from launch import early, machine, mesh

TILE = 64  # keys a maximum is taken over: few enough to look into again, enough to make the maxima 64 times fewer
DEPTH = 1024  # dimensions summed in one go; longer rows are summed in parts, which bounds the rounding error
# Rows of queries and of keys in a block, and blocks of each in one call. On a CPU jaxlib 0.12 takes the maxima of tiles
# while it multiplies, so that a block of products is never in memory; one that is should stay in the cache. The host looks
# into a tile once a call, so an accelerator, for which the host is slow, takes many queries a call.
_JOINED, _IN_CACHE, _ACCELERATOR = ((16384, 2048), (1, 16)), ((1024, 1024), (16, 32)), ((8192, 8192), (64, 8))
_JOINS = not early.old_kernels()
_RESIDENT = {True: 1 << 28, False: 1 << 32}  # bytes of keys that stay on the devices between calls; more stream again
QUERIES, KEYS = mesh.AXES[:1], mesh.AXES[1:]  # axes of the mesh that the two are split over


class Plan(NamedTuple):
    queries: int  # rows of one block of queries
    query_rows: int  # rows of queries in one call to the devices
    keys: int
    key_rows: int
    key_shares: int  # devices, or groups of them, that hold different keys


def plan(n, m, d, block, over, *, maxima: bool) -> Plan:
    """Even shares, so that padding is small and one shape serves all calls; keys in whole tiles, so tiles never move.

    maxima: only maxima of tiles are taken of the products, and these are of a kind that the CPU multiplies fast.
    """
    joined = maxima and d <= DEPTH and _JOINS
    rows, blocks = (_JOINED if joined else _IN_CACHE) if _cpu() else _ACCELERATOR
    block = block or [max(TILE, min(most, (1 << 22) // d)) for most in rows]
    if min(block) < 1:
        raise ValueError(f"block = {block}: both sizes must be positive")
    split = [math.prod(over.shape[axis] for axis in axes) if over else 1 for axes in (QUERIES, KEYS)]
    shares = []
    for total, size, unit, most, parts in zip((n, m), block, (1, TILE), blocks, split, strict=True):
        calls = -(-total // (size * most * parts)) or 1
        blocks = -(-total // (size * calls * parts)) * parts or parts
        rows = -(-total // (calls * blocks * unit)) * unit or unit
        if unit == 1 and rows < 512:  # few queries: of few shapes, each of which is a compilation
            rows = min(size, max(64, 1 << (rows - 1).bit_length()))
        shares += [rows, rows * blocks]
    return Plan(*shares, split[1])


def _cpu() -> bool:
    return jax.default_backend() == "cpu"


def multiplies_bf16() -> bool:
    """Whether products in bfloat16 are so much faster than in float32 that a search had better begin with them: on CPUs with
    matrix units for them (Intel's AMX), four times."""
    return _cpu() and _JOINS and "amx_bf16" in machine.processor()


def current():
    """The current mesh, or None where it is one device."""
    over = jax.sharding.get_mesh()
    return None if over.empty or over.size == 1 else over


def _spec(over, *axes: tuple[str, ...]) -> jax.P:
    """As the compiler writes it, so that what it returns compiles nothing anew: without axes of one device."""
    split = [tuple(axis for axis in one if over and over.shape[axis] > 1) for one in axes]
    split = [(one[0] if len(one) == 1 else one) or None for one in split]
    while split and split[-1] is None:
        split.pop()
    return jax.P(*split)


def _on(over, local: Callable, in_specs, out_specs) -> Callable:
    return (
        local
        if over is None
        else jax.shard_map(local, mesh=over, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    )


def put(x: np.ndarray, over, *axes) -> jax.Array:
    """A host array, of which every process has the whole, on the devices, split over these axes of the mesh."""
    if over is None:
        return jnp.asarray(x)
    return jax.make_array_from_callback(x.shape, NamedSharding(over, _spec(over, *axes)), lambda part: x[part])


def nothing(shape, over) -> tuple[jax.Array, jax.Array, jax.Array]:
    peaks, tiles = np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int32)
    return *(put(x, over, KEYS, QUERIES) for x in (peaks, tiles)), put(np.zeros(shape[0], np.float32), over, KEYS)


def reader(key_MxD, plan: Plan, over):
    """first -> the padded blocks of keys on the devices, (R, keys, D), and the number of the first key of each; small
    sets are put there once."""

    def read(first: int):
        starts = np.arange(first, first + plan.key_rows, plan.keys, dtype=np.int32)
        return padded(key_MxD, first, plan.key_rows, plan.keys, over, KEYS), put(starts, over, KEYS)

    return functools.cache(read) if math.prod(key_MxD.shape) * 4 <= _RESIDENT[_cpu()] else read


def padded(x_NxD, first: int, rows: int, block: int, over, axes):
    x = np.asarray(x_NxD[first : first + rows], np.float32)
    x = x if len(x) == rows else np.concatenate([x, np.repeat(x[-1:], rows - len(x), 0)])
    return put(x.reshape(-1, block, x.shape[1]), over, axes)


def merged(peak_HxSxQxc, tile_HxSxQxc, reach_H, n) -> tuple[np.ndarray, np.ndarray, float]:
    """Peaks and tiles (n, c) of the c largest peaks of all shares of the keys, and the largest norm."""
    if len(reach_H) == 1:
        peak_Nxc, tile_Nxc = (x.reshape(-1, x.shape[-1])[:n] for x in (peak_HxSxQxc, tile_HxSxQxc))
        return peak_Nxc, tile_Nxc, float(reach_H[0])
    c = peak_HxSxQxc.shape[-1]
    peak, tile = (np.moveaxis(x, 0, 2).reshape(-1, len(reach_H) * c)[:n] for x in (peak_HxSxQxc, tile_HxSxQxc))
    order = np.argsort(-peak, axis=1, kind="stable")[:, :c]
    return np.take_along_axis(peak, order, 1), np.take_along_axis(tile, order, 1), float(reach_H.max())


@functools.partial(jax.jit, donate_argnums=3, static_argnames=("over", "bf16"))
def keep(query_SxQxD, key_RxKxD, first_R, found, stop, *, over, bf16):
    """R blocks of keys, whose first are number `first_R`, against S of queries: of each share of the keys the running c
    tiles with the largest maxima. `found`: peaks and tiles (shares, S, Q, c), and the largest norm of a key (shares,)."""

    def local(query_SxQxD, key_RxKxD, first_R, found, stop):
        begin_RxG = first_R[:, None] + jnp.arange(0, key_RxKxD.shape[1], TILE)

        def against(query_QxD, peak_Qxc, tile_Qxc):
            maxima_RxQxG = jax.lax.map(lambda key_KxD: _maxima(products(query_QxD, key_KxD, bf16)), key_RxKxD)
            maxima_RxQxG = jnp.where(begin_RxG[:, None] < stop, maxima_RxQxG, -jnp.inf)
            return _largest(peak_Qxc, tile_Qxc, maxima_RxQxG, begin_RxG // TILE)

        peak, tile, reach = (x[0] for x in found)
        peak, tile = jax.lax.map(lambda one: against(*one), (query_SxQxD, peak, tile))
        reach = jnp.maximum(reach, jnp.sqrt(jnp.max(jnp.sum(key_RxKxD**2, -1))))
        return peak[None], tile[None], reach[None]

    queries, keys, both = (_spec(over, *axes) for axes in ((QUERIES,), (KEYS,), (KEYS, QUERIES)))
    found_spec = both, both, keys
    sharded = _on(over, local, (queries, keys, keys, found_spec, jax.P()), found_spec)
    return sharded(query_SxQxD, key_RxKxD, first_R, found, stop)


def _maxima(sim_QxK):
    """Of every tile of keys, (Q, G). XLA's compiler for CPUs joins a product with a `reduce_window`, and not with a reshape."""
    if _cpu():
        return jax.lax.reduce_window(sim_QxK, -jnp.inf, jax.lax.max, (1, TILE), (1, TILE), "VALID")
    return sim_QxK.reshape(len(sim_QxK), -1, TILE).max(-1)


def _largest(peak_Qxc, tile_Qxc, maxima_RxQxG, tile_RxG):
    """The c largest maxima, and their tiles, among those that were kept and those of R more blocks.

    On a CPU each tile in turn is put in its place for all queries at once: `jax.lax.top_k` would run on one core.
    """
    q, c = peak_Qxc.shape
    if not _cpu() or c > 16:
        peak = jnp.concatenate([peak_Qxc, jnp.moveaxis(maxima_RxQxG, 0, 1).reshape(q, -1)], 1)
        tile = jnp.concatenate([tile_Qxc, jnp.broadcast_to(tile_RxG.ravel(), (q, tile_RxG.size))], 1)
        peak, best = jax.lax.top_k(peak, c)
        return peak, jnp.take_along_axis(tile, best, 1)

    def place(kept, one):
        (peak_cxQ, tile_cxQ), (peak_Q, tile) = kept, one
        above = [peak_Q > peak for peak in peak_cxQ]  # they descend: the new one goes before all that it is above
        moved = lambda kept, new: [
            jnp.where(above[i], jnp.where(above[i - 1], kept[i - 1], new) if i else new, kept[i]) for i in range(c)
        ]
        return tuple(jnp.stack(moved(*pair)) for pair in ((peak_cxQ, peak_Q), (tile_cxQ, tile))), None

    maxima_GxQ = jnp.swapaxes(maxima_RxQxG, 1, 2).reshape(-1, q)
    (peak_cxQ, tile_cxQ), _ = jax.lax.scan(place, (peak_Qxc.T, tile_Qxc.T), (maxima_GxQ, tile_RxG.ravel()), unroll=4)
    return peak_cxQ.T, tile_cxQ.T


@functools.partial(jax.jit, donate_argnums=3, static_argnames="over")
def count(query_SxQxD, key_RxKxD, first_R, count_HxSxQx2, high, low, stop, *, over):
    def local(query_SxQxD, key_RxKxD, first_R, count_1xSxQx2, high, low, stop):
        position = first_R[:, None] + jnp.arange(key_RxKxD.shape[1])

        def against(one):
            def count(total_Qx2, block):
                key_KxD, position = block
                sim = jnp.where(position < stop, products(query_QxD, key_KxD), -jnp.inf)
                above = [jnp.sum(sim > bound, 1, dtype=jnp.int32) for bound in (high, low)]
                return total_Qx2 + jnp.stack(above, -1), None

            query_QxD, total_Qx2 = one
            return jax.lax.scan(count, total_Qx2, (key_RxKxD, position))[0]

        return jax.lax.map(against, (query_SxQxD, count_1xSxQx2[0]))[None]

    queries, keys, both = (_spec(over, *axes) for axes in ((QUERIES,), (KEYS,), (KEYS, QUERIES)))
    sharded = _on(over, local, (queries, keys, keys, both, *[jax.P()] * 3), both)
    return sharded(query_SxQxD, key_RxKxD, first_R, count_HxSxQx2, high, low, stop)


def products(query_QxD, key_KxD, bf16: bool = False):
    """All dot products in true float32 (accelerators would use fewer bits), summed in parts of DEPTH dimensions; or of
    factors rounded to bfloat16."""
    if bf16:
        query_QxD, key_KxD = (x.astype(jnp.bfloat16) for x in (query_QxD, key_KxD))
    multiply = functools.partial(
        jnp.einsum, "qd,kd->qk", precision=None if bf16 else "highest", preferred_element_type=jnp.float32
    )
    whole, rest = divmod(query_QxD.shape[1], DEPTH)
    sim = jnp.zeros((len(query_QxD), len(key_KxD)), jnp.float32)
    if (whole == 1 and not rest) or not whole:
        return multiply(query_QxD, key_KxD)

    def add(part, sim):
        query, key = (jax.lax.dynamic_slice_in_dim(x, part * DEPTH, DEPTH, 1) for x in (query_QxD, key_KxD))
        return sim + multiply(query, key)

    sim = jax.lax.fori_loop(0, whole, add, sim)
    return sim + multiply(query_QxD[:, whole * DEPTH :], key_KxD[:, whole * DEPTH :]) if rest else sim
