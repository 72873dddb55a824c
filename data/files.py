"""One image file -> float32 array in [-1, 1]: a reader for each format, then intensity, then geometry.

Axes are (H, W) or (D, H, W), then channels. Volumes lie as axial DICOM series do: D from inferior to superior, H from
anterior to posterior, W from the patient's right to left. Nothing of an image's content ever enters an error message.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse


class Pixels(NamedTuple):
    """What a reader returns."""

    array: np.ndarray  # (*spatial, C), the file's own numbers
    top: float | None  # by their type the numbers run from 0 to top; None where the type says no such range


class Image(NamedTuple):
    array: np.ndarray  # float32 (*size, C) in [-1, 1]
    eight_bit: bool  # the file holds 8-bit numbers
    resized: bool  # the file had another shape


FITS = ("pad", "crop", "stretch")


class Refused(Exception):
    """A file we can read and do not take; the message says why and the mend, without the path."""


def read_image(path: str, *, size: Sequence[int], channels: int = 1, intensity="type", fit: str = "pad") -> Image:
    """Reads an image file into the project's form.

    Args:
      path: file; its suffix chooses the reader.
      size: (H, W) or (D, H, W) wanted.
      channels: wanted; a colour file is taken for one channel only if its content is grey.
      intensity: how numbers become [-1, 1]; see `parse_intensity`.
      fit: how another shape becomes `size`: 'pad' (with -1) or 'crop' about the centre to the aspect of `size`, then
        resample; or 'stretch', which distorts anatomy. Aspect is counted in voxels, not millimetres.
    Raises:
      ValueError: one line naming the file and the mend.
    """
    kind = suffix(path)
    try:
        if kind not in READERS:
            raise Refused(f"no reader for this kind of file; readable are {', '.join(READERS)}")
        if not os.path.isfile(path):
            raise Refused("there is no such file; correct the manifest or restore the file")
        if os.path.getsize(path) == 0:
            raise Refused("the file is empty; restore or remove it")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # decoders quote the file's content in theirs
            pixels = READERS[kind](path)
        pixels = _one_image(pixels, len(size), channels)
        array = _scale(pixels, intensity)
        resized = array.shape[:-1] != tuple(size)
        return Image(_fit(array, tuple(size), fit) if resized else array, pixels.array.dtype == np.uint8, resized)
    except Refused as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:  # decoders raise anything at damaged files, and what they say may quote content
        why = f"cannot be read as {kind} ({type(error).__name__}): damaged, locked or of another kind"
        raise ValueError(f"{path}: {why}; restore or remove it, or set data.on_error='skip'") from None


def suffix(path: str) -> str:
    """'.png' of 'a/B.PNG'; '.nii.gz' keeps both."""
    name = os.path.basename(path).lower()
    return ".nii.gz" if name.endswith(".nii.gz") else os.path.splitext(name)[1]


def parse_intensity(policy: str | Sequence) -> tuple:
    """Normal form of an intensity policy: its name, and two numbers if it has any.

    'type': from 0 to the top of the file's integer type (255, 65535, what DICOM's stored bits allow).
    'minmax': from each image's own minimum to its maximum.
    'percentile:LO:HI' or ('percentile', lo, hi): between each image's own percentiles; clipped.
    'window:LO:HI' or ('window', lo, hi): between fixed numbers in the file's units (Hounsfield units in CT); clipped.

    Raises:
      ValueError: anything else.
    """
    name, *bounds = policy.split(":") if isinstance(policy, str) else policy
    try:
        low, high = map(float, bounds or (0, 1))
        known = name in ("percentile", "window") if bounds else name in ("type", "minmax")
        if known and np.isfinite(low) and low < high < np.inf and (name != "percentile" or 0 <= low < high <= 100):
            return (name, low, high) if bounds else (name,)
    except (TypeError, ValueError):
        pass  # falls through to the one message for all
    kinds = "'type', 'minmax', 'percentile:LO:HI', 'window:LO:HI' with LO < HI"
    raise ValueError(f"data.intensity {policy!r} is none of {kinds}")


# ---- readers: path -> Pixels


def _pillow(path: str) -> Pixels:
    import PIL.Image
    import PIL.ImageOps

    frames = []
    with PIL.Image.open(path) as image:
        if image.width * image.height > PIL.Image.MAX_IMAGE_PIXELS:
            raise Refused("is larger than any radiograph; remove it, or reduce it first")
        if image.mode in ("LA", "RGB", "RGBA") and image.tile and "16" in str(image.tile[0][3]):
            return _itk(path)  # Pillow would keep only the upper 8 of these 16 bits
        if image.format == "TIFF" and image.info.get("compression") == "raw" and image.getexif().get(0x0112, 1) > 4:
            raise Refused("is stored lying on its side, which Pillow garbles; save it upright")
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            # As every viewer shows it; Pillow turns a TIFF by itself.
            frame = image.copy() if image.format == "TIFF" else PIL.ImageOps.exif_transpose(image)
            if frame.mode in ("1", "P", "PA"):
                frame = frame.convert("L" if frame.mode == "1" else "RGBA" if frame.has_transparency_data else "RGB")
            if frame.mode not in ("L", "LA", "RGB", "RGBA", "I", "F") and not frame.mode.startswith("I;16"):
                raise Refused(f"is stored as {frame.mode}; convert it to grey or RGB")
            # 'I' of a PNG is how some versions of Pillow open 16 bits.
            frames.append(np.asarray(frame, np.uint16 if frame.mode == "I" and image.format == "PNG" else None))
    array = frames[0] if len(frames) == 1 else np.stack(frames)
    return _typed(array, channels=frame.mode in ("LA", "RGB", "RGBA"))


def _nifti(path: str) -> Pixels:
    import nibabel

    image = nibabel.load(path)
    if len(image.shape) not in (3, 4):
        raise Refused(f"is {len(image.shape)}D; save it as 3D, or 4D with the channels last")
    array = np.asanyarray(nibabel.as_closest_canonical(image).dataobj)
    return _typed(array[::-1, ::-1].swapaxes(0, 2), channels=array.ndim == 4)  # (R, A, S) growing -> (S, P, L)


def _itk(path: str) -> Pixels:
    import SimpleITK

    image = SimpleITK.ReadImage(path)
    image = SimpleITK.DICOMOrient(image, "LPS") if image.GetDimension() == 3 else image
    return _typed(SimpleITK.GetArrayFromImage(image), channels=image.GetNumberOfComponentsPerPixel() > 1)


def _numpy(path: str) -> Pixels:
    array = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped, so that a false header cannot ask for memory
    array = array.astype(np.uint8) * np.uint8(255) if array.dtype == bool else np.array(array)
    return _typed(array, channels=array.ndim >= 3 and array.shape[-1] <= 4)


def _dicom(path: str) -> Pixels:
    import pydicom
    import pydicom.pixels

    header = pydicom.dcmread(path)
    if "PixelData" not in header:
        raise Refused("is DICOM without pixel data; remove it")
    array, bits, signed = header.pixel_array, int(header.BitsStored), bool(header.PixelRepresentation)
    if header.PhotometricInterpretation == "MONOCHROME1":  # low numbers are white: mirror the stored range
        array = ((-1 if signed else 2**bits - 1) - array.astype(np.int32)).astype(array.dtype)
    if float(header.get("RescaleSlope", 1)) != 1 or float(header.get("RescaleIntercept", 0)) != 0:
        array = pydicom.pixels.apply_rescale(array, header).astype(np.float32)
    pixels = _typed(array, channels=int(header.SamplesPerPixel) > 1)
    return pixels._replace(top=pixels.top and 2.0**bits - 1)


def _typed(array: np.ndarray, channels: bool) -> Pixels:
    """Adds an axis of channels where there is none, drops an opaque alpha channel, and finds the type's range."""
    array = array if channels else array[..., None]
    if array.shape[-1] in (2, 4) and array.dtype.kind == "u":
        if np.ptp(array[..., -1]):
            raise Refused("is transparent in part; save it without an alpha channel")
        array = array[..., :-1]
    return Pixels(array, float(np.iinfo(array.dtype).max) if array.dtype.kind == "u" else None)


READERS: dict[str, Callable[[str], Pixels]] = {
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".tif", ".tiff"), _pillow),
    **dict.fromkeys((".nii", ".nii.gz"), _nifti),
    **dict.fromkeys((".nrrd", ".mha"), _itk),
    ".npy": _numpy,
    ".dcm": _dicom,
}


# ---- shape, intensity, geometry


def _one_image(pixels: Pixels, rank: int, channels: int) -> Pixels:
    """Drops axes of length 1 until `rank` are left, and the colour of what is grey; refuses all else."""
    array = pixels.array
    if array.dtype.kind not in "uif":
        raise Refused(f"holds {array.dtype} instead of real numbers; save it as numbers")
    for axis in reversed(range(array.ndim - 1)):
        if array.ndim > rank + 1 and array.shape[axis] == 1:
            array = array.squeeze(axis)
    if array.ndim != rank + 1 or array.size == 0:
        shape = "x".join(map(str, pixels.array.shape))
        raise Refused(f"has shape {shape} (channels last), not a {rank}D image's; correct data.size, or leave it out")
    if array.shape[-1] == 3 and channels == 1:
        spread = (array.max(-1) - array.min(-1)).max()
        if spread > 0.02 * (pixels.top or np.abs(array).max()):  # JPEG leaves grey a little coloured
            raise Refused("is a colour image; convert it to grey, or set data.channels=3")
        array = array[..., 1:2]
    if array.shape[-1] != channels:
        raise Refused(f"has {array.shape[-1]} channels, not {channels}; correct data.channels, or leave it out")
    return pixels._replace(array=array)


def _scale(pixels: Pixels, intensity) -> np.ndarray:
    name, *bounds = parse_intensity(intensity)
    with np.errstate(over="ignore"):  # what overflows is caught as infinite
        array = pixels.array.astype(np.float32)
    if not np.isfinite(array).all():
        raise Refused("has NaN or infinite pixels; mend or remove it")
    if name == "type" and pixels.top is None:
        kinds = "minmax, percentile:LO:HI or window:LO:HI"
        raise Refused(f"holds {pixels.array.dtype}, which has no range to divide by; set data.intensity to {kinds}")
    low, high = {
        "type": lambda: (0.0, pixels.top),
        "window": lambda: bounds,
        "minmax": lambda: (array.min(), array.max()),
        "percentile": lambda: np.percentile(array, bounds),
    }[name]()
    if not high > low:
        raise Refused(f"is constant, so {name} cannot scale it; remove it or set data.intensity to window:LO:HI")
    return np.clip((array - np.float32(low)) * np.float32(2 / (np.float64(high) - low)) - 1, -1, 1)


def _fit(array: np.ndarray, size: tuple[int, ...], fit: str) -> np.ndarray:
    factors = [old / new for old, new in zip(array.shape, size, strict=False)]
    factor = {"pad": max, "crop": min, "stretch": lambda _: None}[fit](factors)
    spans = [max(1, round(new * factor)) if factor else old for old, new in zip(array.shape, size, strict=False)]
    return np.clip(resample(array, size, spans), -1, 1)  # the filter's rounding may step out


def resample(array: np.ndarray, size: Sequence[int], spans: Sequence[int] | None = None) -> np.ndarray:
    """Resamples the leading axes to `size` by a triangle filter as wide as an output voxel, so without aliasing.

    Linear where it enlarges. Same numbers as `jax.image.resize(..., 'linear', antialias=True)` of the array that was
    first cropped, or padded with -1, about its centre to `spans` (default: its shape).
    """
    for axis, new in enumerate(size):
        old = array.shape[axis]
        span = spans[axis] if spans else old
        skip, before = max(0, (old - span) // 2), max(0, (span - old) // 2)  # left of the picture: cropped, padded
        if not old == span == new:
            kept = np.moveaxis(array, axis, 0)[skip : skip + span]
            weights = _triangle(span, new)[:, before : before + len(kept)]
            flat = weights @ (kept.reshape(len(kept), -1) + 1) - 1  # padding is 0 here, so it need not be stored
            array = np.moveaxis(flat.reshape(new, *kept.shape[1:]), 0, axis)
    return np.ascontiguousarray(array, dtype=np.float32)


def _triangle(old: int, new: int) -> scipy.sparse.csr_array:
    """Weights (new, old) of the filter; rows sum to 1."""
    width = max(old / new, 1.0)
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    where = np.floor(centres).astype(int)[:, None] + np.arange(-int(np.ceil(width)), int(np.ceil(width)) + 1)
    weights = np.clip(1 - np.abs(where - centres[:, None]) / width, 0, None) * ((where >= 0) & (where < old))
    weights = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    rows = np.repeat(np.arange(new), where.shape[1])
    return scipy.sparse.csr_array((weights.ravel(), (rows, np.clip(where, 0, old - 1).ravel())), shape=(new, old))


# ---- how images are kept


def encode(image: np.ndarray, dtype: str) -> np.ndarray:
    """[-1, 1] -> the whole range of uint8 or uint16, rounded; what came from 8 bits comes back exactly."""
    return np.round((image.astype(np.float64) + 1) * (np.iinfo(dtype).max / 2)).astype(dtype)


def decode(stored: np.ndarray) -> np.ndarray:
    """The inverse: float32 in [-1, 1]."""
    return stored.astype(np.float32) / np.float32(np.iinfo(stored.dtype).max / 2) - np.float32(1)
