"""How public collections and hospitals lay images out: each layout ends in rows of `listing`.

A layout is called with the path and an `Ask`. Where a collection says no patients, a note says what stands for one.
"""

import collections
import concurrent.futures
import difflib
import os
import re
from collections.abc import Mapping, Sequence

from tqdm import tqdm

from data import dicom, readers
from data.listing import Ask, Manifest, Row, choose, image_files, join, records, remember

NIFTI = r"\.nii(?:\.gz)?"
DECATHLON = r"BRATS|la|liver|hippocampus|prostate|lung|pancreas|hepaticvessel|spleen|colon"


def folder(path: str, ask: Ask) -> Manifest:
    """Every image file below a folder, in the order of their names."""
    return Manifest(path, [Row(name, item=_array(name, ask)) for name in image_files(path, ask)])


def table(path: str, ask: Ask) -> Manifest:
    """A CSV file, or a folder with manifest.csv: path, patient_id and, if wanted, study, slice, split, label.

    Paths are relative to the CSV's folder; 'patient' does for patient_id where that is not there. Other columns are
    ignored, and told where their names look like patient_id or split misspelt.
    """
    path = os.path.join(path, "manifest.csv") if os.path.isdir(path) else path
    rows, column_of, record = [], {}, {}
    for line, record in records(path, ask, "path"):
        if not column_of:
            column_of = {field: field for field in Row._fields[:6] if field in record}
            column_of |= {"patient": "patient_id"} if "patient_id" in record else {}
        row = Row(**{field: record[column].strip() for field, column in column_of.items()})
        if row.path:
            rows.append(row._replace(path=os.path.normpath(row.path), item=_array(row.path, ask)))
        else:
            ask.refuse(f"{path}: line {line} has no path; fill it or remove the line")
    absent, others = {"patient_id", "split"} - record.keys(), sorted(record.keys() - column_of.values())
    alike = [name for name in others if difflib.get_close_matches(name, absent, 1, 0.8)]
    note = f"{len(alike)} columns that may be patient_id or split misspelt are not read: {', '.join(alike)} in {path}"
    return Manifest(os.path.dirname(path) or ".", rows, [note] if alike else [])


def _array(name: str, ask: Ask) -> str:
    """Of a file with several arrays, data.kind is the one."""
    return (ask.kind or "") if readers.suffix(name) in (".npz", ".h5", ".hdf5") else ""


# ---- radiographs


def nih(path: str, ask: Ask) -> Manifest:
    """NIH ChestX-ray14, whole or in part: Data_Entry*.csv with 'Image Index' and 'Patient ID'; files below images*/.

    Where its train_val_list.txt and test_list.txt are there, they are its split, by patient.
    """
    tables = [name for name in os.listdir(path) if re.fullmatch(r"Data_Entry.*\.csv", name)]
    if len(tables) != 1:
        raise ValueError(f"{path}: the NIH layout has one Data_Entry*.csv, this has {len(tables)}; correct data.path")
    entries = os.path.join(path, tables[0])
    folders = [f for f in sorted(os.listdir(path)) if f.startswith("images") and os.path.isdir(os.path.join(path, f))]
    found = {os.path.basename(p): f"{f}/{p}" for f in folders for p in image_files(os.path.join(path, f), ask)}

    lists = {"train": os.path.join(path, "train_val_list.txt"), "test": os.path.join(path, "test_list.txt")}
    split_of = {}
    if all(map(os.path.isfile, lists.values())):
        for split, names in lists.items():
            with open(names, encoding="utf-8", errors="replace") as lines:
                split_of |= dict.fromkeys(map(str.strip, lines), split)

    def listed():
        for line, record in records(entries, ask, "image index", "patient id"):
            name, patient = record["image index"], record["patient id"]
            if name and patient:
                said = {"split": split_of.get(name, ""), "label": record.get("finding labels", "")}
                yield name, Row("", patient, record.get("follow-up #", ""), **said)
            else:
                ask.refuse(f"{entries}: line {line} lacks its Image Index or Patient ID; fill it or remove the line")

    return join(path, found, listed(), entries)


def chexpert(path: str, ask: Ask) -> Manifest:
    """CheXpert: train.csv and valid.csv with 'Path' and 'Frontal/Lateral'; files train/patient00001/study1/view1_frontal.jpg.

    Kinds: Frontal, Lateral.
    """
    manifests, kinds = [], {}
    for part, split in (("train", "train"), ("valid", "val"), ("test", "test")):
        entries = os.path.join(path, f"{part}.csv")
        if not os.path.isfile(entries) or not os.path.isdir(os.path.join(path, part)):
            continue
        found = {f"{part}/{name}": f"{part}/{name}" for name in image_files(os.path.join(path, part), ask)}

        def listed(entries=entries, part=part, split=split):
            for _, record in records(entries, ask, "path", "frontal/lateral"):
                match = re.search(rf"{part}/(patient\d+)/(study\d+)/[^/]+$", record["path"])
                if match:
                    kinds[match[0]] = record["frontal/lateral"]
                    yield match[0], Row("", match[1], match[2], split=split)
                else:
                    ask.refuse(f"{entries}: a Path is not {part}/patientN/studyN/FILE; correct it")

        manifests.append(join(path, found, listed(), entries))
    rows = choose(path, [(kinds[row.path], row) for m in manifests for row in m.rows], ask)
    return Manifest(path, rows, [note for m in manifests for note in m.notes])


def mimic(path: str, ask: Ask) -> Manifest:
    """MIMIC-CXR(-JPG): files/p10/p10000032/s50414267/ID.jpg or .dcm; mimic-cxr-2.0.0-{split,metadata}.csv(.gz) if there.

    Kinds, where the metadata is there: its ViewPosition (PA, AP, LATERAL, LL, ...), or 'unknown'.
    """
    splits = {r["dicom_id"]: r["split"] for r in _mimic_table(path, ask, "split", "dicom_id", "split")}
    views = {r["dicom_id"]: r["viewposition"] for r in _mimic_table(path, ask, "metadata", "dicom_id", "viewposition")}
    found = []
    for name in image_files(os.path.join(path, "files"), ask):
        match = re.fullmatch(r"(?:p\d+/)?p(\d+)/s(\d+)/([^/]+)\.\w+", name)
        if match:
            split = {"validate": "val"}.get(said := splits.get(match[3], ""), said)
            row = Row(f"files/{name}", match[1], match[2], split=split)
            found.append((views.get(match[3]) or "unknown" if views else "", row))
        else:
            ask.refuse(f"{path}: files/{name} is not at pNN/pPATIENT/sSTUDY/; move it there or away")
    return Manifest(path, choose(path, found, ask))


def _mimic_table(path: str, ask: Ask, name: str, *columns: str) -> list[dict[str, str]]:
    tables = [t for t in sorted(os.listdir(path)) if re.fullmatch(rf"mimic-cxr-[\d.]+-{name}\.csv(\.gz)?", t)]
    return [record for t in tables[:1] for _, record in records(os.path.join(path, t), ask, *columns)]


# ---- volumes


def mrnet(path: str, ask: Ask) -> Manifest:
    """MRNet: train/sagittal/0000.npy and valid/..., one exam a file. Kinds: axial, coronal, sagittal."""
    found = []
    for part in ("train", "valid"):
        inside = image_files(os.path.join(path, part), ask) if os.path.isdir(os.path.join(path, part)) else []
        for name in inside:
            if match := re.fullmatch(r"(axial|coronal|sagittal)/(\d+)\.npy", name):
                row = Row(f"{part}/{name}", match[2], split={"valid": "val"}.get(part, part))
                found.append((match[1], row))
    note = f"MRNet says no patients, so each exam counts as one: {path}"
    return Manifest(path, choose(path, found, ask), standing_in=note)


def ixi(path: str, ask: Ask) -> Manifest:
    """IXI: IXI002-Guys-0828-T1.nii.gz, in folders or not. Kinds: T1, T2, PD, MRA, DTI."""
    pattern = rf"(?:.*/)?(IXI\d+)-(\w+)-(\d+)-([A-Za-z0-9]+)(?:-\d+)?{NIFTI}"
    return Manifest(path, choose(path, [(m[4], Row(m[0], m[1], m[3])) for m in _named(path, pattern, ask)], ask))


def brats(path: str, ask: Ask) -> Manifest:
    """BraTS of any year: CASE/CASE_t1.nii.gz or CASE/CASE-t1n.nii.gz beside its other sequences.

    Kinds: the sequences (t1, t1ce, t2, flair; from 2023 t1n, t1c, t2w, t2f); several, parted by commas, become channels.
    """
    pattern = rf"^(?:.*/)?((BraTS.*?)(?:-(\d\d\d))?)[_-](t1ce|t1n|t1c|t1|t2w|t2f|t2|flair){NIFTI}$"
    cases, sequences = {}, set()
    for name in image_files(path, ask):
        if match := re.match(pattern, name, re.IGNORECASE):
            case = cases.setdefault(match[1], (match[2], match[3] or "", {}))
            case[2][match[4].lower()] = name
            sequences.add(match[4].lower())
    wanted = (ask.kind or ",".join(sequences if len(sequences) == 1 else "")).split(",")
    if not set(wanted) <= sequences:
        kinds = ", ".join(sorted(sequences)) or "none"
        raise ValueError(f"{path}: holds the sequences {kinds}; set data.kind to one, or to several parted by commas")
    rows = []
    for case, (patient, study, files) in sorted(cases.items()):
        if missing := [kind for kind in wanted if kind not in files]:
            ask.refuse(f"{path}: case {case} has no {missing[0]}; restore it or remove the case")
        elif len(wanted) == 1:
            rows.append(Row(files[wanted[0]], patient, study))
        else:
            rows.append(Row(case, patient, study, parts=tuple(files[kind] for kind in wanted)))
    return Manifest(path, rows, standing_in=f"BraTS says no patients, so each case counts as one: {path}")


def decathlon(path: str, ask: Ask) -> Manifest:
    """Medical Segmentation Decathlon: imagesTr/hippocampus_001.nii.gz, imagesTs/..., or those files alone in a folder."""
    whole = any(os.path.isdir(os.path.join(path, f)) for f in ("imagesTr", "imagesTs"))
    pattern = rf"({'images(?:Tr|Ts)/' if whole else ''})((?:{DECATHLON})_\d+){NIFTI}"
    note = f"the Decathlon says no patients, so each case counts as one: {path}"
    return Manifest(path, [Row(m[0], m[2]) for m in _named(path, pattern, ask)], standing_in=note)


def bids(path: str, ask: Ask) -> Manifest:
    """BIDS: sub-01[/ses-01]/anat/sub-01[_ses-01]_T1w.nii.gz; derivatives are not looked at. Kinds: the suffixes (T1w, ...)."""
    pattern = rf"(sub-[A-Za-z0-9]+)/(?:.*/)?\1(?:_(ses-[A-Za-z0-9]+))?_(?:.*_)?([A-Za-z0-9]+){NIFTI}"
    return Manifest(path, choose(path, [(m[3], Row(m[0], m[1], m[2] or "")) for m in _named(path, pattern, ask)], ask))


def _named(path: str, pattern: str, ask: Ask) -> list[re.Match]:
    """The image files whose whole relative path matches; others, as masks, are no part of the layout."""
    return [match for name in image_files(path, ask) if (match := re.fullmatch(pattern, name))]


def fastmri(path: str, ask: Ask) -> Manifest:
    """fastMRI: multicoil_train/file1000001.h5 and the like; patient_id from the file. Kinds: its acquisition (AXT2, ...)."""
    names = [name for name in image_files(path, ask) if readers.suffix(name) in (".h5", ".hdf5")]
    found, empty = [], 0
    for name, said in zip(names, headers(path, names, ask), strict=True):
        if said and not said[2]:
            empty += 1
        elif said:
            match = re.search(r"(?:^|/)\w+_(train|val|test)(?:_\w+)?/", name)
            found.append((said[1], Row(name, said[0], os.path.basename(name), split=match[1] if match else "")))
    notes = [f"{empty} files hold no reconstructed image (test sets) and are left out: {path}"] if empty else []
    return Manifest(path, choose(path, found, ask), notes)


def dicoms(path: str, ask: Ask) -> Manifest:
    """DICOM files in any tree and under any name, as TCIA and hospital archives give them out; patients from PatientID.

    For volumes, the files of a SeriesInstanceUID are one image; else each file is. data.kind is a regular expression
    searched in 'MODALITY SeriesDescription'.
    """
    names = image_files(path, ask, wanted=lambda p: readers.suffix(p) == ".dcm" or dicom.is_dicom(p))
    said = [dicom.Header(*h) if h else None for h in headers(path, names, ask)]
    try:
        fits = re.compile(ask.kind or "").search
    except re.error as error:
        raise ValueError(f"data.kind {ask.kind!r} is not a regular expression: {error}") from None
    images = [(name, h) for name, h in zip(names, said, strict=True) if h and h.image]
    if not ask.volumes:
        place = lambda h: "" if h.place is None else f"{h.place:g}"
        rows = [Row(name, h.patient, h.study, place(h)) for name, h in images if fits(h.kind)]
        return _of_kinds(path, rows, [h.kind for _, h in images], ask)
    series, folders = {}, {}
    for name, h in images:
        series.setdefault((h.patient, h.study, h.series, h.group), []).append((h.place or 0.0, name, h.kind))
    for (patient, study, uid, _), files in series.items():
        parts = tuple(name for _, name, _ in sorted(files))
        where = os.path.commonpath([os.path.dirname(name) for name in parts])
        folders.setdefault(where, []).append((files[0][2], uid, Row("", patient, study, parts=parts)))
    rows = []
    for where, inside in folders.items():
        for number, (kind, uid, row) in enumerate(inside):
            again = sum(uid == other for _, other, _ in inside[:number])  # other shapes under the same UID
            name = where if where and len(inside) == 1 else f"{where}#{uid}".lstrip("#") + f".{again}" * bool(again)
            if fits(kind):
                rows.append(row._replace(path=name))
    return _of_kinds(path, sorted(rows), [kind for inside in folders.values() for kind, _, _ in inside], ask)


def _of_kinds(path: str, rows: list[Row], kinds: list[str], ask: Ask) -> Manifest:
    """A tree's rows; says so where they are of several kinds and nobody chose."""
    counts = collections.Counter(kinds)
    if ask.kind and not rows:
        raise ValueError(f"{path}: no images of kind {ask.kind!r} here; set data.kind to one of {told(counts)}")
    if ask.kind or len(counts) < 2:
        return Manifest(path, rows)
    note = f"{len(counts)} kinds of series are taken together, since data.kind is not set: {told(counts)} in {path}"
    return Manifest(path, rows, [note], kinds=dict(counts))


def told(kinds: Mapping[str, int]) -> str:
    """'CT CHEST' (12), 'CT SCOUT' (12): the most frequent ones first."""
    common = collections.Counter(kinds).most_common(8)
    return ", ".join(f"{kind!r} ({count})" for kind, count in common) + ", ..." * (len(kinds) > 8)


# ---- headers: what only opening a file tells


def headers(root: str, names: Sequence[str], ask: Ask) -> list[list | None]:
    """What each file's header says, read once and kept in the cache; None where it was refused, which is not kept.

    Of DICOM the fields of `dicom.Header`; of HDF5 [patient_id, acquisition, whether it holds an image].
    """
    full = [os.path.join(root, name) for name in names]
    state = [3, names, [(s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in map(_status, full)]]
    refused = []

    def make(known):
        found = known or [None] * len(full)
        unknown = [place for place, said in enumerate(found) if said is None]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            quiet = bool(os.environ.get("FACSIMILE_QUIET"))
            read = pool.map(_header, [full[place] for place in unknown])
            read = tqdm(read, "reading headers", len(unknown), unit="file", delay=2, disable=quiet)
            for place, said in zip(unknown, read, strict=True):
                refused.extend([said] if isinstance(said, str) else [])
                found[place] = None if isinstance(said, str) else said
        return found

    found = remember(ask, root, state, make)
    for problem in refused:
        ask.refuse(problem)
    return found


def _status(path: str) -> os.stat_result:
    """Of the file that a link leads to, or of one that leads nowhere."""
    try:
        return os.stat(path)
    except OSError:
        return os.lstat(path)


def _header(path: str) -> list | str:
    """The header, or the one line that refuses it."""
    try:
        if readers.suffix(path) in (".h5", ".hdf5"):
            import h5py

            with h5py.File(path, "r") as file:
                text = lambda name: str(file.attrs.get(name, ""))
                return [text("patient_id"), text("acquisition"), any(key in file for key in readers.KEYS)]
        return list(dicom.header(path))
    except Exception as error:  # as for pixels: anything may be raised at a damaged file
        why = f"its header cannot be read ({type(error).__name__}): damaged or of another kind"
        return f"{path}: {why}; restore or remove it, or set data.on_error='skip'"
