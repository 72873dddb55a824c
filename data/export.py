"""Images in [-1, 1] -> files that anyone's viewer opens, and that `read_folder` reads back as the same images.

The intensity policy of the data set is inverted where it is global, so that a synthetic CT is in Hounsfield units again:

| `sample.format` | 'window:LO:HI' | 'type' | 'minmax', 'percentile:LO:HI' (each image had its own range) |
|---|---|---|---|
| 'png8', 'png16' | LO to HI over the whole integer range | the whole integer range | [-1, 1] over the whole integer range |
| 'nifti', 'npy' | float32, in the data's units | integers from 0 to `top` | float32 in [-1, 1] |

'auto' is 'png8' in 2D ('npy' of two or four channels) and 'nifti' in 3D. What is stored as integers is off by half a step at most.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import files

FORMATS = ("auto", "png8", "png16", "nifti", "npy")
SUFFIXES = {"png8": ".png", "png16": ".png", "nifti": ".nii.gz", "npy": ".npy"}


class Form(NamedTuple):
    """How images become numbers in a file: -1 is stored as `low`, 1 as `high`."""

    kind: str
    suffix: str
    dtype: str
    low: float
    high: float
    affine: np.ndarray  # (4, 4): voxel (i, j, k) of the NIfTI array, towards right, anterior, superior -> mm
    reading: str  # the intensity policy by which `read_folder` gets the images back


def form(
    kind: str,
    size: Sequence[int],
    *,
    channels: int = 1,
    intensity: str | Sequence = "type",
    top: int | None = None,
    spacing: Sequence[float] | None = None,
    affine: np.ndarray | None = None,
) -> Form:
    """The form of files of one kind for images of a data set.

    Args:
      kind: one of FORMATS.
      size: (H, W) or (D, H, W).
      intensity: the data set's policy, as `files.parse_intensity` takes it.
      top: under 'type', what the data set's numbers run to (255, 4095 of 12-bit DICOM); None: the integers' whole range.
      spacing: mm between pixels along `size`; None: 1 mm.
      affine: of the data set where its images share one, as Form's; None: axes along the body's, the image's centre at 0.
    Raises:
      ValueError: no such format, or it cannot hold such images.
    """
    if kind not in FORMATS:
        raise ValueError(f"config.sample.format must be one of {', '.join(FORMATS)}, not {kind!r}")
    rank = len(size)
    if kind == "auto":
        kind = "nifti" if rank == 3 else "png8" if channels in (1, 3) else "npy"
    possible = {"png8": rank == 2 and channels in (1, 3), "png16": rank == 2 and channels == 1}
    if not possible.get(kind, channels <= 4):
        mend = "use nifti or npy" if channels <= 4 else "no format of ours holds more than 4, so lower data.channels"
        raise ValueError(f"config.sample.format={kind!r} cannot hold {rank}D images of {channels} channels; {mend}")
    policy, *bounds = files.parse_intensity(intensity)
    deep = 65535 if top is None or top > 255 else 255
    if kind.startswith("png"):
        dtype = "uint8" if kind == "png8" else "uint16"
        low, high = 0.0, float(np.iinfo(dtype).max)
    elif policy == "type":
        dtype, low, high = ("uint16" if deep > 255 else "uint8"), 0.0, float(top or deep)
    else:
        dtype, (low, high) = "float32", bounds if policy == "window" else (-1.0, 1.0)
    whole = dtype != "float32" and high == np.iinfo(dtype).max
    if affine is None:
        step = (*(spacing or (1.0,) * rank)[::-1], 1.0)[:3]  # ours are D, H, W or H, W; NIfTI's W, H, D
        extent = (*size[::-1], 1)[:3]
        affine = np.diag([*step, 1.0])
        affine[:3, 3] = [-mm * (n - 1) / 2 for mm, n in zip(step, extent, strict=True)]
    reading = "type" if whole else f"window:{low!r}:{high!r}"
    return Form(kind, SUFFIXES[kind], dtype, float(low), float(high), np.asarray(affine, float), reading)


def placed(affine: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """`Form.affine` of volumes of `size` that lie as a data set's `affine` says, which is of `ImageSet`."""
    (_, h, w), turned = size, np.zeros((4, 4))
    turned[0, 2], turned[1, 1], turned[2, 0], turned[3, 3] = 1, -1, -1, 1  # index of NIfTI's array -> of ours
    turned[1:3, 3] = h - 1, w - 1
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine @ turned


def write_image(path: Path, image: np.ndarray, form: Form) -> None:
    """Writes one image (*size, C), float in [-1, 1] (what is beyond is clipped), whole or not at all.

    NIfTI axes are turned from ours (inferior to superior, anterior to posterior, right to left) to right, anterior,
    superior; channels come last, in a fourth axis if there are several. NPY has ours, channels last.
    """
    share = (np.clip(image, -1, 1).astype(np.float64) + 1) / 2
    array = form.low + share * (form.high - form.low)
    array = (array if form.dtype == "float32" else np.round(array)).astype(form.dtype)
    aside = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        {"png8": _png, "png16": _png, "nifti": _nifti, "npy": _npy}[form.kind](aside, array, form)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _png(path: Path, array: np.ndarray, form: Form) -> None:
    import PIL.Image

    PIL.Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(path, format="png")


def _nifti(path: Path, array: np.ndarray, form: Form) -> None:
    import nibabel

    array = array[None] if array.ndim == 3 else array
    array = array.swapaxes(0, 2)[::-1, ::-1]
    image = nibabel.Nifti1Image(np.ascontiguousarray(array[..., 0] if array.shape[-1] == 1 else array), form.affine)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = f"synthetic (Facsimile); read with data.intensity={form.reading}"[:79]
    image.to_filename(path)


def _npy(path: Path, array: np.ndarray, form: Form) -> None:
    with open(path, "wb") as file:
        np.save(file, array)
