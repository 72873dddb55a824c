"""The statistics of the audit, on arrays of similarities; nothing here sees an image.

Sizes: N training images, M validation images, C control images, K synthetic images. A score is the similarity of an
image to its nearest training image. Patients are the unit: images of one patient are dependent, those of two are not. Of
synthetic images the draw is, what the generator gave at once: all slices of a volume are one draw.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy

from detection import richness

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
    tau = float(np.percentile(finite(val_of_train_N), percentile))
    return PaperRule(tau, finite(syn_of_train_N) > tau, finite(train_of_syn_K) > tau)


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
    For k > C it is an extrapolation, and `extrapolated` says so: the training images that no control image came near
    stand for unseen species, whose number and discovery follow Chao's estimator (`richness.distinct`). The naive
    1 - (1 - a_i / C)^k takes a_i = 0 for impossible and gave less than half of the truth in simulation. Images of one
    control patient count as separate draws; as they repeat each other, the true rate for k independent images is a
    little higher than either estimate.

    Args:
      train_of_control_C: similarity of each control image to its nearest training image.
      above_N: number of control images above tau for each training image.
    """
    c, n = len(train_of_control_C), len(above_N)
    flags = (finite(train_of_control_C) > tau).astype(float)
    mem_rate = float(richness.distinct(np.asarray(above_N), c, k, n)[0] / n)
    return NullFloor(float(flags.mean()), rate_interval(flags, patients_C, seed=seed), mem_rate, k > c)


def conformal_p(scores_K: np.ndarray, null_M: np.ndarray, patients_M: np.ndarray) -> np.ndarray:
    """Conformal p-value of each score against the scores of unseen patients: (K,).

        p = (1 + sum over patients of the share of that patient's images with null >= score) / (1 + number of patients)

    Valid for one image of a new patient, if patients are exchangeable, whatever their number of images: each weighs alike,
    so a generator that draws patients with many images more often is held against another population (Lee, Barber and Willett, 'Distribution-free
    inference with hierarchical data', 2023; Dunn, Wasserman and Ramdas 2022). With one image a patient it is the usual
    (1 + #{null >= s}) / (1 + M). Ties count against the image. The smallest value possible is 1 / (1 + patients).
    """
    weight_M = patient_weights(patients_M)
    order = np.argsort(finite(null_M), kind="stable")
    null, weight = null_M[order], weight_M[order]
    from_here = np.append(np.cumsum(weight[::-1])[::-1], 0.0)  # weight of all null scores at or after a position
    exceed_K = from_here[np.searchsorted(null, finite(scores_K), side="left")]
    return np.minimum((1.0 + exceed_K) / (1.0 + weight_M.sum()), 1.0)


def patient_weights(patients: np.ndarray) -> np.ndarray:
    """One over the number of images of each image's patient; sums to the number of patients."""
    _, inverse, counts = np.unique(patients, return_inverse=True, return_counts=True)
    return 1.0 / counts[inverse]


def benjamini_hochberg(p_K: np.ndarray, fdr: float) -> np.ndarray:
    """Which p-values are flagged at this false-discovery rate (Benjamini and Hochberg 1995).

    Conformal p-values that share one null set of one image a patient are positively dependent (PRDS), under which the
    procedure holds (Bates et al. 2023). With several images a patient that is not proved; the tests simulate it. An
    exact tie p = fdr r / K is flagged, whatever the rounding of p.
    """
    if not 0 < fdr < 1:
        raise ValueError(f"config.audit.fdr={fdr} must lie between 0 and 1")
    if not len(p_K):
        return np.zeros(0, bool)
    return scipy.stats.false_discovery_control(p_K, method="bh") <= fdr * (1 + 1e-9)


def clopper_pearson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Exact binomial interval of a rate (Clopper and Pearson 1934)."""
    interval = scipy.stats.binomtest(int(successes), int(n)).proportion_ci(level, method="exact")
    return float(interval.low), float(interval.high)


def rate_interval(flags: np.ndarray, patients: np.ndarray, *, seed: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of a rate over images whose patients are the independent unit: the hull of two.

    A bootstrap that resamples patients (percentile), and Clopper-Pearson as if there were as many images as the
    `effective_number` of patients; the latter keeps an interval where the bootstrap has none (all or nothing flagged).
    """
    flags = np.asarray(flags, float)
    _, inverse, counts = np.unique(patients, return_inverse=True, return_counts=True)
    hits = np.bincount(inverse, weights=flags)
    rng = np.random.default_rng(seed)
    draws = (rng.integers(0, len(counts), len(counts)) for _ in range(DRAWS))
    low, high = np.quantile([hits[i].sum() / counts[i].sum() for i in draws], [(1 - level) / 2, (1 + level) / 2])
    exact = beta_interval(flags.mean(), effective_number(patients), level)
    return min(float(low), exact[0]), max(float(high), exact[1])


def effective_number(patients: np.ndarray) -> int:
    """Patients that would say as much with one image each: (sum w)^2 / sum w^2 by image counts (Kish 1965), at least 1."""
    counts = np.unique(patients, return_counts=True)[1]
    return max(round(counts.sum() ** 2 / (counts**2).sum()), 1)


def beta_interval(rate: float, n: float, level: float = 0.95) -> tuple[float, float]:
    """Clopper-Pearson for a rate whose count n * rate need not be whole."""
    tail, x = (1 - level) / 2, n * rate
    low = 0.0 if x <= 0 else float(scipy.stats.beta.ppf(tail, x, n - x + 1))
    high = 1.0 if x >= n else float(scipy.stats.beta.ppf(1 - tail, x + 1, n - x))
    return low, high


def draws_interval(flags_K: np.ndarray, draws_K: np.ndarray) -> tuple[float, float]:
    """Clopper-Pearson of a rate over synthetic images, as if there were as many as the `effective_number` of draws."""
    return beta_interval(float(np.mean(flags_K)), effective_number(draws_K))


class Calibrated(NamedTuple):
    """Outcome of `calibrated_test`; rate is the flagged share, which is no bound of the copy rate (`enrichment` has bounds)."""

    p_K: np.ndarray
    flagged_K: np.ndarray
    threshold: float | None  # the lowest flagged score; None where nothing is flagged
    rate: float
    rate_ci: tuple[float, float]
    needed: float | None  # see `needed_score`: where a threshold is drawn if nothing is flagged


def calibrated_test(
    scores_K: np.ndarray,
    null_M: np.ndarray,
    patients_M: np.ndarray,
    *,
    fdr: float,
    seed: int,
    draws_K: np.ndarray | None = None,
) -> Calibrated:
    """Conformal p-values against unseen patients and the same training images, then Benjamini-Hochberg at `fdr`.

    That is: of the flagged images a share of at most `fdr` is wrong, averaged over audits, not in each. The interval of the
    flagged share is the hull of `draws_interval` (the null set taken as given) and a bootstrap that resamples draws and
    validation patients and repeats the whole test.

    Args:
      draws_K: the draw that each synthetic image is of; None: each is one.
    """
    draws_K = np.arange(len(scores_K)) if draws_K is None else draws_K
    p_K = conformal_p(scores_K, null_M, patients_M)
    flagged_K = benjamini_hochberg(p_K, fdr)
    rng = np.random.default_rng(seed)
    rates = [
        benjamini_hochberg(conformal_p(scores_K[ours], null_M[theirs], renamed), fdr).mean()
        for (theirs, renamed), (ours, _) in zip(
            resampled_patients(patients_M, DRAWS // 4, rng), resampled_patients(draws_K, DRAWS // 4, rng), strict=True
        )
    ]
    exact = draws_interval(flagged_K, draws_K)
    low, high = np.quantile(rates, [0.025, 0.975])
    threshold = float(scores_K[flagged_K].min()) if flagged_K.any() else None
    rate_ci = min(float(low), exact[0]), max(float(high), exact[1])
    needed = needed_score(null_M, patients_M, len(scores_K), fdr)
    return Calibrated(p_K, flagged_K, threshold, float(flagged_K.mean()), rate_ci, needed)


def resampled_patients(
    patients: np.ndarray, draws: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Bootstrap samples of patients: (index of the images drawn, their patients renamed: one drawn twice is two)."""
    _, inverse, counts = np.unique(patients, return_inverse=True, return_counts=True)
    members = np.split(np.argsort(inverse, kind="stable"), np.cumsum(counts)[:-1])
    for _ in range(draws):
        chosen = rng.integers(0, len(members), len(members))
        yield np.concatenate([members[i] for i in chosen]), np.repeat(np.arange(len(chosen)), counts[chosen])


def needed_score(null_M: np.ndarray, patients_M: np.ndarray, k: int, fdr: float) -> float | None:
    """The score that the fewest flaggable images would have needed, None if k images are too few.

    With r of k images the fewest whose smallest possible p-value passes (`fewest_flaggable`): p <= fdr r / k.
    """
    fewest = fewest_flaggable(len(np.unique(patients_M)), k, fdr)
    return score_at(null_M, patients_M, fdr * fewest / k) if fewest <= k else None


def score_at(null_M: np.ndarray, patients_M: np.ndarray, level: float) -> float:
    """The lowest float just above a null score whose conformal p is at most `level`, which is at least 1 / (1 + patients)."""
    null = np.unique(finite(null_M))
    just_above = np.nextafter(null.astype(np.float64), np.inf)
    passes = conformal_p(just_above, np.asarray(null_M, np.float64), patients_M) <= level * (1 + 1e-9)
    return float(just_above[passes][0])


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
      `nominal` by more than its interval allows; it may well lie below, as p-values are multiples of about 1 /
      patients. flag_rate_ci: the hull of `rate_interval` (the null set taken as given) and of a bootstrap that
      resamples the patients of both sets, because the rate of one null set of P patients strays from nominal by about
      sqrt(nominal (1 - nominal) / P). excess_p_value: chance of a flag_rate as high or higher if both sets are alike,
      exact with one image a patient: of n new scores, those above all but j - 1 of P null scores are BetaBinomial(n,
      j, P + 1 - j), j = floor(nominal (P + 1)); with several images a patient n is their `effective_number` (`excess_p`).
      The test of the control: small is bad. smallest_excess_p_value: what it would be if every control image were flagged: a
      control for which this is not small cannot fail. bh_flag_rate: share flagged when the whole procedure is run on them as on the
      synthetic images, comparable with the copy rate; near 0 if all is well.
    """
    p_C = conformal_p(scores_C, null_M, patients_M)
    level = nominal * (1 + 1e-9)  # sums of weights are rounded
    flags = p_C <= level
    rng = np.random.default_rng(seed)
    rates = [
        (conformal_p(scores_C[ours], null_M[theirs], renamed) <= level).mean()
        for (ours, _), (theirs, renamed) in zip(
            resampled_patients(patients_C, DRAWS // 4, rng),
            resampled_patients(patients_M, DRAWS // 4, rng),
            strict=True,
        )
    ]
    low, high = rate_interval(flags, patients_C, seed=seed)
    n, n_null = effective_number(patients_C), len(np.unique(patients_M))
    j = int(level * (n_null + 1))
    return {
        "n": len(flags),
        "n_patients": len(np.unique(patients_C)),
        "flag_rate": float(flags.mean()),
        "flag_rate_ci": [min(low, float(np.quantile(rates, 0.025))), max(high, float(np.quantile(rates, 0.975)))],
        "nominal": nominal,
        "excess_p_value": excess_p(flags.mean() * n, n, j, n_null) if j else 1.0,
        "smallest_excess_p_value": excess_p(n, n, j, n_null) if j else 1.0,
        "bh_flag_rate": float(benjamini_hochberg(p_C, nominal).mean()),
    }


def excess_p(above: float, n: int, j: int, n_null: int) -> float:
    """P(X >= above) for X of BetaBinomial(n, j, n_null + 1 - j): new scores above all but j - 1 of n_null old ones.

    `above` need not be whole, where n is an `effective_number`: between whole numbers the chance is interpolated
    geometrically. (Rounded up, p <= 0.05 came in 7.5 % of fair controls of 20 patients with one to ten images.)
    """
    whole = int(np.floor(above + 1e-9))
    part = max(above - whole, 0.0)
    at = _reach(whole, n, j, n_null)
    return at if part == 0 else at ** (1 - part) * _reach(whole + 1, n, j, n_null) ** part


def _reach(count: int, n: int, j: int, n_null: int) -> float:
    """P(X >= count): of the highest count + j - 1 of all n + n_null scores at least `count` are new. Sums j terms."""
    if count <= 0 or count > n:
        return float(count <= 0)
    new = np.arange(count, min(count + j - 1, n) + 1)
    return min(float(scipy.stats.hypergeom.pmf(new, n + n_null, n, count + j - 1).sum()), 1.0)


def fewest_flaggable(n_patients: int, k: int, fdr: float) -> int:
    """Fewest of k images that, all perfect copies, Benjamini-Hochberg can flag; more than k: it can flag none.

    r copies reach p = 1 / (1 + n_patients) at best, and are flagged if that is at most fdr r / k.
    """
    return max(int(np.ceil(k / (fdr * (1 + n_patients)) - 1e-9)), 1)


def detectable_rate(k: int, ways: Sequence[tuple[int, float]], power: float = 0.8) -> float:
    """Smallest copy rate of a generator at which copies among k images are found with this probability: (0, 1], or infinity.

    Args:
      ways: of finding them: (fewest copies above a line that are enough, share of copies that lie above it). That is
        `fewest_flaggable` for Benjamini-Hochberg and `enrichment.fewest_seen` for the set-level test; the share is the
        recall of the positive control, at its lower limit.

    A number Binomial(k, rate recall) of the images are copies above the line, and P(Binomial(k, q) >= r) = I_q(r, k - r +
    1), the regularised incomplete beta function, so q is its inverse at `power`. The best of the ways counts alone, and
    innocent images above the line, which would only help, do not: an upper bound.
    """
    rates = [
        float(scipy.special.betaincinv(fewest, k - fewest + 1, power)) / recall
        for fewest, recall in ways
        if fewest <= k and recall > 0
    ]
    least = min(rates, default=float("inf"))
    return least if least <= 1 else float("inf")


def power_at(copy_rate: float, k: int, ways: Sequence[tuple[int, float]]) -> float:
    """Probability that copies are found if the generator copies at `copy_rate`; as in `detectable_rate`."""
    return max(float(scipy.stats.binom.sf(fewest - 1, k, copy_rate * recall)) for fewest, recall in ways)


def finite(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x)
    if x.size == 0 or not np.isfinite(x).all():
        raise ValueError("similarities are missing or not finite: the detector's embeddings are broken, train it again")
    return x
