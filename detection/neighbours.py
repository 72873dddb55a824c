"""Exact nearest neighbours by correlation, in memory that depends on the block and not on the number of images.

A step on the devices multiplies blocks of queries with blocks of keys, in float32 or bfloat16, and keeps, for each query,
only the largest product of every tile of 64 consecutive keys, and of those maxima the few largest. But for the error of
the products, the top k keys of a query lie in the k tiles with the largest maxima, so only these, and others within that
error, are looked into again, on the host: in float32, and those keys that float32 does not tell from the k-th best in
float64. Every similarity that is returned is a float64 dot product rounded to float32, and every choice is checked against
a bound of the products' error; the rare query that fails the check (more equal keys than tiles kept) is searched again in
float64 (with bfloat16 products, whose bound is wider: in float32). The result is therefore the same for every block size,
number of devices and precision.
"""

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from detection import tiles
from launch import mesh, stage

_SPARE = {False: 3, True: 7}  # tiles kept beyond k, so that near ties seldom need another search; of bfloat16 products
_LOOK = 1 << 17  # numbers of queries that are looked into at once: they stay in the cache
_LONG = 1 << 43  # multiplications of a search that keeps what is done; some two minutes of two cores


class Neighbours(NamedTuple):
    """The k nearest keys of each query: `sim` (N, k) float32, descending, and `index` (N, k) int32 into the keys."""

    sim: np.ndarray
    index: np.ndarray


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows that are made when they are read: `change` of those of `source`. They are searched as matrices are."""

    source: Any  # (N, ...) matrix, or Rows
    change: Callable[[np.ndarray], np.ndarray]  # (n, ...) -> (n, D)
    width: int

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.source), self.width

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, part) -> np.ndarray:
        return self.change(self.source[part])


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


def nearest(
    query_NxD,
    key_MxD,
    *,
    k: int = 1,
    block: tuple[int, int] | None = None,
    bf16: bool | None = None,
    keep: Path | None = None,
) -> Neighbours:
    """The k keys with the largest dot product to each query; equal similarities go to the smaller index.

    query_NxD, key_MxD: float32 rows as `standardise` gives them; numpy arrays, memory maps or `Rows`, read part by part,
    so they may be larger than the devices' memory. block: (queries, keys) multiplied at once; bf16: in that precision
    first (None: where `tiles.multiplies_bf16`). Both change the speed and the memory, never the result. keep: folder where
    a search of minutes keeps what is done, under the hash of all it depends on, so that one that was stopped goes on;
    emptied at the end. Raises ValueError for k < 1, k > M, unequal D, or NaN.
    """
    query_NxD, key_MxD = _pair(query_NxD, key_MxD)
    n, m = len(query_NxD), len(key_MxD)
    if not 1 <= k <= m:
        raise ValueError(f"k = {k} neighbours asked of {m} keys; k must lie in 1 to {m}")
    over = tiles.current()
    fast = tiles.multiplies_bf16()
    bf16 = fast if bf16 is None else bf16
    plan = tiles.plan(n, m, query_NxD.shape[1], block, over, maxima=fast or not bf16)
    read_keys = tiles.reader(key_MxD, plan, over)
    kept = _Kept(query_NxD, key_MxD, k, plan, keep) if keep and n * m * query_NxD.shape[1] >= _LONG else None
    packed_Nxk = np.empty((n, k), np.int64)

    def again(query, bf16):
        if not bf16:
            return _pack(*_search_exactly(query, key_MxD, k))
        rows = min(1 << (len(query) - 1).bit_length(), -(-len(query) // 1024) * 1024)  # few shapes, few compilations
        filled = np.concatenate([query, np.repeat(query[-1:], rows - len(query), 0)])
        return _pack(*nearest(filled, key_MxD, k=k, block=block, bf16=False))[: len(query)]

    def settle(start, found, bf16):
        """Of one group of queries; the share whose neighbours are sure."""
        query = query_NxD[start : start + plan.query_rows]
        peak_Nxc, tile_Nxc, reach = tiles.merged(*mesh.fetch(found), len(query))
        own = _share(len(query))
        looked = _look_into(query[own], key_MxD, peak_Nxc[own], tile_Nxc[own], reach, k, bf16)
        packed, sure = _gathered(*looked, len(query))
        if not sure.all():
            packed[~sure] = again(query[~sure], bf16)
        packed_Nxk[start : start + len(query)] = packed
        if kept:
            kept.write(start, packed)
        return sure.mean()

    pending = ()
    for start in range(0, n, plan.query_rows):
        if kept and (done := kept.read(start)) is not None:
            packed_Nxk[start : start + len(done)] = done
            continue
        query = tiles.padded(query_NxD, start, plan.query_rows, plan.queries, over, tiles.QUERIES)
        found = tiles.nothing((plan.key_shares, *query.shape[:2], k + _SPARE[bf16]), over)
        for first in range(0, m, plan.key_rows):
            found = tiles.keep(query, *read_keys(first), found, m, over=over, bf16=bf16)
        last, pending = pending, (start, found, bf16)
        if last:  # the host settles one group of queries while the devices multiply the next
            sure = settle(*last)
            bf16 = bf16 and bool(sure > 0.5)  # else keys are so alike that bfloat16 does not tell them apart
    if pending:
        settle(*pending)
    if kept:
        kept.remove()
    return Neighbours(*_unpack(packed_Nxk))


def count_above(query_NxD, key_MxD, tau: float, *, block: tuple[int, int] | None = None) -> np.ndarray:
    """How many keys have a similarity above tau (strictly) to each query: (N,) int64.

    Agrees with `nearest`: the count is positive exactly where the nearest similarity exceeds tau. Inputs and errors
    as there.
    """
    query_NxD, key_MxD = _pair(query_NxD, key_MxD)
    if not np.isfinite(tau):
        raise ValueError(f"tau = {tau} is not a similarity")
    n, m = len(query_NxD), len(key_MxD)
    over = tiles.current()
    plan = tiles.plan(n, m, query_NxD.shape[1], block, over, maxima=False)
    read_keys = tiles.reader(key_MxD, plan, over)
    reach = max((float(_norms(key_MxD[i : i + plan.keys]).max()) for i in range(0, m, plan.keys)), default=0.0)
    count_N = np.zeros(n, np.int64)
    for start in range(0, n, plan.query_rows):
        stop = min(start + plan.query_rows, n)
        query = tiles.padded(query_NxD, start, plan.query_rows, plan.queries, over, tiles.QUERIES)
        slack = float(_errors(query_NxD[start:stop], reach)[0].max())
        counts = tiles.put(np.zeros((plan.key_shares, *query.shape[:2], 2), np.int32), over, tiles.KEYS, tiles.QUERIES)
        for first in range(0, m, plan.key_rows):
            counts = tiles.count(query, *read_keys(first), counts, tau + slack, tau - slack, m, over=over)
        sure, maybe = mesh.fetch(counts).sum(0).reshape(-1, 2)[: stop - start].T
        count_N[start:stop] = sure
        doubtful = start + np.flatnonzero(sure != maybe)
        if len(doubtful):  # a product within rounding of tau: count these queries again in float64
            count_N[doubtful] = _count_exactly(query_NxD[doubtful], key_MxD, tau, plan.keys)
    return count_N


def _look_into(query_NxD, key_MxD, peak_Nxc, tile_Nxc, reach, k, bf16):
    """Exact top k from the kept tiles, packed (N, k), and for which queries they are sure to be the top k (N,).

    With peaks wrong by at most e, each of the k tiles with the largest peaks has a key as large as f = the k-th largest
    peak - e. The k-th best of their keys, b, is at least f; a tile with a better key has a peak of at least b - e, and no
    key of a dropped tile exceeds the last kept peak + e.
    """
    n, keep = peak_Nxc.shape
    error_N, rounding_N = _errors(query_NxD, reach, bf16)
    first, later = peak_Nxc[:, :k], peak_Nxc[:, k:]
    floor_N = first[:, -1] - error_N
    packed_Nxk = _best(
        *_hits(query_NxD, key_MxD, *np.nonzero(tile_Nxc[:, :k] >= 0), tile_Nxc, floor_N - rounding_N), n, k
    )
    best_N = _unpack(packed_Nxk[:, -1])[0]
    row, slot = np.nonzero((tile_Nxc[:, k:] >= 0) & (later >= (best_N - error_N)[:, None]))
    if len(row):
        found = _hits(query_NxD, key_MxD, row, slot + k, tile_Nxc, best_N - rounding_N)
        known = np.repeat(np.arange(n), k), packed_Nxk.ravel()
        packed_Nxk = _best(*(np.concatenate(pair) for pair in zip(known, found, strict=True)), n, k)
    dropped = keep < -(-len(key_MxD) // tiles.TILE)
    sure_N = _unpack(packed_Nxk[:, -1])[0] > peak_Nxc[:, -1] + error_N if dropped else np.ones(n, bool)
    return packed_Nxk, sure_N


def _hits(query_NxD, key_MxD, row_P, slot_P, tile_Nxc, least_N):
    """Of the tiles in these places of `tile_Nxc` the keys with a float32 product of at least `least_N`: rows (P,) of the
    queries, and the pairs packed (P,)."""
    least_N = np.maximum(least_N, np.finfo(np.float32).min)  # never reached by places after the last key
    tile_P = tile_Nxc[row_P, slot_P]
    order = np.argsort(tile_P, kind="stable")
    rows, pairs, most = [], [], max(1, _LOOK // query_NxD.shape[1])
    for start in range(0, max(1, len(order)), most):  # once for none: of few queries, a process may have no share
        part = order[start : start + most]
        asked, first = row_P[part], tile_P[part] * tiles.TILE
        sim_PxT = _tile_products(query_NxD[asked], key_MxD, first)
        hit, column = np.divmod(np.flatnonzero(sim_PxT >= least_N[asked, None]), tiles.TILE)
        rows.append(asked[hit])
        pairs.append(_pack(_pair_dots(query_NxD, rows[-1], key_MxD, first[hit] + column), first[hit] + column))
    return np.concatenate(rows), np.concatenate(pairs)


def _best(row_P, packed_P, n: int, k: int) -> np.ndarray:
    """The k largest of the pairs of each row, descending (n, k); each row has as many."""
    order = np.lexsort((~packed_P, row_P))
    start_N = np.searchsorted(row_P[order], np.arange(n))
    return packed_P[order][start_N[:, None] + np.arange(k)]


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


def _tile_products(query_PxD, key_MxD, first_P) -> np.ndarray:
    """float32 products of each query with the tile of keys that starts at its `first_P`, ascending: (P, TILE), -inf after
    the last.

    In parts so small that OpenBLAS stays in this thread: its idle threads spin and slow the device's step.
    """
    sim_PxT = np.full((len(query_PxD), tiles.TILE), -np.inf, np.float32)
    rows = max(16, (1 << 18) // (tiles.TILE * query_PxD.shape[1]))
    edges = np.flatnonzero(np.diff(first_P, prepend=-1, append=-1)).tolist()
    for low, high in itertools.pairwise(edges):
        first = int(first_P[low])
        key_DxT = np.asarray(key_MxD[first : first + tiles.TILE], np.float32).T
        for i in range(low, high, rows):
            part = slice(i, min(i + rows, high))
            np.matmul(query_PxD[part], key_DxT, out=sim_PxT[part, : key_DxT.shape[1]])
    return sim_PxT


def _pair_dots(query_NxD, row_P, key_MxD, index_P) -> np.ndarray:
    """`_dots` of pairs, (P,), in parts that stay in the cache."""
    sim_P = np.empty(len(row_P))
    rows = max(1, (1 << 15) // query_NxD.shape[1])
    for start in range(0, len(row_P), rows):
        part = slice(start, start + rows)
        query, key = (np.asarray(x, np.float64) for x in (query_NxD[row_P[part]], key_MxD[index_P[part]]))
        sim_P[part] = np.einsum("pd,pd->p", query, key)
    return sim_P.astype(np.float32)


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


def _errors(query_NxD, reach: float, bf16: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of |product - returned similarity| of the devices' products, summed in parts of `tiles.DEPTH`, and of the
    host's in float32, (N,) each: Higham, Accuracy and Stability, section 3.1, and Cauchy-Schwarz.

    Rounding both factors to bfloat16, of 8 bits, adds less than 2 * 2^-8 + 2^-16.
    """
    d = query_NxD.shape[1]
    size_N = _norms(query_NxD) * np.float32(reach)
    if not np.isfinite(size_N).all():
        raise ValueError("the embeddings hold NaN or infinity; mend them first")
    parts = min(d, tiles.DEPTH) + -(-d // tiles.DEPTH) + 2, d + 3
    device, host = (np.float32(sums * 2.0**-24) for sums in parts)
    return (device + bf16 * np.float32(2**-7 + 2**-15)) * size_N, host * size_N


def _norms(x_NxD) -> np.ndarray:
    x = np.asarray(x_NxD, np.float32)
    return np.sqrt(np.einsum("nd,nd->n", x, x))


def _share(n: int) -> slice:
    """The rows of n that this process looks into."""
    rows = -(-n // jax.process_count())
    return slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)


def _gathered(packed_Nxk, sure_N, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Those of all processes, of n rows in all."""
    if jax.process_count() == 1:
        return packed_Nxk, sure_N
    rows = -(-n // jax.process_count())
    both = np.concatenate([packed_Nxk, sure_N[:, None]], 1)
    both = np.concatenate([both, np.zeros((rows - len(both), both.shape[1]), np.int64)])
    both = multihost_utils.process_allgather(both.view(np.int32)).view(np.int64)  # jax would cut 64 bits to 32
    both = both.reshape(-1, both.shape[-1])[:n]
    return both[:, :-1].copy(), both[:, -1].astype(bool)


class _Kept:
    """Finished groups of queries of one search, in files; process 0 writes, all read."""

    def __init__(self, query_NxD, key_MxD, k: int, plan: tiles.Plan, folder: Path):
        digest = hashlib.sha256(repr((query_NxD.shape, key_MxD.shape, k, plan.query_rows)).encode())
        for x in (query_NxD, key_MxD):
            for start in range(0, x.shape[0], 8192):
                digest.update(np.ascontiguousarray(x[start : start + 8192], np.float32))
        self.path = lambda start: folder / f"search-{digest.hexdigest()[:32]}-{start}.npy"
        self.starts = range(0, len(query_NxD), plan.query_rows)

    def read(self, start: int) -> np.ndarray | None:
        return np.load(self.path(start)) if self.path(start).exists() else None

    def write(self, start: int, packed: np.ndarray) -> None:
        if jax.process_index() == 0:
            path = self.path(start)
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_suffix(".aside")
            with open(aside, "wb") as file:
                np.save(file, packed)
            os.replace(aside, path)

    def remove(self) -> None:
        stage.barrier("search")
        if jax.process_index() == 0:
            for start in self.starts:
                self.path(start).unlink(missing_ok=True)


def _pair(query, key):
    query, key = _matrix(query, "query"), _matrix(key, "key")
    if query.shape[1] != key.shape[1]:
        raise ValueError(f"query has {query.shape[1]} dimensions and key {key.shape[1]}; use the same encoder for both")
    return query, key


def _matrix(x, name: str):
    x = x if isinstance(x, np.ndarray | Rows) else np.asarray(x)
    if len(x.shape) != 2 or x.shape[1] == 0:
        raise ValueError(f"{name} has shape {x.shape}; rows of embeddings, (N, D), are needed")
    return x
