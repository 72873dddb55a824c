"""Synthetic images, whoever made them: a folder of files, or one file of many."""

import os
import re
from collections.abc import Sequence

import numpy as np
from absl import logging

from data import files, manifest, prepare, prepared
from data.sets import ImageSet

LITTLE = 0.2  # of the range of intensities: synthetic images that use less are in other units, most likely
WHOLE = (1 << 40,) * 3  # a volume that has sections beyond whatever numbers data.slices names


def read_folder(path: str | os.PathLike, size: Sequence[int], *, draw: str | None = None, **reading) -> ImageSet:
    """Reads synthetic images, whoever made them, in the order of their names; the rest as in `load`.

    Args:
      path: a folder, or an .npy or .npz of many images along its first axis.
      draw: which images were drawn together, as the files of one volume cut up: a regular expression searched in the
        relative path, whose first group, or the whole match where it has none, names the draw; None: each file is one,
        and each image of a single file of many.
    Returns:
      With notes on what was left out, resampled or assumed; `patients` are the draws, `files` are below the folder.
    Raises:
      FileNotFoundError, ValueError: one line; keys of `data` that `audit.reading` has are named as that's.
    """
    path = os.path.expanduser(os.fspath(path))
    found = manifest.synthetic(path)
    draws = _draws([row.path for row in found.rows], draw, path)
    ours = lambda line: re.sub(r"\bdata\.(intensity|fit|spacing|channel|slices)\b", r"audit.reading.\1", line)
    try:
        done, window = prepared.read(found, size=size, lenient=True, **reading)
    except ValueError as error:
        raise ValueError(ours(str(error))) from None
    rows, places = prepared.images_of(np.array(done.counts), np.cumsum(done.counts) - done.counts)
    ids = np.array([found.rows[row].path + done.parts[place] for row, place in zip(rows, places, strict=True)])
    read_from = np.array([row.parts[0] if row.parts else row.path for row in found.rows])[rows]
    images, count = prepared.stored(done, places), f"of {len(ids)} synthetic images"
    notes = [*found.notes, *map(ours, prepared.skipped(done, "synthetic images"))]
    if done.resized:
        notes.append(f"{done.resized} {count} had another shape or spacing and were resampled to {tuple(size)}: {path}")
    if reading.get("spacing") and done.unspaced:
        notes.append(f"{done.unspaced} {count} do not say their spacing, which is taken for that of the data: {path}")
    if (used := _range(images)) < LITTLE:
        mend = "if they are in other units than the data, set audit.reading.intensity"
        notes.append(f"the synthetic images use {100 * used:.1f} % of the range of intensities; {mend}: {path}")
    for note in notes:
        logging.warning("%s", note)
    return ImageSet(
        images,
        ids,
        np.array(draws)[rows],
        done.spacing,
        window,
        tuple(notes),
        done.digests,
        files=read_from,
        unread=_unread(done, reading.get("slices"), count),
    )


def _draws(names: Sequence[str], pattern: str | None, path: str) -> list[str]:
    """What each file, or image of a single file, is part of."""
    if pattern is None:
        return list(names)
    search = manifest.searching(pattern, "audit.reading.draw")
    found = [search(name) for name in names]
    if "" in found:
        mend = "correct it, or move the file away"
        raise ValueError(f"{path}: audit.reading.draw {pattern!r} finds nothing in {names[found.index('')]}; {mend}")
    return found


def _unread(done: prepare.Prepared, slices: str | None, count: str) -> str:
    """Why the files hold more than what was read, or ''. Constant sections count for nothing."""
    if slices and any(done.parts) and files.parse_slices(slices, WHOLE)[1] != range(WHOLE[0]):
        return f"audit.reading.slices={slices} takes some sections of a volume"
    if done.cut:
        return f"the files of {done.cut} {count} show more than was read, by audit.reading.channel or audit.reading.fit"
    return ""


def _range(images: Sequence[np.ndarray]) -> float:
    """How much of [-1, 1] lies between the darkest and the brightest pixel of at most 64 images, evenly spread."""
    chosen = [images[i] for i in np.unique(np.linspace(0, len(images) - 1, min(len(images), 64)).round().astype(int))]
    return float(max(image.max() for image in chosen) - min(image.min() for image in chosen)) / 2
