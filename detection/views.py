"""How each set is rendered before it is compared, and its pixels as vectors."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from detection import rendering
from launch import mesh


class Views(NamedTuple):
    """Functions of a batch on the device for real and for synthetic images, and the check of what they achieve."""

    real: Callable[[jax.Array], jax.Array]
    synthetic: Callable[[jax.Array], jax.Array]
    report: dict[str, Any]


def as_it_is(x: jax.Array) -> jax.Array:
    """The view of images that need no rendering."""
    return x


def like_for_like(
    sets: Mapping[str, Any],
    synthetic: Any,
    render: Callable | None,
    in_order: Callable[..., Iterator],
    batch: int,
    seed: int,
) -> Views:
    """Renders real images as the synthetic ones are and measures what difference is left.

    Args:
      render: how the generator renders an image (the autoencoder's round trip). None, for images made elsewhere: real
        and synthetic images are filtered to their common power spectrum instead.
    """
    val = sets["val"]

    def spectra(images: Sequence, view: Callable) -> np.ndarray:
        return np.concatenate(list(mesh.stream(lambda x: rendering.spectra(view(x)), in_order(images, batch))))

    raw_MxF, syn_KxF = spectra(val.images, as_it_is), spectra(synthetic.images, as_it_is)
    raw = rendering.compare(raw_MxF, val.patients, syn_KxF, seed=seed)
    if render is None:
        filters = rendering.common_filters(raw_MxF, syn_KxF)
        view = lambda gain: lambda x: rendering.apply_filter(x, gain)
        real, fake, kind = view(filters.real), view(filters.synthetic), "low-pass to the common spectrum"
        syn_KxF = spectra(synthetic.images, fake)
    else:
        real, fake, kind = render, as_it_is, "round trip through the autoencoder"
    report = rendering.compare(spectra(val.images, real), val.patients, syn_KxF, seed=seed)
    before = {"raw_gap_db": raw["gap_db"], "raw_worst_gap_db": raw["worst_gap_db"]}
    return Views(real, fake, {"kind": kind, **report, **before})


def fingerprint(images: Sequence, in_order: Callable[..., Iterator], batch: int) -> str:
    """SHA-256 of the images' values in their order."""
    digest = hashlib.sha256()
    for rows, valid in in_order(images, batch):
        digest.update(np.ascontiguousarray(rows[:valid]).tobytes())
    return digest.hexdigest()


def pixels(x: jax.Array, most: int = 4096) -> jax.Array:
    """Images (B, *S, C) as vectors of pixels, (B, at most about `most`): averaged in blocks where there are more.

    Their Pearson correlation is the plain pixel correlation (of the block averages).
    """
    return averaged(x, most).reshape(len(x), -1)


def averaged(x: jax.Array, most: int) -> jax.Array:
    """Images (B, *S, C) averaged in the smallest equal blocks that leave at most about `most` pixels."""
    size, block = x.shape[1:-1], 1
    while np.prod([-(-n // block) for n in size]) > most:
        block += 1
    window = (1, *(min(block, n) for n in size), 1)
    return x if block == 1 else jax.lax.reduce_window(x, 0.0, jax.lax.add, window, window, "VALID") / np.prod(window)
