"""The statistics of the audit, on arrays of similarities; nothing here sees an image.

Sizes: N training images, M validation images, C control images, K synthetic images. A score is the similarity of an
image to its nearest training image. Patients are the unit: images of one patient are dependent, those of two are not.
"""

from typing import Any, NamedTuple

import numpy as np
from scipy import special, stats

DRAWS = 1000  # bootstrap resamples


class PaperRule(NamedTuple):
    """Outcome of `paper_rule`."""

    threshold: float
    mem_N: np.ndarray
    copies_K: np.ndarray


def paper_rule(
    val_of_train_N: np.ndarray, syn_of_train_N: np.ndarray, train_of_syn_K: np.ndarray, percentile: float = 95.0
) -> PaperRule:
    """The rule of Dar et al. (arXiv 2402.01054), as in their code.

    tau is the `percentile` of the similarity of training images to their nearest validation image. A training image is
    memorized if its nearest synthetic image exceeds tau, a synthetic one a copy if its nearest training image does.

    Args:
      val_of_train_N, syn_of_train_N: of each training image, to the nearest validation and synthetic image.
      train_of_syn_K: of each synthetic image, to the nearest training image.
    """
    tau = float(np.percentile(_finite(val_of_train_N), percentile))
    return PaperRule(tau, _finite(syn_of_train_N) > tau, _finite(train_of_syn_K) > tau)


class NullFloor(NamedTuple):
    """What the paper's rule says of a generator that memorizes nothing."""

    copy_rate: float
    copy_rate_ci: tuple[float, float]
    mem_rate: float
    extrapolated: bool


def null_floor(
    tau: float, train_of_control_C: np.ndarray, patients_C: np.ndarray, above_N: np.ndarray, k: int, *, seed: int
) -> NullFloor:
    """The paper's rule applied to unseen real images as if they were k synthetic ones.

    tau is a maximum over the validation set's size, but is applied to maxima over N and over k, so it accuses even a
    perfect generator. The copy rate needs no matching of sizes: each control image meets all N training images, as a
    synthetic one does. The memorized rate does: with a_i of the C control images above tau for training image i, the
    chance that none of k drawn ones is above is C(C - a_i, k) / C(C, k) for k <= C (exact expectation over subsets).
    For k > C it is estimated by (1 - a_i / C)^k, which is biased low where a_i = 0: `extrapolated` says so.

    Args:
      train_of_control_C: similarity of each control image to its nearest training image.
      above_N: number of control images above tau for each training image.
    """
    c = len(train_of_control_C)
    flags = (_finite(train_of_control_C) > tau).astype(float)
    a = np.asarray(above_N, float)
    if k <= c:
        log_none = (
            special.gammaln(c - a + 1)
            - special.gammaln(np.maximum(c - a - k, 0) + 1)
            - special.gammaln(c + 1)
            + special.gammaln(c - k + 1)
        )
        none = np.where(c - a >= k, np.exp(log_none), 0.0)
    else:
        none = (1 - a / c) ** k
    return NullFloor(
        float(flags.mean()), rate_interval(flags, patients_C, seed=seed), max(float(1 - none.mean()), 0.0), k > c
    )


def conformal_p(scores_K: np.ndarray, null_M: np.ndarray, patients_M: np.ndarray) -> np.ndarray:
    """Conformal p-value of each score against the scores of unseen patients: (K,).

        p = (1 + sum over patients of the share of that patient's images with null >= score) / (1 + number of patients)

    Valid for one image of a new patient, if patients are exchangeable (Lee, Barber and Willett, 'Distribution-free
    inference with hierarchical data', 2023; Dunn, Wasserman and Ramdas 2022). With one image a patient it is the usual
    (1 + #{null >= s}) / (1 + M). Ties count against the image. The smallest value possible is 1 / (1 + patients).
    """
    weight_M = patient_weights(patients_M)
    order = np.argsort(_finite(null_M), kind="stable")
    null, weight = null_M[order], weight_M[order]
    from_here = np.append(np.cumsum(weight[::-1])[::-1], 0.0)  # weight of all null scores at or after a position
    exceed_K = from_here[np.searchsorted(null, _finite(scores_K), side="left")]
    return np.minimum((1.0 + exceed_K) / (1.0 + weight_M.sum()), 1.0)


def patient_weights(patients: np.ndarray) -> np.ndarray:
    """One over the number of images of each image's patient; sums to the number of patients."""
    _, inverse, counts = np.unique(patients, return_inverse=True, return_counts=True)
    return 1.0 / counts[inverse]


def benjamini_hochberg(p_K: np.ndarray, fdr: float) -> np.ndarray:
    """Which p-values are flagged at this false-discovery rate (Benjamini and Hochberg 1995).

    Conformal p-values that share one null set are positively dependent, under which the procedure still holds (Bates et
    al. 2023).
    """
    if not 0 < fdr < 1:
        raise ValueError(f"config.audit.fdr={fdr} must lie between 0 and 1")
    if not len(p_K):
        return np.zeros(0, bool)
    return stats.false_discovery_control(p_K, method="bh") <= fdr


def clopper_pearson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Exact binomial interval of a rate (Clopper and Pearson 1934)."""
    interval = stats.binomtest(int(successes), int(n)).proportion_ci(level, method="exact")
    return float(interval.low), float(interval.high)


def rate_interval(flags: np.ndarray, patients: np.ndarray, *, seed: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of a rate over images whose patients are the independent unit: the hull of two.

    A bootstrap that resamples patients (percentile), and Clopper-Pearson as if there were as many images as the
    effective number (sum w)^2 / sum w^2 of patients by their image counts; the latter keeps an interval where the
    bootstrap has none (all or nothing flagged).
    """
    flags = np.asarray(flags, float)
    _, inverse, counts = np.unique(patients, return_inverse=True, return_counts=True)
    hits = np.bincount(inverse, weights=flags)
    draw = np.random.default_rng(seed).integers(0, len(counts), (DRAWS, len(counts)))
    low, high = np.quantile(hits[draw].sum(1) / counts[draw].sum(1), [(1 - level) / 2, (1 + level) / 2])
    effective = max(round(counts.sum() ** 2 / (counts**2).sum()), 1)
    exact = beta_interval(flags.mean(), effective, level)
    return min(float(low), exact[0]), max(float(high), exact[1])


def beta_interval(rate: float, n: float, level: float = 0.95) -> tuple[float, float]:
    """Clopper-Pearson for a rate whose count n * rate need not be whole."""
    tail, x = (1 - level) / 2, n * rate
    low = 0.0 if x <= 0 else float(stats.beta.ppf(tail, x, n - x + 1))
    high = 1.0 if x >= n else float(stats.beta.ppf(1 - tail, x + 1, n - x))
    return low, high


class Calibrated(NamedTuple):
    """Outcome of `calibrated_test`."""

    p_K: np.ndarray
    flagged_K: np.ndarray
    threshold: float | None  # the lowest flagged score; None where nothing is flagged
    rate: float
    rate_ci: tuple[float, float]


def calibrated_test(
    scores_K: np.ndarray, null_M: np.ndarray, patients_M: np.ndarray, *, fdr: float, seed: int
) -> Calibrated:
    """Conformal p-values against unseen patients and the same training images, then Benjamini-Hochberg at `fdr`.

    The interval of the flagged share is the hull of Clopper-Pearson over the K synthetic images (the null set taken as
    given) and a bootstrap that resamples synthetic images and validation patients and repeats the whole test.
    """
    p_K = conformal_p(scores_K, null_M, patients_M)
    flagged_K = benjamini_hochberg(p_K, fdr)
    rng = np.random.default_rng(seed)
    _, inverse = np.unique(patients_M, return_inverse=True)
    members = np.split(np.argsort(inverse, kind="stable"), np.cumsum(np.bincount(inverse))[:-1])
    rates = []
    for _ in range(DRAWS // 4):
        chosen = rng.integers(0, len(members), len(members))
        images = np.concatenate([members[i] for i in chosen])
        renamed = np.repeat(np.arange(len(chosen)), [len(members[i]) for i in chosen])
        resampled = scores_K[rng.integers(0, len(scores_K), len(scores_K))]
        rates.append(benjamini_hochberg(conformal_p(resampled, null_M[images], renamed), fdr).mean())
    exact = clopper_pearson(flagged_K.sum(), len(flagged_K))
    low, high = np.quantile(rates, [0.025, 0.975])
    threshold = float(scores_K[flagged_K].min()) if flagged_K.any() else None
    return Calibrated(
        p_K, flagged_K, threshold, float(flagged_K.mean()), (min(float(low), exact[0]), max(float(high), exact[1]))
    )


def negative_control(
    scores_C: np.ndarray,
    patients_C: np.ndarray,
    null_M: np.ndarray,
    patients_M: np.ndarray,
    *,
    nominal: float,
    seed: int,
) -> dict[str, Any]:
    """Unseen patients, none of them in the null, scored as if they were synthetic.

    Returns:
      n, n_patients: images and patients. flag_rate: share of the images with p <= nominal, which should not exceed
      `nominal` by more than its interval `flag_rate_ci` (by patient) allows. bh_flag_rate: share flagged when the whole
      procedure is run on them as on the synthetic images, comparable with the copy rate; near 0 if all is well.
    """
    p_C = conformal_p(scores_C, null_M, patients_M)
    flags = p_C <= nominal
    return {
        "n": len(flags),
        "n_patients": len(np.unique(patients_C)),
        "flag_rate": float(flags.mean()),
        "flag_rate_ci": list(rate_interval(flags, patients_C, seed=seed)),
        "nominal": nominal,
        "bh_flag_rate": float(benjamini_hochberg(p_C, nominal).mean()),
    }


def smallest_flaggable_rate(n_patients: int, k: int, fdr: float) -> float:
    """Smallest share of perfect copies that Benjamini-Hochberg can flag at all: (0, 1], or infinity if none can be.

    r copies reach p = 1 / (1 + n_patients) at best, and are flagged if that is at most fdr r / k.
    """
    r = int(np.ceil(k / (fdr * (1 + n_patients)) - 1e-9))
    return max(r, 1) / k if r <= k else float("inf")


def _finite(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x)
    if x.size == 0 or not np.isfinite(x).all():
        raise ValueError("similarities are missing or not finite: the detector's embeddings are broken, train it again")
    return x
