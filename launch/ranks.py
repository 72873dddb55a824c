"""Exact permutation tests for few repetitions: ties are allowed, no distribution is assumed, no number is approximated."""

import itertools
from collections import Counter

import numpy as np
import scipy


def trend(values_BxL: np.ndarray) -> tuple[float, float, float]:
    """Whether values rise or fall over L ordered levels, in B blocks that were each measured at every level.

    Page's L (Page 1963) with the levels' places centred, T = sum over blocks and levels of rank times place; under the
    null each block's values come in any order alike.

    Returns:
      T (positive: rising), its two-sided p, and the smallest p that any outcome with as many blocks and levels and the
      same ties could have had.
    """
    place_L = np.arange(values_BxL.shape[1]) - (values_BxL.shape[1] - 1) / 2
    ranks_BxL = scipy.stats.rankdata(values_BxL, axis=1)
    chance = Counter({0.0: 1.0})
    for ranks_L in ranks_BxL:
        orders = np.array(list(itertools.permutations(ranks_L)))
        sums, counts = np.unique(np.round(orders @ place_L, 6), return_counts=True)
        grown: Counter[float] = Counter()
        for (before, p), (t, count) in itertools.product(chance.items(), zip(sums, counts, strict=True)):
            grown[round(before + float(t), 6)] += p * count / len(orders)
        chance = grown
    at_least = lambda t: min(1.0, sum(p for other, p in chance.items() if abs(other) >= abs(t) - 1e-6))
    t = float((ranks_BxL * place_L).sum())
    return t, at_least(t), at_least(max(chance))


def differ(values_BxL: np.ndarray) -> tuple[float, float]:
    """Friedman's test (1937), exact: whether L unordered levels differ, by the spread of their rank sums.

    Returns:
      p, and the least p that these ties and so many blocks allow.
    """
    ranks_BxL = scipy.stats.rankdata(values_BxL, axis=1)
    spread = lambda sums: round(sum(s * s for s in sums), 6)
    chance = Counter({tuple(ranks_BxL[0]): 1.0})  # the first block's order does not matter: only how the others agree
    for ranks_L in ranks_BxL[1:]:
        orders = list(itertools.permutations(ranks_L))
        grown: Counter[tuple[float, ...]] = Counter()
        for (before, p), order in itertools.product(chance.items(), orders):
            grown[tuple(b + r for b, r in zip(before, order, strict=True))] += p / len(orders)
        chance = grown
    seen, most = spread(ranks_BxL.sum(0)), max(map(spread, chance))
    return tuple(min(1.0, sum(p for sums, p in chance.items() if spread(sums) >= s - 1e-6)) for s in (seen, most))


def mean_interval(
    values: np.ndarray, below: np.ndarray, above: np.ndarray, low: float = -np.inf, high: float = np.inf
) -> list[float]:
    """[mean, low, high] of repetitions with other seeds, each with a 95 % interval of its own.

    The seeds' t-interval says how runs differ; what a run's own interval says of the patients is common to all runs, who
    share them, and more seeds do not narrow it. So the two are added in quadrature, on each side by itself: a rate of 0
    has all of its interval above it. One repetition: its own interval.

    Args:
      values, below, above: of each repetition its value, and how far its own interval reaches below it and above it.
      low, high: ends of the scale.
    """
    between = 0.0
    if len(values) > 1:
        between = float(scipy.stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    mean = float(np.mean(values))
    down, up = (float(np.hypot(np.sqrt(np.mean(np.square(side))), between)) for side in (below, above))
    return [mean, max(low, mean - down), min(high, mean + up)]
