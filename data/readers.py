"""A reader for each file format: paths -> the file's own numbers, upright where the file says how it lies."""

import functools
import importlib.metadata
import io
import os
import re
import zipfile
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from data import geometry, sandbox


class Pixels(NamedTuple):
    """What a reader returns."""

    array: np.ndarray  # (*spatial, C), the file's own numbers
    top: float | None  # by their type the numbers run from 0 to top; None where the type says no such range
    spacing: tuple[float, ...] | None = None  # mm between voxels along each spatial axis, where the file says it
    affine: np.ndarray | None = None  # of a volume: (4, 4), index -> mm to the patient's left, posterior, superior
    stored: np.ndarray | None = None  # the same for indices of the array as it lay in the file, slowest axis first
    window: tuple[float, float] | None = None  # that the header recommends
    inverted: bool = False  # low numbers are bright


class Refused(Exception):
    """A file we can read and do not take; the message says why and the mend, without the path."""


BOMB = 16 << 20  # bytes that any file may unpack to
RATIO = 200  # beyond that, so many times its size; deflate reaches 1030 on a constant


def plausible(count: float, path: str, size: float | None = None) -> None:
    """Refuses a header that promises more bytes than a file of its size holds, before memory is asked for."""
    if not 0 <= count <= max(BOMB, RATIO * (os.path.getsize(path) if size is None else size)):
        raise Refused(
            "its header promises more than a file of this size holds: damaged or a bomb; remove it, or save it uncompressed"
        )


def typed(array: np.ndarray, channels: bool, alpha: bool = False, **known) -> Pixels:
    """Adds an axis of channels where there is none, drops a picture's alpha channel if opaque, and finds the type's range."""
    array = array if channels else array[..., None]
    if alpha and array.shape[-1] in (2, 4):
        if np.ptp(array[..., -1]):
            raise Refused("is transparent in part; save it without an alpha channel")
        array = array[..., :-1]
    return Pixels(array, float(np.iinfo(array.dtype).max) if array.dtype.kind == "u" else None, **known)


def volume(array: np.ndarray, affine: np.ndarray, channels: bool, **known) -> Pixels:
    """A volume as it lies in its file, slowest axis first, turned upright; `affine` as of `Pixels.stored`."""
    try:
        turned, placed = geometry.upright(array, affine)
    except (ValueError, np.linalg.LinAlgError):
        raise Refused("its header does not say how the volume lies; mend the header or remove the file") from None
    return typed(turned, channels, spacing=geometry.spacing_of(placed), affine=placed, stored=affine, **known)


# ---- pictures


def _pillow(path: str, item: str = "") -> Pixels:
    import PIL.Image
    import PIL.ImageOps

    frames = []
    with PIL.Image.open(path) as image:
        if image.width * image.height > PIL.Image.MAX_IMAGE_PIXELS:
            raise Refused("is larger than any radiograph; remove it, or reduce it first")
        if image.mode in ("LA", "RGB", "RGBA") and image.tile and "16" in str(image.tile[0][3]):
            # Pillow would keep only the upper 8 of these 16 bits.
            return _grey_alpha(path) if image.tile[0][3] == "LA;16B" else sandbox.call(_itk_here, path, True)
        if image.format == "TIFF" and image.info.get("compression") == "raw" and image.getexif().get(0x0112, 1) > 4:
            raise Refused("is stored lying on its side, which Pillow garbles; save it upright")
        count, raw = getattr(image, "n_frames", 1), image.info.get("compression") == "raw" and image.mode != "1"
        if raw and image.width * image.height > os.path.getsize(path):
            raise Refused("is cut short: its pixels are not all there; restore or remove it")
        plausible(count * image.width * image.height, path)
        for index in range(count):
            image.seek(index)
            # As every viewer shows it; Pillow turns a TIFF by itself.
            frame = image.copy() if image.format == "TIFF" else PIL.ImageOps.exif_transpose(image)
            if frame.mode in ("1", "P", "PA"):
                frame = frame.convert("L" if frame.mode == "1" else "RGBA" if frame.has_transparency_data else "RGB")
            if frame.mode not in ("L", "LA", "RGB", "RGBA", "I", "F") and not frame.mode.startswith("I;16"):
                raise Refused(f"is stored as {frame.mode}; convert it to grey or RGB")
            # 'I' of a PNG is how some versions of Pillow open 16 bits.
            frames.append(np.asarray(frame, np.uint16 if frame.mode == "I" and image.format == "PNG" else None))
        # Pillow turns 8 bits of a TIFF whose zero is white, and no more.
        dark = image.format == "TIFF" and image.tag_v2.get(262) == 0 and frame.mode not in ("L", "1")
    array = frames[0] if len(frames) == 1 else np.stack(frames)
    return typed(array, channels=frame.mode in ("LA", "RGB", "RGBA"), alpha=frame.mode in ("LA", "RGBA"), inverted=dark)


def _grey_alpha(path: str) -> Pixels:
    """16-bit grey with alpha, which SimpleITK cannot read: a PNG keeps it in the same bytes as 8-bit RGBA."""
    import PIL.Image

    with open(path, "rb") as file:
        content = bytearray(file.read())
    content[24:26] = 8, 6  # bit depth and colour type of the header, then its checksum
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    with PIL.Image.open(io.BytesIO(content)) as image:
        return typed(np.ascontiguousarray(image).view(">u2").astype(np.uint16), channels=True, alpha=True)


# ---- volumes with a header that says how they lie

MM = {"meter": 1000.0, "micron": 0.001}


def _nifti(path: str, item: str = "") -> Pixels:
    import nibabel

    image = nibabel.load(path)
    if len(image.shape) not in (3, 4):
        raise Refused(f"is {len(image.shape)}D; save it as 3D, or 4D with the channels last")
    plausible(np.prod(image.shape, dtype=float) * image.get_data_dtype().itemsize, path)
    said = [image.header[name] for name in ("sform_code", "qform_code") if name in image.header]
    if not any(said):
        raise Refused("does not say how the volume lies (sform and qform code 0); write its affine into the header")
    unit = MM.get(image.header.get_xyzt_units()[0], 1.0) if hasattr(image.header, "get_xyzt_units") else 1.0
    affine = np.diag([-unit, -unit, unit, 1.0]) @ image.affine  # NIfTI counts to the right and to anterior
    low, high = (float(image.header.get(name, 0)) for name in ("cal_min", "cal_max"))
    array = np.asanyarray(image.dataobj).swapaxes(0, 2)
    window = (low, high) if np.isfinite([low, high]).all() and high > low else None
    return volume(array, affine[:, [2, 1, 0, 3]], channels=array.ndim == 4, window=window)


def _itk(path: str, item: str = "") -> Pixels:
    return sandbox.call(_itk_here, path)


def _itk_here(path: str, alpha: bool = False) -> Pixels:
    """Of four axes the last is one of channels."""
    import SimpleITK

    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(path)
    reader.ReadImageInformation()
    size, parts = np.array(reader.GetSize(), float), reader.GetNumberOfComponents()
    plausible(size.prod() * parts, path, sum(map(os.path.getsize, [path, *detached(path)])))
    image = reader.Execute()
    array = SimpleITK.GetArrayFromImage(image)
    spacing, rank = np.array(image.GetSpacing()), image.GetDimension()
    if rank == 4 and parts > 1:
        raise Refused("has four axes and several components; save it with either")
    if rank not in (3, 4):
        said = tuple(spacing[::-1].tolist()) if suffix(path) in (".nrrd", ".nhdr", ".mha", ".mhd") else None
        return typed(array, channels=parts > 1, alpha=alpha, spacing=said)
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (rank, rank))[:3, :3] * spacing[:3]
    affine[:3, 3] = image.GetOrigin()[:3]
    array = np.moveaxis(array, 0, -1) if rank == 4 else array
    return volume(array, affine[:, [2, 1, 0, 3]], channels=parts > 1 or rank == 4)


def detached(path: str) -> list[str]:
    """The files that hold the numbers of a header: what .mhd and .nhdr name, of it what is there; of other files none."""
    if suffix(path) not in (".mhd", ".nhdr"):
        return []
    with open(path, "rb") as file:
        lines = file.read(1 << 20).decode("latin-1").splitlines()
    names = []
    for at, line in enumerate(lines):
        if match := re.fullmatch(r"\s*(?:ElementDataFile\s*=|data ?file:)\s*(.*?)\s*", line, re.IGNORECASE):
            listed = re.match(r"LIST\b", match[1])
            series = re.fullmatch(r"(\S*%\d*d\S*)\s+(-?\d+)\s+(-?\d+)\s+(-?\d+)(?:\s+\d+)?", match[1])
            if listed:
                names = [line.strip() for line in lines[at + 1 :] if line.strip()]
            elif series:
                first, last, step = map(int, series.groups()[1:])
                numbers = range(first, last + (1 if step > 0 else -1), step or 1)[: 1 << 16]
                names = [series[1] % number for number in numbers]
            else:
                names = [match[1]]
            break
    found = [os.path.join(os.path.dirname(path), name) for name in names if name != "LOCAL"]
    return [name for name in found if os.path.isfile(name)]


def _dicom(path: str, item: str = "") -> Pixels:
    from data import dicom

    return dicom.read([path])


# ---- arrays


def _numpy(path: str, item: str = "") -> Pixels:
    """`item` is the index of one image of a stack; none, where the file holds a single image."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: a false header cannot ask for memory
    return plain(array[int(item)] if item else array)


def stack(path: str) -> np.ndarray:
    """The images of an .npy, along its first axis, mapped."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.ndim < 3:
        raise Refused(f"has {array.ndim} axes, so it is not a stack of images")
    return array


def plain(array: np.ndarray, **known) -> Pixels:
    """A bare array; a third or later axis of at most four is one of channels."""
    array = array.astype(np.uint8) * np.uint8(255) if array.dtype == bool else np.array(array)
    return typed(array, channels=array.ndim >= 3 and array.shape[-1] <= 4, **known)


def _npz(path: str, item: str = "") -> Pixels:
    """`item` is the name of an array, or 'NAME/INDEX' for one row of it; none, where the file holds a single array."""
    rows = rows_of(path, item.partition("/")[0])
    array = rows(int(item.partition("/")[2])) if "/" in item else np.stack([rows(i) for i in range(rows.count)])
    return plain(array)


class _Rows:
    """Rows of one array of an .npz, unpacked in passing, so that a data set in one file never lies in memory."""

    def __init__(self, path: str, name: str):
        archive = zipfile.ZipFile(path)
        names = [name] if name else [n.removesuffix(".npy") for n in archive.namelist()]
        if len(names) != 1:
            raise Refused("holds several arrays; say which one by data.kind")
        if f"{names[0]}.npy" not in archive.namelist():
            raise Refused(f"holds no array {names[0]}; correct data.kind")
        self.file = archive.open(f"{names[0]}.npy")
        version = np.lib.format.read_magic(self.file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        self.shape, fortran, self.dtype = header(self.file)
        if fortran or not self.shape or self.dtype.hasobject:
            raise Refused("its array is not plain numbers in C order; save it afresh")
        self.count, self.begin = self.shape[0], self.file.tell()
        self.bytes = int(np.prod(self.shape[1:], dtype=object)) * self.dtype.itemsize
        plausible(float(self.bytes) * self.count, path)

    def __call__(self, index: int) -> np.ndarray:
        if not 0 <= index < self.count:
            raise Refused(f"has {self.count} rows; correct the manifest")
        self.file.seek(self.begin + index * self.bytes)
        return np.frombuffer(self.file.read(self.bytes), self.dtype).reshape(self.shape[1:])


def rows_of(path: str, name: str) -> _Rows:
    """The rows of an array of an .npz; the last one asked for stays open."""
    status = os.stat(path)
    return _opened(path, name, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _opened(path: str, name: str, *status) -> _Rows:
    return _Rows(path, name)


KEYS = ("reconstruction_rss", "reconstruction_esc")  # fastMRI: multi-coil, single-coil


def _hdf5(path: str, item: str = "") -> Pixels:
    """`item` is the name of the array; none: fastMRI's reconstruction, or the only array of two or more axes."""
    import h5py

    with h5py.File(path, "r") as file:
        found = []
        file.visititems(lambda name, thing: found.append(name) if _is_image(thing) else None)
        names = [item] if item else [key for key in KEYS if key in found][:1] or found
        if len(names) != 1 or names[0] not in found:
            raise Refused(f"holds {len(found)} arrays; say by data.kind which one is the image")
        array = file[names[0]]
        plausible(float(array.size) * array.dtype.itemsize, path)
        field = file["ismrmrd_header"][()] if "ismrmrd_header" in file else b""
        return plain(array[()], spacing=_fastmri_spacing(field) if array.ndim == 3 else None)


def _is_image(thing) -> bool:
    return hasattr(thing, "dtype") and thing.ndim >= 2 and thing.dtype.kind in "uif"


def _fastmri_spacing(header: bytes) -> tuple[float, ...] | None:
    """(D, H, W) in mm from the ISMRMRD header that fastMRI keeps as XML; in the plane the image is the reconSpace.

    Its x, the readout, are the rows: fastMRI's own loader crops to (recon_size[0], recon_size[1]) = (x, y).
    """
    space = re.search(rb"<reconSpace>(.*?)</reconSpace>", header if isinstance(header, bytes) else b"", re.DOTALL)
    numbers = re.findall(rb"<([xyz])>([\d.]+)</[xyz]>", space[1]) if space else []
    if [axis for axis, _ in numbers] != [b"x", b"y", b"z"] * 2:
        return None
    (x, y, z), (field_x, field_y, field_z) = np.array([float(v) for _, v in numbers]).reshape(2, 3)
    return tuple(map(float, (field_z / z, field_x / x, field_y / y)))


READERS: dict[str, Callable[..., Pixels]] = {
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".tif", ".tiff"), _pillow),
    **dict.fromkeys((".nii", ".nii.gz"), _nifti),
    **dict.fromkeys((".nrrd", ".nhdr", ".mha", ".mhd"), _itk),
    ".npy": _numpy,
    ".npz": _npz,
    **dict.fromkeys((".h5", ".hdf5"), _hdf5),
    ".dcm": _dicom,
}


def suffix(path: str) -> str:
    """'.png' of 'a/B.PNG'; '.nii.gz' keeps both."""
    name = os.path.basename(path).lower()
    return ".nii.gz" if name.endswith(".nii.gz") else os.path.splitext(name)[1]


# what decodes and resamples: another version may give other pixels
DECODERS = ("numpy", "scipy", "pillow", "nibabel", "simpleitk", "h5py", "pydicom", "python-gdcm", "pyjpegls")
DECODERS += ("pylibjpeg", "pylibjpeg-openjpeg", "array_record", "tensorflow-datasets")


def version(name: str) -> str | None:
    """Of a library; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
