"""Loads the four sets of patients as lazily read arrays; who is in which, and who says so."""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    patients: np.ndarray  # (n,) str; of synthetic images the draw that each is part of
    # mm between voxels along each axis of size, median over the whole data set
    spacing: tuple[float, ...] | None = None
    window: tuple[float, float] | None = None  # what -1 and 1 are in the files' units, where that is the same for all
    # what every report on these images must say; files and folders are named only after the first ': ' of each
    notes: tuple[str, ...] = ()
    digests: Sequence[str] = ()  # (n,) of each image's pixels as prepared
    top: float | None = None  # under intensity 'type': what 1 is in the files, where that is the same for all
    affine: list | None = None  # (4, 4): index (d, h, w) -> mm to the left, posterior, superior; where all share it
    stated: bool = False  # the data, or a file of splits, says who is in 'train', and it is just those; not a hash
    files: np.ndarray | tuple = ()  # (n,) str, of synthetic images: the file in the folder that each was read from
    # of synthetic images: why their files hold more than was read of them, so that a release may not copy whole files, or ''
    unread: str = ""


class Trouble(NamedTuple):
    """What is wrong with a data set, for those who would rather look at it than be refused. One line each."""

    problems: list[str]  # what training would refuse, of the whole
    left_out: list[str]  # files and lines that cannot be used


class Partition(NamedTuple):
    """Who is in which split, and who says so."""

    split_of: np.ndarray  # (n,) str, of each row: one of splits.NAMES, or ''
    said: dict[str, str]  # patient -> split, or '' for none, of those of whom the data or a file says it
    stated: bool  # that is everyone, and those said to be in 'train' are, and no one else


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
    need: Sequence[str] = (),
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
      splits: 'hash' leaves out of account the splits that the data brings; see `partition_of`.
      limit: split -> at most so many images of it, whole patients in the order of their hash.
      need: splits that must not be empty, as those with a share in `fractions` must not, though theirs be 0.
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
    if too_few := [name for name, count in (limit or {}).items() if count is not None and count < 1]:
        raise ValueError(f"data.limit.{too_few[0]} must be None, or 1 or more, not {limit[too_few[0]]}")
    found = listed(
        path,
        layout=layout,
        kind=kind,
        patients=patients,
        patient_pattern=patient_pattern,
        centres=centres,
        cohort=cohort,
        size=size,
        trouble=trouble,
        **reading,
    )
    names, of = ([getattr(row, field) for row in found.rows] for field in ("path", "patient"))
    part = partition_of(found, path=path, splits=splits, fractions=fractions, seed=seed, fold=fold, trouble=trouble)
    split_of, task_of = part.split_of, np.arange(len(names))
    if path is None:
        task_of, read = _cohort(dict(cohort or {}), size=size, **reading)
        needed, mend = partition.NAMES, lambda name: "correct data.cohort.subjects"
    else:
        read = lambda: _read_kinds(found, trouble, size=size, **reading)
        shared = [name for name, share in (fractions or partition.FRACTIONS).items() if share > 0]
        needed, whose = {*shared, *need}, "the manifest's splits" if splits in (None, "hash") else splits
        count = f"{path} has {len(set(of))} patients: add some, or correct data.fractions or {whose}"
        none = lambda name: f"data.fractions.{name}=0: give it a share, say 0.15, or correct {whose}"
        mend = lambda name: count if name in shared else none(name)
    _refuse_empty(needed, split_of, mend, trouble)  # before the files are read, which may take hours
    done, window = read()
    notes = (*found.notes, *prepared.skipped(done))
    for note in notes:
        logging.warning("%s", note)
    if trouble:
        trouble.left_out.extend([*found.left_out, *done.skipped])
    rows, places = prepared.images_of(np.array(done.counts)[task_of], (np.cumsum(done.counts) - done.counts)[task_of])
    _refuse_empty(needed, split_of[rows], mend, trouble)
    of_all = {"spacing": done.spacing, "window": window, "notes": notes, "top": done.top, "affine": done.affine}
    of_all["stated"] = part.stated and (limit or {}).get("train") is None
    sets = {}
    for split in partition.NAMES:
        chosen = np.flatnonzero(split_of[rows] == split)
        if limit and limit.get(split) is not None:
            chosen = chosen[partition.first([of[row] for row in rows[chosen]], limit[split], seed=seed)]
        ids = np.array([names[rows[i]] + done.parts[places[i]] for i in chosen], dtype=str)
        patients_of = np.array([of[row] for row in rows[chosen]], dtype=str)
        digests = [done.digests[i] for i in places[chosen]]
        sets[split] = ImageSet(prepared.stored(done, places[chosen]), ids, patients_of, digests=digests, **of_all)
        logging.info("%s: %d images of %d patients", split, len(chosen), len(set(patients_of)))
    if accept_duplicates is not None:
        copies = planted(path, cohort)
        alike = duplicates.find(sets, [*accept_duplicates, *copies])
        duplicates.refuse(alike)
        sets = {split: s._replace(notes=(*notes, *duplicates.notes(alike, copies))) for split, s in sets.items()}
    return sets


def listed(
    path: str | os.PathLike | None,
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
    cohort: Mapping | None = None,
    trouble: Trouble | None = None,
    **_,
) -> manifest.Manifest:
    """What `load` would read, of its arguments: one row for each file, series or drawing. No pixel is read."""
    if path is None:
        if layout not in ("auto", "cohort"):
            raise ValueError(f"data.layout is {layout!r}, but there is no data.path to find it at; set data.path")
        return manifest.Manifest("", [manifest.Row(*row[:2], split=row.split) for row in _records(dict(cohort or {}))])
    if centres == "":
        raise ValueError(
            "data.centres is not said: this config cuts sub-volumes; name the CSV of their centres (path,z,y,x), or set "
            f"data.centres={WHOLE} to take the middle of whole volumes"
        )
    found = manifest.read(
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
    return _with_centres(found, os.path.expanduser(os.fspath(centres))) if centres not in (None, WHOLE) else found


def partition_of(
    found: manifest.Manifest,
    *,
    path: str | os.PathLike | None,
    splits: str | None = None,
    fractions: Mapping[str, float] | None = None,
    seed: int = 0,
    fold: int | None = None,
    trouble: Trouble | None = None,
    **_,
) -> Partition:
    """The split of each row of what `listed` found.

    Args:
      path: the cohort, None, has splits of its own.
      splits: None: what the data says of its patients, and a hash for the others; 'hash': a hash for all; or a CSV with
        the columns patient_id and split (see `manifest.splits`), which is to name every patient of the data. Whom it puts
        in 'train', as those that a generator has seen, is there; it may name others, who are not in the data.
      fractions, seed, fold: see `splits.assign`. A file is not cut in folds.
    Raises:
      ValueError: one line that names the file or key and the mend.
    """
    of, given = ([getattr(row, field) for row in found.rows] for field in ("patient", "split"))
    by_file = splits not in (None, "hash")
    if path is None and not by_file:
        return Partition(np.array(given), dict(zip(of, given, strict=True)), False)
    fold = None if by_file else fold
    assign = functools.partial(partition.assign, of, fractions=fractions, seed=seed, fold=fold, whole_train=by_file)

    def stated() -> Partition:
        what = _looked_up(of, os.path.expanduser(splits)) if by_file else given if splits is None else ()
        split_of, said = assign(what), partition.said_of(of, what)
        pairs = zip(of, split_of, strict=True)
        as_said = all(who in said and (said[who] == "train") == (split == "train") for who, split in pairs)
        return Partition(split_of, said, as_said)

    return _or(trouble, stated, lambda: Partition(assign(), {}, False))


def _looked_up(patients: Sequence[str], path: str) -> list[str]:
    """The split of each patient that a CSV says."""
    if not os.path.isfile(path):
        raise ValueError(f"data.splits must be None or 'hash', or a CSV with patient_id,split: there is no {path}")
    said = manifest.splits(path)
    if unnamed := [patient for patient in dict.fromkeys(patients) if patient not in said]:
        mend = "add them, in the split none if they are to be left out, or correct data.splits"
        raise ValueError(
            f"{path}: {len(unnamed)} of {len(set(patients))} patients are not in it ({unnamed[0]}); {mend}"
        )
    return [said[patient] for patient in patients]


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
    """`prepared.read`; an error names the kinds of series where several are taken together. Who only looks skips bad files."""
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
    digests = [digest for digest, kept in zip(one.digests, keep, strict=True) if kept]
    names = {"ids": one.ids[keep], "patients": one.patients[keep], "files": one.files[keep] if len(one.files) else ()}
    return one._replace(images=one.images[keep], digests=digests, **names)


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
    """The drawing of each of the embedded cohort's images, and what prepares the drawings.

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
    return [place[r.number, r.scan] for r in records], read


def _records(cohort: dict) -> list[brains.Record]:
    cohort = {name: value for name, value in cohort.items() if name != "height"}
    return brains.records(**{"subjects": {"train": 64, "select": 16, "val": 160, "control": 120}, **cohort})


def _draw(task: tuple[str, int, int], **drawing) -> list[files.Image]:
    _, number, scan = task
    return [files.Image(brains.subject(number, scan=scan, **drawing), eight_bit=False, resized=False)]


def _refuse_empty(
    needed: Iterable[str], present: Sequence[str], mend: Callable[[str], str], trouble: Trouble | None
) -> None:
    if missing := sorted(set(needed) - set(present), key=partition.NAMES.index):
        problem = f"the split {missing[0]!r} has no images; {mend(missing[0])}"
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
