"""How well `data.duplicates` tells another file of the same image from another patient's image, and what it costs.

Real images are read from FACSIMILE_DATA (default: ../shared/data) and left out where it is absent.
"""

import io
import os
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel
import numpy as np
import PIL.Image
import pydicom

import data
from data import duplicates, files, geometry

REAL = Path(os.environ.get("FACSIMILE_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
MANY = 100_000


def measure() -> dict:
    brains = lambda size, n: {"size": size, "cohort": {"subjects": {"train": n, "select": 1, "val": 1, "control": 1}}}
    sets = {"brain cohort 64x64": brains((64, 64), 2000), "brain cohort 32x40x32": brains((32, 40, 32), 300)}
    patients = {"patient_pattern": r"_(\d+)\.nii"}
    if REAL.is_dir():
        sets |= {
            "chest X-ray 64x64": {"path": REAL / "nih_cxr64", "size": (64, 64)},
            "hippocampus 32x48x32": {
                "path": REAL / "msd_hippocampus",
                "size": (32, 48, 32),
                "intensity": "percentile:0.5:99.5",
                **patients,
            },
            "lung CT 64x64": {
                "path": ct_by_patient,
                "size": (64, 64),
                "intensity": "window:-1000:400",
                "patient_pattern": "^[^/]+",
            },
        }
    with tempfile.TemporaryDirectory() as folder:
        return {name: quality(Path(folder), **settings) for name, settings in sets.items()} | {"cost": cost()}


def quality(folder: Path, *, path=None, **settings) -> dict:
    path = path(folder) if callable(path) else path
    sets = data.load(path=path, **settings)
    images = np.concatenate([[s.images[i] for i in range(len(s.ids))] for s in sets.values() if len(s.ids)])
    patients = np.concatenate([s.patients for s in sets.values()])
    ids = np.concatenate([s.ids for s in sets.values()])
    prints = duplicates.fingerprints(images)
    other = np.triu(patients[:, None] != patients[None], 1)
    sim = (prints @ prints.T)[other]
    chosen = np.random.default_rng(0).permutation(len(images))[:100]
    original = {i: images[i] if path is None else native(Path(path) / ids[i], settings) for i in chosen}
    size = settings["size"]
    fit = lambda x: geometry.resample(x, size, geometry.spans_of(x.shape[:-1], size, "pad"))
    found = {}
    for name, alter in ALTERATIONS.items():
        copies = duplicates.fingerprints(np.stack([fit(alter(original[i])) for i in chosen]))
        alike = (prints[chosen] * copies).sum(1)
        found[name] = f"{(alike >= duplicates.NEAR).sum()} of {len(chosen)}, least similar {alike.min():.3f}"
    return {
        "images": len(images),
        "pairs of different patients": int(other.sum()),
        "false alarms": int((sim >= duplicates.NEAR).sum()),
        "most similar": round(float(sim.max()), 4),
        "found": found,
    }


def native(path: Path, settings: dict) -> np.ndarray:
    """A file's image at the size it has, (*S, 1) in [-1, 1]."""
    if path.name.endswith(".nii.gz"):
        size = nibabel.as_closest_canonical(nibabel.load(path)).shape[::-1]
    elif path.suffix == ".dcm":
        header = pydicom.dcmread(path, stop_before_pixels=True)
        size = (header.Rows, header.Columns)
    else:
        size = PIL.Image.open(path).size[::-1]
    return files.read_image(str(path), size=size, intensity=settings.get("intensity", "type")).array


def ct_by_patient(folder: Path) -> Path:
    """The CT slices in a folder for each patient of their headers, whose images may well be alike."""
    for path in sorted((REAL / "tcga_luad_ct").glob("*.dcm")):
        home = folder / "ct" / pydicom.dcmread(path, stop_before_pixels=True).PatientID
        home.mkdir(parents=True, exist_ok=True)
        (home / path.name).symlink_to(path)
    return folder / "ct"


def jpeg(x: np.ndarray) -> np.ndarray:
    grey = np.round((x[..., 0] + 1) * 127.5).astype(np.uint8)

    def plane(p: np.ndarray) -> np.ndarray:
        stored = io.BytesIO()
        PIL.Image.fromarray(p).save(stored, "jpeg", quality=90)
        return np.asarray(PIL.Image.open(stored))

    again = np.stack([plane(p) for p in grey]) if grey.ndim == 3 else plane(grey)
    return (again.astype(np.float32) / 127.5 - 1)[..., None]


def resized(factor: float) -> Callable:
    return lambda x: geometry.resample(
        geometry.resample(x, [max(1, round(n * factor)) for n in x.shape[:-1]]), x.shape[:-1]
    )


ALTERATIONS = {
    "JPEG at quality 90 (volumes: slice by slice)": jpeg,
    "8 bits": lambda x: (np.round((x + 1) * 127.5) / 127.5 - 1).astype(np.float32),
    "doubled in size and back": resized(2),
    "halved in size and back": resized(0.5),
    "10 % brighter, clipped": lambda x: np.clip(1.1 * (x + 1) - 1, -1, 1),
    "10 % darker": lambda x: 0.9 * (x + 1) - 1,
    "gamma 1.1": lambda x: 2 * ((x + 1) / 2) ** 1.1 - 1,
}


class Noise(Sequence):
    """As many images as wanted, of no memory."""

    def __init__(self, n: int):
        self._n = n

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, i: int) -> np.ndarray:
        return np.random.Generator(np.random.SFC64(int(i))).random((64, 64, 1), np.float32)


def cost() -> dict:
    memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    before, begin = memory(), time.perf_counter()
    found = duplicates.scan(Noise(MANY))
    assert len(found.pairs) == 0
    return {
        "images": MANY,
        "seconds": round(time.perf_counter() - begin, 1),
        "GiB more than before": round(memory() - before, 2),
    }
