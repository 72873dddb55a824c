"""How many distinct targets do so many draws hit? Rarefaction, extrapolation, and the targets not hit yet.

The statistics of species richness, with training images or patients as the species and images that are drawn as the
sampling units. `hits` holds for each target how many of the k draws hit it (zeros may be left out); a draw may hit none,
one or several.
"""

from collections.abc import Sequence

import numpy as np
import scipy


def distinct(hits: np.ndarray, k: int, draws: int | Sequence[int], targets: int) -> np.ndarray:
    """Expected number of distinct targets hit by each number of draws, when k draws hit target i hits[i] times.

    Up to k draws it is the exact mean over all subsets of the k, sum_i 1 - C(k - hits_i, m) / C(k, m) (Hurlbert 1971).
    Beyond k it is an extrapolation (Chao et al. 2014, 'Rarefaction and
    extrapolation with Hill numbers', Ecological Monographs 84, for incidences): with S seen, u
    unseen (`unseen`) and q1 hit once, S + u (1 - (1 - q1 / (k u + q1))^(m - k)). Good to m of 2 or 3 k; further out
    a lower bound, as u is one. `targets`: how many there are; no more can be hit.
    """
    count, how_many = np.unique(hits[hits > 0], return_counts=True)
    m = np.atleast_1d(np.asarray(draws, np.int64))
    inside = np.minimum(m, k)[:, None]
    left = k - count
    log_missed = (
        scipy.special.gammaln(left + 1)
        - scipy.special.gammaln(np.maximum(left - inside, 0) + 1)
        - scipy.special.gammaln(k + 1)
        + scipy.special.gammaln(k - inside + 1)
    )
    missed = np.where(left >= inside, np.exp(np.minimum(log_missed, 0)), 0.0)
    expected = ((1 - missed) * how_many).sum(1)
    u, once = unseen(hits, k, targets), float((hits == 1).sum())
    more = u * (1 - (1 - once / (k * u + once)) ** np.maximum(m - k, 0)) if u > 0 else 0.0
    return np.minimum(expected + more, targets)


def unseen(hits: np.ndarray, k: int, targets: int, false_once: float = 0.0) -> float:
    """Targets that k draws did not hit but more would (Chao2), at most those left: a lower bound of their number.

    With q1, q2 targets hit once and twice: (k - 1) / k q1^2 / (2 q2), or (k - 1) / k q1 (q1 - 1) / 2 where q2 = 0. No
    estimate can see targets that are hit far more rarely than once in k draws. `false_once`: how many of those hit
    once were hit by mistake and are not to count.
    """
    once = max(float((hits == 1).sum()) - false_once, 0.0)
    return min(_chao2(once, float((hits == 2).sum()), k), float(targets - (hits > 0).sum()))


def unseen_interval(hits: np.ndarray, k: int, targets: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of `unseen` over the sampling of draws (Chao 1987): log-normal, with the variance of Chao2.

    It is an interval of that lower bound, not of all that could ever be hit. Where nothing was hit just once the
    estimate is 0, and the upper end is what would have been estimated from the 3.7 that a Poisson count of 0 allows.
    """
    once, twice, seen = float((hits == 1).sum()), float((hits == 2).sum()), float((hits > 0).sum())
    u, a, most = _chao2(once, twice, k), (k - 1) / k, targets - seen
    if u <= 0:
        allowed = scipy.stats.chi2.ppf((1 + level) / 2, 2 * (once + 1)) / 2
        return 0.0, float(min(_chao2(allowed, twice, k), most))
    if twice:
        r = once / twice
        variance = twice * (a * r**2 / 2 + a**2 * r**3 + a**2 * r**4 / 4)
    else:
        variance = a * once * (once - 1) / 2 + a**2 * once * (2 * once - 1) ** 2 / 4 - a**2 * once**4 / (4 * (seen + u))
    spread = np.exp(scipy.stats.norm.ppf((1 + level) / 2) * np.sqrt(np.log1p(max(variance, 0.0) / u**2)))
    return float(min(u / spread, most)), float(min(u * spread, most))


def assemblage(hits: np.ndarray, k: int, targets: int) -> np.ndarray:
    """Estimated chance of each target seen, of the unseen ones, and last of none: sums to 1. One target a draw at most.

    A bootstrap that draws from what was seen, hits / k, sees too few: it misses a third of the targets hit once. So
    the chances of those seen are shrunk by what `unseen` others must have, and these share it evenly (Chao et al. 2014,
    appendices G and H).
    """
    hits = hits[hits > 0].astype(float)
    u = unseen(hits, k, targets)
    once = float((hits == 1).sum())
    rest = once / k * (k * u / (k * u + once)) if u > 0 else 0.0  # chance that the next draw hits an unseen target
    doubt = (1 - hits / k) ** k
    shrink = rest / max((hits / k * doubt).sum(), 1e-300)  # at most (1 - 1 / k)^-k, so no chance becomes negative
    others = int(np.ceil(u))
    chances = np.concatenate([hits / k * (1 - shrink * doubt), np.full(others, rest / max(others, 1))])
    chances = np.append(chances, max(1 - chances.sum(), 0.0))
    return chances / chances.sum()


def spread(hits: np.ndarray, k: int, targets: int) -> float:
    """Standard deviation, over samples of k draws, of the number of distinct targets (Colwell et al. 2012, eq. 5 at k).

    seen (1 - seen / (seen + unseen)) is its variance if targets are hit independently of each other.
    """
    seen = float((hits > 0).sum())
    u = unseen(hits, k, targets)
    return float(np.sqrt(seen * u / (seen + u))) if u > 0 else 0.0


def _chao2(once: float, twice: float, k: int) -> float:
    return max((k - 1) / k * (once**2 / (2 * twice) if twice else once * (once - 1) / 2), 0.0)
