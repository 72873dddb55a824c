"""How far two sets of features are apart: Frechet and kernel distance, precision, recall, density and coverage.

X (N, D) is the reference, Y (M, D) what is judged. Memory does not grow with N x M. Intervals are at 95 %, by a
delete-group jackknife over patients: the patients of each set are dealt to groups, and everything is computed again
without the g-th group of both sets (Efron and Stein 1981; Shao and Wu 1989). Float64 on the host: the same on any device.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy

GROUPS = 20
PARTS = (1, 2, 3, 4)  # into so many parts the sets are cut for the Frechet distance's extrapolation
FEWEST = 8  # patients, so that each part and each group has some
ROWS, COLUMNS = 512, 8192  # of a block of pairs


class Estimate(NamedTuple):
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


class Features(NamedTuple):
    """Features (N, D) float64 of a set, and its patients dealt to groups.

    Attributes:
      unit: (N,) number of each row's patient. turn: (N,) its patient's place in a random order.
    """

    x: np.ndarray
    unit: np.ndarray
    turn: np.ndarray

    def __len__(self) -> int:
        return len(self.x)

    def group(self, groups: int) -> np.ndarray:
        return self.turn % groups

    def take(self, rows: np.ndarray) -> "Features":
        return Features(self.x[rows], self.unit[rows], self.turn[rows])


def features(x: np.ndarray, patients: np.ndarray | None = None, *, seed: int = 0) -> Features:
    """Features with their patients; None: every row is a patient.

    Raises:
      ValueError: where there is NaN or infinity, or fewer than `FEWEST` patients.
    """
    x = np.asarray(x, np.float64)
    if not np.isfinite(x).all():
        raise ValueError(f"features: row {np.argwhere(~np.isfinite(x))[0][0]} holds NaN or infinity")
    unit = np.arange(len(x)) if patients is None else np.unique(patients, return_inverse=True)[1]
    if len(np.unique(unit)) < FEWEST:
        raise ValueError(f"features: a set of {len(np.unique(unit))} patients; quality needs {FEWEST} at least")
    turn = np.random.default_rng(seed).permutation(unit.max() + 1)[unit]
    return Features(x, unit, turn)


def groups_of(*sets: Features) -> int:
    """Number of jackknife groups: 20, or as many as the set of the fewest patients has."""
    return min(GROUPS, *(int(s.unit.max()) + 1 for s in sets))


def jackknife(value: float, without_G: np.ndarray) -> Estimate:
    """Interval of `value` from what it is without each group: Student's t, G - 1 degrees of freedom."""
    n = len(without_G)
    error = np.sqrt((n - 1) / n * ((without_G - without_G.mean()) ** 2).sum())
    reach = scipy.stats.t.ppf(0.975, n - 1) * error
    return Estimate(float(value), float(value - reach), float(value + reach))


def proportion(value: float, without_G: np.ndarray, units: int) -> Estimate:
    """As `jackknife`, for a share: Clopper-Pearson with the effective number of units (Korn and Graubard 1998)."""
    n = len(without_G)
    variance = (n - 1) / n * ((without_G - without_G.mean()) ** 2).sum()
    effective = float(units)
    if 0 < value < 1 and variance > 0:
        wider = (scipy.stats.norm.ppf(0.975) / scipy.stats.t.ppf(0.975, n - 1)) ** 2
        effective = min(max(value * (1 - value) / variance * wider, 1.0), effective)
    hits = value * effective
    low = scipy.stats.beta.ppf(0.025, hits, effective - hits + 1) if value > 0 else 0.0
    high = scipy.stats.beta.ppf(0.975, hits + 1, effective - hits) if value < 1 else 1.0
    return Estimate(float(value), float(low), float(high))


# ---- Frechet distance


def frechet(x_NxD: np.ndarray, y_MxD: np.ndarray) -> float:
    """Squared Frechet distance of two normal distributions with the sets' means and covariances (Dowson and Landau 1982).

    |mu_x - mu_y|^2 + tr C_x + tr C_y - 2 tr (C_x C_y)^(1/2). The last trace is the nuclear norm of R_x R_y^T, where
    R^T R = C: no square root of a matrix, and fewer rows than dimensions do no harm to its accuracy. It is biased
    upwards by about (tr C) times a constant over the number of rows: see `frechet_infinity`.
    """
    root_x, root_y = (_root(x) for x in (x_NxD, y_MxD))
    shift = x_NxD.mean(0) - y_MxD.mean(0)
    nuclear = np.linalg.svd(root_x @ root_y.T, compute_uv=False).sum()
    return float(shift @ shift + (root_x**2).sum() + (root_y**2).sum() - 2 * nuclear)


def _root(x_NxD: np.ndarray) -> np.ndarray:
    return np.linalg.qr(x_NxD - x_NxD.mean(0), mode="r") / np.sqrt(max(len(x_NxD) - 1, 1))


def frechet_infinity(x: Features, y: Features) -> float:
    """The Frechet distance with its small-sample bias extrapolated away (Chong and Forsyth 2020, Eq. 2).

    The bias is linear in 1 / N to first order. Both sets are cut into p = 1, 2, 3, 4 parts by patient; the mean distance
    of the parts is regressed on p, and p = 0 stands for infinitely many images. (They extrapolate the synthetic set
    alone, as their reference is large; ours is as small.) Where a part has not more rows than dimensions, the bias is
    no longer linear, and the result is too large or too small by some of it.
    """
    return float(np.polyfit(PARTS, [_in_parts(x, y, p) for p in PARTS], 1)[1])


def _in_parts(x: Features, y: Features, parts: int) -> float:
    part_x, part_y = (np.unique(s.turn, return_inverse=True)[1] % parts for s in (x, y))
    return np.mean([frechet(x.x[part_x == i], y.x[part_y == i]) for i in range(parts)])


def without_each_group(statistic: Callable[[Features, Features], float], x: Features, y: Features) -> np.ndarray:
    """`statistic` without the g-th group of both sets: (G,)."""
    groups = groups_of(x, y)
    keep = lambda s, g: s.take(s.group(groups) != g)
    return np.array([statistic(keep(x, g), keep(y, g)) for g in range(groups)])


# ---- kernel distance


def kernel_distance(x: Features, y: Features) -> Estimate:
    """Squared maximum mean discrepancy with the kernel (x . y / D + 1)^3 (KID: Binkowski et al. 2018), unbiased.

    Zero on average, hence often negative, for sets of one distribution. Pairs of images of one patient are left out of
    the means within a set: they are alike because of the patient. The interval is exact enough for sets that differ and
    too wide (by about the square root of two) for sets that do not, where the statistic is degenerate.
    """
    groups = groups_of(x, y)
    sums = {
        (a, b): _kernel_sums(*pair, groups) for a, b, *pair in (("x", "x", x, x), ("y", "y", y, y), ("x", "y", x, y))
    }

    def distance(keep: np.ndarray) -> float:
        mean = {pair: np.divide(*(table[np.ix_(keep, keep)].sum() for table in two)) for pair, two in sums.items()}
        return mean["x", "x"] + mean["y", "y"] - 2 * mean["x", "y"]

    everything = np.arange(groups)
    return jackknife(distance(everything), np.array([distance(np.delete(everything, g)) for g in everything]))


def _kernel_sums(x: Features, y: Features, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the kernel, and numbers of pairs, between the groups of x and those of y: two (G, G)."""
    total, count = np.zeros((2, groups, groups))
    member = lambda s: (s.group(groups)[:, None] == np.arange(groups)).astype(np.float64)
    left, right = member(x), member(y)
    for rows, columns in _blocks(len(x), len(y)):
        kernel = (x.x[rows] @ y.x[columns].T / x.x.shape[1] + 1) ** 3
        apart = np.ones(kernel.shape) if y is not x else x.unit[rows, None] != x.unit[None, columns]
        total += left[rows].T @ (kernel * apart) @ right[columns]
        count += left[rows].T @ apart @ right[columns]
    return total, count


def _blocks(n: int, m: int) -> list[tuple[slice, slice]]:
    return [(slice(i, i + ROWS), slice(j, j + COLUMNS)) for i in range(0, n, ROWS) for j in range(0, m, COLUMNS)]


# ---- precision, recall, density, coverage


class Manifold(NamedTuple):
    """Shares of `prdc`, each with its interval."""

    precision: Estimate
    recall: Estimate
    density: Estimate
    coverage: Estimate


def prdc(x: Features, y: Features, k: int = 5) -> Manifold:
    """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).

    The ball of a row reaches to its k-th nearest other row of its own set. Precision: the share of y inside some ball of
    x. Recall: the share of x inside some ball of y. Density: the mean number of balls of x that a y lies in, over k.
    Coverage: the share of x with some y in their ball. Recall and coverage grow with the number of y: compare like with
    like, or coverage with `coverage_if_equal`.

    Raises:
      ValueError: where a set is too small for k.
    """
    groups = groups_of(x, y)
    radius_x, radius_y = (_radii(s, k, groups) for s in (x, y))
    in_x, _ = _containing(y, x, radius_x, groups)
    in_y, to_y = _containing(x, y, radius_y, groups)
    keep_x, keep_y = (_kept(s, groups) for s in (x, y))
    share = lambda hits, keep: (hits * keep).sum(0) / keep.sum(0)
    units_x, units_y = (int(s.unit.max()) + 1 for s in (x, y))
    precision, recall = share(in_x > 0, keep_y), share(in_y > 0, keep_x)
    density, coverage = share(in_x / k, keep_y), share(to_y <= radius_x, keep_x)
    return Manifold(
        proportion(precision[0], precision[1:], units_y),
        proportion(recall[0], recall[1:], units_x),
        jackknife(density[0], density[1:]),
        proportion(coverage[0], coverage[1:], units_x),
    )


def coverage_if_equal(n: int, m: int, k: int) -> float:
    """Expected coverage of n reference rows by m rows of the same distribution (Naeem et al. 2020, Eq. 8)."""
    i = np.arange(1, k + 1)
    return float(1 - np.prod((n - i) / (n + m - i)))


def _kept(s: Features, groups: int) -> np.ndarray:
    """Which rows take part: (N, 1 + G), all of them first, then without each group."""
    return np.concatenate([np.ones((len(s), 1), bool), s.group(groups)[:, None] != np.arange(groups)], 1)


def _squares(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Squared distances, those within rounding of zero as zero: (N, M)."""
    xx, yy = (np.einsum("nd,nd->n", a, a) for a in (x, y))
    square = xx[:, None] + yy[None] - 2 * (x @ y.T)
    return np.where(square <= 1e-12 * (xx[:, None] + yy[None]), 0.0, square)


def _radii(s: Features, k: int, groups: int) -> np.ndarray:
    """Squared distance to the k-th nearest other row, of all and without each group: (N, 1 + G)."""
    members = [np.flatnonzero(s.group(groups) == g) for g in range(groups)]
    if len(s) - max(map(len, members)) <= k:
        raise ValueError(
            f"a set of {len(s)} images is too small for the {k} nearest neighbours of config.quality.neighbours"
        )
    centred = s.x - s.x.mean(0)
    radii = np.empty((len(s), 1 + groups))
    for start in range(0, len(s), ROWS):
        rows = np.arange(start, min(start + ROWS, len(s)))
        near = np.full((len(rows), groups, k), np.inf)  # the k nearest in each group are enough to leave any one out
        for g, member in enumerate(members):
            square = _squares(centred[rows], centred[member])
            square[rows[:, None] == member] = np.inf
            few = np.partition(square, min(k, square.shape[1]) - 1, axis=1)[:, :k]
            near[:, g, : few.shape[1]] = few
        radii[rows, 0] = _kth(near, k)
        for g in range(groups):
            radii[rows, 1 + g] = _kth(np.delete(near, g, axis=1), k)
    return radii


def _kth(near_NxGxk: np.ndarray, k: int) -> np.ndarray:
    return np.partition(near_NxGxk.reshape(len(near_NxGxk), -1), k - 1, axis=1)[:, k - 1]


def _containing(query: Features, key: Features, radii: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """How many of the keys' balls each query lies in, and its squared distance to the nearest key: two (Q, 1 + G), of all
    keys and without each group."""
    centre = key.x.mean(0)
    kept = _kept(key, groups)
    furthest = radii.max(1)
    inside = np.zeros((len(query), 1 + groups))
    nearest = np.full((len(query), groups), np.inf)
    column_group = key.group(groups)
    for rows, columns in _blocks(len(query), len(key)):
        square = _squares(query.x[rows] - centre, key.x[columns] - centre)
        i, j = np.nonzero(square <= furthest[columns])  # few: only these can lie in a ball
        within = (square[i, j, None] <= radii[columns][j]) & kept[columns][j]
        np.add.at(inside[rows], i, within)
        for g in range(groups):
            member = column_group[columns] == g
            if member.any():
                nearest[rows, g] = np.minimum(nearest[rows, g], square[:, member].min(1))
    without = np.stack([nearest.min(1), *(np.delete(nearest, g, axis=1).min(1) for g in range(groups))], 1)
    return inside, without
