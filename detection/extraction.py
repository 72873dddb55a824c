"""Extraction: how many distinct training images and patients come out as more synthetic images are drawn.

The sampling unit is a synthetic image; it extracts the training image that it is a flagged copy of, or none. Intervals
are over the sampling of synthetic images from the generator, given its training set. What the flags themselves may have
wrong is said apart: a false flag mostly points at an image that no other points at, so false flags look like images
extracted once, and it is from those that the unseen are estimated.
"""

from typing import Any

import numpy as np

from detection import calibrate, richness

RESAMPLES = 250
REACH = 2  # extrapolated to so many times the number drawn; further out the estimates are but lower bounds


def extraction(
    index_K: np.ndarray, flagged_K: np.ndarray, patients_N: np.ndarray, *, fdr: float, seed: int, points: int = 20
) -> dict[str, Any]:
    """The extraction curve and what is unseen, as `audit.json` holds them.

    Args:
      index_K: nearest training image of each synthetic image. flagged_K: whether it is a copy. patients_N: of each
        training image. fdr: at which the flags were made.
    Returns:
      draws: numbers of synthetic images, up to twice those drawn. images, patients: expected number of distinct ones
      extracted by so many: exact over subsets up to those drawn, beyond that an extrapolation (`richness.distinct`);
      `extrapolated` says which. images_ci, patients_ci: 95 % intervals of what this generator would give on average,
      over the sampling of synthetic images, given the training set, the null set and the flags (`interval`).
      unseen_images, unseen_patients: {estimate, ci: how many more would come out if sampling went on for ever (lower
      bound, as rare ones cannot be seen; interval of the bound; `richness.unseen_interval`), without_false_flags: the
      estimate if a share fdr of the flags is false and all of these were extracted just once}.
    """
    k = len(index_K)
    draws = np.unique(np.round(np.linspace(0, REACH * k, 2 * points + 1)).astype(int))[1:]
    draws = np.unique(np.append(draws, k))
    result: dict[str, Any] = {"draws": draws.tolist()}
    extra = {}
    for name, of in (
        ("images", np.arange(len(patients_N))),
        ("patients", np.unique(patients_N, return_inverse=True)[1]),
    ):
        hits = counts_of(index_K, flagged_K, of)
        targets = len(hits)
        result[name] = richness.distinct(hits, k, draws, targets).tolist()
        result[name + "_ci"] = interval(hits, k, draws, targets, seed=seed).tolist()
        extra["unseen_" + name] = {
            "estimate": richness.unseen(hits, k, targets),
            "ci": list(richness.unseen_interval(hits, k, targets)),
            "without_false_flags": richness.unseen(hits, k, targets, false_once=fdr * flagged_K.sum()),
        }
    return result | extra | {"extrapolated": (draws > k).tolist()}


def counts_of(index_K: np.ndarray, flagged_K: np.ndarray, group_N: np.ndarray) -> np.ndarray:
    """How many flagged images point at each group of training images; `group_N` (N,) numbers from 0."""
    return np.bincount(group_N[index_K[flagged_K]], minlength=int(group_N.max()) + 1)


def interval(
    hits: np.ndarray, k: int, draws: np.ndarray, targets: int, *, seed: int, level: float = 0.95
) -> np.ndarray:
    """Interval of `richness.distinct` at each number of draws: (len(draws), 2), over the sampling of the k draws.

    Of what other samples of k from the same generator would give on average. The hull of two: percentiles of the
    bootstrap from `richness.assemblage`, moved so that their median is the estimate and stretched where they are
    narrower at k than the closed form `richness.spread` (with uneven targets, by up to a fifth); and, for few hits, of
    which a bootstrap makes too little, the Clopper-Pearson interval of the rate of draws that hit any target: as many
    draws fewer or more, on the curve downwards and along its tangent upwards. Covered 89 to 99 % in simulation.
    """
    estimate = richness.distinct(hits, k, draws, targets)
    rng = np.random.default_rng(seed)
    samples = rng.multinomial(k, richness.assemblage(hits, k, targets), RESAMPLES)[:, :-1]
    again = np.array([richness.distinct(sample, k, draws, targets) for sample in samples])
    low, middle, high = np.quantile(again, [(1 - level) / 2, 0.5, (1 + level) / 2], axis=0)
    distinct_at_k = (samples > 0).sum(1).std()
    stretch = max(richness.spread(hits, k, targets) / distinct_at_k, 1.0) if distinct_at_k else 1.0
    rate = hits.sum() / k
    least, most = calibrate.clopper_pearson(hits.sum(), k, level)
    if rate:
        inside = np.minimum(draws, k)
        slope = richness.distinct(hits, k, inside, targets) - richness.distinct(hits, k, inside - 1, targets)
        slow = richness.distinct(hits, k, np.floor(draws * least / rate), targets)
        fast = estimate + slope * draws * (most / rate - 1)
    else:
        slow, fast = np.zeros(len(draws)), draws * most
    top = np.minimum(draws, targets)
    both = (
        np.minimum(estimate + stretch * (low - middle), slow),
        np.maximum(estimate + stretch * (high - middle), fast),
    )
    return np.stack([np.clip(end, 0, top) for end in both], 1)


def memorized_interval(
    scores_K: np.ndarray,
    index_K: np.ndarray,
    null_M: np.ndarray,
    patients_M: np.ndarray,
    patients_N: np.ndarray,
    *,
    fdr: float,
    seed: int,
    level: float = 0.95,
) -> dict[str, list[float]]:
    """Intervals of the distinct training images and patients that flagged images point at: n_mem_ci, n_mem_patients_ci.

    Over both samplings, given the training set: `RESAMPLES` times the validation patients are drawn again, the test is
    repeated, and synthetic images are drawn from the `richness.assemblage` of its flags, whose deviation from its own
    mean is added to the number that the flags point at. Hull with `interval` at k draws. (Plainly drawing synthetic
    images again would lose a third of those that only one image points at.) Like the flags, the counts hold a share
    of up to `fdr` false ones.
    """
    k, rng = len(scores_K), np.random.default_rng(seed)
    groups = {"n_mem": np.arange(len(patients_N)), "n_mem_patients": np.unique(patients_N, return_inverse=True)[1]}
    test = lambda null, patients: calibrate.benjamini_hochberg(calibrate.conformal_p(scores_K, null, patients), fdr)
    found = {name: [] for name in groups}
    for images, renamed in calibrate.resampled_patients(patients_M, RESAMPLES, rng):
        flagged_K = test(null_M[images], renamed)
        for name, of in groups.items():
            hits = counts_of(index_K, flagged_K, of)
            chances = richness.assemblage(hits, k, len(hits))
            again = (rng.multinomial(k, chances)[:-1] > 0).sum() - (1 - (1 - chances[:-1]) ** k).sum()
            found[name].append((hits > 0).sum() + again)
    result = {}
    for name, of in groups.items():
        hits = counts_of(index_K, test(null_M, patients_M), of)
        low, high = interval(hits, k, np.array([k]), len(hits), seed=seed, level=level)[0]
        ends = np.clip(np.quantile(found[name], [(1 - level) / 2, (1 + level) / 2]), 0, min(k, len(hits)))
        result[name + "_ci"] = [float(min(low, ends[0])), float(max(high, ends[1]))]
    return result


def size_matched(
    index_K: np.ndarray, flagged_K: np.ndarray, patients_N: np.ndarray, m: int, *, seed: int
) -> dict[str, Any]:
    """Distinct images and patients that flagged images point at had only m synthetic images been drawn.

    Expected over all subsets of m of the K, with the flags of the whole test; an extrapolation where m > K. Comparable
    between generators that were sampled differently. Intervals as `interval`: over the sampling of synthetic images.

    Returns:
      n_mem_size_matched, n_mem_patients_size_matched and their `_ci`; size_matched_to: m; size_matched_extrapolated.
    """
    k = len(index_K)
    result: dict[str, Any] = {"size_matched_to": m, "size_matched_extrapolated": m > k}
    for name, of in (
        ("n_mem_size_matched", np.arange(len(patients_N))),
        ("n_mem_patients_size_matched", np.unique(patients_N, return_inverse=True)[1]),
    ):
        hits = counts_of(index_K, flagged_K, of)
        result[name] = float(richness.distinct(hits, k, m, len(hits))[0])
        result[name + "_ci"] = interval(hits, k, np.array([m]), len(hits), seed=seed)[0].tolist()
    return result


def mem_rate_size_matched(above_N: np.ndarray, patients_N: np.ndarray, k: int, m: int, *, seed: int) -> dict[str, Any]:
    """The paper's share of memorized training images had only m of the k synthetic images been drawn.

    With a_i of the k above tau for training image i it is the mean of 1 - C(k - a_i, m) / C(k, m): exact over subsets,
    with tau as it is. With m = the number of validation images it meets as many candidates as tau was set on, so that
    the rule says about 5 % of a generator that memorizes nothing. For m > k: see `richness.distinct`.

    Args:
      above_N: number of synthetic images above tau for each training image (`neighbours.count_above`).
    Returns:
      mem_rate_size_matched; mem_rate_size_matched_ci over training patients, the synthetic images taken as they are
      (None for m > k, where no image has a rate of its own); mem_rate_size_matched_extrapolated.
    """
    n = len(above_N)
    result = {"mem_rate_size_matched": float(richness.distinct(above_N, k, m, n)[0] / n)}
    result["mem_rate_size_matched_ci"] = None
    if m <= k:
        count, where = np.unique(above_N, return_inverse=True)
        chance = np.array([richness.distinct(np.array([a]), k, m, 1)[0] for a in count])[where]
        result["mem_rate_size_matched_ci"] = list(calibrate.rate_interval(chance, patients_N, seed=seed))
    return result | {"mem_rate_size_matched_extrapolated": m > k}
