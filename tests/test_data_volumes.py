"""Where volumes lie: DICOM series, orientation and spacing, sections, sub-volumes, channels, and arrays in containers."""

import h5py
import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit, RLELossless

import data
from data import files, geometry, manifest
from data.listing import Row
from tests import make_files

RNG = np.random.default_rng(0)
VOLUME = RNG.integers(-1000, 1000, (5, 6, 8), dtype=np.int16)
WINDOW = "window:-1000:1000"
SPACING = (3.0, 0.5, 0.7)


def read(row, size=VOLUME.shape, intensity=WINDOW, **settings):
    row = row if isinstance(row, Row) else Row(str(row))
    return list(files.read_images(row, size=size, intensity=intensity, **settings))


def series_source(folder, **how):
    paths = sorted(str(path) for path in folder.iterdir())
    return Row(str(folder), parts=tuple(paths), **how)


# ---- DICOM


def test_a_series_is_a_volume_in_hounsfield_units(tmp_path):
    stored = VOLUME + 1024
    make_files.series(tmp_path, stored, RescaleSlope=1, RescaleIntercept=-1024)
    (image,) = read(series_source(tmp_path))
    np.testing.assert_allclose(image.array[..., 0], VOLUME / 1000, atol=1e-6)
    assert image.spacing == pytest.approx(SPACING) and not image.resized


@pytest.mark.parametrize("kind", ["axial", "coronal", "sagittal", "oblique"])
def test_a_series_lies_as_itk_says(tmp_path, kind):
    """The same turned volume by our reader and by SimpleITK's, an independent implementation."""
    turn = np.radians(20)
    axes = {
        "axial": (1, 0, 0, 0, 1, 0),
        "coronal": (1, 0, 0, 0, 0, -1),
        "sagittal": (0, 1, 0, 0, 0, -1),
        "oblique": (np.cos(turn), np.sin(turn), 0, -np.sin(turn), np.cos(turn), 0),
    }[kind]
    make_files.series(tmp_path / "x", VOLUME, axes=tuple(map(float, axes)))
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path / "x")))
    itk = SimpleITK.DICOMOrient(reader.Execute(), "LPS")
    wanted = SimpleITK.GetArrayFromImage(itk)
    (image,) = read(series_source(tmp_path / "x"), size=wanted.shape)
    np.testing.assert_allclose(image.array[..., 0], wanted / 1000, atol=1e-6)
    assert image.spacing == pytest.approx(itk.GetSpacing()[::-1])
    if kind == "coronal":  # rows run downwards, frames to posterior: D is upwards, H to posterior
        np.testing.assert_array_equal(wanted, VOLUME.transpose(1, 0, 2)[::-1])


@pytest.mark.parametrize(
    "syntax, eight",
    [
        (RLELossless, False),
        (JPEG2000Lossless, False),
        ("1.2.840.10008.1.2.4.57", False),  # JPEG lossless
        ("1.2.840.10008.1.2.4.70", False),  # JPEG lossless, first-order prediction
        ("1.2.840.10008.1.2.4.80", False),  # JPEG-LS
        ("1.2.840.10008.1.2.4.51", True),  # JPEG extended
        (JPEGBaseline8Bit, True),
    ],
)
def test_compressed_dicom(tmp_path, syntax, eight):
    smooth = (np.add.outer(np.arange(32), np.arange(40)) * (3 if eight else 57)).astype(
        np.uint8 if eight else np.uint16
    )
    path = make_files.dicom(tmp_path / "x.dcm", smooth, bits=8 if eight else 12, syntax=syntax)
    assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == syntax
    (image,) = read(path, size=(32, 40), intensity="type")
    wanted = smooth / (255 if eight else 4095) * 2 - 1
    np.testing.assert_allclose(image.array[..., 0], wanted, atol=0.03 if eight else 1e-6)


def test_a_multi_frame_file_is_ordered_by_its_frames_places(tmp_path):
    order = [3, 0, 4, 1, 2]
    frames = []
    for k in order:
        position, item = pydicom.Dataset(), pydicom.Dataset()
        position.ImagePositionPatient = [0.0, 0.0, 3.0 * k]
        item.PlanePositionSequence = [position]
        frames.append(item)
    shared, orientation, measures, rescale = (pydicom.Dataset() for _ in range(4))
    orientation.ImageOrientationPatient = [1.0, 0, 0, 0, 1, 0]
    measures.PixelSpacing = [0.5, 0.7]
    rescale.RescaleSlope, rescale.RescaleIntercept = 2, -1000
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [orientation], [measures]
    shared.PixelValueTransformationSequence = [rescale]
    stored = ((VOLUME.astype(int) + 1000) // 2).astype(np.int16)
    groups = {"SharedFunctionalGroupsSequence": [shared], "PerFrameFunctionalGroupsSequence": frames}
    path = make_files.dicom(tmp_path / "x.dcm", stored[order], **groups)
    (image,) = read(path)
    np.testing.assert_allclose(image.array[..., 0], (stored * 2.0 - 1000) / 1000, atol=1e-6)
    assert image.spacing == pytest.approx(SPACING)
    film = make_files.dicom(tmp_path / "film.dcm", VOLUME)  # says nothing of places: as it is
    np.testing.assert_allclose(read(film)[0].array[..., 0], VOLUME / 1000, atol=1e-6)


@pytest.mark.parametrize("function, low, high", [(None, -160, 239), ("LINEAR_EXACT", -160, 240)])
def test_the_headers_window_and_monochrome1(tmp_path, function, low, high):
    tags = {"WindowCenter": [40, 1000], "WindowWidth": [400, 9], "RescaleSlope": 1, "RescaleIntercept": -1024}
    tags |= {"VOILUTFunction": function} if function else {}
    (image,) = read(make_files.dicom(tmp_path / "x.dcm", VOLUME[0] + 1024, **tags), (6, 8), "header")
    wanted = np.clip((VOLUME[0].astype(float) - low) / (high - low), 0, 1) * 2 - 1
    np.testing.assert_allclose(image.array[..., 0], wanted, atol=1e-5)
    inverse = make_files.dicom(tmp_path / "y.dcm", VOLUME[0] + 1024, PhotometricInterpretation="MONOCHROME1", **tags)
    np.testing.assert_allclose(read(inverse, (6, 8), "header")[0].array[..., 0], -wanted, atol=1e-5)
    bright = read(inverse, (6, 8), "percentile:0:50")[0].array
    np.testing.assert_allclose(bright, -read(tmp_path / "x.dcm", (6, 8), "percentile:50:100")[0].array, atol=1e-5)
    with pytest.raises(ValueError, match="its header recommends no window"):
        read(make_files.dicom(tmp_path / "z.dcm", VOLUME[0]), (6, 8), "header")


def test_series_that_are_no_volume_are_refused(tmp_path):
    def refused(name, change, words):
        folder = make_files.series(tmp_path / name, VOLUME)
        for number, path in enumerate(sorted(folder.iterdir())):
            file = pydicom.dcmread(path)
            change(number, file)
            file.save_as(path)
        with pytest.raises(ValueError, match=words) as error:
            read(series_source(folder))
        assert str(error.value).startswith(f"{folder}: ") and "\n" not in str(error.value)

    place = lambda file: file.ImagePositionPatient
    refused("gap", lambda i, f: setattr(f, "ImagePositionPatient", [0, 0, (0, 3, 6, 9, 15)[i]]), "has gaps between")
    refused(
        "time", lambda i, f: setattr(f, "ImagePositionPatient", [0, 0, 3 * (i // 2)]), "several images at one place"
    )
    refused("turned", lambda i, f: i or setattr(f, "ImageOrientationPatient", [0, 1, 0, 0, 0, 1]), "not parallel")
    refused("nowhere", lambda i, f: i or delattr(f, "ImagePositionPatient"), "do not say where they lie")
    refused("unscaled", lambda i, f: delattr(f, "PixelSpacing"), "do not say their PixelSpacing")
    refused("infinite", lambda i, f: setattr(f, "ImagePositionPatient", [0, 0] if i else place(f)), "where they lie")
    other = make_files.series(tmp_path / "shapes", VOLUME)
    make_files.dicom(other / "9.dcm", VOLUME[0, :4], ImagePositionPatient=[0, 0, 99.0])
    with pytest.raises(ValueError, match="differ in shape"):
        read(series_source(other))


# ---- spacing and frames


def nifti(path, array, spacing=SPACING, unit="mm"):
    """(D, H, W) as ours, written as NIfTI lies by default: to the right, anterior, superior."""
    image = nibabel.Nifti1Image(array.T[::-1, ::-1].copy(), np.diag([*spacing[::-1], 1.0]))
    image.header.set_xyzt_units(unit)
    nibabel.save(image, path)
    return path


def test_spacing_is_read_whatever_the_file(tmp_path):
    float_volume = VOLUME.astype(np.float32)
    nifti(tmp_path / "x.nii.gz", float_volume)
    nifti(tmp_path / "metres.nii", float_volume, spacing=[mm / 1000 for mm in SPACING], unit="meter")
    itk = SimpleITK.GetImageFromArray(float_volume)
    itk.SetSpacing(SPACING[::-1])
    for name in ("x.nrrd", "x.mha", "x.mhd", "detached.nhdr"):
        SimpleITK.WriteImage(SimpleITK.DICOMOrient(itk, "RAI"), str(tmp_path / name))
    for name in ("x.nii.gz", "metres.nii", "x.nrrd", "x.mha", "x.mhd", "detached.nhdr"):
        (image,) = read(tmp_path / name)
        np.testing.assert_allclose(image.array[..., 0], VOLUME / 1000, atol=1e-6, err_msg=name)
        assert image.spacing == pytest.approx(SPACING, rel=1e-5), name


def ball(shape, spacing, radius=10.0, centre=(0, 0, 0)):
    """A soft ball about the middle, in mm: its picture does not depend on the grid."""
    ticks = [(np.arange(n) - (n - 1) / 2) * mm - c for n, mm, c in zip(shape, spacing, centre, strict=True)]
    distance = np.sqrt(sum(t**2 for t in np.meshgrid(*ticks, indexing="ij")))
    return (1000 * np.tanh((radius - distance) / 3)).astype(np.float32)


def test_a_common_spacing_makes_patients_comparable(tmp_path):
    grids = [((20, 40, 40), (2.0, 1.0, 1.0)), ((50, 30, 24), (0.8, 1.3, 1.7))]
    wanted = ball((16, 16, 16), (2.0, 2.0, 2.0))
    for number, (shape, spacing) in enumerate(grids):
        path = nifti(tmp_path / f"{number}.nii.gz", ball(shape, spacing), spacing)
        (image,) = read(path, size=(16, 16, 16), fit="exact", spacing=(2.0, 2.0, 2.0))
        assert image.spacing == pytest.approx((2.0, 2.0, 2.0), rel=1e-5)
        inside = np.s_[2:-2, 2:-2, 2:-2]  # one grid does not reach the rim
        assert abs(image.array[..., 0] - wanted / 1000)[inside].max() < 0.1
        (image,) = read(path, size=(16, 16, 16), fit="pad", spacing=(1.0, 1.0, 1.0))
        assert max(image.spacing) == pytest.approx(min(image.spacing), rel=1e-5)  # the aspect is in mm


def test_exact_crops_and_pads_without_interpolation(tmp_path):
    path = nifti(tmp_path / "x.nii.gz", VOLUME)
    (image,) = read(path, size=(7, 4, 8), fit="exact")
    assert (image.array[[0, -1]] == -1).all()
    np.testing.assert_allclose(image.array[1:6, ..., 0], VOLUME[:, 1:5] / 1000, atol=1e-6)
    assert image.spacing == pytest.approx(SPACING) and image.resized


@settings(max_examples=30, deadline=None)
@given(st.integers(5, 30), st.floats(0.3, 3.0), st.integers(4, 20))
def test_resampling_keeps_a_ramp(old, scale, new):
    """A linear function is read where the grid lies: exactly, or by a filter wider than a voxel to a fraction of one."""
    ramp = np.linspace(-0.5, 0.5, old, dtype=np.float32)[:, None]
    (span,) = geometry.spans_of((old,), (new,), "exact", [scale])
    assume(not float(span).is_integer())  # whole frames lie on whole voxels
    got = geometry.resample(ramp, (new,), [span])[:, 0]
    places = old / 2 + (np.arange(new) + 0.5 - new / 2) * scale - 0.5
    inside = (places > max(1, scale)) & (places < old - 1 - max(1, scale))
    read_at = (got + 0.5) * (old - 1)
    assert abs(read_at - places)[inside].max(initial=0) < (1e-4 if scale <= 1 else 0.2)


# ---- sections and sub-volumes


@pytest.mark.parametrize(
    "text, axis, indices",
    [("z", 0, range(5)), ("y:1:4", 1, range(1, 4)), ("x:25%:75%:2", 2, [2, 4]), ("z:3:99", 0, [3, 4])],
)
def test_slices(tmp_path, text, axis, indices):
    images = read(nifti(tmp_path / "x.nii.gz", VOLUME), size=np.delete(VOLUME.shape, axis), slices=text)
    assert [image.part for image in images] == [f"#{'zyx'[axis]}{i:03d}" for i in indices]
    for image, i in zip(images, indices, strict=True):
        wanted = VOLUME.take(i, axis)[:: -1 if axis else 1]  # superior above
        np.testing.assert_allclose(image.array[..., 0], wanted / 1000, atol=1e-6)
        assert image.spacing == pytest.approx(tuple(np.delete(SPACING, axis)))
    np.save(tmp_path / "x.npy", VOLUME)  # says nothing of how it lies, so it is not turned
    bare = read(tmp_path / "x.npy", size=np.delete(VOLUME.shape, axis), slices=text)
    np.testing.assert_allclose(bare[0].array[..., 0], VOLUME.take(indices[0], axis) / 1000, atol=1e-6)


@pytest.mark.parametrize("axis, size", [("y", (6, 10)), ("x", (6, 8))])
def test_a_superior_voxel_is_in_the_upper_rows_of_a_section(tmp_path, axis, size):
    """By the affine alone, in two orientations of the file: the head is above the feet, as everyone looks at it."""
    array = np.full((10, 8, 6), -900, np.float32)  # to the right, anterior, superior
    array[3:7, 2:6, 5] = 900
    image = nibabel.Nifti1Image(array, np.eye(4))
    assert (image.affine @ [4, 4, 5, 1])[2] > (image.affine @ [4, 4, 0, 1])[2]
    nibabel.save(image, tmp_path / "a.nii.gz")
    nibabel.save(image.as_reoriented(np.array([[2, -1], [0, 1], [1, -1]])), tmp_path / "b.nii.gz")
    for name in ("a.nii.gz", "b.nii.gz"):
        (section,) = read(tmp_path / name, size=size, slices=f"{axis}:4:5")
        assert section.array[0].max() > 0 > section.array[1:].max(), name


def test_slices_of_a_patient_stay_together(tmp_path):
    for number in range(8):
        volume = RNG.integers(1, 1000, (4, 6, 8), dtype=np.int16)
        volume[0] = -1000  # outside the body: no image
        nifti(tmp_path / f"p{number}.nii.gz", volume)
    how = dict(
        path=tmp_path, patient_pattern=r"p\d", size=(6, 8), slices="z", intensity=WINDOW, cache=tmp_path / "cache"
    )
    halves = {"train": 0.5, "val": 0.5}
    sets = data.load(**how, fractions=halves)
    of = {name: set(s.patients) for name, s in sets.items()}
    assert sum(map(len, of.values())) == 8 == len(set.union(*of.values()))
    ids = sorted(i for s in sets.values() for i in s.ids)
    assert ids == [f"p{n}.nii.gz#z{k:03d}" for n in range(8) for k in (1, 2, 3)]
    assert sets["train"].spacing == (0.5, 0.7) and sets["train"].window == (-1000.0, 1000.0)
    assert len(data.load(**how, fractions=halves, limit={"train": 2})["train"].ids) == 2


def test_a_volume_of_which_no_section_is_taken_is_refused(tmp_path):
    """And counted where that is skipped: it does not vanish."""
    volume = RNG.integers(1, 1000, (5, 6, 8), dtype=np.int16)
    (tmp_path / "x").mkdir()
    nifti(tmp_path / "x" / "p0.nii.gz", np.concatenate([volume] * 3))
    volume[:2] = -1000
    nifti(tmp_path / "x" / "p1.nii.gz", volume)
    how = dict(path=tmp_path / "x", patient_pattern=r"p\d", size=(6, 8), intensity=WINDOW, fractions={"train": 1.0})
    for slices, told in [
        ("z:7:12", r"p1\.nii\.gz: data\.slices selects 0 of its 5 sections; correct it, or leave the file out"),
        ("z:0:2", r"p1\.nii\.gz: data\.slices selects 2 of its 5 sections, all constant; correct it"),
    ]:
        with pytest.raises(ValueError, match=told):
            data.load(**how, slices=slices, cache=tmp_path / "cache")
        found = data.load(**how, slices=slices, on_error="skip", cache=tmp_path / "cache")["train"]
        assert set(found.patients) == {"p0"} and found.notes[0].startswith("1 of 2 images could not be read")


@pytest.mark.parametrize("text", ["w", "z:1", "z:4:2:0", "z:1.5:3", "", "z:a:b"])
def test_slices_that_cannot_be(text):
    with pytest.raises(ValueError, match=r"^data\.slices .* is not AXIS"):
        files.parse_slices(text)


def test_sub_volumes_about_centres(tmp_path):
    volume = RNG.integers(-1000, 1000, (9, 10, 12), dtype=np.int16)
    path = nifti(tmp_path / "a.nii.gz", volume)
    wanted = volume[2:6, 3:7, 4:8] / 1000  # about voxel (4, 5, 6) of ours
    k, j, i = 4, 10 - 1 - 5, 12 - 1 - 6  # as the file counts
    right, anterior, superior = nibabel.load(path).affine @ [i, j, k, 1] @ np.eye(4, 3)
    places = [("a", k, j, i, "voxel"), ("b", superior, -anterior, -right, "mm")]
    images = read(Row(str(path), centres=tuple(places)), size=(4, 4, 4))
    assert [image.part for image in images] == ["#a", "#b"]
    for image in images:
        np.testing.assert_allclose(image.array[..., 0], wanted, atol=1e-5)
        assert image.spacing == pytest.approx(SPACING)
    np.save(tmp_path / "a.npy", volume)
    corner = read(Row(str(tmp_path / "a.npy"), centres=(("c", 0, 0, 0, "voxel"),)), size=(4, 4, 4))[0].array
    assert (corner[:2] == -1).all() and (corner[:, :2] == -1).all()
    np.testing.assert_allclose(corner[2:, 2:, 2:, 0], volume[:2, :2, :2] / 1000, atol=1e-6)
    for name, centre, words in [
        ("a.npy", (1, 2, 3, "mm"), "does not say where"),
        ("a.npy", (9, 2, 3, "voxel"), "outside"),
    ]:
        with pytest.raises(ValueError, match=words):
            read(Row(str(tmp_path / name), centres=(("c", *centre),)), size=(4, 4, 4))


def test_a_constant_sub_volume_leaves_the_others(tmp_path):
    volume = RNG.integers(-1000, 1000, (9, 10, 12), dtype=np.int16)
    volume[:4] = 0
    np.save(tmp_path / "a.npy", volume)
    places = [("a", 2, 5, 6, "voxel"), ("b", 6, 5, 6, "voxel"), ("c", 2, 5, 5, "voxel")]
    images = files.read_images(Row(str(tmp_path / "a.npy"), centres=tuple(places)), size=(4, 4, 4), intensity=WINDOW)
    assert next(images).part == "#b"
    with pytest.raises(ValueError, match="the sub-volume a and 1 more is constant; correct its centre"):
        next(images)


def test_centres_from_a_table(tmp_path):
    (tmp_path / "x").mkdir()
    for name in ("p1", "p2", "p3"):
        nifti(tmp_path / "x" / f"{name}.nii.gz", RNG.integers(-1000, 1000, (9, 10, 12), dtype=np.int16))
    table = tmp_path / "centres.csv"
    how = dict(path=tmp_path / "x", patient_pattern=r"p\d", intensity=WINDOW, centres=table, fractions={"train": 1.0})
    load = lambda **more: data.load(**(how | dict(size=(4, 4, 4), cache=tmp_path / "cache") | more))
    table.write_text("path,z,y,x\np1.nii.gz,4,5,6\np1.nii.gz,5,5,5\np3.nii.gz,4,4,4\n")
    assert load()["train"].ids.tolist() == ["p1.nii.gz#c000", "p1.nii.gz#c001", "p3.nii.gz#c000"]
    assert load()["train"].patients.tolist() == ["p1", "p1", "p3"]
    with pytest.raises(ValueError, match=r"data\.size must be \(D, H, W\)"):
        load(size=(4, 4))
    for content, words in [
        ("path,z,y\np1.nii.gz,4,5\n", "no column 'x'"),
        ("path,z,y,x\np1.nii.gz,4,5,a\n", "line 2 has a z, y or x that is no number"),
        ("path,z,y,x\np1.nii.gz,4,5,inf\n", "line 2 has a unit or place"),
        ("path,z,y,x,unit\np1.nii.gz,4,5,6,cm\n", "line 2 has a unit or place"),
        ("path,z,y,x,name\np1.nii.gz,4,5,6,a\np1.nii.gz,4,5,7,a\n", "line 3 repeats the name a"),
        (
            "path,z,y,x\np9.nii.gz,4,5,6\n",
            r"p9.nii.gz is none of the volumes of .*, which are p1.nii.gz, p2.nii.gz, p3.nii.gz",
        ),
    ]:
        table.write_text(content)
        with pytest.raises(ValueError, match=words) as error:
            load()
        assert str(error.value).startswith(str(table)) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "how, words",
    [
        (dict(spacing=(1.0,)), "data.spacing must be mm for each axis"),
        (dict(spacing=(1.0, 0.0)), "data.spacing must be mm"),
        (dict(spacing=(1.0, 1.0), fit="stretch"), "without fit 'stretch'"),
        (dict(slices="z", size=(4, 4, 4)), "data.slices makes 2D images"),
        (dict(slices="q"), "data.slices 'q' is not AXIS"),
        (dict(spacing=(1.0, 1.0)), r"x\.png: does not say its spacing"),
        (dict(slices="z"), "has shape 12x16x1 .* not a 3D image's"),
        (dict(splits="mine"), "data.splits must be None or 'hash'"),
    ],
)
def test_settings_that_cannot_be(tmp_path, how, words):
    make_files.picture(tmp_path / "x.png", make_files.EIGHT)
    with pytest.raises(ValueError, match=words) as error:
        data.load(
            **(dict(path=tmp_path, patients="per_image", size=(12, 16), fractions={"train": 1.0}, cache=tmp_path) | how)
        )
    assert "\n" not in str(error.value)


# ---- channels and containers


def test_one_channel_of_several(tmp_path):
    four = RNG.integers(0, 1000, (*VOLUME.shape, 4)).astype(np.float32)
    image = nibabel.Nifti1Image(four.transpose(2, 1, 0, 3)[::-1, ::-1].copy(), np.eye(4))
    nibabel.save(image, tmp_path / "x.nii.gz")
    whole = read(tmp_path / "x.nii.gz", channels=4)[0].array
    np.testing.assert_allclose(whole, four / 1000, atol=1e-6)
    np.testing.assert_allclose(read(tmp_path / "x.nii.gz", channel=2)[0].array, four[..., 2:3] / 1000, atol=1e-6)
    with pytest.raises(ValueError, match=r"has 4 channels, not 1; set data.channel to one of them"):
        read(tmp_path / "x.nii.gz")
    with pytest.raises(ValueError, match=r"none numbered 4; correct data.channel"):
        read(tmp_path / "x.nii.gz", channel=4)
    paths = [str(nifti(tmp_path / f"{k}.nii.gz", four[..., k])) for k in (0, 3)]
    both = read(Row("case", parts=tuple(paths)), channels=2)[0].array
    np.testing.assert_allclose(both, four[..., [0, 3]] / 1000, atol=1e-6)


@given(st.integers(1, 5), st.sampled_from(["minmax", "percentile:1:99", "type", "header"]))
@settings(max_examples=10, deadline=None)
def test_each_sequence_has_its_own_range_of_intensities(tmp_path_factory, factor, intensity):
    """Channels of several files are these files' images, whatever the units of each; of one file they share a range."""
    folder, dtype = tmp_path_factory.mktemp("x"), np.uint8 if factor % 2 else np.uint16
    arrays = [(RNG.integers(0, 40, VOLUME.shape) * k).astype(kind) for k, kind in ((1, np.uint8), (factor, dtype))]
    paths = [str(folder / f"{k}.nii.gz") for k in range(2)]
    for path, array in zip(paths, arrays, strict=True):
        image = nibabel.Nifti1Image(array.T.copy(), np.diag([-1.0, -1, 1, 1]))
        image.header["cal_max"] = array.max()
        nibabel.save(image, path)
    (both,) = read(Row("case", parts=tuple(paths)), channels=2, intensity=intensity)
    alone = [read(path, intensity=intensity)[0] for path in paths]
    np.testing.assert_array_equal(both.array, np.concatenate([one.array for one in alone], -1))
    assert both.eight_bit == all(one.eight_bit for one in alone)
    assert both.top == (alone[0].top if alone[0].top == alone[1].top else None)
    with pytest.raises(ValueError, match=r"set data\.channels=3"):  # not one of them in place of a grey picture
        read(Row("case", parts=(*paths, paths[0])), intensity=intensity)
    (one,) = read(Row("case", parts=tuple(paths)), channel=1, intensity=intensity)
    np.testing.assert_array_equal(one.array, alone[1].array)
    np.save(folder / "joint.npy", np.stack(arrays, -1).astype(np.uint16))
    (joint,) = read(folder / "joint.npy", channels=2, intensity="minmax")
    whole = np.stack(arrays, -1).astype(float)
    np.testing.assert_allclose(joint.array, 2 * (whole - whole.min()) / np.ptp(whole) - 1, atol=1e-6)


def test_arrays_in_npz_and_hdf5(tmp_path):
    np.savez(tmp_path / "p1.npz", image=VOLUME)
    np.savez_compressed(tmp_path / "p2.npz", mask=VOLUME > 0, image=VOLUME)
    with h5py.File(tmp_path / "p3.h5", "w") as file:
        file["scans/image"], file["age"] = VOLUME, 60
    with h5py.File(tmp_path / "p4.hdf5", "w") as file:
        file["image"], file["mask"] = VOLUME, VOLUME
    for name, item in (("p1.npz", ""), ("p2.npz", "image"), ("p3.h5", ""), ("p4.hdf5", "image")):
        np.testing.assert_allclose(
            read(Row(str(tmp_path / name), item=item))[0].array[..., 0], VOLUME / 1000, atol=1e-6
        )
    for name, item in (("p2.npz", ""), ("p4.hdf5", ""), ("p2.npz", "image/9")):
        with pytest.raises(ValueError, match=r"holds (several|2) arrays|has 5 rows"):
            read(Row(str(tmp_path / name), item=item))
    rows = manifest.read(tmp_path, patients="per_image", kind="image").rows
    assert {row.item for row in rows} == {"image"} and len(rows) == 4


def test_rows_of_an_npz_are_read_in_any_order(tmp_path):
    rows = RNG.integers(0, 256, (50, 6, 8), dtype=np.uint8)
    np.savez_compressed(tmp_path / "x.npz", train_images=rows)
    for index in (0, 1, 40, 3, 49, 49, 0):
        (image,) = read(Row(str(tmp_path / "x.npz"), item=f"train_images/{index}"), (6, 8), "type")
        np.testing.assert_allclose(image.array[..., 0], rows[index] / 127.5 - 1, atol=1e-6)
