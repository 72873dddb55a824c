"""Loads the four sets of patients, or a folder of synthetic images, as lazily read arrays."""

import functools
import os
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from data import cohort as brains
from data import files, manifest, prepare, splits


class ImageSet(NamedTuple):
    images: Sequence[np.ndarray]  # images[i] is float32 (*size, C) in [-1, 1], read when asked for
    ids: np.ndarray  # (n,) str, unique: relative path, or 'sub-0012_scan-1'
    patients: np.ndarray  # (n,) str; '' for synthetic images


def load(
    *,
    path: str | os.PathLike | None = None,
    layout: str = "auto",
    patients: str = "required",
    patient_pattern: str | None = None,
    fractions: Mapping[str, float] | None = None,
    seed: int = 0,
    limit: Mapping[str, int] | None = None,
    cohort: Mapping | None = None,
    size: Sequence[int] = (64, 64),
    **reading,
) -> dict[str, ImageSet]:
    """Loads a data set, split by patient.

    The first call reads the raw files into the cache; later calls, with other splits too, open what is there.

    Args:
      path: folder, manifest or layout root; None is the embedded semi-synthetic cohort.
      layout, patients, patient_pattern: see `manifest.read`.
      fractions, seed: see `splits.assign`. The cohort has splits of its own.
      limit: split -> at most so many images of it, whole patients in the order of their hash.
      cohort: arguments of `cohort.records`, and `height` of `cohort.subject`.
      size: (H, W) or (D, H, W).
      **reading: channels, intensity, fit: see `files.read_image`; on_error, cache, workers: see `prepare.prepare`.
    Returns:
      'train', 'select', 'val', 'control' -> ImageSet, in the manifest's order; no patient is in two of them.
    Raises:
      FileNotFoundError, ValueError: one line that names the file or key and the mend; also where a split is empty that
        should not be.
    """
    if path is None:
        if layout not in ("auto", "cohort"):
            raise ValueError(f"data.layout is {layout!r}, but there is no data.path to find it at; set data.path")
        rows, read = _cohort(dict(cohort or {}), size=size, **reading)
        needed, mend = splits.NAMES, "correct data.cohort.subjects"
    else:
        found = manifest.read(path, layout=layout, patient_pattern=patient_pattern, patients=patients)
        for note in found.notes:
            logging.warning("%s", note)
        ids, of, said = zip(*((row.path, row.patient, row.split) for row in found.rows), strict=True)
        rows = list(zip(ids, of, splits.assign(of, said, fractions=fractions, seed=seed), ids, strict=True))
        needed = [name for name, share in (fractions or splits.FRACTIONS).items() if share > 0]
        mend = f"{path} has {len(set(of))} patients: add some, or correct data.fractions or the manifest's splits"
        read = functools.partial(_read, found.root, ids, size=size, **reading)
    _refuse_empty(needed, {row[2] for row in rows}, mend)  # before the files are read, which may take hours
    done = read()
    place = {name: i for i, name in enumerate(done.ids)}
    rows = [row for row in rows if row[3] in place]  # what could not be read is left out
    _refuse_empty(needed, {row[2] for row in rows}, mend)
    sets = {}
    for split in splits.NAMES:
        chosen = [row for row in rows if row[2] == split]
        if limit and limit.get(split) is not None:
            chosen = [chosen[i] for i in splits.first([row[1] for row in chosen], limit[split], seed=seed)]
        places = np.array([place[row[3]] for row in chosen], np.int64)
        names, patients_of = (np.array([row[k] for row in chosen], dtype=str) for k in (0, 1))
        sets[split] = ImageSet(_stored(done, places), names, patients_of)
        logging.info("%s: %d images of %d patients", split, len(chosen), len({row[1] for row in chosen}))
    return sets


def read_folder(path: str | os.PathLike, size: Sequence[int], **reading) -> ImageSet:
    """Reads a folder of synthetic images, whoever made them, in the order of their names; the rest as in `load`."""
    path = os.path.expanduser(os.fspath(path))
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"{path}: there is no such folder of synthetic images; correct the path, or sample first"
        )
    ids = [row.path for row in manifest.folder(path).rows]
    if not ids:
        raise ValueError(f"{path}: no images in it; readable are {', '.join(files.READERS)}")
    done = _read(path, ids, size=size, **reading)
    if done.resized:
        lost = f"{done.resized} of {len(done.ids)} images had another shape than {tuple(size)} and were resampled"
        logging.warning("%s: %s", path, lost)
    return ImageSet(_stored(done, np.arange(len(done.ids))), np.array(done.ids), np.full(len(done.ids), ""))


def _read(root, paths, *, size, channels=1, intensity="type", fit="pad", **preparing) -> prepare.Prepared:
    """The files' images, prepared; ids are their paths."""
    if len(size) not in (2, 3) or min(size) < 1 or channels < 1:
        raise ValueError(
            f"data.size must be (H, W) or (D, H, W), and data.channels 1 or more, not {size} and {channels}"
        )
    if fit not in files.FITS:
        raise ValueError(f"data.fit must be one of {', '.join(files.FITS)}, not {fit!r}")
    intensity = files.parse_intensity(intensity)
    settings = {"size": tuple(size), "channels": channels, "intensity": intensity, "fit": fit}
    full = {path: os.path.join(root, path) for path in paths}
    stats = [(s.st_size, s.st_mtime_ns) if (s := _stat(path)) else None for path in full.values()]
    done = prepare.prepare(
        re.sub(r"[^A-Za-z0-9-]", "_", os.path.basename(os.path.realpath(root)))[:40],
        full,
        functools.partial(files.read_image, **settings),
        shape=(*size, channels),
        inputs=[os.path.realpath(root), settings, stats],
        code=[files],
        eight_bit=intensity == ("type",),
        **preparing,
    )
    if done.skipped:
        count = f"{len(done.skipped)} of {len(paths)} images could not be read and are left out"
        logging.warning("%s: %s; the first: %s", root, count, done.skipped[0])
    return done


def _stat(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None  # reading it will say why


def _cohort(cohort: dict, *, size, channels=1, intensity=None, fit=None, **preparing):
    """Rows (id, patient, split, id of the drawing) of the embedded cohort, and what prepares its drawings.

    Each (number, scan) is drawn once: planted copies cost nothing more. Intensity and fit are for files only.
    """
    if channels != 1:
        raise ValueError(f"the embedded cohort has one channel, not {channels}; correct data.channels or set data.path")
    drawing = {"size": tuple(size), "seed": cohort.get("seed", 0)}
    drawing |= {"height": cohort.pop("height")} if "height" in cohort else {}
    records = brains.records(**{"subjects": {"train": 64, "select": 16, "val": 160, "control": 120}, **cohort})
    rows = [(r.id, r.patient, r.split, f"{r.number}-{r.scan}") for r in records]
    tasks = {row[3]: (r.number, r.scan) for row, r in zip(rows, records, strict=True)}
    draw = functools.partial(_draw, **drawing)
    settings = {"shape": (*size, 1), "inputs": drawing, "code": [files, brains], **preparing}
    return rows, functools.partial(prepare.prepare, "cohort", tasks, draw, **settings)


def _draw(who: tuple[int, int], **drawing) -> files.Image:
    return files.Image(brains.subject(who[0], scan=who[1], **drawing), eight_bit=False, resized=False)


def _stored(done: prepare.Prepared, places: np.ndarray) -> Sequence[np.ndarray]:
    from data import builder

    return builder.Stored(done.folder, places)


def _refuse_empty(needed: Sequence[str], present: set[str], mend: str) -> None:
    for split in needed:
        if split not in present:
            raise ValueError(f"the split {split!r} has no images; {mend}")
