"""Rows of a manifest -> their images, prepared: where settings meet files, for real images and synthetic ones."""

import functools
import os
import re
from collections.abc import Sequence

import numpy as np

from data import containers, dicom, files, geometry, manifest, prepare, readers


def read(
    found: manifest.Manifest,
    *,
    size: Sequence[int],
    channels: int = 1,
    channel: int | None = None,
    intensity="type",
    fit: str = "pad",
    spacing: Sequence[float] | None = None,
    slices: str | None = None,
    lenient: bool = False,
    **preparing,
) -> tuple[prepare.Prepared, tuple[float, float] | None]:
    """The rows' images, prepared, and the window of intensities that is the same for all."""
    if len(size) not in (2, 3) or min(size) < 1 or channels < 1:
        raise ValueError(
            f"data.size must be (H, W) or (D, H, W), and data.channels 1 or more, not {size} and {channels}"
        )
    if fit not in geometry.FITS:
        raise ValueError(f"data.fit must be one of {', '.join(geometry.FITS)}, not {fit!r}")
    if spacing and (len(spacing) != len(size) or not all(0 < mm < float("inf") for mm in spacing) or fit == "stretch"):
        raise ValueError(f"data.spacing must be mm for each axis of data.size, without fit 'stretch', not {spacing}")
    centres = any(row.centres for row in found.rows)
    if slices and (files.parse_slices(slices) and (len(size) == 3 or centres)):
        raise ValueError("data.slices makes 2D images of volumes: data.size must be (H, W), and data.centres None")
    if centres and len(size) == 2:
        raise ValueError("data.centres makes sub-volumes: data.size must be (D, H, W)")
    intensity = files.parse_intensity(intensity)
    settings = {"size": tuple(size), "channels": channels, "intensity": intensity, "fit": fit}
    more = {"channel": channel, "spacing": spacing and tuple(spacing), "slices": slices, "lenient": lenient or None}
    settings |= {name: value for name, value in more.items() if value is not None}
    root = found.root
    stamp = functools.lru_cache(maxsize=1)(_stamp)

    def inputs():
        yield from (os.path.realpath(root), settings, [readers.version(name) for name in readers.DECODERS])
        for row in found.rows:
            parts = [[part, stamp(os.path.join(root, part))] for part in row.parts or (row.path,)]
            yield [parts, row.item, row.centres]

    done = prepare.prepare(
        re.sub(r"[^A-Za-z0-9-]", "_", os.path.basename(os.path.realpath(root)))[:40],
        found.rows,
        functools.partial(files.read_images, root=root, **settings),
        shape=(*size, channels),
        inputs=inputs(),
        code=[files, readers, dicom, geometry, containers],
        eight_bit=intensity == ("type",),
        several=64 if slices else 8 if centres else 1,
        **preparing,
    )
    return done, intensity[1:] if intensity[0] == "window" else None


def images_of(counts: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(row, place in the prepared set) of every image, for rows of so many images that start at a place each."""
    rows = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rows, starts[rows] + within


def stored(done: prepare.Prepared, places: np.ndarray) -> Sequence[np.ndarray]:
    """The images at these places, read when asked for."""
    from data import builder

    return builder.Stored(done.folder, places)


def skipped(done: prepare.Prepared, what: str = "images") -> list[str]:
    """A note on the files that were left out, if any were."""
    if not done.skipped:
        return []
    count = f"{len(done.skipped)} of {len(done.counts)} {what} could not be read and are left out"
    return [f"{count}; the first: {done.skipped[0]}"]


def _stamp(path: str) -> list | None:
    """Changes where a file does, or one of those that hold its numbers."""
    try:
        found = [os.stat(name) for name in (path, *readers.detached(path))]
    except OSError:
        return None  # reading it will say why
    return [(status.st_size, status.st_mtime_ns, status.st_ctime_ns) for status in found]
