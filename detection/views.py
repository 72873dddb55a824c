"""How each set is rendered before it is compared, and its pixels as vectors."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from detection import redaction, rendering
from launch import mesh


class Views(NamedTuple):
    """Functions of a batch on the device for real and for synthetic images, the check of what they achieve, and what the
    reader must know of it."""

    real: Callable[[jax.Array], jax.Array]
    synthetic: Callable[[jax.Array], jax.Array]
    report: dict[str, Any]
    caveats: list[str]


def as_it_is(x: jax.Array) -> jax.Array:
    """The view of images that need no rendering."""
    return x


def like_for_like(
    sets: Mapping[str, Any],
    synthetic: Any,
    render: Callable | None,
    band: tuple[float, float],
    in_order: Callable[..., Iterator],
    batch: int,
    seed: int,
) -> Views:
    """Renders real images as the synthetic ones are and measures what difference is left.

    Args:
      render: how the generator renders an image (the autoencoder's round trip). None, for images made elsewhere: real
        and synthetic images are filtered to their common power spectrum instead. The filters are found on a random half
        of the unseen patients and of the synthetic images, and measured on the others: on those that they were found on
        they leave no difference, whatever they were given.
      band: of frequencies, as shares of Nyquist, that the similarity rests on; what else differs does not matter.
    """
    val = sets["val"]

    def seen(images: Sequence, view: Callable) -> rendering.Seen:
        parts = list(mesh.stream(lambda x: rendering.measure(view(x), band), in_order(images, batch)))
        return rendering.Seen(*(np.concatenate(part) for part in zip(*parts, strict=True)))

    names = rendering.mark_names(val.images[0].shape[:-1], band)
    raw, made = seen(val.images, as_it_is), seen(synthetic.images, as_it_is)
    draws = synthetic.patients
    before = rendering.compare(raw, val.patients, made, draws, names, seed=seed)
    if render is None:
        rng = np.random.default_rng(seed)
        fit_M, rest_M = halves(val.patients, rng)
        fit_K, rest_K = halves(draws, rng)
        filters = rendering.common_filters(raw.shares[fit_M], made.shares[fit_K])
        view = lambda gain: lambda x: rendering.apply_filter(x, gain)
        real, fake, kind = view(filters.real), view(filters.synthetic), "low-pass to the common spectrum"
        one, other = seen(val.images, real).take(rest_M), seen(synthetic.images, fake).take(rest_K)
        report = rendering.compare(one, val.patients[rest_M], other, draws[rest_K], names, seed=seed, fitted=True)
    else:
        real, fake, kind = render, as_it_is, "round trip through the autoencoder"
        report = rendering.compare(seen(val.images, real), val.patients, made, draws, names, seed=seed)
    gap = rendering.worst_gap(raw.shares, made.shares, band)
    caveats = [redaction.LOUD.format(f"{gap:+.1f}")] if abs(gap) > rendering.RAW_GAP_DB else []
    raw_keys = {"raw_gap_db": before["gap_db"], "raw_worst_gap_db": before["worst_gap_db"]}
    return Views(real, fake, {"kind": kind, "band": list(band), **report, **raw_keys}, caveats)


def halves(of: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two masks over `of` (N,): of its values, patients say, a random half each; of an odd number they share one."""
    each = rng.permutation(np.unique(of))
    return np.isin(of, each[: -(-len(each) // 2)]), np.isin(of, each[len(each) // 2 :])


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
