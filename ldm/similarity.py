"""How alike two images are, image by image: PSNR, SSIM and MS-SSIM. Any rank, channel last, jittable."""

import jax
import jax.numpy as jnp
import numpy as np

RANGE = 2.0  # images lie in [-1, 1]
SIGMA, RADIUS = 1.5, 5  # of the Gaussian window, 11 wide (Wang et al. 2004)
K1, K2 = 0.01, 0.03
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, Sec. 4, finest first


@jax.jit
def psnr(a: jax.Array, b: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio in dB, 10 log10(4 / mean squared error); a, b (B, *S, C) in [-1, 1]: (B,).

    Infinite for equal images.
    """
    return 10 * jnp.log10(RANGE**2 / ((a - b) ** 2).mean(tuple(range(1, a.ndim))))


@jax.jit
def ssim(a: jax.Array, b: jax.Array) -> jax.Array:
    """Structural similarity (Wang et al. 2004), mean over windows inside the image and channels; a, b as in `psnr`: (B,).

    The window is Gaussian, 11 wide along every axis, narrower along an axis shorter than that.
    """
    return _scale(a, b)[0]


def scales(size: tuple[int, ...]) -> int:
    """How many of the five scales of MS-SSIM fit an image of this size: the whole window, at the coarsest, on its
    shortest axis (which takes 176 pixels for all five); one at least."""
    fitting = [n for n in range(1, len(SCALE_WEIGHTS) + 1) if min(size) // 2 ** (n - 1) > 2 * RADIUS]
    return max(fitting, default=1)


@jax.jit
def ms_ssim(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multi-scale structural similarity (Wang et al. 2003, Eq. 7); a, b as in `psnr`: (B,).

    Small images have fewer scales (`scales`), the finest ones, with their weights made to sum to one; values of images
    of different sizes are then not comparable. Negative terms count as zero.
    """
    count = scales(a.shape[1:-1])
    weights = np.array(SCALE_WEIGHTS[:count]) / sum(SCALE_WEIGHTS[:count])
    product = 1.0
    for scale, weight in enumerate(weights):
        similarity, contrast = _scale(a, b)
        term = similarity if scale == count - 1 else contrast
        product = product * jnp.maximum(term, 0.0) ** weight
        a, b = _halve(a), _halve(b)
    return product


def _scale(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean over windows of luminance times contrast-structure, and of contrast-structure alone: (B,) each."""
    mu_a, mu_b, aa, bb, ab = (_blur(x) for x in (a, b, a * a, b * b, a * b))
    c1, c2 = (K1 * RANGE) ** 2, (K2 * RANGE) ** 2
    contrast = (2 * (ab - mu_a * mu_b) + c2) / (aa - mu_a**2 + bb - mu_b**2 + c2)
    luminance = (2 * mu_a * mu_b + c1) / (mu_a**2 + mu_b**2 + c1)
    inside = tuple(range(1, a.ndim))
    return (luminance * contrast).mean(inside), contrast.mean(inside)


def _blur(x: jax.Array) -> jax.Array:
    """Gaussian mean over the windows that lie inside the image; one banded matrix per axis, as shifted sums compile slowly."""
    for axis in range(1, x.ndim - 1):
        size = x.shape[axis]
        radius = min(RADIUS, (size - 1) // 2)
        offset = np.arange(size)[:, None] - np.arange(radius, size - radius)
        window = np.where(np.abs(offset) <= radius, np.exp(-0.5 * (offset / SIGMA) ** 2), 0.0)
        window = (window / window.sum(0)).astype(np.float32)
        x = jnp.moveaxis(jnp.tensordot(x, window, (axis, 0), precision="highest"), -1, axis)
    return x


def _halve(x: jax.Array) -> jax.Array:
    """Mean of 2 x ... x 2 cells; an odd last row is dropped."""
    for axis in range(1, x.ndim - 1):
        n = x.shape[axis] // 2
        x = jax.lax.slice_in_dim(x, 0, 2 * n, axis=axis)
        x = x.reshape(*x.shape[:axis], n, 2, *x.shape[axis + 1 :]).mean(axis + 1)
    return x
