"""Every format there and back, intensity, and geometry."""

import struct
import zlib

import jax
import nibabel
import numpy as np
import PIL.Image
import pytest
import SimpleITK
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data import export, files, geometry
from tests.make_files import EIGHT, RNG, SIXTEEN, dicom
from tests.make_files import picture as save

VOLUME = RNG.normal(0, 500, (5, 6, 7)).astype(np.float32)


def read(path, size=(12, 16), **settings):
    return files.read_image(str(path), size=size, **settings).array


def scaled(array, low=0.0, high=None):
    high = np.iinfo(array.dtype).max if high is None else high
    return (np.clip((array.astype(np.float64) - low) / (high - low), 0, 1) * 2 - 1)[..., None]


def rgb(array, alpha=None):
    return np.stack([array] * 3 + ([np.full_like(array, alpha)] if alpha is not None else []), -1)


# ---- formats


@pytest.mark.parametrize("name", ["x.png", "x.TIF", "x.tiff", "x.npy"])
@pytest.mark.parametrize("array", [EIGHT, SIXTEEN], ids=["8 bit", "16 bit"])
def test_grey_is_exact(tmp_path, name, array):
    path = tmp_path / name
    np.save(path, array) if name == "x.npy" else save(path, array)
    image = files.read_image(str(path), size=(12, 16))
    np.testing.assert_allclose(image.array, scaled(array), atol=3e-7)
    assert image.array.dtype == np.float32 and image.eight_bit == (array is EIGHT) and not image.resized
    dtype = "uint8" if array is EIGHT else "uint16"
    np.testing.assert_array_equal(files.encode(image.array, dtype)[..., 0], array)  # kept exactly
    assert abs(files.decode(files.encode(image.array, dtype)) - image.array).max() < 1e-6


@pytest.mark.parametrize("name", ["x.png", "x.tiff"])
def test_grey_in_colour_files(tmp_path, name):
    for colour in (rgb(EIGHT), rgb(EIGHT, alpha=255)):
        np.testing.assert_allclose(read(save(tmp_path / name, colour)), scaled(EIGHT), atol=1e-6)
    for colour in (rgb(SIXTEEN), rgb(SIXTEEN, alpha=65535)):  # all 16 bits
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(colour, isVector=True), str(tmp_path / name))
        np.testing.assert_allclose(read(tmp_path / name), scaled(SIXTEEN), atol=1e-6)
    PIL.Image.fromarray(EIGHT).convert("LA").save(tmp_path / "la.png")
    np.testing.assert_allclose(read(tmp_path / "la.png"), scaled(EIGHT), atol=1e-6)
    sixteen_with_alpha(tmp_path / "la16.png", SIXTEEN, 65535)
    np.testing.assert_allclose(read(tmp_path / "la16.png"), scaled(SIXTEEN), atol=1e-6)
    sixteen_with_alpha(tmp_path / "la16.png", SIXTEEN, SIXTEEN)
    with pytest.raises(ValueError, match="transparent in part"):
        read(tmp_path / "la16.png")
    PIL.Image.fromarray(EIGHT).convert("P").save(tmp_path / "p.png")
    np.testing.assert_allclose(read(tmp_path / "p.png"), scaled(EIGHT), atol=1e-6)


def sixteen_with_alpha(path, grey, alpha):
    """A PNG of 16-bit grey with alpha (colour type 4), which Pillow does not write."""
    pixels = np.stack([grey, np.broadcast_to(alpha, grey.shape)], -1).astype(">u2")
    lines = b"".join(b"\0" + row.tobytes() for row in pixels)
    chunk = lambda name, body: struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    header = struct.pack(">IIBBBBB", grey.shape[1], grey.shape[0], 16, 4, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


def test_jpeg(tmp_path):
    smooth = (np.add.outer(np.arange(12), np.arange(16)) * 8).astype(np.uint8)
    for array in (smooth, rgb(smooth)):
        assert abs(read(save(tmp_path / "x.jpg", array, quality=95)) - scaled(smooth)).max() < 0.05


def test_colour_is_refused_or_kept(tmp_path):
    colour = RNG.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    path = save(tmp_path / "x.png", colour)
    with pytest.raises(ValueError, match=r"x\.png: is a colour image"):
        read(path)
    np.testing.assert_allclose(read(path, channels=3), scaled(colour)[..., 0], atol=1e-6)
    with pytest.raises(ValueError, match="has 1 channels, not 3"):
        read(save(tmp_path / "y.png", EIGHT), channels=3)
    see_through = rgb(EIGHT, alpha=255)
    see_through[0, 0, 3] = 7
    with pytest.raises(ValueError, match="transparent in part"):
        read(save(tmp_path / "z.png", see_through))


def test_photograph_turned_by_its_exif(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    for name, how in (("x.tif", {"compression": "tiff_lzw"}), ("x.png", {})):
        path = save(tmp_path / name, EIGHT, exif=exif, **how)
        np.testing.assert_allclose(read(path, size=(16, 12)), scaled(np.rot90(EIGHT, -1)), atol=1e-6)
    with pytest.raises(ValueError, match="save it upright"):
        read(save(tmp_path / "y.tif", EIGHT, exif=exif))


@pytest.mark.parametrize("array", [EIGHT, SIXTEEN], ids=["8 bit", "16 bit"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_a_tiff_whose_zero_is_white_is_turned(tmp_path, array, compression):
    how = {"compression": compression} if compression else {}
    path = save(tmp_path / "x.tif", np.iinfo(array.dtype).max - array, **how)
    tag = struct.pack("<HHIH", 262, 3, 1, 1)  # PhotometricInterpretation, BlackIsZero
    content = path.read_bytes()
    assert content.count(tag) == 1
    path.write_bytes(content.replace(tag, struct.pack("<HHIH", 262, 3, 1, 0)))
    np.testing.assert_allclose(read(path), scaled(array), atol=1e-6)


def test_a_nifti_that_does_not_say_how_it_lies_is_refused(tmp_path):
    image = nibabel.Nifti1Image(VOLUME, np.eye(4))
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    nibabel.save(image, tmp_path / "x.nii.gz")
    with pytest.raises(ValueError, match=r"x\.nii\.gz: does not say how the volume lies .*; write its affine"):
        read(tmp_path / "x.nii.gz", size=VOLUME.shape, intensity="minmax")


def test_volumes_agree_whatever_the_file(tmp_path):
    """The same patient as NIfTI in two orientations, NRRD, MHA and NPY."""
    lps = VOLUME  # D up, H to posterior, W to left
    wanted = scaled(lps, -1000, 1000)
    image = nibabel.Nifti1Image(lps.T[::-1, ::-1].copy(), np.diag([2.0, 3, 4, 1]))  # (R, A, S)
    nibabel.save(image, tmp_path / "ras.nii.gz")
    nibabel.save(image.as_reoriented([[2, -1], [0, 1], [1, -1]]), tmp_path / "other.nii")
    itk = SimpleITK.GetImageFromArray(lps)  # identity direction: left, posterior, superior
    SimpleITK.WriteImage(itk, str(tmp_path / "x.nrrd"))
    SimpleITK.WriteImage(SimpleITK.DICOMOrient(itk, "SAR"), str(tmp_path / "x.mha"))
    np.save(tmp_path / "x.npy", lps)
    for name in ("ras.nii.gz", "other.nii", "x.nrrd", "x.mha", "x.npy"):
        got = read(tmp_path / name, size=lps.shape, intensity="window:-1000:1000")
        np.testing.assert_allclose(got, wanted, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("size", [(12, 16), (5, 6, 7)])
def test_what_we_export_comes_back(tmp_path, size):
    image = RNG.uniform(-1, 1, (*size, 1)).astype(np.float32)
    form = export.form("auto", size, intensity="minmax")
    path = tmp_path / f"x{form.suffix}"
    export.write_image(path, image, form)
    got = read(path, size=size, intensity=form.reading)
    assert abs(got - image).max() <= (1 / 255 if len(size) == 2 else 1e-6) + 1e-6


def test_dicom(tmp_path):
    path, twelve = tmp_path / "x.dcm", SIXTEEN // 16
    np.testing.assert_allclose(read(dicom(path, EIGHT)), scaled(EIGHT), atol=1e-6)
    np.testing.assert_allclose(read(dicom(path, twelve, bits=12)), scaled(twelve, 0, 4095), atol=1e-6)
    mirrored = dicom(path, twelve, bits=12, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_allclose(read(mirrored), -scaled(twelve, 0, 4095), atol=1e-6)
    ct = (SIXTEEN // 20).astype(np.int16)
    hounsfield = ct.astype(np.float32) - 1024
    dicom(path, ct, RescaleSlope=1, RescaleIntercept=-1024)
    np.testing.assert_allclose(read(path, intensity=("window", -1000, 400)), scaled(hounsfield, -1000, 400), atol=1e-5)
    with pytest.raises(ValueError, match="has no range to divide by; set"):
        read(path)


def test_real_files(real_data):
    ct = sorted((real_data / "tcga_luad_ct").glob("*.dcm"))[0]
    image = read(ct, size=(512, 512), intensity="window:-1024:1000")
    assert image.min() == -1 and 0 < image.max() <= 1
    mri = sorted((real_data / "msd_hippocampus").glob("*.nii.gz"))
    for path in mri[:4]:
        image = files.read_image(str(path), size=(32, 32, 32), intensity="minmax")
        assert image.array.shape == (32, 32, 32, 1) and image.resized and image.array.min() == -1


# ---- intensity


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_minmax_and_percentile_do_not_see_units(shift, scale):
    pixels = files.Pixels(VOLUME[..., None], None)
    other = files.Pixels((VOLUME[..., None].astype(np.float64) * scale + shift * scale), None)
    for policy in ("minmax", ("percentile", 2, 98)):
        np.testing.assert_allclose(files._scale(pixels, policy), files._scale(other, policy), atol=2e-2)
    assert files._scale(pixels, "minmax").min() == -1 and files._scale(pixels, "minmax").max() == 1
    clipped = np.mean(abs(files._scale(pixels, "percentile:10:90")) == 1)
    assert abs(clipped - 0.2) < 0.03


def test_intensity_spellings():
    assert files.parse_intensity("window:-1000:400") == files.parse_intensity(["window", -1000, 400.0])
    assert files.parse_intensity(("type",)) == files.parse_intensity("type") == ("type",)
    bad = ["", "none", "window", "window:1", "window:2:1", "window:a:b", "percentile:1:101", "type:0:1"]
    for policy in (*bad, ("window", 0, None)):
        with pytest.raises(ValueError, match="is none of"):
            files.parse_intensity(policy)


# ---- geometry


@settings(max_examples=15, deadline=None)
@given(*[st.tuples(*[st.integers(1, 40)] * 2)] * 3)
@example((1, 1), (1, 1), (1, 2))  # one voxel of padding: its left half rounds to nothing
@example((7, 8), (7, 8), (6, 9))
def test_resample_is_jax_image_resize(old, new, spans):
    array = np.random.default_rng(1).normal(size=(*old, 2)).astype(np.float32)
    framed = array
    for axis, span in enumerate(spans):
        margin = abs(span - old[axis]) // 2
        if span <= old[axis]:
            framed = framed.take(range(margin, margin + span), axis)
        else:
            more = [(margin, span - old[axis] - margin) if a == axis else (0, 0) for a in range(3)]
            framed = np.pad(framed, more, constant_values=-1)
    wanted = jax.image.resize(framed, (*new, 2), "linear", antialias=True)
    np.testing.assert_allclose(geometry.resample(array, new, spans), wanted, atol=2e-5)
    wanted = jax.image.resize(array, (*new, 2), "linear", antialias=True)
    np.testing.assert_allclose(geometry.resample(array, new), wanted, atol=2e-5)


def test_fit(tmp_path):
    wide = np.zeros((20, 40), np.uint8)
    wide[:, 10:30] = 255  # the middle square
    path = save(tmp_path / "x.png", wide)
    crop, pad, stretch = (read(path, size=(10, 10), fit=fit) for fit in ("crop", "pad", "stretch"))
    assert (crop == 1).all()
    assert (pad[:2] == -1).all() and (pad[-2:] == -1).all() and (pad[4:6, 4:6] == 1).all() and pad[5, 0] == -1
    assert stretch[5, 0] == -1 and stretch[0, 5] == 1
    padded = lambda shape, size: files._fit(np.ones((*shape, 1), np.float32), size, "pad", None, None, False).array
    thread = padded((1, 300_000), (8, 8))  # its frame would fill the memory
    assert thread.shape == (8, 8, 1) and thread.max() < -0.99
    volume = padded((16, 8, 12), (8, 8, 8))
    assert volume.shape == (8, 8, 8, 1) and (volume[:, 0] == -1).all() and (volume[:, 3:5, 2:6] == 1).all()


def test_an_even_picture_stays_even():
    for old, new in [((7, 9), (64, 64)), ((200, 300), (64, 48)), ((5, 6, 7), (8, 8, 8))]:
        np.testing.assert_allclose(geometry.resample(np.full((*old, 1), 0.3, np.float32), new), 0.3, atol=1e-6)
