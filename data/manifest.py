"""What a collection of images on disk holds: one row per image. Every layout is a few lines that end in such rows."""

import collections
import csv
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from data import files


class Row(NamedTuple):
    """One image. `path` is relative to the manifest's root and is also the image's id, so it is unique."""

    path: str
    patient: str = ""
    study: str = ""
    slice: str = ""
    split: str = ""  # one of splits.NAMES or 'test', or '' where it is left to the hash
    label: str = ""


class Manifest(NamedTuple):
    root: str  # folder that the rows' paths are relative to
    rows: list[Row]
    notes: list[str] = []  # noqa: RUF012  one line each: what the user should know of


def read(
    path: str | os.PathLike, *, layout: str = "auto", patient_pattern: str | None = None, patients: str = "required"
) -> Manifest:
    """Lists the images under a path.

    Args:
      path: a folder of images, a CSV manifest, or the root of a known layout.
      layout: a key of LAYOUTS, or 'auto' to tell by what is there.
      patient_pattern: for images whose layout does not say the patient: a regular expression searched in the relative
        path (folders parted by '/'); its first group, or the whole match where it has none, is the patient.
      patients: 'required' refuses images without a patient; 'per_image' takes each for a patient of its own, of which
        every report must then warn.
    Raises:
      FileNotFoundError: nothing at the path.
      ValueError: anything wrong with what is there, in one line that says the mend.
    """
    path = os.path.expanduser(os.fspath(path))
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: there is no such file or folder; correct data.path")
    if patients not in ("required", "per_image"):
        raise ValueError(f"data.patients must be 'required' or 'per_image', not {patients!r}")
    layout = _detect(path) if layout == "auto" else layout
    if layout not in LAYOUTS:
        raise ValueError(f"data.layout {layout!r} is none for a data.path: auto, {', '.join(LAYOUTS)}")
    manifest = LAYOUTS[layout](path)
    rows = _match(manifest.rows, patient_pattern) if patient_pattern else manifest.rows
    if not rows:
        raise ValueError(f"{path}: no images found as layout {layout!r}; correct data.path or data.layout")
    name, count = collections.Counter(row.path for row in rows).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{path}: {name} is listed {count} times; keep one row for each image")
    missing = [row.path for row in rows if not row.patient]
    if missing and patients == "required":
        mend = "set data.patient_pattern, give a CSV with path,patient_id, or accept data.patients='per_image'"
        raise ValueError(f"{path}: {len(missing)} of {len(rows)} images have no patient id ({missing[0]}); {mend}")
    return manifest._replace(rows=[row if row.patient else row._replace(patient=row.path) for row in rows])


def folder(path: str) -> Manifest:
    """Every image file below a folder, in the order of their names."""
    return Manifest(path, [Row(name) for name in _image_files(path)])


def table(path: str) -> Manifest:
    """A CSV file, or a folder with manifest.csv: path, patient_id and, if wanted, study, slice, split, label.

    Paths are relative to the CSV's folder. Other columns are ignored.
    """
    path = os.path.join(path, "manifest.csv") if os.path.isdir(path) else path
    columns = {"patient_id": "patient", **{field: field for field in Row._fields}}
    rows = []
    for line, record in _records(path, "path"):
        row = Row(**{columns[k]: v.strip() for k, v in record.items() if k in columns})
        if not row.path:
            raise ValueError(f"{path}: line {line} has no path; fill it or remove the line")
        rows.append(row._replace(path=os.path.normpath(row.path)))
    return Manifest(os.path.dirname(path) or ".", rows)


def nih(path: str) -> Manifest:
    """NIH ChestX-ray14, whole or in part: Data_Entry*.csv with 'Image Index' and 'Patient ID'; files below images*/."""
    tables = [name for name in os.listdir(path) if re.fullmatch(r"Data_Entry.*\.csv", name)]
    if len(tables) != 1:
        raise ValueError(f"{path}: the NIH layout has one Data_Entry*.csv, this has {len(tables)}; correct data.path")
    entries = os.path.join(path, tables[0])
    folders = [f for f in sorted(os.listdir(path)) if f.startswith("images") and os.path.isdir(os.path.join(path, f))]
    found = {os.path.basename(p): f"{f}/{p}" for f in folders for p in _image_files(os.path.join(path, f))}
    rows, absent = [], 0
    for line, record in _records(entries, "Image Index", "Patient ID"):
        name, patient = record["Image Index"], record["Patient ID"]
        if not name or not patient:
            raise ValueError(f"{entries}: line {line} lacks its Image Index or Patient ID; fill it or remove the line")
        if name in found:
            study, label = record.get("Follow-up #", ""), record.get("Finding Labels", "")
            rows.append(Row(found[name], patient, study, label=label))
        absent += name not in found
    notes = [f"{entries}: {absent} of the images listed are not there and are left out"] if absent else []
    if extra := len(found) - len({row.path for row in rows}):
        notes.append(f"{path}: {extra} images are not listed in {tables[0]} and are left out")
    return Manifest(path, sorted(rows), notes)


LAYOUTS = {"folder": folder, "manifest": table, "nih": nih}


def _detect(path: str) -> str:
    if os.path.isfile(path):
        if not path.lower().endswith(".csv"):
            raise ValueError(f"{path}: is neither a folder nor a .csv manifest; correct data.path")
        return "manifest"
    names = os.listdir(path)
    if any(re.fullmatch(r"Data_Entry.*\.csv", name) for name in names):
        return "nih"
    return "manifest" if "manifest.csv" in names else "folder"


def _image_files(root: str) -> list[str]:
    """Relative paths, sorted, '/' between folders, of files with an image's suffix; hidden ones left out."""
    if not os.path.isdir(root):
        raise ValueError(f"{root}: is not a folder; correct data.path or data.layout")

    def refuse(error: OSError):
        raise ValueError(f"{error.filename}: cannot be listed ({error.strerror}); mend its permissions or move it away")

    found, seen = [], set()
    for folder_, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        real = os.path.realpath(folder_)
        if real in seen:  # a link back to where we have been
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = [name for name in names if not name.startswith(".") and files.suffix(name) in files.READERS]
        found += [os.path.normpath(os.path.join(os.path.relpath(folder_, root), name)) for name in names]
    for name in found:
        if not name.isascii() and name.encode(errors="replace").decode() != name:
            raise ValueError(f"{root}: the name {name!a} is not UTF-8; rename it")
    return sorted(name.replace(os.sep, "/") for name in found)


def _match(rows: list[Row], pattern: str) -> list[Row]:
    try:
        search = re.compile(pattern).search
    except re.error as error:
        raise ValueError(f"data.patient_pattern {pattern!r} is not a regular expression: {error}") from None
    found = [(row, None if row.patient else search(row.path)) for row in rows]
    return [row._replace(patient=match[min(1, match.re.groups)] or "") if match else row for row, match in found]


def _records(path: str, *needed: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields (line number, record) of a CSV whose header has the needed columns."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines, strict=True)
            header = reader.fieldnames or []
            if missing := [name for name in needed if name not in header]:
                has = ", ".join(header) or "nothing"
                raise ValueError(f"{path}: no column {missing[0]!r}, its header has {has}; add or rename it")
            for record in reader:
                if None in record or None in record.values():
                    raise ValueError(
                        f"{path}: line {reader.line_num} has not the header's {len(header)} fields; mend it"
                    )
                yield reader.line_num, record
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.line_num} is not CSV ({error}); mend it") from None
