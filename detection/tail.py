"""p-values below what the number of unseen patients can show: an extrapolation along a generalised Pareto tail.

The exact conformal p-value is never below 1 / (1 + patients). To go further one must say how the similarities of unseen
patients go on above the largest seen. Here: as a generalised Pareto tail that ends at similarity 1,

    P(S > s | S > u) = ((1 - s) / (1 - u))^a      (shape -1 / a, scale (1 - u) / a),

so that E = log((1 - u) / (1 - S)) of those above u is exponential with rate a. That is what nearest neighbours do: where
images have a density over d dimensions the chance of a training image within a distance r goes with r^d, and 1 - s with
r^2, so a tends to d / 2 (the estimate of a is Levina and Bickel's of the intrinsic dimension). As d seldom falls when
one looks closer, the tail is rather lighter than so, and the p-values err to the safe side. With one free parameter the
p-value and its interval are exact for any number of patients; a free shape has neither with some tens of them.

What no such tail can know is a kind of unseen patient of which the null holds none: twins, re-scans, phantoms. Where
the null holds some they make the tail heavier than exponential; that is tested, and then the extrapolation is refused.
"""

from typing import Any, NamedTuple

import numpy as np
import scipy

from detection import calibrate

LEAST_PATIENTS = 30
REFUSED_AT = 0.1  # p-value of the test of a heavier tail
CLOSEST = 2.0**-24  # 1 - s below this is rounding
SIMULATIONS = 1999


class Tail(NamedTuple):
    """A fitted tail; where `refused` says why there is none, the other fields are not to be used."""

    refused: str | None
    threshold: float  # u, a similarity
    share: float  # conformal p-value just above u
    patients: float  # n, the exceedances, each patient's images sharing a weight of one
    total: float  # sum of the weighted log excesses
    n_patients: int
    heavier_p: float  # see `fit`


def fit(null_M: np.ndarray, patients_M: np.ndarray, *, seed: int) -> Tail:
    """Tail of the similarities of unseen patients to their nearest training image.

    u is set so that about 2 sqrt(patients) patients lie above. A patient's images share a weight of one, which is exact
    if they are alike or if there is one, and wide in between. `heavier_p`: chance of as large a sum of squares of the
    excesses, given their sum, if they are exponential; exact by simulation, with one random excess a patient. It is
    the score test against a generalised Pareto tail of positive shape (Greenwood's statistic; del Castillo et al. 2014).
    """
    y_M, weight_M = _log_closeness(calibrate.finite(null_M)), calibrate.patient_weights(patients_M)
    p = len(np.unique(patients_M))
    no = Tail(None, float("nan"), float("nan"), 0.0, 0.0, p, float("nan"))
    if p < LEAST_PATIENTS:
        return no._replace(refused=f"{p} unseen patients; {LEAST_PATIENTS} are needed")
    if y_M.max() >= -np.log(CLOSEST):
        return no._replace(refused="an unseen patient's image equals a training image")
    order = np.argsort(-y_M, kind="stable")
    weight_from_top = np.cumsum(weight_M[order])
    u = y_M[order][np.searchsorted(weight_from_top, 2 * np.sqrt(p) + 1 - 1e-9)]
    above = y_M > u
    n, excess = float(weight_M[above].sum()), y_M[above] - u
    if n < 1 or len(np.unique(excess)) < 5:
        return no._replace(refused="the largest similarities of unseen patients are tied")
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(excess))
    one_each = excess[shuffled[np.unique(patients_M[above][shuffled], return_index=True)[1]]]
    greenwood = lambda e: (e**2).sum(-1) / e.sum(-1) ** 2
    simulated = greenwood(rng.standard_exponential((SIMULATIONS, len(one_each))))
    heavier = float((1 + (simulated >= greenwood(one_each)).sum()) / (1 + SIMULATIONS))
    tail = Tail(None, float(-np.expm1(-u)), (1 + n) / (1 + p), n, float(weight_M[above] @ excess), p, heavier)
    if heavier <= REFUSED_AT:
        return tail._replace(refused="some unseen patients are far closer to a training image than the tail allows")
    return tail


def p_values(
    tail: Tail, scores_K: np.ndarray, null_M: np.ndarray, patients_M: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """p-value of each score, extrapolated above the tail's threshold and conformal below, and its upper 97.5 % limit.

        p = share (1 + E / total)^(-n),      E = log((1 - u) / (1 - s))

    which is P(S > s) for one image of a new patient, u, n and total being random too: E / total of n + 1 exponential
    excesses does not depend on their rate. So it is exact, not merely estimated, if the tail is what it is taken for.
    The upper limit is of the tail probability itself, over the sampling of validation patients, given the training set:
    97.5 % limits of the share (Clopper-Pearson) and of the rate (gamma), so at least 95 % together.
    """
    p_K = calibrate.conformal_p(scores_K, null_M, patients_M)
    high_K = np.ones(len(p_K))
    excess_K = _log_closeness(np.asarray(scores_K, float)) - _log_closeness(np.float64(tail.threshold))
    out = excess_K > 0
    rate = scipy.stats.chi2.ppf(0.025, 2 * tail.patients) / (2 * tail.total)
    share = calibrate.beta_interval(min(tail.patients / tail.n_patients, 1.0), tail.n_patients)[1]
    p_K[out] = tail.share * (1 + excess_K[out] / tail.total) ** -tail.patients
    high_K[out] = np.minimum(share * np.exp(-rate * excess_K[out]), 1.0)
    return p_K, np.maximum(high_K, p_K)


def extrapolated_test(
    scores_K: np.ndarray, null_M: np.ndarray, patients_M: np.ndarray, *, fdr: float, seed: int
) -> tuple[dict[str, Any], np.ndarray]:
    """Benjamini-Hochberg on extrapolated p-values: (what `audit.json` holds of it, flagged (K,)).

    An extrapolation, to be named so wherever it is shown, beside the exact test and never in its place.

    Returns:
      refused: why there is none, or None. threshold, n_patients_above, exponent: u, n and a, the latter with
      `exponent_ci`, exact over the sampling of validation patients. heavier_p_value: see `fit`. smallest_p_value: of
      the scores. n_copies: flagged images. n_copies_cautious: flagged by the upper limits of the p-values.
    """
    tail = fit(null_M, patients_M, seed=seed)
    said: dict[str, Any] = {
        "method": "EXTRAPOLATION along a generalised Pareto tail that ends at similarity 1",
        "refused": tail.refused,
    }
    if tail.refused:
        return said, np.zeros(len(scores_K), bool)
    p_K, high_K = p_values(tail, scores_K, null_M, patients_M)
    flagged_K = calibrate.benjamini_hochberg(p_K, fdr)
    said |= {
        "threshold": tail.threshold,
        "n_patients_above": tail.patients,
        "exponent": tail.patients / tail.total,
        "exponent_ci": [float(scipy.stats.chi2.ppf(q, 2 * tail.patients) / (2 * tail.total)) for q in (0.025, 0.975)],
        "heavier_p_value": tail.heavier_p,
        "smallest_p_value": float(p_K.min()),
        "n_copies": int(flagged_K.sum()),
        "n_copies_cautious": int(calibrate.benjamini_hochberg(high_K, fdr).sum()),
    }
    return said, flagged_K


def _log_closeness(similarity: np.ndarray) -> np.ndarray:
    return -np.log(np.maximum(1 - np.asarray(similarity, float), CLOSEST))
