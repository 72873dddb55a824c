"""Exact nearest neighbours by Euclidean distance, on top of the streaming search for the largest dot product."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import scipy

from detection import neighbours

_SPARE = 6  # candidates looked into beyond k
_ROWS = 1 << 22  # numbers held at once in float64
_FEW = 1 << 22  # pairs; so few are all measured, which is sooner done than compiling a search for their shape


class Nearest(NamedTuple):
    """The k nearest keys of each query: `distance` (N, k) float64, ascending, and `index` (N, k) into the keys."""

    distance: np.ndarray
    index: np.ndarray


def nearest(query_NxD: np.ndarray, key_MxD: np.ndarray, *, k: int = 1) -> Nearest:
    """The k keys at the smallest Euclidean distance of each query; of equal ones, the smaller index first.

    query_NxD, key_MxD: matrices, memory maps or `neighbours.Rows`, read part by part. |q - k|^2 / 2 = |q|^2 / 2 - (q . k -
    |k|^2 / 2), so the nearest are those with the largest dot product of (q, 1) and (k, -|k|^2 / 2); a few more than k are
    found so, and measured anew in float64. Where rounding leaves a doubt (many keys as near) the query is searched again
    in float64. No N x M matrix is held.

    Raises:
      ValueError: fewer keys than asked for, unequal D, NaN.
    """
    query_NxD, key_MxD = (x if isinstance(x, neighbours.Rows) else np.asanyarray(x) for x in (query_NxD, key_MxD))
    n, m, wide = len(query_NxD), len(key_MxD), key_MxD.shape[1]
    if k > m:
        raise ValueError(f"{k} nearest neighbours asked of {m} vectors")
    finite = all(np.isfinite(part).all() for x in (query_NxD, key_MxD) for part in _parts(x))
    if query_NxD.shape[1:] != key_MxD.shape[1:] or not finite:
        raise ValueError(f"vectors of {query_NxD.shape[1:]} and {key_MxD.shape[1:]} numbers, or NaN among them")
    if n * m <= _FEW:
        index = _searched(query_NxD, key_MxD, k)
        return Nearest(_measured(query_NxD, key_MxD, index), index)
    middle = sum(part.sum(0, dtype=np.float64) for part in _parts(key_MxD)) / m
    moved = lambda x: np.asarray(x - middle, np.float32)
    squares = lambda x: np.einsum("md,md->m", x, x, dtype=np.float64)
    longest = max(squares(moved(part)).max() for part in _parts(key_MxD))
    lifted = lambda x: np.concatenate([x, -0.5 * squares(x)[:, None].astype(np.float32)], 1)
    found = neighbours.nearest(
        neighbours.Rows(query_NxD, lambda x: np.pad(moved(x), ((0, 0), (0, 1)), constant_values=1), wide + 1),
        neighbours.Rows(key_MxD, lambda x: lifted(moved(x)), wide + 1),
        k=min(k + _SPARE, m),
    )
    index = found.index.astype(np.int64)
    distance = _measured(query_NxD, key_MxD, index)
    if index.shape[1] < m:  # is any key that was left out sure to be farther than the last one wanted?
        size = np.sqrt(longest) + np.sqrt(np.concatenate([squares(moved(part)) for part in _parts(query_NxD)]))
        doubt = np.sort(distance, 1)[:, k - 1] ** 2 >= distance[:, -1] ** 2 - 2.0**-20 * size**2
        if doubt.any():
            index[doubt] = _searched(query_NxD[doubt], key_MxD, index.shape[1])
            distance[doubt] = _measured(query_NxD[doubt], key_MxD, index[doubt])
    order = np.lexsort((index, distance), axis=1)[:, :k]
    return Nearest(np.take_along_axis(distance, order, 1), np.take_along_axis(index, order, 1))


def _parts(x) -> Iterator[np.ndarray]:
    rows = max(1, _ROWS // x.shape[1])
    return (x[start : start + rows] for start in range(0, len(x), rows))


def _measured(query_NxD, key_MxD, index_Nxc) -> np.ndarray:
    rows = max(1, _ROWS // (index_Nxc.shape[1] * key_MxD.shape[1]))
    parts = [np.zeros((0, index_Nxc.shape[1]))]
    for start in range(0, len(index_Nxc), rows):
        part = slice(start, start + rows)
        gap = query_NxD[part].astype(np.float64)[:, None] - key_MxD[index_Nxc[part]].astype(np.float64)
        parts.append(np.sqrt(np.einsum("ncd,ncd->nc", gap, gap)))
    return np.concatenate(parts)


def _searched(query_NxD, key_MxD, c) -> np.ndarray:
    """Indices of the c nearest keys, all distances measured as differences in float64."""
    rows = max(1, _ROWS // len(key_MxD))
    parts = [np.zeros((0, c), np.int64)]
    for start in range(0, len(query_NxD), rows):
        query = query_NxD[start : start + rows]
        distance = np.concatenate([scipy.spatial.distance.cdist(query, part) for part in _parts(key_MxD)], 1)
        parts.append(distance.argmin(1)[:, None] if c == 1 else np.argsort(distance, axis=1, kind="stable")[:, :c])
    return np.concatenate(parts)
