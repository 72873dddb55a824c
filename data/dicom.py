"""DICOM: headers of many files, and the pixels of one file or of a series, in the units and the place they say."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data import readers, sandbox

# Objects that have rows and columns but are no image of a patient.
NO_IMAGE = {"SEG", "PR", "KO", "SR", "REG", "RTSTRUCT", "RTPLAN", "RTDOSE", "DOC", "ECG", "AU"}
TAGS = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SeriesDescription", "Modality", "Rows", "Columns")


class Header(NamedTuple):
    """What a file says of itself, for those who list files."""

    patient: str
    study: str
    series: str
    kind: str  # 'MODALITY DESCRIPTION'
    place: float | None  # mm along the normal of its plane
    group: str  # images of a series that can be stacked agree in it
    image: bool


def is_dicom(path: str) -> bool:
    """Whether a file that may have any name begins as DICOM files do. False where it cannot be opened."""
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def header(path: str) -> Header:
    """Reads the header of a file without its pixels; raises whatever pydicom does at a damaged one."""
    import pydicom

    tags = [*TAGS, "ImagePositionPatient", "ImageOrientationPatient", "NumberOfFrames"]
    found = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags)
    text = lambda name: str(found.get(name) or "").strip()
    axes, position = _axes(found), _numbers(found, "ImagePositionPatient", 3)
    place = float(np.cross(*axes) @ position) if axes is not None and position is not None else None
    turn = [] if axes is None else [f"{round(v, 2) + 0:g}" for v in axes.ravel()]
    return Header(
        *(text(name) for name in ("PatientID", "StudyInstanceUID", "SeriesInstanceUID")),
        kind=f"{text('Modality')} {text('SeriesDescription')}".strip(),
        place=place,
        group=" ".join([text("Rows"), text("Columns"), *turn]),
        image="Rows" in found and "Columns" in found and text("Modality") not in NO_IMAGE,
    )


def read(paths: Sequence[str]) -> readers.Pixels:
    """Reads one file, or the files of one series, whatever their order.

    Stored numbers become those of the modality (Hounsfield units) by slope and intercept, frame by frame. Slices are
    ordered along the normal of their planes by ImagePositionPatient.

    Raises:
      readers.Refused: not pixels, or not one even stack of parallel slices.
    """
    frames = [frame for path in paths for frame in _frames(path)]
    first = frames[0]
    if any(f.array.shape != first.array.shape or f.inverted != first.inverted for f in frames):
        raise readers.Refused("its slices differ in shape or photometry; list its images one by one")
    rescaled = any(f.rescale != (1.0, 0.0) for f in frames)
    slices = [f.array * np.float32(f.rescale[0]) + np.float32(f.rescale[1]) if rescaled else f.array for f in frames]
    slices = _without_padding(slices, [f.padding for f in frames], first.inverted)
    known = {"window": first.window, "inverted": first.inverted}
    if len(frames) == 1:
        pixels = readers.typed(slices[0], first.colour, spacing=first.spacing, **known)
    elif any(f.axes is None or f.position is None for f in frames):
        if len(paths) > 1:
            raise readers.Refused("its slices do not say where they lie; list its images one by one")
        pixels = readers.typed(np.stack(slices), first.colour, **known)  # a film, or an old multi-frame file
    else:
        order, affine = _stack(frames)
        pixels = readers.volume(np.stack([slices[i] for i in order]), affine, first.colour, **known)
    return pixels._replace(top=pixels.top and 2.0**first.bits - 1)


class _Frame(NamedTuple):
    array: np.ndarray  # (H, W) or (H, W, C), as stored, but for tables of values or colours, which are looked up
    padding: np.ndarray | None  # (H, W) where pixels are no image, where the header says so
    bits: int
    colour: bool
    inverted: bool
    rescale: tuple[float, float]
    window: tuple[float, float] | None
    spacing: tuple[float, float] | None  # between rows, between columns
    axes: np.ndarray | None  # (2, 3) directions of a row's pixels and of a column's
    position: np.ndarray | None  # (3,) of the first pixel, mm


def _frames(path: str) -> list[_Frame]:
    import pydicom
    import pydicom.pixels

    file = pydicom.dcmread(path)
    if not {"PixelData", "FloatPixelData", "DoubleFloatPixelData"} & set(file.dir()):
        raise readers.Refused("is DICOM without pixel data; remove it")
    count = max(1, int(file.get("NumberOfFrames") or 1))
    colour = int(file.SamplesPerPixel) > 1
    readers.plausible(float(file.Rows) * file.Columns * count * file.SamplesPerPixel * file.BitsAllocated / 8, path)
    array = _pixels(path, file).reshape(count, file.Rows, file.Columns, *[3] * colour)
    bits = int(file.get("BitsStored", file.BitsAllocated))
    padding = _padding(file, array) if not colour else None
    if file.PhotometricInterpretation == "PALETTE COLOR":
        array, colour, padding = pydicom.pixels.apply_color_lut(array, file), True, None
        bits = 8 * array.itemsize
    table = file.get("ModalityLUTSequence") if file.PhotometricInterpretation != "PALETTE COLOR" else None
    if table:
        entries, start, bits = map(int, table[0].LUTDescriptor)
        table[0].LUTDescriptor = [entries, start, 8 if bits == 8 else 16]  # else pydicom asks NumPy for 12 bits
        array = pydicom.pixels.apply_modality_lut(array, file)
    groups = file.get("PerFrameFunctionalGroupsSequence") or [None] * count
    if len(groups) != count:
        raise readers.Refused("says another number of frames than it has; remove it")
    shared = file.get("SharedFunctionalGroupsSequence") or [None]
    return [
        _Frame(
            array[i],
            None if padding is None else padding[i],
            bits,
            colour,
            inverted=file.PhotometricInterpretation == "MONOCHROME1",
            rescale=(1.0, 0.0) if table else _rescale([group, shared[0], file]),
            window=_window([group, shared[0], file]),
            spacing=_spacing([group, shared[0], file]),
            axes=_axes(_macro([group, shared[0], file], "PlaneOrientationSequence")),
            position=_numbers(_macro([group, shared[0], file], "PlanePositionSequence"), "ImagePositionPatient", 3),
        )
        for i, group in enumerate(groups)
    ]


def _padding(file, array: np.ndarray) -> np.ndarray | None:
    """Where stored numbers are PixelPaddingValue, or between it and PixelPaddingRangeLimit (PS3.3 C.7.5.1.1.2)."""
    ends = [_numbers(file, name, 1) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    if ends[0] is None:
        return None
    one, other = (float(end[0]) for end in (ends[0], ends[0] if ends[1] is None else ends[1]))
    return (array >= min(one, other)) & (array <= max(one, other))


def _without_padding(
    slices: list[np.ndarray], padding: Sequence[np.ndarray | None], inverted: bool
) -> list[np.ndarray]:
    """Padding becomes as dark as the darkest of the image, so that it neither widens the range nor shows."""
    padded = [where is not None and where.any() for where in padding]
    real = [s[~where] if pads else s for s, where, pads in zip(slices, padding, padded, strict=True)]
    real = [values for values in real if values.size]
    if not any(padded) or not real:
        return slices
    dark = max(v.max() for v in real) if inverted else min(v.min() for v in real)
    return [np.where(where, dark, s) if pads else s for s, where, pads in zip(slices, padding, padded, strict=True)]


# Among the decoders that pydicom knows, those that raise at damaged files where others end the process.
DECODERS = {"JPEG 2000": "pylibjpeg", "JPEG-LS": "pyjpegls", "RLE": "pydicom", "JPEG Base": "pillow"}


def _pixels(path: str, file) -> np.ndarray:
    name = file.file_meta.TransferSyntaxUID.name
    if name.startswith(("JPEG Lossless", "JPEG Extended")):
        return sandbox.call(_by_gdcm, path)
    file.pixel_array_options(
        decoding_plugin=next((DECODERS[start] for start in DECODERS if name.startswith(start)), "")
    )
    return file.pixel_array


def _by_gdcm(path: str) -> np.ndarray:
    import pydicom

    file = pydicom.dcmread(path)
    file.pixel_array_options(decoding_plugin="gdcm")
    return file.pixel_array


def _macro(levels: Sequence, name: str):
    """The functional group of an enhanced file, of the frame or shared by all; else the file itself."""
    return next((level[name].value[0] for level in levels[:-1] if level is not None and name in level), levels[-1])


def _numbers(where, name: str, count: int) -> np.ndarray | None:
    """An attribute of so many finite numbers; None where it is missing or something else."""
    value = where.get(name)
    if value is None or np.size(value) != count:
        return None
    numbers = np.array(value, np.float64).reshape(count)
    return numbers if np.isfinite(numbers).all() else None


def _axes(where) -> np.ndarray | None:
    cosines = _numbers(where, "ImageOrientationPatient", 6)
    return None if cosines is None or not np.cross(cosines[:3], cosines[3:]).any() else cosines.reshape(2, 3)


def _spacing(levels: Sequence) -> tuple[float, float] | None:
    measures = _macro(levels, "PixelMeasuresSequence")
    found = [
        _numbers(measures, name, 2) for name in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")
    ]
    return next((tuple(v.tolist()) for v in found if v is not None and (v > 0).all()), None)


def _rescale(levels: Sequence) -> tuple[float, float]:
    where = _macro(levels, "PixelValueTransformationSequence")
    slope, intercept = (_numbers(where, name, 1) for name in ("RescaleSlope", "RescaleIntercept"))
    return (1.0 if slope is None else float(slope[0])), (0.0 if intercept is None else float(intercept[0]))


def _window(levels: Sequence) -> tuple[float, float] | None:
    """Ends of the first window that the header recommends, in rescaled units (PS3.3 C.11.2.1.2)."""
    where = _macro(levels, "FrameVOILUTSequence")
    said = [where.get(name) for name in ("WindowCenter", "WindowWidth")]
    centre, width = (np.atleast_1d(np.array([] if value is None else value, np.float64)) for value in said)
    if not centre.size or not width.size or not width[0] > 0 or where.get("VOILUTFunction", "LINEAR") == "SIGMOID":
        return None
    shift = 0.0 if where.get("VOILUTFunction") == "LINEAR_EXACT" else 0.5
    half = width[0] / 2 - shift
    low, high = float(centre[0] - shift - half), float(centre[0] - shift + half)
    return (low, high) if math.isfinite(low) and low < high < math.inf else None


def _stack(frames: Sequence[_Frame]) -> tuple[list[int], np.ndarray]:
    """Order of parallel slices along their normal, and the stack's affine from (slice, row, column)."""
    across, down = frames[0].axes
    if any(abs(f.axes - frames[0].axes).max() > 1e-3 or f.spacing != frames[0].spacing for f in frames):
        raise readers.Refused("its slices are not parallel, or their spacing differs; list its images one by one")
    if frames[0].spacing is None:
        raise readers.Refused("its slices do not say their PixelSpacing; list its images one by one")
    places = np.array([np.cross(across, down) @ f.position for f in frames])
    order = np.argsort(places, kind="stable").tolist()
    gaps = np.diff(places[order])
    if gaps.min() < 1e-3:
        raise readers.Refused("has several images at one place, as series in time do; split the series")
    if gaps.max() > 1.5 * np.median(gaps) or gaps.min() < 0.5 * np.median(gaps):
        raise readers.Refused("has gaps between its slices; restore the missing ones or remove the series")
    affine = np.eye(4)
    affine[:3, 0] = (frames[order[-1]].position - frames[order[0]].position) / (len(order) - 1)
    affine[:3, 1], affine[:3, 2] = down * frames[0].spacing[0], across * frames[0].spacing[1]
    affine[:3, 3] = frames[order[0]].position
    return order, affine
