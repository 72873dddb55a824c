"""Near-copies of known kind and strength: what an audit plants to learn whether its detector would see such copies.

Each is a pure function `(key, x) -> x` on the device, for batches (B, *size, C) in [-1, 1], 2D and 3D alike.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from data import augment

RIM = 0.05  # of a part copied into another image: width of the blend, in sides of the image


def crop(key: Array, x: Array, kept: float) -> Array:
    """A window of `kept` of each side, in a corner drawn for each image, enlarged to the whole frame."""
    size = x.shape[1:-1]
    window = [max(round(kept * n), 1) for n in size]

    def one(key: Array, image: Array) -> Array:
        far = jax.random.bernoulli(key, 0.5, (len(size),))
        start = [jnp.where(far[a], n - w, 0) for a, (n, w) in enumerate(zip(size, window, strict=True))]
        part = jax.lax.dynamic_slice(image, (*start, 0), (*window, image.shape[-1]))
        return jax.image.resize(part, image.shape, "linear")

    return jax.vmap(one)(jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(x))), x)


def local(key: Array, x: Array, side: float) -> Array:
    """The central part of each image, of `side` of each of its sides, blended into the next image of the batch.

    That one is mirrored, so that an image which is alone in its batch does not come back as it was.
    """
    del key
    weight = jnp.ones(x.shape[1:-1])
    for axis, n in enumerate(weight.shape):
        from_middle = jnp.abs((jnp.arange(n) + 0.5) / n - 0.5)
        ramp = jnp.clip((side / 2 - from_middle) / RIM + 0.5, 0, 1)
        weight = weight * ramp.reshape([-1 if a == axis else 1 for a in range(weight.ndim)])
    host = augment.flip(jnp.roll(x, -1, axis=0))
    return host + weight[..., None] * (x - host)


# kind -> (key, x, strength) -> x, and what the strength is
KINDS: dict[str, Callable[[Array, Array, float], Array]] = {
    "identity": lambda key, x, s: (
        x + 1e-6
    ),  # below what any score sees; a rendering whose noise follows the bits draws anew
    "flip": lambda key, x, s: augment.flip(x),
    "rotation": lambda key, x, degrees: augment.rotate(x, degrees),
    "shift": lambda key, x, fraction: augment.shift(x, fraction),
    "scale": lambda key, x, factor: augment.scale(x, factor),
    "crop": crop,
    "local": local,
    "gamma": lambda key, x, exponent: augment.gamma(x, exponent),
    "bias": lambda key, x, log_field: augment.bias_field(x, log_field),
    "noise": lambda key, x, deviation: augment.noise(key, x, deviation),
    "blur": lambda key, x, voxels: augment.blur(x, voxels),
    "jpeg": lambda key, x, quality: augment.jpeg(x, quality),
    "combined": lambda key, x, s: augment.augment(
        key,
        x,
        **{"flip": 0.5, "rotate": 5.0 * s, "shift": 0.06 * s, "scale": 0.08 * s, "gamma": 0.3 * s, "bias": 0.2 * s},
        **{"blur": 1.0 * s, "noise": 0.05 * s},
        **{f"{kind}_p": 1.0 for kind in ("rotate", "shift", "scale", "gamma", "bias", "blur", "noise")},
    ),
}
# the first strength of a kind is its standard one, which an overall recall counts; units as in KINDS
GRID: dict[str, tuple[float, ...]] = {
    "identity": (0.0,),
    "flip": (1.0,),
    "rotation": (4.0, 8.0),
    "shift": (0.06, 0.12),
    "scale": (1.08, 0.92, 1.15),
    "crop": (0.9, 0.8),
    "local": (0.7, 0.5),
    "gamma": (1.4, 0.7, 2.0),
    "bias": (0.3, 0.6),
    "noise": (0.05, 0.1, 0.2),
    "blur": (1.0, 2.0),
    "jpeg": (50.0, 10.0),
    "combined": (1.0,),
}


def grid(strengths: Mapping[str, Sequence[float]] | None = None) -> dict[tuple[str, float], Callable]:
    """(kind, strength) -> `(key, x) -> x` for every strength of every kind; None: all of GRID.

    Raises:
      ValueError: for an unknown kind.
    """
    strengths = GRID if strengths is None else strengths
    if unknown := [kind for kind in strengths if kind not in KINDS]:
        raise ValueError(f"config.audit.planted: no kind {unknown[0]!r}; use {', '.join(KINDS)}")

    def copy(kind: str, strength: float) -> Callable[[Array, Array], Array]:
        return jax.jit(lambda key, x: KINDS[kind](key, x, strength))

    return {(kind, float(s)): copy(kind, float(s)) for kind, values in strengths.items() for s in values}
