"""Known measures of copying, each beside its value for unseen real images: d1/d2, C_T and AuthPct.

They are given to compare with the literature; the calibrated test is the one to read. All take vectors of images in one
space (embeddings, latents, pixels) and Euclidean distances; on standardised vectors these order as correlation does. The
literature takes them of pixels or latents; here each image is first brought to mean 0 and norm 1. Vectors are read part
by part, so they may be memory maps.
"""

from typing import Any

import numpy as np
import scipy

from detection import calibrate, controls, euclidean, neighbours

RATIO = 1 / 3
LEAST = 20  # images of either set that a cell of C_T must hold
PER_CELL = 40  # unseen patients per cell, on average; at most MOST_CELLS cells
MOST_CELLS = 10
CENTRES_FROM = 20_000  # training images, at random, that the cells are made of
DRAWS = 50  # choices of one image a patient


def baselines(
    train_NxD: np.ndarray,
    syn_KxD: np.ndarray,
    draws_K: np.ndarray,
    val_MxD: np.ndarray,
    patients_M: np.ndarray,
    control_CxD: np.ndarray,
    patients_C: np.ndarray,
    *,
    seed: int,
) -> dict[str, Any]:
    """The three measures in one space, as `audit.json` holds them.

    Returns:
      d1_d2: {rate, rate_ci: share of synthetic images with d1 / d2 < 1/3 (`close_to_one`),
      `calibrate.draws_interval`; null_rate, null_rate_ci: of validation images, over patients}. auth_pct: {value, ci, null,
      null_ci}: share of `authentic` images, likewise. c_t: {statistic, p_value, cells; null_statistic, null_p_value}:
      see `c_t`; the null is of the control images in place of the synthetic ones, against the same validation images.
    """
    of_syn, of_val = (euclidean.nearest(x, train_NxD, k=2) for x in (syn_KxD, val_MxD))
    result: dict[str, Any] = {}
    flags = {"d1_d2": close_to_one, "auth_pct": lambda found: authentic(found, train_NxD)}
    for name, (rate, null) in {"d1_d2": ("rate", "null_rate"), "auth_pct": ("value", "null")}.items():
        syn_K, val_M = flags[name](of_syn), flags[name](of_val)
        result[name] = {
            rate: float(syn_K.mean()),
            "rate_ci" if rate == "rate" else "ci": list(calibrate.draws_interval(syn_K, draws_K)),
            null: float(val_M.mean()),
            f"{null}_ci": list(calibrate.rate_interval(val_M, patients_M, seed=seed)),
        }
    n_cells = int(np.clip(len(np.unique(patients_M)) // PER_CELL, 1, min(MOST_CELLS, len(train_NxD))))
    test = lambda x, patients: c_t(train_NxD, val_MxD, patients_M, x, patients, n_cells=n_cells, seed=seed)
    ours, null = test(syn_KxD, draws_K), test(control_CxD, patients_C)
    return result | {"c_t": ours | {f"null_{name}": null[name] for name in ("statistic", "p_value")}}


def close_to_one(of: euclidean.Nearest) -> np.ndarray:
    """Which images are far closer to one training image than to any other: d1 / d2 < 1/3 (Yoon et al. 2023; Gu et al. 2023).

    Blind to copies of an image that is in the training set twice, for which d2 = d1; unless d1 = 0, which counts.
    """
    return (of.distance[:, 0] < RATIO * of.distance[:, 1]) | (of.distance[:, 0] == 0)


def authentic(of: euclidean.Nearest, train_NxD: np.ndarray) -> np.ndarray:
    """Which images are farther from their nearest training image than that is from its own nearest (Alaa et al. 2022).

    The share of these is AuthPct. It depends on how many training images there are and on repeats among them (several
    images of a patient, duplicates), so it means something only beside its value for unseen images.
    """
    used, where = np.unique(of.index[:, 0], return_inverse=True)
    others = euclidean.nearest(_picked(train_NxD, used), train_NxD, k=2)
    own = np.where(others.index[:, 0] == used, others.distance[:, 1], others.distance[:, 0])
    return of.distance[:, 0] > own[where]


def c_t(
    train_NxD: np.ndarray,
    val_MxD: np.ndarray,
    patients_M: np.ndarray,
    syn_KxD: np.ndarray,
    patients_K: np.ndarray,
    *,
    n_cells: int,
    seed: int,
) -> dict[str, Any]:
    """C_T of Meehan, Chaudhuri and Dasgupta (2020): are generated images nearer to training images than unseen ones are?

    Space is cut into cells by k-means on the training images. In each cell the Mann-Whitney statistic U of distances to
    the nearest training image of that cell, generated against validation, is standardised, (U - m n / 2) / sqrt(m n (m +
    n + 1) / 12); C_T is its mean over the cells, weighted by their share of validation images. Far below 0: copying;
    far above: underfitting. Cells with fewer than 20 generated or validation images, or no training image, are left out.

    The standardisation needs independent images. So one image of each patient is taken, `DRAWS` times at random where
    there are several, and the statistics are averaged, whose spread is no larger.

    Returns:
      statistic; p_value: chance of as low a one if generated and unseen patients are alike, as sum w z / sqrt(sum w^2)
      is standard normal or narrower; cells: how many counted. None, None, 0 where no cell has enough images.
    """
    centres, cell_N = _cells(train_NxD, n_cells, np.random.default_rng(seed))
    sides = [_in_cells(x, centres, cell_N, train_NxD) for x in (val_MxD, syn_KxD)]
    rng = np.random.default_rng(seed)
    several = any(len(np.unique(p)) < len(p) for p in (patients_M, patients_K))
    draws = [
        _one_draw(
            *(
                np.take(side, controls.one_each(p, rng), 1)
                for side, p in zip(sides, (patients_M, patients_K), strict=True)
            )
        )
        for _ in range(DRAWS if several else 1)
    ]
    draws = [draw for draw in draws if draw]
    if not draws:
        return {"statistic": None, "p_value": None, "cells": 0}
    statistic, z, cells = np.mean(draws, 0)
    return {"statistic": float(statistic), "p_value": float(scipy.stats.norm.cdf(z)), "cells": round(float(cells))}


def _cells(train_NxD, n_cells: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Centres, and the cell of each training image."""
    if n_cells == 1:
        return np.zeros((1, train_NxD.shape[1])), np.zeros(len(train_NxD), int)
    few = len(train_NxD) <= CENTRES_FROM
    used = train_NxD if few else train_NxD[np.sort(rng.choice(len(train_NxD), CENTRES_FROM, replace=False))]
    centres, cell = scipy.cluster.vq.kmeans2(
        np.asarray(used, np.float64), n_cells, minit="++", seed=rng, missing="warn"
    )
    return centres, cell if few else euclidean.nearest(train_NxD, centres).index[:, 0]


def _in_cells(x_KxD, centres, cell_N, train_NxD) -> np.ndarray:
    """(2, K): the cell of each image, and its distance to the nearest training image of that cell."""
    cell_K = euclidean.nearest(x_KxD, centres).index[:, 0]
    distance_K = np.full(len(x_KxD), np.nan)
    for cell in np.unique(cell_K):
        if (cell_N == cell).any():
            ours, theirs = (_picked(x, np.flatnonzero(of == cell)) for x, of in ((x_KxD, cell_K), (train_NxD, cell_N)))
            distance_K[cell_K == cell] = euclidean.nearest(ours, theirs).distance[:, 0]
    return np.stack([cell_K, distance_K])


def _picked(x_NxD, index: np.ndarray) -> neighbours.Rows:
    """The rows of these numbers, read when asked for."""
    return neighbours.Rows(index, lambda part: x_NxD[part], x_NxD.shape[1])


def _one_draw(val_2xM: np.ndarray, syn_2xK: np.ndarray) -> tuple[float, float, int] | None:
    """(C_T, its standardised sum, number of cells) of one image a patient."""
    weights, scores = [], []
    for cell in np.unique(val_2xM[0]):
        (val, syn) = (x[1][x[0] == cell] for x in (val_2xM, syn_2xK))
        m, n = len(syn), len(val)
        if min(m, n) >= LEAST and np.isfinite(val[0]):
            u = scipy.stats.rankdata(np.concatenate([syn, val]))[:m].sum() - m * (m + 1) / 2
            scores.append((u - m * n / 2) / np.sqrt(m * n * (m + n + 1) / 12))
            weights.append(n)
    if not scores:
        return None
    w = np.array(weights) / np.sum(weights)
    return float(w @ scores), float(w @ scores / np.sqrt((w**2).sum())), len(scores)
