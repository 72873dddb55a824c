"""A semi-synthetic cohort of brain MR "patients", made from the MNI152 templates that the `nilearn` wheel ships.

Each subject is a pure function of an integer: the T1, grey- and white-matter templates are deformed (affine, two scales
of smooth warp, ventricle size), given tissue contrast and regional atrophy, then scanned (bias field, Rician noise). A
re-scan keeps the anatomy and contrast and draws the bias and noise afresh. Nobody is depicted: use it to test a
pipeline whose truth must be known, never as evidence about patients. Templates: ICBM 2009a nonlinear symmetric, Fonov
et al., NeuroImage 54 (2011), (C) McConnell Brain Imaging Centre, as packaged by nilearn.

Only the output's own voxels are computed: random fields are cubic B-splines on coarse lattices, evaluated as a
product of three small matrices, and the templates are read once, trilinearly, at the deformed positions.
"""

import functools
import importlib.util
import math
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

SPLITS = ("train", "select", "val", "control")
SPLIT_STRIDE = 100_000  # subjects of split k are numbered from k * SPLIT_STRIDE, planted copies after the last split
_CENTRE = np.array([5.0, -17.0, 0.0])  # middle of the template's brain, MNI mm, in our axis order (z, y, x)
_VIEW = np.array([172.0, 206.0, 168.0])  # mm that must fit in the picture along z, y, x
_EDGE = 104.0  # the lattices span the centre +- this many mm; beyond it the fields are constant
_COARSE, _FINE, _BIAS = 48.0, 14.0, 70.0  # lattice spacings in mm
_CHUNK = 1 << 18  # voxels computed at a time, which bounds the memory of large volumes


class Record(NamedTuple):
    """One image of the cohort: `subject(number, scan=scan)`, filed under `patient`."""

    id: str  # 'sub-0012_scan-0', unique
    patient: str  # 'sub-0012'
    split: str
    number: int  # which anatomy to draw
    scan: int  # which scan of it
    duplicate_of: str  # id of the image that this one secretly copies, or ''


def records(
    *,
    subjects: Mapping[str, int],
    scans: int = 1,
    duplicates: int = 0,
    copies: int = 1,
    rescanned: bool = False,
    into: str = "train",
    seed: int = 0,
) -> list[Record]:
    """Lists the images of a cohort, split by split, without drawing any.

    Subject i of a split always has the same number, whatever the sizes of this and the other splits: a small
    training set is a prefix of a large one, and growing it never changes who is in validation.

    Args:
      subjects: number of subjects of each split, keys out of SPLITS.
      scans: images per subject.
      duplicates: how many distinct training subjects to plant copies of. Copies are rows with a patient id of their
        own, placed after the honest rows of split `into`.
      copies: copies of each of these.
      rescanned: False copies scan 0 exactly; True gives each copy a new scan of the same anatomy.
      into: split that receives the copies; 'val' or 'control' plants a leak.
      seed: chooses which training subjects are copied (nothing else depends on it).
    Returns:
      Records; those with `duplicate_of` set are the planted truth.
    Raises:
      ValueError: an unknown split, a count out of range, or more duplicates than training subjects.
    """
    for split, count in subjects.items():
        if split not in SPLITS:
            raise ValueError(f"cohort: no split {split!r}; splits are {', '.join(SPLITS)}")
        if not 0 <= count <= SPLIT_STRIDE:
            raise ValueError(f"cohort: {split} must have 0 to {SPLIT_STRIDE} subjects, not {count}")
    if scans < 1 or copies < 1:
        raise ValueError(f"cohort: scans and copies must be at least 1, not {scans} and {copies}")
    if not 0 <= duplicates <= subjects.get("train", 0):
        raise ValueError(f"cohort: {duplicates} duplicates asked of {subjects.get('train', 0)} training subjects")
    if duplicates and into not in subjects:
        raise ValueError(f"cohort: duplicates are to go into {into!r}, which is not among the splits asked for")

    rows = []
    for offset, split in enumerate(SPLITS):
        for number in range(offset * SPLIT_STRIDE, offset * SPLIT_STRIDE + subjects.get(split, 0)):
            patient = f"sub-{number:04d}"
            rows += [Record(f"{patient}_scan-{s}", patient, split, number, s, "") for s in range(scans)]
        if duplicates and split == into:
            sources = np.random.default_rng(seed).permutation(subjects["train"])[:duplicates]
            for i, (number, copy) in enumerate((int(n), c) for n in sources for c in range(copies)):
                patient = f"sub-{len(SPLITS) * SPLIT_STRIDE + i:04d}"
                scan = scans + copy if rescanned else 0
                rows.append(Record(f"{patient}_scan-0", patient, split, number, scan, f"sub-{number:04d}_scan-0"))
    return rows


def render(record: Record, *, size: tuple[int, ...], seed: int = 0, height: float = 14.0) -> np.ndarray:
    """Draws a record's image, as `subject` does: the form for `pool.map(functools.partial(render, size=...), rows)`."""
    return subject(record.number, size=size, scan=record.scan, seed=seed, height=height)


def subject(number: int, *, size: tuple[int, ...], scan: int = 0, seed: int = 0, height: float = 14.0) -> np.ndarray:
    """Draws one scan of one subject.

    The same person is drawn at any size: a (64, 64) image is a section of the (D, H, W) volume. Voxels are isotropic,
    as small as lets the whole head fit, so any aspect ratio is padded with background and never stretched.

    Args:
      number: who; >= 0.
      size: (H, W) for an axial slice or (D, H, W) for a volume. D runs from inferior to superior, H from anterior to
        posterior, W from the patient's right to left (the radiological view).
      scan: which scan of this subject; >= 0.
      seed: of the whole cohort; another seed is another population.
      height: of the axial slice, mm above the anterior commissure in the template's frame; up to 5 mm of jitter are
        added, once per subject. 2D only.
    Returns:
      float32 (*size, 1) in [-1, 1], the background near -1.
    Raises:
      ValueError: a size that is neither 2D nor 3D, or a negative number, scan or seed.
      FileNotFoundError: the templates are not installed.
    """
    if len(size) not in (2, 3) or min(size) < 2:
        raise ValueError(f"cohort: size must be (H, W) or (D, H, W), each at least 2, not {tuple(size)}")
    if min(number, scan, seed) < 0:
        raise ValueError(f"cohort: number, scan and seed must not be negative, not {number}, {scan}, {seed}")
    # Two independent streams: the anatomy must not shift when a scan draws more or fewer numbers.
    person = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(number, 0)))
    scanner = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(number, 1, scan)))

    spacing = float(np.max(_VIEW[-len(size) :] / size))
    linear, shift = _affine(person)
    jitter = float(np.clip(person.normal(0, 2.5), -5, 5))
    coarse = _lattice(person, _COARSE, [3.6, 4.0, 3.6, 0.5])  # displacement along z, y, x in mm; atrophy
    # Heads are nearly symmetric: blend the coarse field with its mirror image (whose x displacement changes sign).
    coarse = 0.85 * coarse + 0.53 * coarse[:, :, ::-1] * np.float32([1, 1, -1, 1])
    fine = _lattice(person, _FINE, [2.0, 2.2, 2.0, 0.35])  # the same; gyral shape
    ventricle = float(np.clip(person.normal(0.12, 0.2), -0.25, 0.5))
    atrophy = person.normal(0.0, 0.25)
    csf, grey, white = person.normal([0.22, 0.57, 0.79], [0.03, 0.04, 0.03])
    detail = person.uniform(0.6, 1.2)  # how far tissue differs within itself (thalamus, putamen), as in the T1 template
    bias = _lattice(scanner, _BIAS, [0.075])
    sigma = scanner.uniform(0.012, 0.028)  # noise, as a fraction of full scale: an SNR of 30 to 70 in white matter

    ticks = [_CENTRE[-len(size) + i] + spacing * (np.arange(n) - (n - 1) / 2) for i, n in enumerate(size)]
    if len(size) == 2:  # the plane whose centre the affine sends to the height asked for
        ticks.insert(0, np.array([_CENTRE[0] + (height + jitter - _CENTRE[0] - shift[0]) / linear[0, 0]]))
    # Output order is anterior first and right first; MNI's y and x grow the other way.
    ticks[1], ticks[2] = ticks[1][::-1], ticks[2][::-1]

    depth = max(1, _CHUNK // (len(ticks[1]) * len(ticks[2])))
    slabs = []
    for start in range(0, len(ticks[0]), depth):
        where = [ticks[0][start : start + depth], ticks[1], ticks[2]]
        warp = _field(coarse, _COARSE, where)
        folds = _field(fine, _FINE, where)
        position = np.stack(np.meshgrid(*[t.astype(np.float32) for t in where], indexing="ij"), -1)
        source = position + warp[..., :3] + folds[..., :3] - _CENTRE.astype(np.float32)
        source = source @ linear.T.astype(np.float32) + (_CENTRE + shift).astype(np.float32)
        source = _widen_ventricles(source, ventricle)
        tissue = _sample(source, _templates(max(1, round(spacing / 1.6))))
        g, w, c, extra = np.moveaxis(tissue, -1, 0)
        # Partial volumes move between tissues: regional atrophy opens sulci, the fine field thins or thickens gyri.
        loss = np.clip(atrophy + warp[..., 3], -0.5, 0.5) * 2 * g * c
        growth = np.clip(folds[..., 3], -0.5, 0.5) * 2 * g * w
        signal = white * (w - growth) + grey * (g + growth - loss) + csf * (c + loss) + detail * extra
        slabs.append(signal * np.exp(_field(bias, _BIAS, where)[..., 0]))
    signal = np.concatenate(slabs).reshape(size)
    noise = scanner.standard_normal((2, *size), dtype=np.float32) * np.float32(sigma)
    magnitude = np.hypot(signal + noise[0], noise[1])  # Rician: the magnitude of a complex signal with Gaussian noise
    return (2 * np.clip(magnitude, 0, 1) - 1).astype(np.float32)[..., None]


def _affine(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draws subject mm -> template mm about the brain's centre: a (3, 3) matrix and a (3,) shift, axes (z, y, x)."""
    angles = np.radians(np.clip(rng.normal(0, [3.0, 2.0, 2.5]), -7, 7))  # about z (in plane), y (roll), x (pitch)
    linear = np.diag(1 / np.clip(rng.normal(1, [0.05, 0.045, 0.05]), 0.9, 1.08))
    for axis, angle in enumerate(angles):
        i, j = [k for k in range(3) if k != axis]
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = math.cos(angle)
        turn[i, j], turn[j, i] = -math.sin(angle), math.sin(angle)
        linear = linear @ turn
    shear = np.eye(3) + np.triu(np.clip(rng.normal(0, 0.025, (3, 3)), -0.06, 0.06), 1)
    return linear @ shear, np.clip(rng.normal(0, 1.5, 3), -3, 3)


def _lattice(rng: np.random.Generator, spacing: float, amplitudes: list[float]) -> np.ndarray:
    """Draws spline coefficients (n, n, n, fields) of random fields with these standard deviations."""
    n = math.ceil(2 * _EDGE / spacing) + 3
    # The mean over positions of a cubic B-spline's sum of squared weights is 151/315 per axis.
    scale = np.array(amplitudes, np.float32) * np.float32((315 / 151) ** 1.5)
    return rng.standard_normal((n, n, n, len(amplitudes)), dtype=np.float32) * scale


def _field(lattice: np.ndarray, spacing: float, ticks: list[np.ndarray]) -> np.ndarray:
    """Evaluates spline fields at the grid of ticks (three 1D arrays, mm): (len z, len y, len x, fields)."""
    out = lattice
    for axis, (t, centre) in enumerate(zip(ticks, _CENTRE, strict=True)):
        basis = _basis(tuple(t - centre), spacing, lattice.shape[axis])
        out = np.moveaxis(np.tensordot(basis, out, (1, axis)), 0, axis)
    return out


@functools.lru_cache(maxsize=64)  # most axes are the same for all subjects
def _basis(offsets: tuple[float, ...], spacing: float, n: int) -> np.ndarray:
    """Weights of n spline coefficients at positions in mm from the centre: (len(offsets), n)."""
    place = np.clip(np.array(offsets) + _EDGE, 0, 2 * _EDGE) / spacing + 1
    distance = np.abs(place[:, None] - np.arange(n))
    basis = np.where(distance < 1, 2 / 3 - distance**2 + distance**3 / 2, np.clip(2 - distance, 0, None) ** 3 / 6)
    return basis.astype(np.float32)


def _widen_ventricles(source: np.ndarray, amount: float) -> np.ndarray:
    """Pulls positions near the lateral ventricles towards their middle, which enlarges them (amount < 0 shrinks)."""
    middle = np.array([15.0, -12.0, 0.0], np.float32)
    reach = np.array([16.0, 34.0, 17.0], np.float32)  # mm along z, y, x
    away = source - middle
    near = np.exp(-0.5 * np.sum((away / reach) ** 2, -1, keepdims=True))
    return source - np.float32(amount) * near * away


def _sample(source: np.ndarray, templates: tuple[np.ndarray, float]) -> np.ndarray:
    """Reads stacked templates (Z, Y, X, K) trilinearly at MNI positions (..., 3); outside them is background, 0."""
    stack, voxel, origin = templates
    limit = np.array(stack.shape[:3], np.float32) - 1
    place = np.clip((source - origin) / np.float32(voxel), 0, limit)
    low = np.minimum(place.astype(np.int32), (limit - 1).astype(np.int32))
    part = np.moveaxis(place - low, -1, 0)
    z, y, x = zip(1 - part, part, strict=True)  # of each axis the weights of its two sides
    strides = (stack.shape[1] * stack.shape[2], stack.shape[2], 1)
    index = low[..., 0] * strides[0] + low[..., 1] * strides[1] + low[..., 2]
    flat = stack.reshape(-1, stack.shape[3])
    total = np.zeros((*index.shape, stack.shape[3]), np.float32)
    for i, j, k in np.ndindex(2, 2, 2):
        corner = flat.take(index + (i * strides[0] + j * strides[1] + k), axis=0)
        total += (z[i] * y[j] * x[k])[..., None] * corner
    return total


@functools.lru_cache(maxsize=4)
def _templates(factor: int) -> tuple[np.ndarray, float, np.ndarray]:
    """Grey, white, CSF and residual T1 as (Z, Y, X, 4), averaged over blocks of `factor` mm; voxel size; MNI origin.

    Averaging before sampling keeps coarse pictures free of aliasing and gives a 2D slice its thickness.
    """
    volumes = dict(_read_templates())
    brain = volumes["t1"] > 0
    inside = [np.flatnonzero(brain.any(axes)) for axes in ((1, 2), (0, 2), (0, 1))]
    box = tuple(slice(int(k[0]), int(k[-1]) + 1) for k in inside)
    brain = brain[box]
    grey, white, t1 = (volumes[k][box] * (brain / np.float32(255)) for k in ("gm", "wm", "t1"))
    tissue = np.stack([grey, white, np.clip(brain - grey - white, 0, 1)], -1)
    # What the three tissues do not explain of the T1 template: deep nuclei and the like, in units of its full scale.
    flat = tissue.reshape(-1, 3)
    mix = np.linalg.solve(flat.T @ flat, flat.T @ t1.ravel())
    # A rim of background on every side, so that clipping a position to the array reads background.
    stack = np.zeros((*(n + 2 * factor + -n % factor for n in t1.shape), 4), np.float32)
    middle = stack[tuple(slice(factor, factor + n) for n in t1.shape)]
    middle[..., :3] = tissue
    np.subtract(t1, tissue @ mix, out=middle[..., 3])
    origin = volumes["origin"] + [axis.start for axis in box] - factor + (factor - 1) / 2
    z, y, x, k = stack.shape
    stack = stack.reshape(z // factor, factor, y // factor, factor, x // factor, factor, k).mean((1, 3, 5))
    return np.ascontiguousarray(stack), float(factor), origin.astype(np.float32)


def _read_templates():
    """Yields ('t1' | 'gm' | 'wm', (Z, Y, X) uint8 volume at 1 mm) and ('origin', MNI mm of voxel 0)."""
    import nibabel

    package = importlib.util.find_spec("nilearn")  # found, not imported: importing it takes seconds and is not needed
    if package is None:
        raise FileNotFoundError("cohort: the brain templates come with the nilearn package; pip install nilearn")
    folder = pathlib.Path(package.origin).parent / "datasets" / "data"
    for name in ("t1", "gm", "wm"):
        path = folder / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz"
        if not path.is_file():
            raise FileNotFoundError(f"cohort: {path} is missing; install a nilearn that ships the MNI152 templates")
        image = nibabel.load(path)
        yield name, np.asarray(image.dataobj).transpose(2, 1, 0)
    yield "origin", image.affine[[2, 1, 0], 3]
