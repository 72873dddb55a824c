"""What a collection of images on disk holds: one row per image, or per file of several images."""

import collections
import itertools
import math
import os
import re
import sys
from collections.abc import Callable

from data import containers, dicom, layouts, readers
from data.listing import Ask, Manifest, Row, notes, records, walk

LAYOUTS: dict[str, Callable[[str, Ask], Manifest]] = {
    "folder": layouts.folder,
    "manifest": layouts.table,
    "nih": layouts.nih,
    "chexpert": layouts.chexpert,
    "mimic": layouts.mimic,
    "mrnet": layouts.mrnet,
    "fastmri": layouts.fastmri,
    "ixi": layouts.ixi,
    "brats": layouts.brats,
    "decathlon": layouts.decathlon,
    "bids": layouts.bids,
    "dicom": layouts.dicoms,
    "medmnist": containers.medmnist,
    "tfds": containers.tfds,
}


def read(
    path: str | os.PathLike,
    *,
    layout: str = "auto",
    patient_pattern: str | None = None,
    patients: str = "required",
    kind: str | None = None,
    volumes: bool = False,
    on_error: str = "raise",
    cache: str | None = None,
    problems: list[str] | None = None,
) -> Manifest:
    """Lists the images under a path.

    Args:
      path: a folder of images, a CSV manifest, the root or file of a known layout, or 'tfds:NAME'.
      layout: a key of LAYOUTS, or 'auto' to tell by what is there.
      patient_pattern: for images whose layout does not say the patient or lets something else stand for one, and for
        DICOM headers that say a wrong one: a regular expression searched in the relative path (folders parted by '/');
        its first group, or the whole match where it has none, is the patient. Where it matches nothing there is no
        patient: headers are not asked.
      patients: 'required' refuses images without a patient; 'per_image' takes each for a patient of its own, of which
        every report must then warn. PatientID and patient_id of DICOM and fastMRI files are looked up before that.
      kind: which images, where a collection has several kinds; each layout says what a kind is in it.
      volumes: the images wanted have three axes, or are cut from such.
      on_error: 'raise', or 'skip': files and lines that cannot be used are left out, counted, and noted.
      cache: folder for what was read of headers; None: they are read again each time.
      problems: if given, images without a patient are told in this list instead of being refused, and count each as one.
    Raises:
      FileNotFoundError: nothing at the path.
      ValueError: anything wrong with what is there, in one line that says the mend.
    """
    path = os.path.expanduser(os.fspath(path))
    if not path.startswith("tfds:") and not os.path.exists(path):
        raise FileNotFoundError(f"{path}: there is no such file or folder; correct data.path")
    if patients not in ("required", "per_image"):
        raise ValueError(f"data.patients must be 'required' or 'per_image', not {patients!r}")
    ask = Ask(kind or None, volumes, on_error == "skip", cache)
    try:
        layout = _detect(path) if layout == "auto" else layout
        if layout not in LAYOUTS:
            raise ValueError(f"data.layout {layout!r} is none for a data.path: auto, {', '.join(LAYOUTS)}")
        manifest = LAYOUTS[layout](path, ask)
    except OSError as error:
        raise ValueError(f"{error.filename}: cannot be read ({error.strerror}); mend its permissions") from None
    rows = manifest.rows
    standing_in = manifest.standing_in
    if patient_pattern:
        rows = _match(rows, patient_pattern, replace=bool(layout == "dicom" or standing_in))
        standing_in = ""
    else:
        rows = _ask_headers(manifest.root, rows, ask)
    rows = _unique(path, rows, ask)
    if not rows:
        raise ValueError(f"{path}: no images found as layout {layout!r}; correct data.path or data.layout")
    missing = [row.path for row in rows if not row.patient]
    if missing and patients == "required":
        mend = "set data.patient_pattern, give a CSV with path,patient_id, or accept data.patients='per_image'"
        problem = f"{path}: {len(missing)} of {len(rows)} images have no patient id ({missing[0]}); {mend}"
        if problems is None:
            raise ValueError(problem)
        problems.append(problem)
    for place, row in enumerate(rows) if missing else ():
        rows[place] = row if row.patient else row._replace(patient=row.path)
    said = [*manifest.notes, *filter(None, [standing_in]), *notes(path, ask)]
    return manifest._replace(rows=rows, notes=said, left_out=ask.left_out)


def synthetic(path: str) -> Manifest:
    """Every image file below a folder, in the order of their names; or every image of one .npy or .npz, along its first axis.

    Raises:
      ValueError: one line; nothing at the path, or no images.
    """
    mend = "correct audit.synthetic"
    if os.path.isdir(path):
        ask = Ask()
        found = layouts.folder(path, ask)
        if not found.rows:
            others = "".join(f", but {note}" for note in notes(path, ask))
            raise ValueError(f"{path}: no images in it{others}; {mend}; readable are {', '.join(readers.READERS)}")
        return found._replace(notes=notes(path, ask))
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: there are no synthetic images; {mend}, or run --mode=sample first")
    name, kind = os.path.basename(path), readers.suffix(path)
    if kind not in (".npy", ".npz"):
        raise ValueError(f"{path}: is no folder of images and no .npy or .npz of many; {mend}")
    try:
        count = readers.rows_of(path, "").count if kind == ".npz" else len(readers.stack(path))
    except readers.Refused as error:
        raise ValueError(f"{path}: {error}; {mend}".replace("data.kind", "a file with the images alone")) from None
    except Exception as error:  # as for pixels: anything may be raised at a damaged file
        raise ValueError(f"{path}: cannot be read as {kind} ({type(error).__name__}); restore it, or {mend}") from None
    item = "/{}" if kind == ".npz" else "{}"
    rows = [Row(f"{name}#{i:06d}", parts=(name,), item=item.format(i)) for i in range(count)]
    return Manifest(os.path.dirname(path) or ".", rows)


def centres(path: str) -> dict[str, list[tuple[str, float, float, float, str]]]:
    """Centres of sub-volumes from a CSV: a row's path -> (name, z, y, x, unit).

    Columns path, z, y, x and, if wanted, name and unit. The unit 'voxel' (default) counts in the file's own array, slowest
    axis first; 'mm' are DICOM's patient coordinates: x to the left, y to posterior, z to superior. NIfTI's x and y have
    the other sign.

    Raises:
      ValueError: one line that names the file, its line and the mend.
    """
    found = collections.defaultdict(list)
    for line, record in records(path, Ask(), "path", "z", "y", "x"):
        name, unit = record.get("name", ""), record.get("unit") or "voxel"
        try:
            place = [float(record[axis]) for axis in "zyx"]
        except ValueError:
            raise ValueError(f"{path}: line {line} has a z, y or x that is no number; correct it") from None
        if unit not in ("voxel", "mm") or not all(map(math.isfinite, place)):
            raise ValueError(f"{path}: line {line} has a unit or place that cannot be; units are voxel and mm")
        rows = found[os.path.normpath(record["path"]).replace(os.sep, "/")]
        rows.append((name or f"c{len(rows):03d}", *place, unit))
        if len({row[0] for row in rows}) < len(rows):
            raise ValueError(f"{path}: line {line} repeats the name {rows[-1][0]}; names are unique within a file")
    return dict(found)


def splits(path: str) -> dict[str, str]:
    """Patient -> split, of a CSV with the columns patient_id and split; other columns are not read.

    A split is one of `splits.NAMES`, 'test' or 'none'; a patient may have several lines that say the same.

    Raises:
      ValueError: one line that names the file, its line and the mend.
    """
    found = {}
    for line, record in records(path, Ask(), "patient_id", "split"):
        patient, split = record["patient_id"].strip(), record["split"].strip()
        if not patient or not split:
            raise ValueError(f"{path}: line {line} lacks its patient_id or split, which may be 'none'; fill it")
        if found.setdefault(patient, split) != split:
            raise ValueError(
                f"{path}: line {line} puts {patient} in {split} and an earlier one in {found[patient]}; correct it"
            )
    return found


def _detect(path: str) -> str:
    """The layout, by what only one of them has; 'folder' or 'dicom' by the first image."""
    if path.startswith("tfds:"):
        return "tfds"
    if os.path.isfile(path):
        kind = {".csv": "manifest", ".npz": "medmnist"}.get(readers.suffix(path))
        if not kind:
            raise ValueError(f"{path}: is neither a folder nor a .csv manifest or .npz; correct data.path")
        return kind
    names = sorted(os.listdir(path))
    inside = lambda *parts: os.path.exists(os.path.join(path, *parts))
    any_is = lambda pattern: any(re.fullmatch(pattern, name, re.IGNORECASE) for name in names)
    images = [name for name in names if readers.suffix(name) in readers.READERS and not name.startswith(".")]
    of_decathlon = re.compile(rf"(?:{layouts.DECATHLON})_\d+{layouts.NIFTI}").fullmatch
    signs = {
        "manifest": inside("manifest.csv"),
        "tfds": inside(containers.INFO) and inside("features.json"),
        "nih": any_is(r"Data_Entry.*\.csv"),
        "bids": inside("dataset_description.json") and any_is(r"sub-.*"),
        "mimic": any_is(r"mimic-cxr-[\d.]+-.*\.csv(\.gz)?") and inside("files"),
        "chexpert": inside("train.csv") and inside("train") and _begins(path, "train", "patient"),
        "mrnet": any(inside(part, plane) for part in ("train", "valid") for plane in ("axial", "coronal", "sagittal")),
        "decathlon": inside("imagesTr") or inside("imagesTs") or (bool(images) and all(map(of_decathlon, images))),
        "ixi": any_is(rf"IXI\d+-\w+-\d+-.*{layouts.NIFTI}"),
        "brats": any_is(r"BraTS.*[_-]\d+.*"),
        "fastmri": any_is(r"(single|multi)coil_.*") or any_is(r"file\w*\.h5"),
    }
    if found := [name for name, sign in signs.items() if sign]:
        return found[0]
    return "dicom" if _begins_with_dicom(path) else "folder"


def _begins(path: str, part: str, start: str) -> bool:
    """Whether a folder's first entries are named so; a folder may have millions."""
    with os.scandir(os.path.join(path, part)) as entries:
        return any(entry.name.startswith(start) for entry in itertools.islice(entries, 100))


def _begins_with_dicom(path: str) -> bool:
    """Whether the first file met that we can read is DICOM."""
    for folder, names in walk(path):
        for name in names:
            kind = readers.suffix(name)
            if kind in readers.READERS or dicom.is_dicom(os.path.join(folder, name)):
                return kind == ".dcm" or kind not in readers.READERS
    return False


def searching(pattern: str, key: str) -> Callable[[str], str]:
    """A function to what a regular expression finds in a text: its first group, or the whole match where it has none; or ''.

    Raises:
      ValueError: it is none; one line that names the key.
    """
    try:
        search = re.compile(pattern).search
    except re.error as error:
        raise ValueError(f"{key} {pattern!r} is not a regular expression: {error}") from None

    def found(text: str) -> str:
        match = search(text)
        return match[min(1, match.re.groups)] or "" if match else ""

    return found


def _match(rows: list[Row], pattern: str, replace: bool) -> list[Row]:
    search = searching(pattern, "data.patient_pattern")
    for place, row in enumerate(rows):  # where they are: a second list would be as much memory again
        if replace or not row.patient:
            rows[place] = row._replace(patient=sys.intern(search(row.path)))
    return rows


def _ask_headers(root: str, rows: list[Row], ask: Ask) -> list[Row]:
    """Fills in the patients that are still unknown and that a file's header says."""
    kinds = (".dcm", ".h5", ".hdf5")
    unknown = [row.path for row in rows if not row.patient and not row.parts and readers.suffix(row.path) in kinds]
    unknown = [name for name in unknown if os.path.isfile(os.path.join(root, name))]
    if not unknown:
        return rows
    said = dict(zip(unknown, layouts.headers(root, unknown, ask), strict=True))
    filled = [row._replace(patient=said[row.path][0]) if said.get(row.path) else row for row in rows]
    return [row for row in filled if said.get(row.path, True)]


def _unique(path: str, rows: list[Row], ask: Ask) -> list[Row]:
    if len({row.path for row in rows}) == len(rows):
        return rows
    counts = collections.Counter(row.path for row in rows)
    for name, count in counts.items():
        if count > 1:
            ask.refuse(f"{path}: {name} is listed {count} times; keep one row for each image")
    return [row for row in rows if counts[row.path] == 1] if ask.left_out else rows
