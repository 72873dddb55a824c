"""Several similarity spaces side by side: what each sees of planted copies, what it flags, and whether spaces agree.

A space turns images into vectors (`embed`) and finds for each the most similar training image (`search`): by the
correlation of vectors, or by a score of two images, which is then exact on a few candidates per image. A detector that
learned nothing is one that sees no more than an untrained one does, or than pixels do.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from detection import calibrate, controls, neighbours, registration, roc, views
from launch import log, mesh

CANDIDATES = 16  # training images a pair score is measured on, for each version of the query
COARSE = 256  # block averages that candidates are chosen by: coarse, so that a small shift moves them little
REGISTERED = 2**19  # pixels registered at once; ten times as many volumes took 1.6 times as long and 1.4 GB more
MOST_PIXELS = 2**14  # of an image that is compared in pairs; larger ones are averaged in blocks


class Space(NamedTuple):
    """One space: see the module. `note`: what the reader must know of it."""

    embed: Callable[[jax.Array], jax.Array]  # images (B, *S, C) -> (B, D)
    search: Callable[[np.ndarray, np.ndarray], neighbours.Neighbours]  # of (queries, training images), rows as kept
    note: str
    keep: Callable[[np.ndarray], np.ndarray] = neighbours.standardise  # rows as `embed` gives them -> as they are kept
    vectors: Callable[[np.ndarray], np.ndarray] = lambda rows: rows  # what correlates of rows as kept, standardised
    slow: bool = False  # measured on `audit.slow_images` of each set only
    band: tuple[float, float] = (0.0, 1.0)  # frequencies that the similarity rests on, as shares of Nyquist


class Measured(NamedTuple):
    """What a space says: the nearest training image of each synthetic one, and scores of unseen and planted images."""

    hits: neighbours.Neighbours  # indices are of the rows of the training images, some or all
    null_M: np.ndarray
    planted: Sequence[controls.Planted] | None  # None where no copies can be planted: vectors made elsewhere


NAMES = ("detector alone", "untrained", "pixels", "shifted pixels", "SSIM", "latents")


def chosen(
    names: Sequence[str],
    image_shape: tuple[int, ...],
    *,
    trained: Callable[[jax.Array], jax.Array] | None,
    untrained: Callable[[jax.Array], jax.Array],
    ssim: Callable[[jax.Array, jax.Array], jax.Array],
    latents: Callable[[jax.Array], jax.Array] | None,
    bf16: bool | None = None,
) -> dict[str, Space]:
    """The spaces of these names, of NAMES; ValueError for another.

    Args:
      trained: embeddings of the copy detector, None where the verdict rests on them alone. untrained: before it learned
        anything. ssim: structural similarity, (B, *S, C) twice -> (B,).
      latents: an autoencoder's, images -> (B, D); None where there is no autoencoder, and then no such space.
      bf16: see `neighbours.nearest`.
    """
    if unknown := [name for name in names if name not in NAMES]:
        raise ValueError(f"config.audit.spaces: no space {unknown[0]!r}; use {', '.join(NAMES)}")
    vectors = functools.partial(by_correlation, bf16=bf16)
    pairs = functools.partial(by_pairs, image_shape=image_shape, bf16=bf16)
    make = {
        "untrained": lambda name: vectors(untrained, "the copy detector before any training"),
        "pixels": lambda name: vectors(views.pixels, "Pearson correlation of pixels"),
        "shifted pixels": lambda name: pairs(shifted_correlation(image_shape), name=name, flips=True),
        "SSIM": lambda name: pairs(ssim, name=name, flips=False),
    }
    if trained:
        make["detector alone"] = lambda name: vectors(trained, "the copy detector without registration")
    if latents:
        make["latents"] = lambda name: vectors(latents, "the autoencoder's latents")
    return {name: make[name](name) for name in names if name in make}


def by_correlation(
    embed: Callable[[jax.Array], jax.Array], note: str = "Pearson correlation of vectors", *, bf16: bool | None = None
) -> Space:
    """A space of vectors: a detector, trained or not; an autoencoder's latents; pixels (`views.pixels`)."""
    return Space(embed, lambda query_QxD, train_NxD: nearest(query_QxD, train_NxD, 1, bf16), note)


def nearest(query_QxD: np.ndarray, train_NxD: np.ndarray, k: int, bf16: bool | None) -> neighbours.Neighbours:
    """`neighbours.nearest`; a long search keeps what is done beside the file of the training images' rows."""
    source = train_NxD.source if isinstance(train_NxD, neighbours.Rows) else train_NxD
    keep = Path(source.filename).parent if isinstance(source, np.memmap) and source.filename else None
    return neighbours.nearest(query_QxD, train_NxD, k=k, bf16=bf16, keep=keep)


def registered(
    embed: Callable[[jax.Array], jax.Array],
    image_shape: tuple[int, ...],
    candidates: int,
    bf16: bool | None = None,
) -> Space:
    """The space of the verdict: embeddings and spectra find candidates, and laying one image over the other decides.

    The similarity is the correlation of a query with one of its `candidates` training images, once they are registered
    (`registration.correlation`), the query as it is or mirrored along the last axis. Half of the candidates correlate
    most with it by embeddings, half by `registration.spectra`, which holds up where the detector learned little. With no
    candidates, it is the correlation of embeddings alone.

    A row is an embedding, a spectrum (see `_waves`), and the flat look of the image, which is registered.
    """
    if not candidates:
        return by_correlation(embed, "the trained copy detector; decides", bf16=bf16)
    shape = registration.shape(image_shape[:-1])
    waves, wide = math.prod(_waves(shape)), math.prod(shape)
    vectors = lambda rows: rows[:, : -waves - wide]

    def rows(x: jax.Array) -> jax.Array:
        looks = registration.looks(x)
        return jnp.concatenate([embed(x), registration.spectra(looks), looks.reshape(len(x), -1)], 1)

    def keep(rows: np.ndarray) -> np.ndarray:
        spectra = neighbours.standardise(rows[:, -waves - wide : -wide])
        return np.concatenate([neighbours.standardise(vectors(rows)), spectra, rows[:, -wide:]], 1)

    def search(query_QxD: np.ndarray, train_NxD: np.ndarray) -> neighbours.Neighbours:
        count = min(candidates, len(train_NxD))
        picks = [nearest(vectors(query_QxD), vectors(train_NxD), count - count // 2, bf16).index]
        if count > 1:
            picks.append(alike(query_QxD, train_NxD, shape, count // 2, bf16))
        pick_Qxc = np.concatenate(picks, 1)
        return _best(overlaid(query_QxD, train_NxD, pick_Qxc, shape), pick_Qxc)

    note = (
        f"correlation after registration, of each image's {candidates} candidates, half by the trained copy detector and "
        "half by their spectra; decides"
    )
    return Space(jax.jit(rows), search, note, keep, vectors, band=registration.band(image_shape[:-1]))


def alike(
    query_QxD: np.ndarray, train_NxD: np.ndarray, shape: tuple[int, ...], count: int, bf16: bool | None = None
) -> np.ndarray:
    """Indices (Q, count) of the training images whose spectra correlate most with the query's, as it is or mirrored.

    Rows end in a standardised spectrum and a look, as those of `registered`. The spectrum of a mirrored look is that of
    the look with the signs of all frequencies turned but those of the last axis.
    """
    waves = _waves(shape)
    turned = np.arange(math.prod(waves)).reshape(waves)[
        np.ix_(*(-np.arange(n) % n for n in waves[:-1]), range(waves[-1]))
    ]
    spectra = lambda rows: rows[:, -math.prod(waves) - math.prod(shape) : -math.prod(shape)]
    mirrored = neighbours.Rows(spectra(query_QxD), lambda rows: rows[:, turned.ravel()], turned.size)
    found = [nearest(query, spectra(train_NxD), count, bf16) for query in (spectra(query_QxD), mirrored)]
    sim_Qxc, index_Qxc = (np.concatenate(parts, 1) for parts in zip(*found, strict=True))
    best_first = np.argsort(-sim_Qxc, axis=1, kind="stable")
    index_Qxc = np.take_along_axis(index_Qxc, best_first, 1)
    again = np.stack([(index_Qxc[:, :i] == index_Qxc[:, [i]]).any(1) for i in range(2 * count)], 1)  # found both ways
    return np.take_along_axis(index_Qxc, np.argsort(again, axis=1, kind="stable")[:, :count], 1)


def _waves(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Frequencies an axis of the spectrum of a look of `shape`: both signs of each, of the last axis one."""
    most = [n // 3 for n in shape]
    return (*(2 * m + 1 for m in most[:-1]), most[-1] + 1)


def overlaid(query_QxD: np.ndarray, train_NxD: np.ndarray, pick_Qxc: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Correlation (Q, c) with the training images picked, registered as they are or mirrored.

    Rows end in the flat look of an image, of `shape` (see `registration`); only those of a batch of pairs are read. Few
    pairs go in a batch of an eighth, and in no other: to compile for another size takes longer than a batch.
    """
    measure, pairs = functools.partial(_registered, shape=shape), _Pairs(query_QxD, train_NxD, pick_Qxc)
    batch = REGISTERED // math.prod(shape)
    batch = max(batch if len(pairs) > batch // 8 else batch // 8, 1)
    with log.progress("registering", len(query_QxD), unit="image") as bar:
        done = lambda n: bar.update(n / pick_Qxc.shape[1])
        sim = _by_batch(measure, pairs, batch, done)
    return sim.reshape(pick_Qxc.shape)


@functools.partial(jax.jit, static_argnames="shape")
def _registered(pairs: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    looks = pairs[..., -math.prod(shape) :].reshape(*pairs.shape[:2], *shape)
    one, moving, fixed = jax.vmap(registration.correlation), looks[:, 0], looks[:, 1]
    return jnp.maximum(one(moving, fixed), one(jnp.flip(moving, -1), fixed))


def _best(sim_Qxc: np.ndarray, pick_Qxc: np.ndarray) -> neighbours.Neighbours:
    """Of each query's candidates the most similar; of equal ones that of the smaller index."""
    order = np.lexsort((pick_Qxc, -sim_Qxc), axis=1)[:, :1]
    take = lambda x: np.take_along_axis(x, order, 1)
    return neighbours.Neighbours(take(sim_Qxc).astype(np.float32), take(pick_Qxc).astype(np.int32))


def by_pairs(
    score: Callable[[jax.Array, jax.Array], jax.Array],
    image_shape: tuple[int, ...],
    name: str,
    *,
    flips: bool,
    candidates: int = CANDIDATES,
    batch: int = 256,
    bf16: bool | None = None,
) -> Space:
    """A space of a score of two images, (B, *S, C) twice -> (B,), say SSIM.

    Too slow for all pairs, so it is measured on `candidates` training images per query, those that correlate most with
    it in coarse block averages, and as many for its mirror image where `flips`. The most similar by score of all may be
    another: the score found is then a little low. Images of over 16,384 pixels are compared as block averages.

    A row is the coarse image, that of the mirror image where `flips`, and the flat image.
    """
    shape = _averaged_shape(image_shape)
    wide, versions = math.prod(shape), 1 + flips
    coarse = math.prod(_averaged_shape(shape, COARSE))
    at = [slice(i * coarse, (i + 1) * coarse) for i in range(versions)]

    @jax.jit
    def measure(pairs):
        return score(*(pairs[:, i, -wide:].reshape(-1, *shape) for i in range(2)))

    def rows(x: jax.Array) -> jax.Array:
        x = views.averaged(x, MOST_PIXELS)
        blocks = [views.pixels(version, COARSE) for version in (x, jnp.flip(x, -2))[:versions]]
        return jnp.concatenate([*blocks, x.reshape(len(x), -1)], 1)

    def keep(rows: np.ndarray) -> np.ndarray:
        return np.concatenate([*(neighbours.standardise(rows[:, part]) for part in at), rows[:, -wide:]], 1)

    def search(query_QxD: np.ndarray, train_NxD: np.ndarray) -> neighbours.Neighbours:
        count = min(candidates, len(train_NxD))
        pick_Qxc = np.concatenate(
            [nearest(query_QxD[:, part], train_NxD[:, at[0]], count, bf16).index for part in at], 1
        )
        pairs = _Pairs(query_QxD, train_NxD, pick_Qxc)
        sim_Qxc = _by_batch(measure, pairs, min(batch, len(pairs))).reshape(pick_Qxc.shape)
        if not np.isfinite(sim_Qxc).all():
            raise ValueError(f"{name}: a score is not finite")
        return _best(sim_Qxc, pick_Qxc)

    way = " or of their mirror images" if flips else ""
    averaged = "" if shape == tuple(image_shape) else f", on block averages of size {shape[:-1]}"
    note = (
        f"{name}, exact on the {candidates} training images that correlate most in coarse block averages{way}{averaged}"
    )
    return Space(jax.jit(rows), search, note, keep, lambda rows: rows[:, at[0]], slow=True)


def shifted_correlation(
    image_shape: tuple[int, ...], shift: float = 0.0625
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Score of two images: their best pixel correlation over shifts of up to `shift` of each axis, and a flip of one.

    The middle of one image, without a border as wide as the largest shift, is held against every window of that size
    of the other, plain and mirrored along the last axis. The correlation is Pearson's over the window: all sums by FFT.

    Returns:
      function (B, *S, C) twice -> (B,) in [-1, 1]; a window without any variation counts as 0.
    """
    size = _averaged_shape(image_shape)[:-1]
    reach = tuple(round(shift * n) for n in size)
    middle = np.zeros((1, *size, 1), np.float32)
    middle[(slice(None), *(slice(r, n - r) for r, n in zip(reach, size, strict=True)))] = 1
    axes = tuple(range(1, len(size) + 1))

    def sums(a, b):
        """Sum over the windows of a times b, b being zero outside the middle: (B, shifts)."""
        spectrum = jnp.fft.rfftn(a, axes=axes) * jnp.conj(jnp.fft.rfftn(b, axes=axes))
        at = jnp.fft.irfftn(spectrum, s=size, axes=axes).sum(-1)
        for axis, r in zip(axes, reach, strict=True):
            at = jnp.roll(at, r, axis)
            at = jax.lax.slice_in_dim(at, 0, 2 * r + 1, axis=axis)
        return at.reshape(len(at), -1)

    def best(a, b):
        over = (*axes, len(axes) + 1)
        a = a - a.mean(over, keepdims=True)
        n = middle.sum() * a.shape[-1]
        b = middle * (b - (middle * b).sum(over, keepdims=True) / n)
        window = jnp.broadcast_to(middle, (1, *size, a.shape[-1]))
        spread = sums(a**2, window) - sums(a, window) ** 2 / n
        power = spread * (b**2).sum(over)[:, None]
        least = 1e-4 * ((a**2).sum(over) * (b**2).sum(over))[:, None] + 1e-12
        return jnp.where(power > least, sums(a, b) / jnp.sqrt(jnp.maximum(power, least)), 0.0).max(1)

    return jax.jit(lambda a, b: jnp.clip(jnp.maximum(best(a, b), best(jnp.flip(a, -2), b)), -1, 1))


def _averaged_shape(image_shape: tuple[int, ...], most: int = MOST_PIXELS) -> tuple[int, ...]:
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return jax.eval_shape(lambda x: views.averaged(x, most), images).shape[1:]


def measured(space: Space, rows: Mapping[str, np.ndarray], copies_PxD: np.ndarray, plants: controls.Plants) -> Measured:
    """Scores of all sets in a space.

    Args:
      rows: of 'train', 'val' and 'synthetic', and copies_PxD of planted copies of all kinds of `plants`, as kept (see
        `embeddings`).
    """
    search = functools.partial(space.search, train_NxD=rows["train"])
    planted = controls.planted(plants, search(copies_PxD))
    return Measured(search(rows["synthetic"]), search(rows["val"]).sim[:, 0], planted)


def given(vectors: Mapping[str, np.ndarray]) -> Measured:
    """The same from vectors of 'train', 'val' and 'synthetic' images that were made elsewhere, compared as they are.

    Nothing is known of how they were made, so no copies can be planted and nothing is rendered alike.
    """
    rows = {name: neighbours.standardise(vectors[name]) for name in ("train", "val", "synthetic")}
    search = functools.partial(neighbours.nearest, key_MxD=rows["train"])
    return Measured(search(rows["synthetic"]), search(rows["val"]).sim[:, 0], None)


def section(
    what: Measured,
    patients_M: np.ndarray,
    patients_Q: np.ndarray,
    detector_flags_K: np.ndarray,
    draws_K: np.ndarray,
    *,
    fdr: float,
    seed: int,
    note: str = "",
) -> dict[str, Any]:
    """What `audit.json` says of a space.

    Args:
      patients_M: of the validation images. patients_Q: of the training images that were copied.
      detector_flags_K: what the calibrated test flags in the detector's space. draws_K: what each synthetic image is of.
    Returns:
      auc, recall_at_fpr_01, recall_at_fpr_05 with `_ci`, and fpr_01_ci, fpr_05_ci: planted copies, standard strength of
      every kind together, against validation images; over patients of both (`roc.summary`). None without copies.
      n_flagged, flag_rate_ci: by the calibrated test in this space; `calibrate.draws_interval`, the null taken as given. agreement, agreement_ci: of the images flagged here or by the detector, the share flagged by both
      (Jaccard), Clopper-Pearson over those images; None where there are none. kappa: Cohen's, chance-corrected; None
      where both flag all or both flag none.
    """
    scores_K = what.hits.sim[:, 0]
    p_K = calibrate.conformal_p(scores_K, what.null_M, patients_M)
    flags_K = calibrate.benjamini_hochberg(p_K, fdr)
    both, either = int((flags_K & detector_flags_K).sum()), int((flags_K | detector_flags_K).sum())
    standard = [p for p in what.planted or () if p.standard]
    if standard:
        sim = np.concatenate([p.sim_Q for p in standard])
        told = roc.summary(sim, np.tile(patients_Q, len(standard)), what.null_M, patients_M, seed=seed)
    else:
        names = ("auc", "recall_at_fpr_01", "recall_at_fpr_05")
        told = dict.fromkeys((*names, *(f"{n}_ci" for n in names), "fpr_01_ci", "fpr_05_ci"))
    return {
        **told,
        "n_flagged": int(flags_K.sum()),
        "flag_rate_ci": list(calibrate.draws_interval(flags_K, draws_K)),
        "agreement": both / either if either else None,
        "agreement_ci": list(calibrate.clopper_pearson(both, either)) if either else None,
        "kappa": kappa(flags_K, detector_flags_K),
        "note": note,
    }


def kappa(a_K: np.ndarray, b_K: np.ndarray) -> float | None:
    """Cohen's kappa of two sets of flags: 1 for the same, 0 for what chance gives; None where chance gives the same."""
    a, b = a_K.mean(), b_K.mean()
    chance = a * b + (1 - a) * (1 - b)
    return float(((a_K == b_K).mean() - chance) / (1 - chance)) if chance < 1 else None


class _Pairs(Sequence):
    """(query, candidate) images of every pair, in the order of the rows of `pick_Qxc`; made when asked for."""

    def __init__(self, query: np.ndarray, train: np.ndarray, pick_Qxc: np.ndarray):
        self.query, self.train, self.pick = query, train, pick_Qxc

    def __len__(self) -> int:
        return self.pick.size

    def __getitem__(self, part: slice) -> np.ndarray:
        i = np.arange(part.start, min(part.stop, len(self)))
        return np.stack([self.query[i // self.pick.shape[1]], self.train[self.pick.ravel()[i]]], 1)


def _by_batch(fn: Callable, rows: Sequence, batch: int, done: Callable[[int], None] = lambda n: None) -> np.ndarray:
    """`fn` of all rows, so many at a time on all devices; the last batch is filled up with its last row."""

    def batches():
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            yield np.concatenate([part, np.repeat(part[-1:], batch - len(part), 0)]), len(part)

    parts = []
    for part in mesh.stream(fn, batches()):
        parts.append(part)
        done(len(part))
    return np.concatenate(parts)
