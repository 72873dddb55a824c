"""Are the images that are compared rendered alike? Power spectra, a test of their difference, a common low-pass.

A decoder smooths, and a smooth image correlates more with every image: samples of a generator that memorizes nothing
look like copies if they are held against raw unseen patients. So real images are given the rendering of the synthetic
ones before anything is calibrated, and what difference is left is measured here.
"""

import functools
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from detection import calibrate

TOLERANCE = 0.8  # standard deviations; docs/audit.md has the simulation that it is from
SURE = 0.01
# least standard deviation of a mark, in its unit: where real images are as one, a difference is certain and harmless
FLOOR = {"power": 1.0, "intensity": 0.02, "gradient": 0.25}
RAW_GAP_DB = 10.0  # of a band that is compared: what a filter leaves of it is mostly another's noise
GROUPS = 5  # of bands; a power each
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
RELEVANT = 1e-3  # bands with a smaller share of the variance do not move a correlation
PERMUTATIONS = 999


def band_of(size: tuple[int, ...]) -> np.ndarray:
    """Band of every coefficient of `cosines` of an image of this size: distance from zero frequency, each axis in units
    of its Nyquist frequency, in as many equal bands up to 1 as half the shortest axis; beyond 1 belongs to the last."""
    radius = np.sqrt(sum(np.square(f) for f in np.meshgrid(*(np.arange(n) / n for n in size), indexing="ij")))
    bands = max(min(size) // 2, 2)
    return np.minimum(np.ceil(radius * bands), bands).astype(np.int32)


def cosines(x: jax.Array, *, inverse: bool = False) -> jax.Array:
    """Orthonormal cosine transform (DCT-II, or its inverse) of `x` (B, *S, C) over S.

    It sees the image mirrored at its borders. A Fourier transform sees opposite borders joined; the edge between them
    fills the high frequencies of real images and hides a blur, which would then not be compensated.
    """
    for axis in range(1, x.ndim - 1):
        n = x.shape[axis]
        basis = np.cos(np.pi / n * np.arange(n)[:, None] * (np.arange(n) + 0.5)) * np.sqrt(2 / n)
        basis[0] /= np.sqrt(2)
        turned = jnp.tensordot(x, basis.astype(np.float32), (axis, 0 if inverse else 1), precision="highest")
        x = jnp.moveaxis(turned, -1, axis)
    return x


@jax.jit
def spectra(x: jax.Array) -> jax.Array:
    """Power in each band, as a share of the image's variance: (B, bands); x is (B, *S, C). The mean is left out."""
    band = band_of(x.shape[1:-1])
    power = (cosines(x) ** 2).sum(-1).reshape(x.shape[0], -1)
    sums = jax.ops.segment_sum(power.T, band.ravel(), int(band.max()) + 1).T[:, 1:]
    return sums / jnp.maximum(sums.sum(1, keepdims=True), 1e-12)


class Filters(NamedTuple):
    """Gain per band, band 0 (the mean) first, for real and for synthetic images."""

    real: np.ndarray
    synthetic: np.ndarray


def common_filters(val_MxF: np.ndarray, syn_KxF: np.ndarray) -> Filters:
    """Zero-phase gains, at most 1, that bring both mean spectra to their lower envelope: sqrt(min(P, Q) / P)."""
    val, syn = val_MxF.mean(0), syn_KxF.mean(0)
    lower = np.minimum(val, syn)
    gain = lambda power: np.append(1.0, np.sqrt(lower / np.maximum(power, 1e-20))).astype(np.float32)
    return Filters(gain(val), gain(syn))


def worst_gap(val_MxF: np.ndarray, syn_KxF: np.ndarray, band: tuple[float, float] = (0.0, 1.0)) -> float:
    """The largest in size of `gap_db` among the bands that lie in `band` and hold at least 0.1 % of the variance; dB."""
    val, syn = val_MxF.mean(0), syn_KxF.mean(0)
    above = np.arange(1, len(val) + 1) / len(val)
    counts = (np.maximum(val, syn) >= RELEVANT) & (above > band[0]) & (above <= band[1] + 1 / len(val))
    gap = 10 * np.log10(np.maximum(syn, 1e-12) / np.maximum(val, 1e-12))
    return float(gap[counts][np.argmax(np.abs(gap[counts]))]) if counts.any() else 0.0


@jax.jit
def apply_filter(x: jax.Array, gain: jax.Array) -> jax.Array:
    """`x` (B, *S, C) with each frequency band multiplied by its gain."""
    return cosines(cosines(x) * gain[band_of(x.shape[1:-1])][..., None], inverse=True).astype(x.dtype)


class Seen(NamedTuple):
    """What `measure` says of N images: `shares` (N, bands), see `spectra`; `marks` (N, F), see `mark_names`."""

    shares: np.ndarray
    marks: np.ndarray

    def take(self, rows: np.ndarray) -> "Seen":
        return Seen(self.shares[rows], self.marks[rows])


def mark_names(size: tuple[int, ...], band: tuple[float, float]) -> list[str]:
    """What the F marks of an image of `size` are, as a similarity sees it that rests on frequencies in `band`."""
    top = max(min(size) // 2, 2)
    powers = [
        f"power at {low / top:.2f} to {high / top:.2f} of Nyquist"
        for low, high in itertools.pairwise(_edges(size, band))
    ]
    return [*powers, *(f"intensity, {100 * q:g} % quantile" for q in QUANTILES), "intensity, skewness", "gradient"]


def _edges(size: tuple[int, ...], band: tuple[float, float]) -> list[int]:
    """Bounds between some GROUPS groups of `band_of`'s bands in `band`, about equal in octaves: group i is above edges[i]
    and up to edges[i + 1]."""
    top = max(min(size) // 2, 2)
    low, high = int(band[0] * top), min(max(math.ceil(band[1] * top), int(band[0] * top) + 2), top)
    return sorted({low, *np.geomspace(max(low, 1), high, GROUPS + 1).round().astype(int).tolist()})


@functools.partial(jax.jit, static_argnames="band")
def measure(x: jax.Array, band: tuple[float, float]) -> tuple[jax.Array, jax.Array]:
    """(shares, marks), see `Seen`, of images (B, *S, C).

    The marks: log power (dB) in groups of bands, of that in all of `band`; and of the image without what is finer than
    `band`, its mean 0 and its variance 1: quantiles, skewness, and log of the mean size of its gradient.
    """
    size = x.shape[1:-1]
    bands, edges = spectra(x), _edges(size, band)
    groups = jnp.stack([bands[:, low:high].sum(1) for low, high in itertools.pairwise(edges)], 1)
    power = 10 * jnp.log10(jnp.maximum(groups / jnp.maximum(groups.sum(1, keepdims=True), 1e-12), 1e-6))
    kept = tuple(slice(max(math.ceil(n * band[1]), 2)) for n in size)
    y = cosines(cosines(x.mean(-1, keepdims=True))[:, *kept], inverse=True)[..., 0]
    axes = tuple(range(1, y.ndim))
    y = y - y.mean(axes, keepdims=True)
    y = y / jnp.maximum(jnp.sqrt((y**2).mean(axes, keepdims=True)), 1e-6)
    quantiles = jnp.quantile(y.reshape(len(y), -1), np.array(QUANTILES), axis=1).T
    slope = sum(jnp.abs(jnp.diff(y, axis=a)).mean(axes) for a in axes) / len(axes)
    rest = jnp.stack([(y**3).mean(axes), 10 * jnp.log10(jnp.maximum(slope, 1e-6))], 1)
    return bands, jnp.concatenate([power, quantiles, rest], 1)


def compare(
    val: Seen,
    patients_M: np.ndarray,
    syn: Seen,
    draws_K: np.ndarray,
    names: Sequence[str],
    *,
    seed: int,
    fitted: bool = False,
) -> dict[str, Any]:
    """Whether validation and synthetic images differ in rendering.

    Every mark is compared by its mean, and each log power also by its dispersion, the mean distance from the median of
    both sets: half of a set blurred changes that where the mean does not change. A patient counts as much as another and
    as one draw of synthetic images.

    Args:
      draws_K: the draw that each synthetic image is of; see `calibrate`.
      names: of the marks (`mark_names`).
      fitted: the images were filtered to a common spectrum by gains found on as many other images of both sets. The
        error of these gains is then in the difference as much as the error of this sample is; the statistic is divided
        by sqrt(2) for it.
    Returns:
      gap_db: 10 log10 of synthetic over validation mean power, per band from low to high frequency (None where a band
      is empty). worst_gap_db: the largest in size among bands holding at least 0.1 % of the variance. effects: a row per
      comparison: `of` what, its `effect`, the difference in standard deviations of the validation images (with FLOOR), and its
      `p_value` by permuting patients and draws (each represented by its mean), adjusted for all comparisons by
      the maximum of their statistics (Westfall and Young 1993), each divided by its standard error, as a patient's mean
      of many images varies less than one synthetic image does (Chung and Romano 2013). worst_of, worst_effect, p_value:
      the row that decides, the largest effect of those with a p_value under SURE, or of all if there is none. tolerance:
      TOLERANCE. differs: that p_value is under SURE and the effect larger than the tolerance; with many images a small
      difference is certain and harmless, with few a large one may be chance.
    """
    centre = np.median(np.concatenate([val.marks, syn.marks]), 0)
    kinds = [re.match(r"\w+", name)[0] for name in names]
    powers = [i for i, kind in enumerate(kinds) if kind == "power"]
    far = lambda marks: np.concatenate([marks, np.abs(marks - centre)[:, powers]], 1)
    of = [*names, *(f"dispersion of {names[i]}" for i in powers)]
    by_patient, by_draw = means(far(val.marks), patients_M), means(far(syn.marks), draws_K)
    each = calibrate.patient_weights(patients_M)
    spread = np.sqrt(np.average((val.marks - by_patient.mean(0)[: len(names)]) ** 2, axis=0, weights=each))
    spread = np.hypot(spread, [FLOOR[kind] for kind in kinds])
    spread = np.concatenate([spread, spread[powers]])
    effects = (by_draw.mean(0) - by_patient.mean(0)) / spread
    p = adjusted_p(by_patient, by_draw, np.sqrt(2) if fitted else 1.0, seed)
    certain = p < SURE
    worst = int(np.argmax(np.abs(effects) * (certain if certain.any() else 1)))
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_val, mean_syn = val.shares.mean(0), syn.shares.mean(0)
        gap = 10 * np.log10(mean_syn / mean_val)
    return {
        "gap_db": [round(float(g), 3) if np.isfinite(g) else None for g in gap],
        "worst_gap_db": round(worst_gap(val.shares, syn.shares), 3),
        "effects": [
            {"of": of[i], "effect": round(float(effects[i]), 3), "p_value": float(p[i])} for i in range(len(of))
        ],
        "worst_of": of[worst],
        "worst_effect": round(float(effects[worst]), 3),
        "p_value": float(p[worst]),
        "tolerance": TOLERANCE,
        "differs": bool(certain[worst] and abs(effects[worst]) > TOLERANCE),
    }


def means(rows: np.ndarray, of: np.ndarray) -> np.ndarray:
    """(groups, F): the mean of the rows (N, F) of each group, say patient, of `of` (N,)."""
    _, inverse, size = np.unique(of, return_inverse=True, return_counts=True)
    found = np.zeros((len(size), rows.shape[1]))
    np.add.at(found, inverse, rows / size[inverse, None])
    return found


def adjusted_p(one: np.ndarray, other: np.ndarray, inflation: float, seed: int) -> np.ndarray:
    """P-values (F,) of a difference in means of rows (N, F) and (M, F), adjusted for F by the maximum; see `compare`."""
    pool, n = np.concatenate([one, other]), len(one)
    pool = pool - pool.mean(0)
    rng = np.random.default_rng(seed)
    mine = np.zeros((1 + PERMUTATIONS, len(pool)))
    mine[0, :n] = 1
    for row in mine[1:]:
        row[rng.permutation(len(pool))[:n]] = 1

    def moments(mine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        count = mine.sum(1, keepdims=True)
        mean = mine @ pool / count
        return mean, np.maximum(mine @ pool**2 / count - mean**2, 0) / count

    (mean, error), (mean_other, error_other) = moments(mine), moments(1 - mine)
    t = np.abs(mean - mean_other) / np.maximum(np.sqrt(error + error_other), 1e-12)
    return (1 + (t[1:].max(1)[:, None] >= t[0] / inflation).sum(0)) / (1 + PERMUTATIONS)
