"""What the synthetic images say together: are there copies among them, at least how many, at most how many?

Each image alone must be more similar than all unseen patients, and Benjamini-Hochberg asks this of many images at once
before it names any. Here it is counted how many of the K images lie above the line that the j-th most similar of P unseen
patients draws (their conformal p is at most j / (P + 1)). Without copies the count is BetaBinomial(K, j, P + 1 - j). That
holds for one image a patient; with several the weighted p-values make the count no larger, which the tests simulate.
All of it needs a generator that draws innocent images from the population that the unseen patients come from, patients
weighing alike. A line is a rank j; see `calibrate.score_at` for the similarity that it stands for.
"""

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy

from detection import calibrate

RANKS = (1, 2, 5, 10, 20)  # set before any score is seen; more of them cost power, by Bonferroni
ALPHA = 0.05  # each bound is one-sided, at 1 - ALPHA
ENOUGH = 0.8  # of audits of an innocent generator of the sizes that `enough` names, this share could PASS
MOST = 100_000  # images or patients that `enough` thinks of


def ranks(n_patients: int, nominal: float) -> list[int]:
    """The RANKS that stand for a p-value of at most `nominal` against so many unseen patients, and 1 in any case."""
    return [j for j in RANKS if j == 1 or j <= nominal * (n_patients + 1) * (1 + 1e-9)]


def above(p_K: np.ndarray, rank: int, n_patients: int) -> int:
    """How many images lie above the line of this rank."""
    return int((p_K <= rank / (n_patients + 1) * (1 + 1e-9)).sum())


def set_test(counts: Sequence[float], lines: Sequence[int], k: int, n_patients: int) -> tuple[float, int]:
    """The set-level test of the `counts` of k images above each of the `lines`. Counts need not be whole; see `bounds`.

    Returns:
      (p-value that none of them is a copy, Bonferroni over the lines; one-sided lower bound of how many are copies, at
      1 - ALPHA). The bound is the number of c for which the hypothesis that c images are copies is rejected: those take c
      of the count at most, and k - c innocent images would have to reach the rest.
    """
    p_value, at_least = 1.0, 0
    for count, j in zip(counts, lines, strict=True):
        chance = lambda c, count=count, j=j: calibrate.excess_p(count - c, k - c, j, n_patients)  # rises with c
        p_value = min(p_value, len(lines) * chance(0))
        at_least = max(at_least, bisect.bisect_right(range(int(count) + 1), ALPHA / len(lines), key=chance))
    return p_value, at_least


def at_most(count: float | np.ndarray, k: int, recall_low: float) -> np.ndarray:
    """Upper bound of the copy rate where `count` of k images lie above a line that a share of copies does, too.

    The rate above the line is at least the copy rate times the recall. Its Clopper-Pearson upper limit and the recall's
    lower limit are at 1 - ALPHA / 2 each, so that the bound holds at 1 - ALPHA. Every image above the line is counted as a
    copy, so it errs upwards. It holds for the generator's rate and, as k images scatter less, for the share of the k.
    """
    count = np.asarray(count, float)
    high = np.where(count >= k, 1.0, scipy.stats.beta.ppf(1 - ALPHA / 2, count + 1, np.maximum(k - count, 1e-3)))
    return np.minimum(high / max(recall_low, 1e-9), 1.0)


def expected_bound(rank: int, k: int, n_patients: int, recall_low: float) -> float:
    """Mean of `at_most` over audits in which nothing is copied: by it a line is chosen, blind to the synthetic images."""
    count = np.arange(k + 1)
    return float(scipy.stats.betabinom.pmf(count, k, rank, n_patients + 1 - rank) @ at_most(count, k, recall_low))


def fewest_seen(k: int, rank: int, n_patients: int, tests: int) -> int:
    """Fewest of k images above a line for which the set-level test, of so many lines, sees copies; k + 1: none do."""
    chance = lambda n: -calibrate.excess_p(n, k, rank, n_patients)
    return bisect.bisect_left(range(k + 1), -ALPHA / tests, key=chance)


def ways_of_seeing(k: int, n_patients: int, lows: Mapping[int, float]) -> list[tuple[int, float]]:
    """Of the set-level test, for `calibrate.power_at`: for each line the fewest images above it, and its recall's lower limit."""
    return [(fewest_seen(k, j, n_patients, len(lows)), low) for j, low in lows.items()]


def bounds(p_K: np.ndarray, n_patients: int, lows: Mapping[int, float], n_draws: int | None = None) -> dict[str, Any]:
    """The section `bounds` of `audit.json` but for the kinds: see docs/audit.md.

    Args:
      lows: line -> lower limit of the recall on planted copies at that line, for every line of `ranks`.
      n_draws: as how many independent images the K count, so many of every K of a count (`calibrate.effective_number`);
        None: each does.
    """
    k, lines = len(p_K), list(lows)
    n_draws = k if n_draws is None else n_draws
    counts = [above(p_K, j, n_patients) for j in lines]
    p_value, at_least = set_test([n * n_draws / k for n in counts], lines, n_draws, n_patients)
    rank = min(lines, key=lambda j: expected_bound(j, n_draws, n_patients, lows[j]))
    n_above = counts[lines.index(rank)]
    at_least_rate, at_most_rate = at_least / n_draws, float(at_most(n_above * n_draws / k, n_draws, lows[rank]))
    contradict = at_least_rate > at_most_rate  # so copies are not as similar as planted ones: these bound nothing
    return {
        "confidence": 1 - ALPHA,
        "p_value": p_value,
        "at_least": round(at_least * k / n_draws),
        "at_least_rate": at_least_rate,
        "at_most_rate": 1.0 if contradict else at_most_rate,
        "contradict": contradict,
        "rank": rank,
        "n_above": n_above,
        "n_above_expected": k * rank / (n_patients + 1),
        "lines": [
            {
                "rank": j,
                "n_above": n,
                "fewest_seen": math.ceil(fewest_seen(n_draws, j, n_patients, len(lines)) * k / n_draws),
            }
            for j, n in zip(lines, counts, strict=True)
        ],
    }


def enough(
    k: int, n_patients: int, *, recall_low: float, max_rate: float, min_power: float, nominal: float
) -> dict[str, int | None]:
    """Sizes at which an innocent generator PASSes with the probability ENOUGH, if recall stays as it is.

    Returns:
      n_syn: synthetic images, with the unseen patients at hand, at least those at hand; n_val_patients: the reverse. None:
      no number is enough.
    """

    def could(k: int, n_patients: int) -> bool:
        beyond = bisect.bisect_right(range(k + 1), max_rate, key=lambda n: float(at_most(n, k, recall_low)))
        passes = 1 - calibrate.excess_p(beyond, k, 1, n_patients)
        if not beyond or passes < ENOUGH:
            return False
        ways = ways_of_seeing(k, n_patients, dict.fromkeys(ranks(n_patients, nominal), recall_low))
        return calibrate.power_at(max_rate, k, ways) >= min_power

    return {
        "n_syn": smallest(lambda n: could(n, n_patients), k),
        "n_val_patients": smallest(lambda n: could(k, n), n_patients),
    }


def smallest(holds: Callable[[int], bool], start: int) -> int | None:
    """Smallest number from `start` to MOST that `holds`, which is taken to go on holding; None: it does nowhere."""
    high = max(start, 1)
    while not holds(high):
        if high >= MOST:
            return None
        high = min(2 * high, MOST)
    return bisect.bisect_left(range(high), True, lo=min(max(start, high // 2), high), key=holds)
