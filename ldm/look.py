"""A look while training: samples above their nearest training images, and whether the network denoises the images it was
trained on better than others. That gap opening is the first sign of memorization, before any copy can be seen.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import PIL.Image
import PIL.ImageDraw
import scipy

from launch import checkpoint, log, mesh
from ldm import levels

GUARDS = ("warn", "stop", "off")
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # noise levels t / T
PATIENTS = 64  # of each side at most, one image of each
SAMPLES, STEPS = 8, 20  # of the picture, and of its sampler
ALPHA = 0.05  # chance of a false alarm, all looks of a run together
COPIED = 1 / 3  # d1 / d2 below which a sample is called a copy in the literature (Yoon et al. 2023)
SCANNED = 2**31  # bytes of training latents searched for the nearest; of more, an even selection


class Gap(NamedTuple):
    """By how much held-out images are denoised worse, relative to training images, and the chance of that if the network
    treats both alike."""

    relative: float
    p_value: float


def gap(train_PxL: np.ndarray, held_out_QxL: np.ndarray) -> Gap:
    """Compares losses by noise level, one image a patient.

    Each image counts with its mean log loss over the levels, so that no level outweighs another; Welch's t-test, one
    sided, over patients.
    """
    train, held_out = (np.log(np.maximum(x, 1e-12)).mean(1) for x in (train_PxL, held_out_QxL))
    p = scipy.stats.ttest_ind(held_out, train, equal_var=False, alternative="greater").pvalue
    return Gap(float(np.expm1(held_out.mean() - train.mean())), float(p) if np.isfinite(p) else 1.0)


def allowed(number: int) -> float:
    """The share of `ALPHA` that look `number` = 1, 2, ... may spend: ALPHA / (n (n + 1)), which sums to ALPHA however many
    looks follow (Bonferroni's inequality: the looks may depend on each other in any way)."""
    return ALPHA / (number * (number + 1))


class Sides(NamedTuple):
    """What a look compares: normalised latents of some training images and of some held-out ones."""

    train: np.ndarray
    held_out: np.ndarray


def one_per_patient(patients: np.ndarray) -> np.ndarray:
    """Indices of one image of each of at most `PATIENTS` patients, the same at every start."""
    order = np.random.default_rng(0).permutation(len(patients))
    _, first = np.unique(np.asarray(patients)[order], return_index=True)
    return np.sort(order[np.sort(first)[:PATIENTS]])


def watch(
    *,
    denoiser: Any,
    draw: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]],
    sides: Sides,
    latents: Sequence,
    normalise: Callable[[np.ndarray], np.ndarray],
    images: Sequence,
    in_order: Callable[..., Iterator],
    batch: int,
    folder: Path,
    average: str | None,
    every: int,
    guard: str,
    key: jax.Array,
) -> Callable[[int, Any], tuple[dict[str, float], bool]]:
    """The `on_eval` of `loop.fit` for the diffusion stage in `folder`.

    At each look it writes `looks/STEP.png`, returns losses, gap and p-value for the metrics, and acts on the gap as
    `guard` says: 'warn' keeps the averages of the last look at which the gap was within chance, in `last_safe`, and says once
    when it is not; 'stop' also ends training there. With 'off' there are no looks, which is for the caller to see to.

    Args:
      draw: jitted, (unet parameters, sample numbers (B,)) -> (images, their normalised latents).
      latents: posterior means of the training images `images`, before `normalise`.
      batch: images that pass through the networks at a time.
      average: key of the moving average that is looked at, None: the parameters themselves.
      every: steps between looks.
    """
    known = np.concatenate(sides)

    @jax.jit
    def measure(params: Any, known: jax.Array, numbers: jax.Array) -> jax.Array:
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(numbers)
        return levels.losses(denoiser, params, known[numbers], keys, LEVELS, draws=1)

    def look(step: int, state: Any) -> tuple[dict[str, float], bool]:
        params = state.params if average is None else state.ema[average]
        numbers = np.arange(len(known), dtype=np.int32)
        some = in_order(numbers, min(batch, len(known)))
        each = np.concatenate(list(mesh.stream(lambda n: measure(params, known, n), some)))
        train, held_out = each[: len(sides.train)], each[len(sides.train) :]
        found = gap(train, held_out)
        pictures = np.arange(SAMPLES, dtype=np.int32)
        drawn = mesh.stream(lambda n: draw(params, n), in_order(pictures, min(batch, SAMPLES)))
        x, z = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
        near = nearest(z, latents, normalise)
        if jax.process_index() == 0:
            (folder / "looks").mkdir(exist_ok=True)
            picture(folder / "looks" / f"{step:08d}.png", x, [images[i] for i in near.index], near)
        values = {f"{name}@{level:g}": float(loss) for name, side in (("train_loss", train), ("held_out_loss", held_out))
                  for level, loss in zip(LEVELS, side.mean(0), strict=True)}  # fmt: skip
        values |= {
            "gap": found.relative,
            "gap_p_value": found.p_value,
            "d1_d2_copies": float((near.ratio < COPIED).mean()),
        }
        return values, act(folder, step, -(-step // every), found, state.ema, guard)

    return look


def act(folder: Path, step: int, number: int, found: Gap, averages: Any, guard: str) -> bool:
    """Keeps what is safe, tells what is not; whether to stop."""
    before = opened(folder)
    safe = checkpoint.published(folder / "last_safe")
    if before is None and found.p_value >= allowed(number):
        if safe is None or safe < step:  # a resumed run passes looks again
            checkpoint.publish(folder / "last_safe", step, averages)
        return False
    if before is None:
        checkpoint.write_json(
            folder / "guard.json",
            {"opened_at": step, "gap": found.relative, "p_value": found.p_value, "last_safe": safe},
        )
        kept = (
            f"{folder}/last_safe holds step {safe}" if safe else "it was open at the first look: nothing safe to keep"
        )
        log.say(
            f"diffusion: at step {step} unseen images are denoised {100 * found.relative:.0f} % worse than training images "
            f"(p = {found.p_value:.1g}, {allowed(number):.1g} allowed): it memorizes; {kept}"
        )
    return guard == "stop" and (before is None or step >= before["opened_at"])


def opened(folder: Path) -> dict[str, Any] | None:
    """What `guard.json` says of the look at which the gap opened; None while it has not."""
    return checkpoint.read_json(folder / "guard.json")


def check(guard: str) -> None:
    """Raises ValueError for an unknown guard."""
    if guard not in GUARDS:
        raise ValueError(f"config.train.guard={guard!r}: use one of {', '.join(GUARDS)}")


# ---- the picture


class Nearest(NamedTuple):
    """For each sample: its nearest training image, the root mean square distance of the normalised latents, and that
    over the distance of the second nearest."""

    index: np.ndarray
    distance: np.ndarray
    ratio: np.ndarray


def nearest(z: np.ndarray, latents: Sequence, normalise: Callable[[np.ndarray], np.ndarray]) -> Nearest:
    """Nearest training latents of z (B, *s, c), read part by part."""
    size = int(np.prod(z.shape[1:]))
    rows = np.arange(0, len(latents), -(-len(latents) * size * 4 // SCANNED))
    query = np.asarray(z, np.float64).reshape(len(z), -1)
    squares = []
    for part in np.array_split(rows, -(-len(rows) * size * 4 // 2**26)):
        key = normalise(np.asarray(latents[part])).reshape(len(part), -1).astype(np.float64)
        squares.append((query**2).sum(1)[:, None] + (key**2).sum(1) - 2 * query @ key.T)
    distance = np.sqrt(np.maximum(np.concatenate(squares, 1), 0) / size)
    two = np.argsort(distance, axis=1, kind="stable")[:, :2]
    first, second = (np.take_along_axis(distance, two[:, [i]], 1)[:, 0] for i in (0, -1))
    return Nearest(rows[two[:, 0]], first, first / np.maximum(second, 1e-12))


def picture(path: Path, samples: np.ndarray, training: Sequence[np.ndarray], near: Nearest) -> None:
    """Samples in the upper row, their nearest training images under them, distance and d1 / d2 below; volumes by their
    middle plane. A red frame where d1 / d2 < 1/3."""
    tiles = [[_grey(image) for image in row] for row in (samples, training)]
    height, width = tiles[0][0].shape
    factor = max(1, -(-96 // width))
    cell, gutter, text = (factor * height + 4, factor * width + 4), 6, 14
    sheet = PIL.Image.new("RGB", (len(samples) * (cell[1] + gutter), 2 * cell[0] + text + gutter), "white")
    pen = PIL.ImageDraw.Draw(sheet)
    for column, (ratio, distance) in enumerate(zip(near.ratio, near.distance, strict=True)):
        left = column * (cell[1] + gutter)
        for row in (0, 1):
            tile = PIL.Image.fromarray(np.kron(tiles[row][column], np.ones((factor, factor), np.uint8)))
            pen.rectangle(
                (left, row * cell[0], left + cell[1] - 1, (row + 1) * cell[0] - 1), "red" if ratio < COPIED else "white"
            )
            sheet.paste(tile, (left + 2, row * cell[0] + 2))
        pen.text((left + 2, 2 * cell[0] + 1), f"{distance:.2f} {ratio:.2f}", "black")
    data = io.BytesIO()
    sheet.save(data, format="png")
    checkpoint.write_bytes(path, data.getvalue())


def _grey(image: np.ndarray) -> np.ndarray:
    flat = np.asarray(image).mean(-1)
    plane = flat[len(flat) // 2] if flat.ndim == 3 else flat
    return np.round((np.clip(plane, -1, 1) + 1) * 127.5).astype(np.uint8)
