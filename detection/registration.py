"""Is one image a moved copy of another? Registers the two and correlates what then lies on top of each other.

An embedding finds candidates, as well as it has learned to from the images at hand; their spectra, which need no training,
find others. Whether two images are one and the same is better seen by laying one over the other: a copy agrees in every
detail, another patient does not, however alike.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import scipy

MOST = {2: 1024, 3: 20_000}  # pixels of an image that is registered: enough detail, and no more
ITERATIONS = 8  # in each of two bands
FINE, MIDDLE, COARSE = 1.0, 2.0, 4.0  # pixels: deviations of the Gaussians whose differences are the bands
THIN = 4  # pixels
_PRIOR = 1e-4  # cost of a shift by a pixel, a turn by 6 degrees or a size off by a tenth; of a correlation 0 it is 2


def shape(size: tuple[int, ...]) -> tuple[int, ...]:
    """Of what is registered of an image of `size`: itself, or as much smaller as leaves at most MOST pixels.

    Axes that would be left with fewer than THIN pixels keep that many, or all they have, and the others pay for it.
    """
    kept: dict[int, int] = {}
    while True:
        free = [n for axis, n in enumerate(size) if axis not in kept]
        most = MOST[len(size)] / np.prod(list(kept.values()))
        ratio = min(1.0, (most / np.prod(free)) ** (1 / max(len(free), 1)))
        thin = {axis: min(n, THIN) for axis, n in enumerate(size) if axis not in kept and int(n * ratio) < min(n, THIN)}
        if not thin:
            return tuple(kept.get(axis, int(n * ratio)) for axis, n in enumerate(size))
        kept |= thin


def band(size: tuple[int, ...]) -> tuple[float, float]:
    """Frequencies, as shares of the Nyquist frequency of an image of `size`, that `correlation` rests on.

    Those whose power the two bands and the smaller size leave at a tenth of its most, or more; along axes that are not thin.
    """
    smaller = [s / n for s, n in zip(shape(size), size, strict=True) if s > THIN] or [1.0]
    f = np.linspace(0, 1, 1001)
    blurred = lambda sigma: np.exp(-0.5 * (np.pi * f * sigma) ** 2)
    power = ((blurred(FINE) - blurred(COARSE)) * (1 - blurred(MIDDLE))) ** 2
    kept = f[power >= 0.1 * power.max()] * np.prod(smaller) ** (1 / len(smaller))
    return float(kept[0]), float(kept[-1])


def looks(x: jax.Array) -> jax.Array:
    """Images (B, *S, C) -> (B, *shape(S)): averaged over channels, made smaller, and band-passed from FINE to COARSE."""
    x = x.mean(-1)
    x = jax.image.resize(x, (len(x), *shape(x.shape[1:])), "linear", antialias=True)
    return _blur(x, FINE) - _blur(x, COARSE)


def spectra(looks: jax.Array) -> jax.Array:
    """`looks` (B, *s) -> (B, D): root of the magnitude of their Fourier transform, up to a third of a cycle a pixel.

    A shift changes it little, a small turn or size less than pixels; mirrored looks have other spectra. The root keeps the
    largest waves, which patients have in common, from drowning the rest.
    """
    for axis in range(1, looks.ndim):
        ends = np.hanning(looks.shape[axis]) if looks.shape[axis] > 2 else np.ones(looks.shape[axis])
        looks = looks * jnp.expand_dims(ends, [a for a in range(looks.ndim) if a != axis])
    axes = tuple(range(1, looks.ndim))
    height = jnp.abs(jnp.fft.rfftn(looks, axes=axes))
    for axis in axes:  # the last holds the frequencies from 0 on, the others both signs
        most = looks.shape[axis] // 3
        signs = np.r_[: most + 1] if axis == axes[-1] else np.r_[: most + 1, -most:0]
        height = jnp.take(height, signs, axis, mode="wrap")
    return jnp.sqrt(height).reshape(len(looks), -1)


def _blur(x: jax.Array, sigma: float) -> jax.Array:
    """Gaussian, edges extended, of (B, *s): a matrix product an axis."""
    for axis in range(1, x.ndim):
        rows = scipy.ndimage.gaussian_filter1d(np.eye(x.shape[axis]), sigma, axis=0, mode="nearest")
        x = jnp.moveaxis(jnp.tensordot(x, jnp.asarray(rows, jnp.float32), (axis, 1), precision="highest"), -1, axis)
    return x


def correlation(moving: jax.Array, fixed: jax.Array) -> jax.Array:
    """Pearson correlation of two `looks` (*s) where they overlap, once `moving` is turned, scaled and shifted onto `fixed`.

    The move that maximises it near none is found in the whole band first, which reaches further, and then in its finer
    part, FINE to MIDDLE, whose correlation is returned: coarse structure is what patients have in common.

    Returns:
      Scalar in [-1, 1]; 0 if one of them is blank.
    """
    finer = [(x[None] - _blur(x[None], MIDDLE))[0] for x in (moving, fixed)]
    p, _ = _fit(moving, fixed, None)
    return jnp.clip(_fit(*finer, p)[1], -1, 1)


def _fit(moving: jax.Array, fixed: jax.Array, start: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The move of `moving` and the correlation after it, from the move `start`.

    Gauss-Newton steps on the difference of the normalised images, damped after Levenberg and Marquardt, with the Jacobian
    of `fixed` at no move (Hager and Belhumeur 1998, section 2), so that a step costs one resampling.
    """
    rank, size = fixed.ndim, fixed.shape
    middle = np.array([(n - 1) / 2 for n in size])
    ticks = np.stack(np.meshgrid(*[np.arange(n) for n in size], indexing="ij")).reshape(rank, -1) - middle[:, None]
    # moves (parameters, rank, pixels), each times its parameter: size, turns (to first order), shifts
    turns = [np.eye(rank)[[i]].T @ np.eye(rank)[[j]] for i, j in itertools.combinations(range(rank), 2)]
    linear = [np.eye(rank), *(turn - turn.T for turn in turns)]
    shifts = [np.repeat(np.eye(rank)[:, [a]], ticks.shape[1], 1) for a in range(rank)]
    moves = jnp.asarray([0.1 * (one @ ticks) for one in linear] + shifts, jnp.float32)
    here = jnp.asarray(ticks + middle[:, None], jnp.float32)
    last = jnp.asarray(size, jnp.float32)[:, None] - 1
    fixed = fixed.ravel()

    def normalised(image, inside):
        image = image - (image * inside).sum() / inside.sum()
        return image * inside / jnp.sqrt((image**2 * inside).sum() + 1e-8)

    def at(p):
        """Cost at `p`, the difference that is left, and the correlation."""
        where = here + jnp.tensordot(p, moves, 1)
        inside = jnp.clip(1 - jnp.maximum(-where, where - last), 0, 1).prod(0)
        moved = normalised(jax.scipy.ndimage.map_coordinates(moving, list(where), 1, "nearest"), inside)
        aim = normalised(fixed, inside)
        left = moved - aim
        return left @ left + _PRIOR * p @ p, left, moved @ aim

    start = jnp.zeros(len(moves)) if start is None else start
    aim = normalised(fixed, jnp.ones_like(fixed))
    image = aim.reshape(size)  # along an axis of one pixel there is no slope
    slopes = [jnp.gradient(image, axis=axis) if n > 1 else jnp.zeros(size) for axis, n in enumerate(size)]
    slopes = jnp.stack(slopes).reshape(rank, -1)
    jacobian = jnp.einsum("ax,pax->xp", slopes, moves, precision="highest")
    jacobian = jacobian - jacobian.mean(0)
    jacobian = jacobian - jnp.outer(aim, aim @ jacobian)  # a change of contrast changes no correlation
    curvature = jacobian.T @ jacobian + _PRIOR * jnp.eye(len(moves))

    def step(state, _):
        p, damping, found = state
        down = jacobian.T @ found[1] + _PRIOR * p
        q = p - jnp.linalg.solve(curvature + damping * jnp.diag(jnp.diag(curvature)), down)
        tried = at(q)
        better = tried[0] < found[0]
        p, found = jax.tree.map(functools.partial(jnp.where, better), (q, tried), (p, found))
        return (p, jnp.where(better, damping / 4, damping * 4), found), None

    (p, _, found), _ = jax.lax.scan(step, (start, jnp.float32(0.01), at(start)), None, ITERATIONS)
    return p, found[2]
