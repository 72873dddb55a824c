"""Loads the four sets of patients, or a folder of synthetic images, as lazily read arrays."""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from data import cohort as brains
from data import duplicates, files, layouts, manifest, prepare, prepared
from data import splits as partition

WHOLE = "none"  # data.centres of a config that asks for them, to do without


class ImageSet(NamedTuple):
    images: Sequence[np.ndarray]  # images[i] is float32 (*size, C) in [-1, 1], read when asked for
    ids: np.ndarray  # (n,) str, unique: relative path, 'scan.nii.gz#z012', or 'sub-0012_scan-1'
    patients: np.ndarray  # (n,) str; '' for synthetic images
    # mm between voxels along each axis of size, median over the whole data set
    spacing: tuple[float, ...] | None = None
    window: tuple[float, float] | None = None  # what -1 and 1 are in the files' units, where that is the same for all
    # what every report on these images must say; files and folders are named only after the first ': ' of each
    notes: tuple[str, ...] = ()
    digests: Sequence[str] = ()  # (n,) of each image's pixels as prepared
    top: float | None = None  # under intensity 'type': what 1 is in the files, where that is the same for all
    affine: list | None = None  # (4, 4): index (d, h, w) -> mm to the left, posterior, superior; where all share it


class Trouble(NamedTuple):
    """What is wrong with a data set, for those who would rather look at it than be refused. One line each."""

    problems: list[str]  # what training would refuse, of the whole
    left_out: list[str]  # files and lines that cannot be used


def load(
    *,
    path: str | os.PathLike | None = None,
    layout: str = "auto",
    kind: str | None = None,
    patients: str = "required",
    patient_pattern: str | None = None,
    centres: str | os.PathLike | None = None,
    fractions: Mapping[str, float] | None = None,
    seed: int = 0,
    fold: int | None = None,
    limit: Mapping[str, int] | None = None,
    splits: str | None = None,
    accept_duplicates: Sequence[str] | None = None,
    cohort: Mapping | None = None,
    size: Sequence[int] = (64, 64),
    trouble: Trouble | None = None,
    **reading,
) -> dict[str, ImageSet]:
    """Loads a data set, split by patient.

    The first call reads the raw files into the cache; later calls, with other splits too, open what is there.

    Args:
      path: folder, manifest, file or layout root, or 'tfds:NAME'; None is the embedded semi-synthetic cohort.
      layout, kind, patients, patient_pattern: see `manifest.read`.
      centres: CSV of the centres of sub-volumes, which are the images then; see `manifest.centres`.
      fractions, seed, fold: see `splits.assign`. The cohort has splits of its own.
      splits: 'hash' leaves out of account the splits that the data brings.
      limit: split -> at most so many images of it, whole patients in the order of their hash.
      accept_duplicates: images of different patients that are the same image are an error that lists them, but for those
        named here (see `duplicates.find`) and the cohort's own, which are in the sets' `notes`; None: not looked for.
      cohort: arguments of `cohort.records`, and `height` of `cohort.subject`.
      size: (H, W) or (D, H, W).
      trouble: if given, what is wrong with the data is added to it instead of being refused, where there is more to look
        at: images without a patient, splits that are empty or contradict each other, files that cannot be used.
      **reading: channels, channel, intensity, fit, spacing, slices: see `files.read_images`; on_error, cache, workers,
        beam: see `prepare.prepare`.
    Returns:
      'train', 'select', 'val', 'control' -> ImageSet, in the manifest's order; no patient is in two of them.
    Raises:
      FileNotFoundError, ValueError: one line that names the file or key and the mend; also where a split is empty that
        should not be.
    """
    if splits not in (None, "hash"):
        raise ValueError(f"data.splits must be None or 'hash', not {splits!r}")
    if path is None:
        if layout not in ("auto", "cohort"):
            raise ValueError(f"data.layout is {layout!r}, but there is no data.path to find it at; set data.path")
        names, of, split_of, task_of, read = _cohort(dict(cohort or {}), size=size, **reading)
        needed, mend = partition.NAMES, "correct data.cohort.subjects"
    else:
        found = listed(
            path,
            layout=layout,
            kind=kind,
            patients=patients,
            patient_pattern=patient_pattern,
            centres=centres,
            size=size,
            trouble=trouble,
            **reading,
        )
        if centres and centres != WHOLE:
            found = _with_centres(found, os.path.expanduser(os.fspath(centres)))
        names, of, said = ([getattr(row, field) for row in found.rows] for field in ("path", "patient", "split"))
        said = said if splits is None else ()
        assign = functools.partial(partition.assign, of, fractions=fractions, seed=seed, fold=fold)
        split_of = _or(trouble, lambda: assign(said), assign)
        task_of = np.arange(len(names))
        needed = [name for name, share in (fractions or partition.FRACTIONS).items() if share > 0]
        mend = f"{path} has {len(set(of))} patients: add some, or correct data.fractions or the manifest's splits"
        read = lambda: _read_kinds(found, trouble, size=size, **reading)
    _refuse_empty(needed, split_of, mend, trouble)  # before the files are read, which may take hours
    done, window = read()
    notes = (*(found.notes if path else ()), *prepared.skipped(done))
    for note in notes:
        logging.warning("%s", note)
    if trouble:
        trouble.left_out.extend([*(found.left_out if path else ()), *done.skipped])
    rows, places = prepared.images_of(np.array(done.counts)[task_of], (np.cumsum(done.counts) - done.counts)[task_of])
    _refuse_empty(needed, split_of[rows], mend, trouble)
    sets = {}
    for split in partition.NAMES:
        chosen = np.flatnonzero(split_of[rows] == split)
        if limit and limit.get(split) is not None:
            chosen = chosen[partition.first([of[row] for row in rows[chosen]], limit[split], seed=seed)]
        ids = np.array([names[rows[i]] + done.parts[places[i]] for i in chosen], dtype=str)
        patients_of = np.array([of[row] for row in rows[chosen]], dtype=str)
        digests = [done.digests[i] for i in places[chosen]]
        of_all = {"spacing": done.spacing, "window": window, "notes": notes, "top": done.top, "affine": done.affine}
        sets[split] = ImageSet(prepared.stored(done, places[chosen]), ids, patients_of, digests=digests, **of_all)
        logging.info("%s: %d images of %d patients", split, len(chosen), len(set(patients_of)))
    if accept_duplicates is not None:
        copies = planted(path, cohort)
        alike = duplicates.find(sets, [*accept_duplicates, *copies])
        duplicates.refuse(alike)
        sets = {split: s._replace(notes=(*notes, *duplicates.notes(alike, copies))) for split, s in sets.items()}
    return sets


def listed(
    path: str | os.PathLike,
    *,
    size: Sequence[int],
    centres: str | os.PathLike | None = None,
    slices: str | None = None,
    on_error: str = "raise",
    cache: str | os.PathLike | None = None,
    layout: str = "auto",
    kind: str | None = None,
    patients: str = "required",
    patient_pattern: str | None = None,
    trouble: Trouble | None = None,
    **_,
) -> manifest.Manifest:
    """What `load` would read, of its arguments: one row for each file or series. No pixel is read."""
    if centres == "":
        raise ValueError(
            "data.centres is not said: this config cuts sub-volumes; name the CSV of their centres (path,z,y,x), or set "
            f"data.centres={WHOLE} to take the middle of whole volumes"
        )
    return manifest.read(
        path,
        layout=layout,
        patient_pattern=patient_pattern,
        patients=patients,
        kind=kind,
        volumes=bool(len(size) == 3 or centres or slices),
        on_error="skip" if trouble else on_error,
        cache=prepare.folder(cache),
        problems=trouble and trouble.problems,
    )


def content(sets: Mapping[str, ImageSet], *names: str) -> str:
    """A hash of who is in these splits, and of their images' pixels, wherever the files lie."""
    rows = sorted(
        (str(image), str(patient), name, digest)
        for name in set(names)
        for image, patient, digest in zip(sets[name].ids, sets[name].patients, sets[name].digests, strict=True)
    )
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:20]


def planted(path: str | os.PathLike | None, cohort: Mapping | None) -> list[str]:
    """Ids of the images that the embedded cohort plants as copies, on purpose; none where there is a data.path."""
    return [] if path else [r.id for r in _records(dict(cohort or {})) if r.duplicate_of]


def _read_kinds(found: manifest.Manifest, trouble: Trouble | None, **reading):
    """`_read`; an error names the kinds of series where several are taken together. Who only looks skips bad files."""
    try:
        return prepared.read(found, **reading)
    except ValueError as error:
        if trouble and reading.get("on_error", "raise") == "raise":
            return prepared.read(found, **{**reading, "on_error": "skip"})
        if not found.kinds:
            raise
        choice = f"there are several kinds of series, of which data.kind chooses: {layouts.told(found.kinds)}"
        raise ValueError(f"{error}; {choice}") from None


def subset(one: ImageSet, keep: np.ndarray) -> ImageSet:
    """The images of a set at which `keep`, (n,) bool, is true; they stay on disk."""
    from data import builder

    images = builder.Stored(one.images.folder, one.images.indices[keep])
    digests = [digest for digest, kept in zip(one.digests, keep, strict=True) if kept]
    return one._replace(images=images, ids=one.ids[keep], patients=one.patients[keep], digests=digests)


def _with_centres(found: manifest.Manifest, path: str) -> manifest.Manifest:
    """The rows that have centres; those that have none are counted."""
    centres = manifest.centres(path)
    rows = [row._replace(centres=tuple(centres[row.path])) for row in found.rows if row.path in centres]
    if absent := sorted(set(centres) - {row.path for row in rows}):
        some = ", ".join(row.path for row in found.rows[:3]) + ", ..." * (len(found.rows) > 3)
        raise ValueError(
            f"{path}: {absent[0]} is none of the volumes of {found.root}, which are {some}; correct the path"
        )
    note = [f"{len(found.rows) - len(rows)} volumes have no centre and are left out: {path}"]
    return found._replace(rows=rows, notes=found.notes + note * (len(rows) < len(found.rows)))


def _cohort(cohort: dict, *, size, channels=1, **preparing):
    """Ids, patients, splits and drawings of the embedded cohort's images, and what prepares the drawings.

    Each (number, scan) is drawn once: planted copies cost nothing more. What is about files only is ignored.
    """
    if channels != 1:
        raise ValueError(f"the embedded cohort has one channel, not {channels}; correct data.channels or set data.path")
    for name in ("channel", "intensity", "fit", "spacing", "slices"):
        preparing.pop(name, None)
    drawing = {"size": tuple(size), "seed": cohort.get("seed", 0)}
    drawing |= {"height": cohort["height"]} if "height" in cohort else {}
    records = _records(cohort)
    tasks = {(r.number, r.scan): f"{r.number}-{r.scan}" for r in records}
    place = {who: place for place, who in enumerate(tasks)}
    settings = {"shape": (*size, 1), "inputs": [drawing], "code": [files, brains], **preparing}
    draw = functools.partial(_draw, **drawing)
    named = [(name, *who) for who, name in tasks.items()]
    read = lambda: (prepare.prepare("cohort", named, draw, **settings), None)
    ids, patients, splits = (list(values) for values in list(zip(*records, strict=True))[:3])
    return ids, patients, np.array(splits), [place[r.number, r.scan] for r in records], read


def _records(cohort: dict) -> list[brains.Record]:
    cohort = {name: value for name, value in cohort.items() if name != "height"}
    return brains.records(**{"subjects": {"train": 64, "select": 16, "val": 160, "control": 120}, **cohort})


def _draw(task: tuple[str, int, int], **drawing) -> list[files.Image]:
    _, number, scan = task
    return [files.Image(brains.subject(number, scan=scan, **drawing), eight_bit=False, resized=False)]


def _refuse_empty(needed: Sequence[str], present: Sequence[str], mend: str, trouble: Trouble | None) -> None:
    if missing := sorted(set(needed) - set(present), key=partition.NAMES.index):
        problem = f"the split {missing[0]!r} has no images; {mend}"
        if trouble is None:
            raise ValueError(problem)
        if problem not in trouble.problems:
            trouble.problems.append(problem)


def _or(trouble: Trouble | None, make: Callable, instead: Callable) -> Any:
    """make(); where that is refused and someone only looks, the refusal is a problem and instead() is returned."""
    try:
        return make()
    except ValueError as error:
        if trouble is None:
            raise
        result = instead()  # where this is refused as well, there is nothing to look at
        trouble.problems.append(str(error))
        return result
