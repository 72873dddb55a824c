"""What a manifest points to -> float32 arrays in [-1, 1]: a format's reader, then intensity, then geometry.

Axes are (H, W) or (D, H, W), then channels. Volumes lie as axial DICOM series do: D from inferior to superior, H from
anterior to posterior, W from the patient's right to left. Nothing of an image's content ever enters an error message.
"""

import contextlib
import errno
import os
import re
import stat
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from data import containers, dicom, geometry, readers
from data.listing import Row
from data.readers import Pixels, Refused, suffix

# what happens to a machine or its network, whatever the file; not what a damaged or locked file gives
MACHINE = {
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ENOMEM,
    errno.EMFILE,
    errno.ENFILE,
    errno.EAGAIN,
    errno.EINTR,
}
MACHINE |= {errno.ENOTCONN, errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH}


class NotNow(ValueError):
    """A file that may well be read another time: never left out as one that cannot be read, since that is remembered."""


class Image(NamedTuple):
    array: np.ndarray  # float32 (*size, C) in [-1, 1]
    eight_bit: bool  # the file holds 8-bit numbers
    resized: bool  # the file had another shape
    spacing: tuple[float, ...] | None = None  # mm between the voxels of `array`, where the file says its own
    part: str = ""  # of a file with several: what to add to the id, '#z012'
    top: float | None = None  # by their type the file's numbers run from 0 to that
    affine: np.ndarray | None = None  # of a whole volume that says it: (4, 4), as of `Pixels`, for indices of `array`
    cut: bool = False  # the file shows more than this: other channels, or what lies beyond the frame


def read_image(path: str, *, size: Sequence[int], **settings) -> Image:
    """The image of a file that holds one; see `read_images`."""
    (image,) = read_images(Row(str(path)), size=size, **settings)
    return image


def read_images(
    row: Row,
    *,
    root: str = "",
    size: Sequence[int],
    channels: int = 1,
    channel: int | None = None,
    intensity="type",
    fit: str = "pad",
    spacing: Sequence[float] | None = None,
    slices: str | None = None,
    lenient: bool = False,
) -> Iterator[Image]:
    """Reads a file, or the files of a series, into the project's form.

    Args:
      row: what to read; the suffix of a file chooses its reader.
      root: folder that the row's paths are relative to.
      size: (H, W) or (D, H, W) wanted.
      channels: wanted; a colour file is taken for one channel only if its content is grey.
      channel: of a file with several (4D), only this one.
      intensity: how numbers become [-1, 1], over the whole of each file; see `parse_intensity`.
      fit: how another shape becomes `size`; see `geometry.spans_of`. Sub-volumes are always 'exact'.
      spacing: mm between voxels, for each axis of `size`: `fit` is meant on a grid of this spacing, with a single
        resampling. None: the file's own voxels.
      slices: of volumes, these sections as 2D images; see `parse_slices`. Constant ones, outside the body, are not given,
        but one there must be. Coronal and sagittal ones have superior above, where the file says how it lies.
      lenient: of what generators write: a 2D image needs no slicing, and one that does not say its spacing is taken for one
        on the grid of `spacing` and has none in the result.
    Yields:
      One image, or one for each slice or centre.
    Raises:
      ValueError: one line naming the file and the mend; NotNow where the machine failed, not the file.
    """
    with _one_line(row, root):
        parts = _read(row, root)
        pixels = _joined(parts)
        top, eight_bit = pixels.top, pixels.array.dtype == np.uint8
        if scaled := len(parts) > 1:  # sequences, whose intensities have nothing to do with each other
            pixels = pixels._replace(array=np.concatenate([_scale(part, intensity) for part in parts], -1), top=None)
        if lenient and sum(n > 1 for n in pixels.array.shape[:-1]) <= 2:
            slices = None
        rank = 3 if slices or row.centres else len(size)
        taken = _take_channel(pixels, channel)
        one_of_several = taken.array.shape[-1] < pixels.array.shape[-1]
        pixels = _one_image(taken, rank, channels)
        spacing = None if lenient and pixels.spacing is None else spacing
        array = pixels.array if scaled else _scale(pixels, intensity)
        if np.ptp(array) == 0:
            raise Refused("is constant, so it shows nothing; remove it, or widen data.intensity if that is a window")
        if slices:
            axis, chosen = parse_slices(slices, array.shape)
            sections = [index for index in chosen if np.ptp(array.take(index, axis))]
            if not sections:
                few = f"{len(chosen)} of its {array.shape[axis]} sections" + ", all constant" * bool(chosen)
                raise Refused(f"data.slices selects {few}; correct it, or leave the file out")
            in_plane = pixels.spacing and pixels.spacing[:axis] + pixels.spacing[axis + 1 :]
            for index in sections:
                picture = array.take(index, axis)
                if axis and pixels.affine is not None:  # D runs upwards, the rows of a picture downwards
                    picture = picture[::-1]
                image = _fit(picture, tuple(size), fit, in_plane, spacing, eight_bit)
                cut = image.cut or one_of_several
                yield image._replace(top=top, part=f"#{'zyx'[axis]}{index:03d}", cut=cut)
        elif row.centres:
            constant = []
            for label, *centre in row.centres:
                image = _around(array, pixels, centre, tuple(size), spacing)
                if np.ptp(image.array):
                    yield image._replace(eight_bit=eight_bit, top=top, part=f"#{label}")
                else:
                    constant.append(label)
            if constant:  # only now, so that the others are there where what cannot be read is skipped
                which = constant[0] + f" and {len(constant) - 1} more" * (len(constant) > 1)
                raise Refused(f"the sub-volume {which} is constant; correct its centre or widen data.intensity")
        else:
            image = _fit(array, tuple(size), fit, pixels.spacing, spacing, eight_bit, pixels.affine)
            yield image._replace(top=top, cut=image.cut or one_of_several)


def raw(row: Row, root: str = "") -> Pixels:
    """The file's own numbers, upright, with what it says of spacing. Raises ValueError: one line, file and mend."""
    with _one_line(row, root):
        return _joined(_read(row, root))


@contextlib.contextmanager
def _one_line(row: Row, root: str) -> Iterator[None]:
    name = os.path.join(root, row.path)
    try:
        yield
    except Refused as error:
        raise ValueError(f"{name}: {error}") from None
    except Exception as error:  # decoders raise anything at damaged files, and what they say may quote content
        if isinstance(error, MemoryError):
            raise NotNow(f"{name}: memory ran out as it was read; lower data.workers, or remove it") from None
        if isinstance(error, OSError) and error.errno in MACHINE:
            why = os.strerror(error.errno)
            raise NotNow(f"{name}: cannot be read now ({why}); run the command again, or remove it") from None
        kind = suffix((row.parts or (row.path,))[0]) or "an image"
        why = f"cannot be read as {kind} ({type(error).__name__}): damaged, locked or of another kind"
        raise ValueError(f"{name}: {why}; restore or remove it, or set data.on_error='skip'") from None


def parse_intensity(policy: str | Sequence) -> tuple:
    """Normal form of an intensity policy: its name, and two numbers if it has any.

    'type': from 0 to the top of the file's integer type (255, 65535, what DICOM's stored bits allow).
    'minmax': from each image's own minimum to its maximum.
    'percentile:LO:HI' or ('percentile', lo, hi): between each image's own percentiles; clipped.
    'window:LO:HI' or ('window', lo, hi): between fixed numbers in the file's units (Hounsfield units in CT); clipped.
    'header': the window that the file's header recommends (DICOM's WindowCenter, NIfTI's cal_min); clipped.

    Raises:
      ValueError: anything else.
    """
    name, *bounds = policy.split(":") if isinstance(policy, str) else policy
    try:
        low, high = map(float, bounds or (0, 1))
        known = name in ("percentile", "window") if bounds else name in ("type", "minmax", "header")
        if known and np.isfinite(low) and low < high < np.inf and (name != "percentile" or 0 <= low < high <= 100):
            return (name, low, high) if bounds else (name,)
    except (TypeError, ValueError):
        pass  # falls through to the one message for all
    kinds = "'type', 'minmax', 'header', 'percentile:LO:HI', 'window:LO:HI' with LO < HI"
    raise ValueError(f"data.intensity {policy!r} is none of {kinds}")


def parse_slices(text: str, shape: Sequence[int] = (100, 100, 100)) -> tuple[int, range]:
    """(axis, indices) of 'AXIS[:START:STOP[:EVERY]]', as 'z', 'z:40:80', 'x:25%:75%:2', in a volume of this shape.

    z are axial sections, y coronal and x sagittal ones; for a bare array its first, second and third axis. START and STOP
    are indices, or percentages of the volume's length.

    Raises:
      ValueError: anything else.
    """
    match = re.fullmatch(r"([zyx])(?::(\d+%?):(\d+%?)(?::([1-9]\d*))?)?", text)
    if not match:
        raise ValueError(
            f"data.slices {text!r} is not AXIS or AXIS:START:STOP:EVERY, as 'z', 'z:40:80' or 'x:25%:75%:2'"
        )
    axis = "zyx".index(match[1])
    count = shape[axis]
    at = lambda end: min(count, round(count * int(end[:-1]) / 100) if end.endswith("%") else int(end))
    return axis, range(at(match[2] or "0"), at(match[3] or "100%"), int(match[4] or 1))


# ---- from files to one array


def _check(path: str) -> None:
    try:
        found = os.stat(path)
    except OSError as error:
        if error.errno in MACHINE:
            raise
        found = None
    if not found or not stat.S_ISREG(found.st_mode):
        raise Refused("there is no such file; correct the manifest or restore the file")
    if found.st_size == 0:
        raise Refused("the file is empty; restore or remove it")


def _read(row: Row, root: str) -> list[Pixels]:
    """The row's image: one part, or one for each file that is a channel of its own."""
    paths = [os.path.join(root, part) for part in row.parts or (row.path,)]
    for path in paths:
        _check(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # decoders quote the file's content in theirs
        return _read_as(paths, suffix(paths[0]), row.item)


def _read_as(paths: Sequence[str], kind: str, item: str) -> list[Pixels]:
    if os.path.basename(paths[0]) == containers.INFO:
        return [containers.record(paths[0], item)]
    if kind not in readers.READERS and dicom.is_dicom(paths[0]):
        kind = ".dcm"  # scanners and archives leave the suffix out
    if kind not in readers.READERS:
        raise Refused(f"no reader for this kind of file; readable are {', '.join(readers.READERS)}")
    if kind == ".dcm" and len(paths) > 1:
        return [dicom.read(paths)]
    return [readers.READERS[kind](path, item) for path in paths]


def _joined(parts: Sequence[Pixels]) -> Pixels:
    """Parts as the channels of one image."""
    if len(parts) == 1:
        return parts[0]
    if any(part.array.shape != parts[0].array.shape for part in parts):
        raise Refused("its channels differ in shape; register them to one grid first")
    top = parts[0].top if len({part.top for part in parts}) == 1 else None
    return parts[0]._replace(array=np.concatenate([part.array for part in parts], -1), top=top)


def _take_channel(pixels: Pixels, channel: int | None) -> Pixels:
    if channel is None or pixels.array.shape[-1] == 1:
        return pixels
    if not 0 <= channel < pixels.array.shape[-1]:
        raise Refused(f"has {pixels.array.shape[-1]} channels and none numbered {channel}; correct data.channel")
    return pixels._replace(array=pixels.array[..., channel : channel + 1])


def _one_image(pixels: Pixels, rank: int, channels: int) -> Pixels:
    """Drops axes of length 1 until `rank` are left, and the colour of what is grey; refuses all else."""
    array, spacing = pixels.array, pixels.spacing
    for axis in reversed(range(array.ndim - 1)):
        if array.ndim > rank + 1 and array.shape[axis] == 1:
            array, spacing = array.squeeze(axis), spacing and spacing[:axis] + spacing[axis + 1 :]
    if array.ndim != rank + 1 or array.size == 0:
        shape = "x".join(map(str, pixels.array.shape))
        mend = (
            "correct data.size, set data.slices, or leave it out" if rank == 2 else "correct data.size, or leave it out"
        )
        raise Refused(f"has shape {shape} (channels last), not a {rank}D image's; {mend}")
    if array.shape[-1] == 3 and channels == 1:
        spread = (array.max(-1) - array.min(-1)).max()
        if spread > 0.02 * (pixels.top or np.abs(array).max()):  # JPEG leaves grey a little coloured
            raise Refused("is a colour image; convert it to grey, or set data.channels=3")
        array = array[..., 1:2]
    if array.shape[-1] != channels:
        mend = "set data.channel to one of them, correct data.channels, or leave it out"
        raise Refused(f"has {array.shape[-1]} channels, not {channels}; {mend}")
    return pixels._replace(array=array, spacing=spacing)


def _scale(pixels: Pixels, intensity) -> np.ndarray:
    name, *bounds = parse_intensity(intensity)
    if pixels.array.dtype.kind not in "uif":
        raise Refused(f"holds {pixels.array.dtype} instead of real numbers; save it as numbers")
    with np.errstate(over="ignore"):  # what overflows is caught as infinite
        array = pixels.array.astype(np.float32)
    if not np.isfinite(array).all():
        raise Refused("has NaN or infinite pixels; mend or remove it")
    if name == "type" and pixels.top is None:
        kinds = "minmax, percentile:LO:HI or window:LO:HI"
        raise Refused(f"holds {pixels.array.dtype}, which has no range to divide by; set data.intensity to {kinds}")
    if name == "header" and pixels.window is None:
        raise Refused("its header recommends no window; set data.intensity to window:LO:HI")
    if name == "percentile" and pixels.inverted:
        bounds = [100 - bound for bound in reversed(bounds)]  # percentiles of brightness
    low, high = {
        "type": lambda: (0.0, pixels.top),
        "window": lambda: bounds,
        "header": lambda: pixels.window,
        "minmax": lambda: (array.min(), array.max()),
        "percentile": lambda: np.percentile(array, bounds),
    }[name]()
    if not high > low:
        raise Refused(f"is constant, so {name} cannot scale it; remove it or set data.intensity to window:LO:HI")
    scaled = np.clip((array - np.float32(low)) * np.float32(2 / (np.float64(high) - low)) - 1, -1, 1)
    return -scaled if pixels.inverted else scaled


# ---- geometry


def _fit(array, size, fit, own, wanted, eight_bit, affine=None) -> Image:
    """The whole of (*shape, C) as `size`; `own` and `wanted` are the spacings of the file and of the grid."""
    shape = array.shape[:-1]
    scale = _scale_of(own, wanted) if wanted else None
    spans = geometry.spans_of(shape, size, fit, scale)
    spacing = own and tuple(mm * span / new for mm, span, new in zip(own, spans, size, strict=True))
    affine = geometry.framed(affine, shape, size, spans) if affine is not None and len(size) == 3 else None
    if shape == size == tuple(spans):
        return Image(array, eight_bit, False, spacing, affine=affine)
    fitted = np.clip(geometry.resample(array, size, spans), -1, 1)  # the filter's rounding may step out
    cut = any(span < n - 0.5 for span, n in zip(spans, shape, strict=True))
    return Image(fitted, eight_bit, True, spacing, affine=affine, cut=cut)


def _around(array, pixels: Pixels, centre, size, wanted) -> Image:
    """The sub-volume of `size` about a centre: z, y, x and their unit."""
    *place, unit = centre
    upright, stored = (np.eye(4) if matrix is None else matrix for matrix in (pixels.affine, pixels.stored))
    if unit == "mm" and pixels.affine is None:
        raise Refused("does not say where it lies, so data.centres cannot be in mm; give them in voxels")
    patient = np.array([*place[::-1], 1.0]) if unit == "mm" else stored @ [*place, 1.0]
    index = (np.linalg.inv(upright) @ patient)[:3]
    if not ((index > -1) & (index < array.shape[:3])).all():
        raise Refused("a centre of data.centres lies outside the volume; correct it or its unit")
    scale = _scale_of(pixels.spacing, wanted) if wanted else (1,) * 3
    spans = [new * k for new, k in zip(size, scale, strict=True)]
    cut = geometry.resample(array, size, spans, geometry.starts_at(index, size, spans))
    spacing = pixels.spacing and tuple(mm * k for mm, k in zip(pixels.spacing, scale, strict=True))
    return Image(np.clip(cut, -1, 1), False, False, spacing)


def _scale_of(own: Sequence[float] | None, wanted: Sequence[float]) -> list[float]:
    if own is None or not all(mm > 0 for mm in own):
        raise Refused("does not say its spacing, which data.spacing needs; leave data.spacing out, or convert the file")
    return [new / mm for new, mm in zip(wanted, own, strict=True)]


# ---- how images are kept


def encode(image: np.ndarray, dtype: str) -> np.ndarray:
    """[-1, 1] -> the whole range of uint8 or uint16, rounded; what came from 8 bits comes back exactly."""
    return np.round((image.astype(np.float64) + 1) * (np.iinfo(dtype).max / 2)).astype(dtype)


def decode(stored: np.ndarray) -> np.ndarray:
    """The inverse: float32 in [-1, 1]."""
    return stored.astype(np.float32) / np.float32(np.iinfo(stored.dtype).max / 2) - np.float32(1)
