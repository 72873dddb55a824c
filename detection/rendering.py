"""Are the images that are compared rendered alike? Power spectra, a test of their difference, a common low-pass.

A decoder smooths, and a smooth image correlates more with every image: samples of a generator that memorizes nothing
look like copies if they are held against raw unseen patients. So real images are given the rendering of the synthetic
ones before anything is calibrated, and what difference is left is measured here.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from detection import roc

TOLERANCE_DB = 3.0  # a factor of two in power
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


@jax.jit
def apply_filter(x: jax.Array, gain: jax.Array) -> jax.Array:
    """`x` (B, *S, C) with each frequency band multiplied by its gain."""
    return cosines(cosines(x) * gain[band_of(x.shape[1:-1])][..., None], inverse=True).astype(x.dtype)


def compare(val_MxF: np.ndarray, patients_M: np.ndarray, syn_KxF: np.ndarray, *, seed: int) -> dict[str, Any]:
    """Whether validation and synthetic images differ in rendering, from their `spectra`.

    Returns:
      gap_db: 10 log10 of synthetic over validation mean power, per band from low to high frequency (None where a band
      is empty). worst_gap_db: the largest in size among bands holding at least 0.1 % of the variance. p_value: of the
      difference in the mean log share of power above half of Nyquist, by permuting patients (each represented by its
      mean) and synthetic images; divided by its standard error, as a patient's mean of many images varies less than one
      synthetic image does (Chung and Romano 2013). differs: p_value < 0.01 and a gap of over 3 dB; with many images a
      small gap is certain and harmless, with few a large one may be chance.
    """
    val, syn = val_MxF.mean(0), syn_KxF.mean(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = 10 * np.log10(syn / val)
    counts = np.maximum(val, syn) >= RELEVANT
    worst = gap[counts][np.argmax(np.abs(gap[counts]))] if counts.any() else 0.0
    high = slice(val_MxF.shape[1] // 2, None)
    score = lambda shares: np.log(np.maximum(shares[:, high].sum(1), 1e-12))
    by_patient = roc.by_patient(score(val_MxF), patients_M)
    pool = np.concatenate([by_patient, score(syn_KxF)])
    split = len(by_patient)

    def distance(values):
        one, other = values[:split], values[split:]
        error = np.sqrt(one.var() / len(one) + other.var() / len(other))
        return abs(one.mean() - other.mean()) / max(error, 1e-12)

    rng = np.random.default_rng(seed)
    seen = distance(pool)
    beaten = sum(distance(rng.permutation(pool)) >= seen for _ in range(PERMUTATIONS))
    p = float(1 + beaten) / (1 + PERMUTATIONS)
    return {
        "gap_db": [round(float(g), 3) if np.isfinite(g) else None for g in gap],
        "worst_gap_db": round(float(worst), 3),
        "p_value": p,
        "differs": bool(p < 0.01 and abs(worst) > TOLERANCE_DB),
    }
