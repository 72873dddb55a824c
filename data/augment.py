"""Random and fixed distortions of image batches, on the device: pure functions of a key, for 2D and 3D alike.

Images are float32 (B, *size, C) in [-1, 1] with size (H, W) or (D, H, W); "axis" counts the spatial axes only, so
axis -1 is always the horizontal one. Everything can be jitted, and row i of a batch is distorted by
fold_in(key, i) alone, so it does not depend on how many rows there are or on the devices that hold them.

All geometry is one affine map and one linear resampling, however many distortions are composed: interpolating twice
would blur twice. Positions outside the image read its nearest edge voxel. Filling with a constant instead would draw
black wedges at the corners of pictures that have no empty border (chest X-rays, cropped knees): a mark by which a
contrastive detector could tell the distorted view from the plain one. Where the border is empty the two agree.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import scipy
from jax import Array

_KINDS = ("flip", "rotate", "shift", "scale", "gamma", "bias", "blur", "noise")
_HIGHEST = jax.lax.Precision.HIGHEST  # a bfloat16 product of coordinates would be off by whole voxels


def augment(
    key: Array,
    x: Array,
    *,
    flip: float = 0.5,
    flip_axis: int = -1,
    rotate: float = 5.0,
    rotate_p: float = 0.5,
    shift: float = 0.0,
    shift_p: float = 0.5,
    scale: float = 0.0,
    scale_p: float = 0.5,
    gamma: float = 0.0,
    gamma_p: float = 0.5,
    bias: float = 0.0,
    bias_p: float = 0.5,
    blur: float = 0.0,
    blur_p: float = 0.5,
    noise: float = 0.0,
    noise_p: float = 0.5,
    border: str = "edge",
) -> Array:
    """Distorts each image at random; the defaults are the positives of the paper's copy detector.

    Dar et al. (arXiv 2402.01054), Methods: a rotation by up to 5 degrees and a flip, each with probability one half.
    The wider set is off by default. Every distortion is drawn on its own, with its own probability, and an image for
    which none is drawn comes back bit for bit.

    Args:
      key: PRNG key.
      x: (B, *size, C) float32 in [-1, 1].
      flip: probability of mirroring along `flip_axis`.
      flip_axis: spatial axis of the flip; -1 is left-right.
      rotate: largest angle in degrees, uniform in +-rotate; 2D in the plane, 3D about each of the three axes.
      shift: largest move, as a fraction of each axis' length, uniform in +-shift for each axis.
      scale: largest relative change of size, uniform in 1 +- scale, the same for all axes.
      gamma: the exponent is exp(u), u uniform in +-gamma, on intensities mapped to [0, 1].
      bias: largest |log| of a smooth multiplicative field on intensities mapped to [0, 1].
      blur: largest standard deviation of a Gaussian blur in voxels, uniform in [0, blur].
      noise: largest standard deviation of Gaussian noise on the [-1, 1] scale, uniform in [0, noise].
      border: what positions outside the image read: 'edge' its nearest voxel, 'minimum' its lowest value.
      *_p: probability of that distortion. Probabilities and strengths are Python numbers, fixed at trace time.
    Returns:
      (B, *size, C) float32 in [-1, 1].
    Raises:
      ValueError: x is not (B, *size, C) of two or three spatial axes, or a probability or strength is out of range.
    """
    for name, p in dict(
        flip=flip,
        rotate_p=rotate_p,
        shift_p=shift_p,
        scale_p=scale_p,
        gamma_p=gamma_p,
        bias_p=bias_p,
        blur_p=blur_p,
        noise_p=noise_p,
    ).items():
        if not 0 <= p <= 1:
            raise ValueError(f"augment: {name} is a probability, in [0, 1], not {p}")
    for name, strength in dict(
        rotate=rotate, shift=shift, scale=scale, gamma=gamma, bias=bias, blur=blur, noise=noise
    ).items():
        if not 0 <= strength < (1 if name in ("shift", "scale") else math.inf):
            raise ValueError(f"augment: {name} must not be negative, shift and scale stay below 1; not {strength}")
    _check_border(border)
    axis = _axis(x, flip_axis)

    turns = 1 if _rank(x) == 2 else 3

    def one(key, image):
        rank = image.ndim - 1
        draws, grain = jax.random.split(key)
        # A row for each kind, used or not: turning one distortion on leaves what the others draw as it was. One draw
        # for all, since each call of the generator costs compile time: a coin and up to seven values a kind.
        chances = dict(zip(_KINDS, jax.random.uniform(draws, (len(_KINDS), 8)), strict=True))

        def draw(kind, p, low, high, neutral, count=None):
            """(drawn or not, `count` values, or one: uniform in [low, high) if drawn and neutral if not)"""
            on = chances[kind][0] < p
            value = chances[kind][1] if count is None else chances[kind][1 : 1 + count]
            return on, jnp.where(on, low + (high - low) * value, neutral)

        mirror, _ = draw("flip", flip, 0.0, 1.0, 0.0)
        if (rotate and rotate_p) or (shift and shift_p) or (scale and scale_p):
            _, degrees = draw("rotate", rotate_p, -rotate, rotate, 0.0, turns)
            _, moves = draw("shift", shift_p, -shift, shift, 0.0, rank)
            _, factor = draw("scale", scale_p, 1 - scale, 1 + scale, 1.0)
            sign = jnp.where(mirror & (jnp.arange(rank) == axis), -1.0, 1.0)
            # From output to input: mirror, then undo the size, the turn and the move. With nothing drawn every
            # number in it is exactly 0 or +-1, the weights of the interpolation are 0 or 1, and no bit changes.
            image = _resample(image, _rotation(degrees) * (sign / factor), -moves * jnp.array(image.shape[:-1]), border)
            image = jax.lax.optimization_barrier(image)  # or what follows decides how this is rounded
        elif flip:
            image = jnp.where(mirror, jnp.flip(image, axis), image)
        if gamma and gamma_p:
            on, u = draw("gamma", gamma_p, -gamma, gamma, 0.0)
            image = jnp.where(on, _gamma(image, jnp.exp(u)), image)
        if bias and bias_p:
            on, c = draw("bias", bias_p, -1.0, 1.0, 0.0, 2 * rank + 1)
            image = jnp.where(on, _bias(image, bias * c[0], c[1:]), image)
        if blur and blur_p:
            on, sigma = draw("blur", blur_p, 0.0, blur, 0.0)
            image = jnp.where(on, _blur(image, sigma, _radius(blur)), image)
        if noise and noise_p:
            on, sigma = draw("noise", noise_p, 0.0, noise, 0.0)
            image = jnp.where(on, _noise(grain, image, sigma), image)
        return image

    return jax.vmap(one)(_row_keys(key, x), x)


def rotate(x: Array, degrees: float | Sequence[float], border: str = "edge") -> Array:
    """Turns every image about its centre.

    Args:
      x: (B, *size, C).
      degrees: 2D: one angle, as `scipy.ndimage.rotate` turns axes (0, 1). 3D: the angles about the axes D, H and W in
        turn, or one angle about D, which turns within the axial sections. Angles are in the index space of the array.
      border: what positions outside the image read: 'edge' its nearest voxel, 'minimum' its lowest value.
    """
    _check_border(border)
    angles = jnp.atleast_1d(jnp.asarray(degrees, jnp.float32))
    if _rank(x) == 3 and angles.shape == (1,):
        angles = jnp.concatenate([angles, jnp.zeros(2)])
    if angles.shape != (1 if _rank(x) == 2 else 3,):
        raise ValueError(f"augment: rotate takes 1 angle, or 3 for a volume, not {angles.shape}")
    return jax.vmap(lambda image: _resample(image, _rotation(angles), jnp.zeros(_rank(x)), border))(x)


def flip(x: Array, axis: int = -1) -> Array:
    """Mirrors every image of (B, *size, C) along a spatial axis; -1 is left-right."""
    return jnp.flip(x, _axis(x, axis) + 1)


def shift(x: Array, fraction: float | Sequence[float], border: str = "edge") -> Array:
    """Moves every image of (B, *size, C) towards larger indices by a fraction of each axis' length (or of all)."""
    _check_border(border)
    size = jnp.array(x.shape[1:-1], jnp.float32)
    offset = -jnp.broadcast_to(jnp.asarray(fraction, jnp.float32), (_rank(x),)) * size
    return jax.vmap(lambda image: _resample(image, jnp.eye(_rank(x)), offset, border))(x)


def scale(x: Array, factor: float, border: str = "edge") -> Array:
    """Enlarges every image of (B, *size, C) about its centre by `factor` (below 1 shrinks it), in the same frame."""
    if not isinstance(factor, jax.core.Tracer) and not factor > 0:
        raise ValueError(f"augment: scale takes a factor above 0, not {factor}")
    _check_border(border)
    matrix = jnp.eye(_rank(x)) / factor
    return jax.vmap(lambda image: _resample(image, matrix, jnp.zeros(_rank(x)), border))(x)


def gamma(x: Array, exponent: float) -> Array:
    """Raises intensities, mapped from [-1, 1] to [0, 1], to `exponent`: above 1 darkens."""
    return _gamma(x, exponent)


def bias_field(x: Array, strength: float, coefficients: Sequence[float] | None = None) -> Array:
    """Multiplies every image of (B, *size, C) by a smooth field exp(f), |f| <= strength, on [0, 1] intensities; clips.

    f is a combination of t and 2 t^2 - 1 along each axis, t from -1 to 1 across the image (the first two Chebyshev
    polynomials), with 2 * rank coefficients, all the linear ones first, of which only the ratios matter. By default
    f is a ramp along the diagonal.
    """
    if coefficients is None:
        coefficients = [1.0] * _rank(x) + [0.0] * _rank(x)
    if len(coefficients) != 2 * _rank(x) or not np.any(coefficients):
        raise ValueError(f"augment: bias_field takes {2 * _rank(x)} coefficients, not all 0")
    return jax.vmap(lambda image: _bias(image, strength, jnp.asarray(coefficients, jnp.float32)))(x)


def blur(x: Array, sigma: float) -> Array:
    """Convolves every image of (B, *size, C) with a Gaussian of `sigma` voxels (a Python number), edges extended."""
    _rank(x)
    if sigma < 0:
        raise ValueError(f"augment: blur takes a sigma of at least 0, not {sigma}")
    return jax.vmap(lambda image: _blur(image, sigma, _radius(sigma)))(x)


def noise(key: Array, x: Array, sigma: float) -> Array:
    """Adds Gaussian noise of deviation `sigma` on the [-1, 1] scale and clips; row i draws from fold_in(key, i)."""
    _rank(x)
    return jax.vmap(_noise, (0, 0, None))(_row_keys(key, x), x, sigma)


# ITU-T T.81 (JPEG), table K.1: steps of the 8x8 cosine coefficients of brightness at quality 50
_JPEG_STEPS = """
    16 11 10 16 24 40 51 61   12 12 14 19 26 58 60 55   14 13 16 24 40 57 69 56   14 17 22 29 51 87 80 62
    18 22 37 56 68 109 103 77   24 35 55 64 81 104 113 92   49 64 78 87 103 121 120 101   72 92 95 98 112 100 103 99
"""


def jpeg(x: Array, quality: float) -> Array:
    """What is left of 8-bit grey images after JPEG at `quality` (1 to 100, as libjpeg counts); volumes slice by slice."""
    _rank(x)
    if not 1 <= quality <= 100:
        raise ValueError(f"augment: JPEG quality must be 1 to 100, not {quality}")
    percent = 5000 / quality if quality < 50 else 200 - 2 * quality
    base = np.array(_JPEG_STEPS.split(), float).reshape(8, 8)
    steps = jnp.asarray(np.clip(np.floor((base * percent + 50) / 100), 1, 255), jnp.float32)
    cosines = jnp.asarray(scipy.fft.dct(np.eye(8), axis=0, norm="ortho"), jnp.float32)  # (frequency, place)
    height, width = x.shape[-3:-1]
    edge = [(0, 0)] * (x.ndim - 3) + [(0, -height % 8), (0, -width % 8), (0, 0)]
    grey = jnp.pad(jnp.round((x + 1) * 127.5) - 128, edge, mode="edge")
    blocks = grey.reshape(*grey.shape[:-3], grey.shape[-3] // 8, 8, grey.shape[-2] // 8, 8, grey.shape[-1])
    both = "ui,vj,...aibjc->...aubvc"
    frequencies = jnp.einsum(both, cosines, cosines, blocks, precision=_HIGHEST)
    kept = jnp.round(frequencies / steps[:, None, :, None]) * steps[:, None, :, None]
    back = jnp.einsum(both, cosines.T, cosines.T, kept, precision=_HIGHEST).reshape(grey.shape)
    return jnp.clip(jnp.round(back) + 128, 0, 255)[..., :height, :width, :] / 127.5 - 1


def _rank(x: Array) -> int:
    if x.ndim not in (4, 5):
        raise ValueError(f"augment: images must be (B, H, W, C) or (B, D, H, W, C), not {x.shape}")
    return x.ndim - 2


def _check_border(border: str) -> None:
    if border not in ("edge", "minimum"):
        raise ValueError(f"augment: border must be 'edge' or 'minimum', not {border!r}")


def _axis(x: Array, axis: int) -> int:
    if not -_rank(x) <= axis < _rank(x):
        raise ValueError(f"augment: images with {_rank(x)} spatial axes have no axis {axis}")
    return axis % _rank(x)


def _row_keys(key: Array, x: Array) -> Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(x.shape[0]))


def _rotation(degrees: Array) -> Array:
    """Output-to-input matrix of (1,) angles (2, 2), or of (3,) angles (3, 3), the turns about axes 0, 1, 2 in order."""
    planes = [(0, 1)] if degrees.shape == (1,) else [(1, 2), (0, 2), (0, 1)]
    rank = 2 if len(planes) == 1 else 3
    matrix = jnp.eye(rank)
    for angle, (i, j) in zip(jnp.radians(degrees), planes, strict=True):
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        turn = jnp.eye(rank).at[i, i].set(cos).at[j, j].set(cos).at[i, j].set(sin).at[j, i].set(-sin)
        matrix = jnp.matmul(turn, matrix, precision=_HIGHEST)
    return matrix


def _resample(image: Array, matrix: Array, offset: Array, border: str) -> Array:
    """Reads (*size, C) linearly where `matrix` (output to input, about the centre) and `offset` (voxels) point."""
    size = image.shape[:-1]
    middle = [(n - 1) / 2 for n in size]
    ticks = jnp.meshgrid(*[jnp.arange(n) - m for n, m in zip(size, middle, strict=True)], indexing="ij", sparse=True)
    # Sums, not a matrix product: exact for whole numbers whatever the device's matmul precision.
    where = [m + offset[a] + sum(matrix[a, b] * t for b, t in enumerate(ticks)) for a, m in enumerate(middle)]
    if border == "minimum":  # a rim of the minimum, whose own edge is then repeated
        image = jnp.pad(image, [(1, 1)] * len(size) + [(0, 0)], constant_values=jnp.min(image))
        where = [place + 1 for place in where]
    return jax.vmap(lambda channel: jax.scipy.ndimage.map_coordinates(channel, where, 1, "nearest"), -1, -1)(image)


def _gamma(image: Array, exponent: Array) -> Array:
    return 2 * jnp.clip((image + 1) / 2, 0, 1) ** exponent - 1


def _bias(image: Array, strength: Array, coefficients: Array) -> Array:
    rank = image.ndim - 1
    ticks = jnp.meshgrid(*[jnp.linspace(-1, 1, n) for n in image.shape[:-1]], indexing="ij", sparse=True)
    log_field = sum(coefficients[a] * t + coefficients[rank + a] * (2 * t**2 - 1) for a, t in enumerate(ticks))
    log_field = strength * log_field / jnp.maximum(jnp.sum(jnp.abs(coefficients)), 1e-6)
    return 2 * jnp.clip((image + 1) / 2 * jnp.exp(log_field)[..., None], 0, 1) - 1


def _radius(sigma: float) -> int:
    return math.ceil(3 * sigma)


def _blur(image: Array, sigma: Array, radius: int) -> Array:
    """Separable Gaussian with its edges extended, as one banded matrix product an axis.

    Summing shifted copies takes fewer products, but XLA then recomputes whatever made the image once for every tap.
    """
    taps = np.arange(-radius, radius + 1)
    weights = jax.nn.softmax(-0.5 * (taps / jnp.maximum(sigma, 1e-3)) ** 2)  # a delta for sigma 0
    for axis, n in enumerate(image.shape[:-1]):
        rows = np.arange(n)[:, None]
        matrix = jnp.zeros((n, n)).at[rows, np.clip(rows + taps, 0, n - 1)].add(weights)
        image = jnp.moveaxis(jnp.tensordot(matrix, image, (1, axis), precision=_HIGHEST), 0, axis)
    return image


def _noise(key: Array, image: Array, sigma: Array) -> Array:
    return jnp.clip(image + sigma * jax.random.normal(key, image.shape, image.dtype), -1, 1)
