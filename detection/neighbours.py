"""Exact nearest neighbours by correlation, in memory that depends on the block and not on the number of images.

A step on the device multiplies one block of queries with one block of keys in float32 and keeps, for each query, only
the largest product of every tile of 64 consecutive keys, and of those maxima the few largest. The top k keys of a
query lie in the k tiles with the largest maxima, so only these are looked into again, on the host and in float64.
Every similarity that is returned is a float64 dot product rounded to float32, and every choice is checked against a
bound of the error of the float32 products; the rare query that fails the check (more equal keys than tiles kept) is
searched again in float64. The result is therefore the same for every block size and device.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_TILE = 64  # keys a maximum is taken over: few enough to look into again, enough to make the maxima 64 times fewer
_SPARE = 3  # tiles kept beyond k, so that near ties seldom need the search in float64
_DEPTH = 1024  # dimensions summed in one go; longer rows are summed in parts, which bounds the rounding error
_BLOCKS = 8  # blocks each way in one call: fewer calls, and the products' memory is taken once a call
_RESIDENT = 1 << 28  # bytes of keys that may stay on the device between query blocks; more than this is streamed again


class Neighbours(NamedTuple):
    """The k nearest keys of each query: `sim` (N, k) float32, descending, and `index` (N, k) int32 into the keys."""

    sim: np.ndarray
    index: np.ndarray


def standardise(x_NxD) -> np.ndarray:
    """Centre each row and divide it by its norm, so that the dot product of two rows is their Pearson correlation.

    x_NxD: N rows of D >= 2 numbers, of any unit. Returns (N, D) float32 of unit norm. A row whose variation is below
    the resolution of float32 (a blank image) becomes zeros: it is similar to nothing, 0 to everything. Raises
    ValueError on NaN or infinity.
    """
    x_NxD = _matrix(x_NxD, "x")
    out_NxD = np.empty(x_NxD.shape, np.float32)
    rows = max(1, (1 << 22) // x_NxD.shape[1])
    for start in range(0, len(x_NxD), rows):
        x = np.asarray(x_NxD[start : start + rows], np.float64)
        if not np.isfinite(x).all():
            raise ValueError(f"rows {start} to {start + len(x) - 1} hold NaN or infinity; mend the embeddings first")
        reach = np.abs(x).max(1, keepdims=True)
        x = x - x.mean(1, keepdims=True)
        norm = np.sqrt(np.einsum("nd,nd->n", x, x))[:, None]
        blank = norm <= 1e-6 * np.sqrt(x.shape[1]) * reach
        out_NxD[start : start + rows] = np.where(blank, 0.0, x / np.where(blank, 1.0, norm))
    return out_NxD


def nearest(query_NxD, key_MxD, *, k: int = 1, block: tuple[int, int] | None = None) -> Neighbours:
    """The k keys with the largest dot product to each query; equal similarities go to the smaller index.

    query_NxD, key_MxD: float32 rows as `standardise` gives them; numpy arrays or memory maps, read part by part, so
    they may be larger than the device's memory. block: (queries, keys) multiplied at once; it changes the speed and
    the memory, never the result. Raises ValueError for k < 1, k > M, unequal D, or NaN.
    """
    query_NxD, key_MxD = _pair(query_NxD, key_MxD)
    n, m = len(query_NxD), len(key_MxD)
    if not 1 <= k <= m:
        raise ValueError(f"k = {k} neighbours asked of {m} keys; k must lie in 1 to {m}")
    plan = _plan(n, m, query_NxD.shape[1], block)
    read_keys = _reader(key_MxD, plan.keys, plan.key_rows)
    sim_Nxk, index_Nxk = np.empty((n, k), np.float32), np.empty((n, k), np.int32)

    def settle(start, peak_SxQxc, tile_SxQxc, reach):
        query = query_NxD[start : start + plan.query_rows]
        peak_Nxc, tile_Nxc = (np.asarray(x).reshape(-1, x.shape[-1])[: len(query)] for x in (peak_SxQxc, tile_SxQxc))
        found = _look_into(query, key_MxD, peak_Nxc, tile_Nxc, _error(query, float(reach)), k)
        sim_Nxk[start : start + len(query)], index_Nxk[start : start + len(query)] = found

    pending = ()
    for start in range(0, n, plan.query_rows):
        query = _padded(query_NxD, start, plan.query_rows, plan.queries)
        shape = query.shape[:2] + (k + _SPARE,)
        best = jnp.full(shape, -jnp.inf, jnp.float32), jnp.full(shape, -1, jnp.int32), jnp.float32(0)
        for first in range(0, m, plan.key_rows):
            best = _keep_tiles(query, read_keys(first), *best, first, m)
        if pending:  # the host settles one group of queries while the device multiplies the next
            settle(*pending)
        pending = (start, *best)
    if pending:
        settle(*pending)
    return Neighbours(sim_Nxk, index_Nxk)


def count_above(query_NxD, key_MxD, tau: float, *, block: tuple[int, int] | None = None) -> np.ndarray:
    """How many keys have a similarity above tau (strictly) to each query: (N,) int64.

    Agrees with `nearest`: the count is positive exactly where the nearest similarity exceeds tau. Inputs and errors
    as there.
    """
    query_NxD, key_MxD = _pair(query_NxD, key_MxD)
    if not np.isfinite(tau):
        raise ValueError(f"tau = {tau} is not a similarity")
    n, m = len(query_NxD), len(key_MxD)
    plan = _plan(n, m, query_NxD.shape[1], block)
    read_keys = _reader(key_MxD, plan.keys, plan.key_rows)
    reach = max((float(_norms(key_MxD[i : i + plan.keys]).max()) for i in range(0, m, plan.keys)), default=0.0)
    count_N = np.zeros(n, np.int64)
    for start in range(0, n, plan.query_rows):
        stop = min(start + plan.query_rows, n)
        query = _padded(query_NxD, start, plan.query_rows, plan.queries)
        slack = float(_error(query_NxD[start:stop], reach).max())
        counts = jnp.zeros((2, *query.shape[:2]), jnp.int32)
        for first in range(0, m, plan.key_rows):
            counts = _count(query, read_keys(first), counts, tau + slack, tau - slack, first, m)
        sure, maybe = np.asarray(counts).reshape(2, -1)[:, : stop - start]
        count_N[start:stop] = sure
        doubtful = start + np.flatnonzero(sure != maybe)
        if len(doubtful):  # a product within rounding of tau: count these queries again in float64
            count_N[doubtful] = _count_exactly(query_NxD[doubtful], key_MxD, tau, plan.keys)
    return count_N


@functools.partial(jax.jit, donate_argnums=(2, 3))
def _keep_tiles(query_SxQxD, key_RxKxD, peak_SxQxc, tile_SxQxc, reach, first, stop):
    """R blocks of keys, from key number `first` on, against S of queries: the running c tiles with the largest maxima."""
    blocks, rows, _ = key_RxKxD.shape
    position = first + jnp.arange(blocks * rows).reshape(blocks, -1, _TILE)
    tile_G = position[..., 0].ravel() // _TILE

    def against(query_QxD, peak_Qxc, tile_Qxc):
        def maxima(key_KxD, position):
            sim = _products(query_QxD, key_KxD).reshape(len(query_QxD), -1, _TILE)
            return jnp.where(position < stop, sim, -jnp.inf).max(-1)

        peak_RxQxG = jax.lax.map(lambda one: maxima(*one), (key_RxKxD, position))
        peak = jnp.concatenate([peak_Qxc, jnp.moveaxis(peak_RxQxG, 0, 1).reshape(len(query_QxD), -1)], 1)
        tile = jnp.concatenate([tile_Qxc, jnp.broadcast_to(tile_G, (len(query_QxD), len(tile_G)))], 1)
        peak, best = jax.lax.top_k(peak, peak_Qxc.shape[1])
        return peak, jnp.take_along_axis(tile, best, 1)

    peak_SxQxc, tile_SxQxc = jax.lax.map(lambda one: against(*one), (query_SxQxD, peak_SxQxc, tile_SxQxc))
    return peak_SxQxc, tile_SxQxc, jnp.maximum(reach, jnp.sqrt(jnp.max(jnp.sum(key_RxKxD**2, -1))))


@functools.partial(jax.jit, donate_argnums=2)
def _count(query_SxQxD, key_RxKxD, count_2xSxQ, high, low, first, stop):
    blocks, rows, _ = key_RxKxD.shape
    position = first + jnp.arange(blocks * rows).reshape(blocks, rows)

    def against(query_QxD):
        def count(total_2xQ, block):
            key_KxD, position = block
            sim = jnp.where(position < stop, _products(query_QxD, key_KxD), -jnp.inf)
            return total_2xQ + jnp.stack([jnp.sum(sim > bound, 1, dtype=jnp.int32) for bound in (high, low)]), None

        return jax.lax.scan(count, jnp.zeros((2, len(query_QxD)), jnp.int32), (key_RxKxD, position))[0]

    return count_2xSxQ + jnp.moveaxis(jax.lax.map(against, query_SxQxD), 0, 1)


def _products(query_QxD, key_KxD):
    """All dot products in true float32 (accelerators would use fewer bits), summed in parts of _DEPTH dimensions."""
    multiply = functools.partial(jnp.einsum, "qd,kd->qk", precision="highest")
    whole, rest = divmod(query_QxD.shape[1], _DEPTH)
    sim = jnp.zeros((len(query_QxD), len(key_KxD)), jnp.float32)
    if (whole == 1 and not rest) or not whole:
        return multiply(query_QxD, key_KxD)

    def add(part, sim):
        query, key = (jax.lax.dynamic_slice_in_dim(x, part * _DEPTH, _DEPTH, 1) for x in (query_QxD, key_KxD))
        return sim + multiply(query, key)

    sim = jax.lax.fori_loop(0, whole, add, sim)
    return sim + multiply(query_QxD[:, whole * _DEPTH :], key_KxD[:, whole * _DEPTH :]) if rest else sim


def _look_into(query_NxD, key_MxD, peak_Nxc, tile_Nxc, error_N, k):
    """Exact top k from the kept tiles: (sim_Nxk, index_Nxk).

    With peaks wrong by at most e, the k-th best similarity is at least f = the k-th largest peak - e, a tile that
    holds one as large has a peak of at least f - e, and no key of a dropped tile exceeds the last kept peak + e.
    """
    n, keep = peak_Nxc.shape
    floor_N = peak_Nxc[:, k - 1] - error_N
    row, slot = np.nonzero((tile_Nxc >= 0) & (peak_Nxc >= (floor_N - error_N)[:, None]))
    tile = tile_Nxc[row, slot]
    order = np.argsort(tile, kind="stable")
    row, tile = row[order], tile[order]
    edges = np.flatnonzero(np.diff(tile, prepend=-1, append=-1))
    rows, pairs = [], []
    for low, high in itertools.pairwise(edges):
        first, asked = int(tile[low]) * _TILE, row[low:high]
        sim = _few_dots(query_NxD[asked], key_MxD[first : first + _TILE])
        hit, column = np.nonzero(sim >= floor_N[asked, None])
        rows.append(asked[hit])
        pairs.append(_pack(sim[hit, column], first + column))
    rows, pairs = np.concatenate(rows), np.concatenate(pairs)
    order = np.lexsort((~pairs, rows))
    start_N = np.searchsorted(rows[order], np.arange(n))
    sim_Nxk, index_Nxk = _unpack(pairs[order][start_N[:, None] + np.arange(k)])
    if keep < -(-len(key_MxD) // _TILE):  # else no tile was dropped
        unsure = np.flatnonzero(~(sim_Nxk[:, -1] > peak_Nxc[:, -1] + error_N))
        sim_Nxk[unsure], index_Nxk[unsure] = _search_exactly(query_NxD[unsure], key_MxD, k)
    return sim_Nxk, index_Nxk


def _search_exactly(query_NxD, key_MxD, k, rows=256, keys=8192):
    """Brute force in float64 with a running top k: the definition of what `nearest` returns, several times slower."""
    best_Nxk = np.full((len(query_NxD), k), np.iinfo(np.int64).min)
    for start in range(0, len(query_NxD), rows):
        part = slice(start, start + rows)
        for first in range(0, len(key_MxD), keys):
            sim = _dots(query_NxD[part], key_MxD[first : first + keys])
            packed = _pack(sim, np.arange(first, first + sim.shape[1]))
            best_Nxk[part] = _largest(np.concatenate([best_Nxk[part], packed], 1), k)
    return _unpack(best_Nxk)


def _count_exactly(query_NxD, key_MxD, tau, keys, rows=256):
    count_N = np.zeros(len(query_NxD), np.int64)
    for start in range(0, len(query_NxD), rows):
        part = slice(start, start + rows)
        for first in range(0, len(key_MxD), keys):
            count_N[part] += (_dots(query_NxD[part], key_MxD[first : first + keys]) > tau).sum(1)
    return count_N


def _dots(query_NxD, key_MxD) -> np.ndarray:
    return (np.asarray(query_NxD, np.float64) @ np.asarray(key_MxD, np.float64).T).astype(np.float32)


def _few_dots(query_NxD, key_MxD) -> np.ndarray:
    """`_dots` in parts so small that OpenBLAS stays in this thread: its idle threads spin and slow the device's step."""
    rows = max(16, (1 << 18) // key_MxD.size)
    return np.concatenate([_dots(query_NxD[i : i + rows], key_MxD) for i in range(0, len(query_NxD), rows)])


def _pack(sim, index) -> np.ndarray:
    """One int64 a pair, ordered by similarity and then by smaller index. Unique, so any selection is stable."""
    bits = (sim + np.float32(0)).view(np.int32)  # + 0 makes -0 equal to 0
    ordered = np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits).astype(np.int64)
    return (ordered << 32) | (0xFFFFFFFF - index.astype(np.int64))


def _unpack(packed) -> tuple[np.ndarray, np.ndarray]:
    ordered = (packed >> 32).astype(np.int32)
    sim = np.where(ordered < 0, ordered ^ np.int32(0x7FFFFFFF), ordered).view(np.float32)
    return sim, (0xFFFFFFFF - (packed & 0xFFFFFFFF)).astype(np.int32)


def _largest(packed_NxM, k) -> np.ndarray:
    if k == 1:
        return packed_NxM.max(1, keepdims=True)
    top = np.partition(packed_NxM, packed_NxM.shape[1] - k, axis=1)[:, -k:]
    return np.sort(top, axis=1)[:, ::-1]


def _error(query_NxD, reach: float) -> np.ndarray:
    """Bound of |float32 product - returned similarity|: Higham, Accuracy and Stability, section 3.1, and Cauchy-Schwarz."""
    d = query_NxD.shape[1]
    error_N = (min(d, _DEPTH) + -(-d // _DEPTH) + 2) * np.float32(2**-24) * _norms(query_NxD) * np.float32(reach)
    if not np.isfinite(error_N).all():
        raise ValueError("the embeddings hold NaN or infinity; mend them first")
    return error_N.astype(np.float32)


def _norms(x_NxD) -> np.ndarray:
    x = np.asarray(x_NxD, np.float32)
    return np.sqrt(np.einsum("nd,nd->n", x, x))


class _Plan(NamedTuple):
    queries: int  # rows of one block of queries
    query_rows: int  # rows of queries in one call to the device
    keys: int
    key_rows: int


def _plan(n, m, d, block) -> _Plan:
    """Even shares, so that padding is small and one shape serves all calls; keys in whole tiles, so tiles never move."""
    if block is None:
        rows = (
            1024 if jax.default_backend() == "cpu" else 8192
        )  # on a CPU the block of products should stay in the cache
        block = (max(_TILE, min(rows, (1 << 22) // d)),) * 2
    if min(block) < 1:
        raise ValueError(f"block = {block}: both sizes must be positive")
    shares = []
    for total, size, unit in ((n, block[0], 1), (m, block[1], _TILE)):
        calls = -(-total // (size * _BLOCKS)) or 1
        blocks = -(-total // (size * calls)) or 1
        rows = -(-total // (calls * blocks * unit)) * unit or unit
        shares += [rows, rows * blocks]
    return _Plan(*shares)


def _reader(key_MxD, keys, rows):
    """first -> (R, keys, D), the padded blocks of keys on the device; small sets are put there once."""
    read = functools.partial(_padded, key_MxD, rows=rows, block=keys)
    return functools.cache(read) if key_MxD.size * 4 <= _RESIDENT else read


def _padded(x_NxD, first: int, rows: int, block: int):
    x = np.asarray(x_NxD[first : first + rows], np.float32)
    x = x if len(x) == rows else np.concatenate([x, np.zeros((rows - len(x), x.shape[1]), np.float32)])
    return jnp.asarray(x.reshape(-1, block, x.shape[1]))


def _pair(query, key):
    query, key = _matrix(query, "query"), _matrix(key, "key")
    if query.shape[1] != key.shape[1]:
        raise ValueError(f"query has {query.shape[1]} dimensions and key {key.shape[1]}; use the same encoder for both")
    return query, key


def _matrix(x, name: str):
    x = x if isinstance(x, np.ndarray) else np.asarray(x)
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"{name} has shape {x.shape}; rows of embeddings, (N, D), are needed")
    return x
