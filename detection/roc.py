"""How well a score tells two sets of images apart: ROC area and recall at a false-positive rate, by patient.

Patients are the unit: each counts once, and its images share that. So the ROC area is the chance that an image of a
random patient of the first set scores above one of a random patient of the second, and intervals are over patients.
"""

from typing import Any

import numpy as np
import scipy

from detection import calibrate


def area(
    high_P: np.ndarray, patients_P: np.ndarray, low_Q: np.ndarray, patients_Q: np.ndarray, level: float = 0.95
) -> tuple[float, tuple[float, float]]:
    """ROC area of scores that should be high in the first set and low in the second, and its interval over patients.

    DeLong, DeLong and Clarke-Pearson (1988) with patients for observations, which is Obuchowski's (1997) way with
    clusters, on the logit scale; its hull with the interval of a score test with Hanley and McNeil's (1982) variance
    at as many patients (Newcombe 2006), which still has a width where all are told apart.

    Returns:
      area in [0, 1], ties counting one half; (low, high).
    """
    high_P, low_Q = calibrate.finite(high_P), calibrate.finite(low_Q)
    wins = by_patient(_share_below(high_P, low_Q, patients_Q), patients_P)
    losses = by_patient(_share_below(low_Q, high_P, patients_P), patients_Q)
    value, p, q = float(wins.mean()), len(wins), len(losses)
    error = np.sqrt((wins.var(ddof=1) / p if p > 1 else 0.25) + (losses.var(ddof=1) / q if q > 1 else 0.25))
    z = scipy.stats.norm.ppf((1 + level) / 2)
    low, high = _score_interval(value, p, q, z)
    if 0 < value < 1:
        half = z * error / (value * (1 - value))
        low = min(low, float(scipy.special.expit(scipy.special.logit(value) - half)))
        high = max(high, float(scipy.special.expit(scipy.special.logit(value) + half)))
    return value, (low, high)


def recall_at(
    fpr: float,
    high_P: np.ndarray,
    patients_P: np.ndarray,
    low_Q: np.ndarray,
    patients_Q: np.ndarray,
    *,
    seed: int,
    level: float = 0.95,
) -> tuple[float, tuple[float, float]]:
    """Share of the first set above the lowest threshold that at most `fpr` of the second reaches, and its interval.

    Both shares are over patients. The interval is the hull of a bootstrap that resamples the patients of both sets,
    and so sets the threshold anew, and of Clopper-Pearson over the patients of the first. With fewer than about
    4 / fpr patients in the second set their largest scores say little of where the threshold should be, and the
    interval is of the recall at such a threshold as they give: what its false-positive rate may truly be, `false_rate`
    says.
    """
    high_P, low_Q = calibrate.finite(high_P), calibrate.finite(low_Q)
    value = _recall(fpr, high_P, patients_P, low_Q, patients_Q)
    rng = np.random.default_rng(seed)
    draws = zip(
        calibrate.resampled_patients(patients_P, calibrate.DRAWS // 4, rng),
        calibrate.resampled_patients(patients_Q, calibrate.DRAWS // 4, rng),
        strict=True,
    )
    again = [_recall(fpr, high_P[i], renamed_i, low_Q[j], renamed_j) for (i, renamed_i), (j, renamed_j) in draws]
    low, high = np.quantile(again, [(1 - level) / 2, (1 + level) / 2])
    exact = calibrate.beta_interval(value, len(np.unique(patients_P)), level)
    return value, (min(float(low), exact[0]), max(float(high), exact[1]))


def false_rate(
    fpr: float, low_Q: np.ndarray, patients_Q: np.ndarray, level: float = 0.95
) -> tuple[float, tuple[float, float]]:
    """Share of the second set's patients at or above the threshold of `recall_at`, and its Clopper-Pearson interval.

    The interval is over the patients of the second set and says nothing of having chosen the threshold on them; with
    20 patients and fpr = 1 % it is 0 with an upper end of 17 %.
    """
    reached = 1 - _share_below(low_Q, low_Q, patients_Q, ties=0.0)
    value = float(reached[reached <= fpr * (1 + 1e-9)].max(initial=0.0))
    return value, calibrate.beta_interval(value, len(np.unique(patients_Q)), level)


def summary(
    high_P: np.ndarray, patients_P: np.ndarray, low_Q: np.ndarray, patients_Q: np.ndarray, *, seed: int
) -> dict[str, Any]:
    """`area`, `recall_at` 1 and 5 %, and the `false_rate` that the two thresholds have, as `audit.json` holds them."""
    result: dict[str, Any] = {}
    result["auc"], ci = area(high_P, patients_P, low_Q, patients_Q)
    result["auc_ci"] = list(ci)
    for name, fpr in (("recall_at_fpr_01", 0.01), ("recall_at_fpr_05", 0.05)):
        result[name], ci = recall_at(fpr, high_P, patients_P, low_Q, patients_Q, seed=seed)
        result[name + "_ci"] = list(ci)
        result[name.removeprefix("recall_at_") + "_ci"] = list(false_rate(fpr, low_Q, patients_Q)[1])
    return result


def _recall(fpr, high_P, patients_P, low_Q, patients_Q) -> float:
    reached = 1 - _share_below(high_P, low_Q, patients_Q, ties=0.0)  # share of the second set at or above each score
    return float(by_patient(reached <= fpr * (1 + 1e-9), patients_P).mean())


def _share_below(scores: np.ndarray, others: np.ndarray, patients: np.ndarray, ties: float = 0.5) -> np.ndarray:
    """Share of `others`, each patient counting once, below each score; equal ones count `ties`."""
    order = np.argsort(others, kind="stable")
    weight = calibrate.patient_weights(patients)[order]
    below = np.append(0.0, np.cumsum(weight)) / weight.sum()
    left, right = (below[np.searchsorted(others[order], scores, side=side)] for side in ("left", "right"))
    return (1 - ties) * left + ties * right


def by_patient(x: np.ndarray, patients: np.ndarray) -> np.ndarray:
    """Mean of `x` (n, ...) over the images of each patient: (patients, ...), in the order of their names."""
    _, inverse, counts = np.unique(patients, return_inverse=True, return_counts=True)
    columns = np.reshape(x, (len(x), -1)).T
    means = [np.bincount(inverse, weights=column) / counts for column in columns]
    return np.stack(means, 1).reshape(len(counts), *np.shape(x)[1:])


def _score_interval(value: float, p: int, q: int, z: float) -> tuple[float, float]:
    """All areas t with (value - t)^2 <= z^2 V(t), V of Hanley and McNeil with both sizes at their mean."""
    more = (p + q) / 2 - 1

    def excess(t):
        v = t * (1 - t) * (1 + more * ((1 - t) / (2 - t) + t / (1 + t))) / (p * q)
        return abs(value - t) - z * np.sqrt(v)

    inside = min(max(value, 1e-9), 1 - 1e-9)  # at 0 and 1 themselves V is 0, which is a root but not the end
    low = 0.0 if value <= 0 else scipy.optimize.brentq(excess, 0.0, inside)
    high = 1.0 if value >= 1 else scipy.optimize.brentq(excess, inside, 1.0)
    return float(low), float(high)
