"""What is written is read back: every format, policy, rank and depth."""

import nibabel
import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from data import export
from tests import make_files

INTENSITIES = ["type", "minmax", "percentile:1:99", "window:-1000:400", "window:0:0.25", ("window", -3, 7)]
TOPS = [None, 255, 4095, 65535, 100]


def written_and_read(folder, images, form, size):
    folder.mkdir()
    for i, image in enumerate(images):
        export.write_image(folder / f"{i:03d}{form.suffix}", image, form)
    back = data.read_folder(folder, size, channels=images.shape[-1], intensity=form.reading, cache=folder / "cache")
    return np.stack([back.images[i] for i in range(len(images))])


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(export.FORMATS),
    size=st.one_of(st.tuples(*[st.integers(2, 9)] * 2), st.tuples(*[st.integers(2, 7)] * 3)),
    channels=st.sampled_from([1, 1, 1, 3]),
    intensity=st.sampled_from(INTENSITIES),
    top=st.sampled_from(TOPS),
    seed=st.integers(0, 1000),
)
def test_read_folder_reads_back_the_same_images(tmp_path_factory, kind, size, channels, intensity, top, seed):
    args = dict(channels=channels, intensity=intensity, top=top)
    try:
        form = export.form(kind, size, **args)
    except ValueError as error:
        assert kind in ("png8", "png16") and (len(size) == 3 or channels == 3), error
        return
    images = np.random.default_rng(seed).uniform(-1, 1, (2, *size, channels)).astype(np.float32)
    images.reshape(-1)[:2] = -1, 1
    back = written_and_read(tmp_path_factory.mktemp("x") / "images", images, form, size)
    step = 0 if form.dtype == "float32" else 2 / (form.high - form.low)
    # half a step of the file and half of the 16 bits in which prepared images are kept
    assert np.abs(back - images).max() <= step / 2 + 1 / 65535 + 1e-6


@pytest.mark.parametrize("kind", ["nifti", "npy"])
def test_a_window_is_undone_to_the_datas_units(tmp_path, kind):
    image = np.float32([[-1, 0], [0.5, 1]]).reshape(1, 2, 2, 1)
    form = export.form(kind, (1, 2, 2), intensity="window:-1000:400")
    path = tmp_path / f"x{form.suffix}"
    export.write_image(path, image, form)
    if kind == "npy":
        stored = np.load(path)[..., 0]
    else:
        stored = nibabel.load(path).get_fdata()[::-1, ::-1].swapaxes(0, 2)
    np.testing.assert_allclose(stored, [[[-1000, -300], [50, 400]]], atol=1e-3)


def test_a_type_is_undone_to_its_integers(tmp_path):
    image = np.linspace(-1, 1, 4096, dtype=np.float32).reshape(64, 64, 1)
    form = export.form("npy", (64, 64), intensity="type", top=4095)
    export.write_image(tmp_path / "x.npy", image, form)
    stored = np.load(tmp_path / "x.npy")
    assert stored.dtype == np.uint16 and stored.ravel().tolist() == list(range(4096))


@pytest.mark.parametrize("kind", ["npy", "auto"])
def test_two_channels_come_back(tmp_path, kind):
    images = np.random.default_rng(0).uniform(-1, 1, (2, 6, 7, 2)).astype(np.float32)
    form = export.form(kind, (6, 7), channels=2)
    assert form.kind == "npy" and form.dtype == "uint16"
    back = written_and_read(tmp_path / "x", images, form, (6, 7))
    np.testing.assert_allclose(back, images, atol=2 / 65535)


def test_export_undoes_what_a_data_set_was_read_by(tmp_path):
    """12-bit DICOM is written in 12 bits again, and volumes that share a place lie there again."""
    deep = np.random.default_rng(0).integers(0, 4096, (3, 6, 7), dtype=np.uint16)
    (tmp_path / "xray").mkdir()
    for i, image in enumerate(deep):
        make_files.dicom(tmp_path / "xray" / f"p{i}.dcm", image, bits=12)
    load = lambda path, size, **how: data.load(
        path=path, size=size, patient_pattern=r"p\d", fractions={"train": 1.0}, cache=tmp_path / "cache", **how
    )["train"]
    found = load(tmp_path / "xray", (6, 7))
    assert found.top == 4095
    form = export.form("npy", (6, 7), intensity="type", top=found.top)
    export.write_image(tmp_path / "x.npy", found.images[0], form)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy")[..., 0], deep[0])
    make_files.dicom(tmp_path / "xray" / "p3.dcm", deep[0], bits=16)
    assert load(tmp_path / "xray", (6, 7)).top is None


@pytest.mark.parametrize(
    "size, how",
    [
        ((8, 10, 12), {}),
        ((10, 7, 14), {"fit": "exact"}),
        ((4, 5, 6), {"fit": "stretch"}),
        ((9, 9, 9), {"spacing": (2.0,) * 3}),
    ],
)
def test_exported_volumes_lie_where_the_data_lay(tmp_path, size, how):
    """A bright voxel is at the same place of the body, in mm, in the file read and in the file written."""
    turn = np.radians(10)
    affine = np.array([[1.5 * np.cos(turn), -2 * np.sin(turn), 0, -20], [1.5 * np.sin(turn), 2 * np.cos(turn), 0, 9]])
    affine = np.vstack([affine, [0, 0, 3.0, -30], [0, 0, 0, 1]])
    ramps = np.meshgrid(*(np.arange(n) for n in (12, 10, 8)), indexing="ij")  # as NIfTI counts
    for i in range(2):
        places = np.einsum("ij,j...->i...", affine[:3], np.stack([*ramps, np.ones((12, 10, 8))]))
        image = nibabel.Nifti1Image(places[i].astype(np.float32), affine)  # each voxel holds its own x, or y
        nibabel.save(image, tmp_path / f"p{i}.nii.gz")
    found = data.load(
        path=tmp_path, layout="folder", size=size, patient_pattern=r"p\d", intensity="window:-60:60",
        fractions={"train": 1.0}, cache=tmp_path / "cache", **how,
    )["train"]  # fmt: skip
    form = export.form("nifti", size, intensity="window:-60:60", affine=export.placed(np.array(found.affine), size))
    for i in range(2):
        export.write_image(tmp_path / "out.nii.gz", found.images[i], form)
        stored = nibabel.load(tmp_path / "out.nii.gz")
        values = stored.get_fdata()
        at = np.stack([*np.meshgrid(*(np.arange(n) for n in values.shape), indexing="ij"), np.ones(values.shape)])
        places = np.einsum("ij,j...->i...", stored.affine[:3], at)
        back = np.einsum("ij,j...->i...", np.linalg.inv(affine)[:3], np.concatenate([places, at[3:]]))
        inside = np.all([(b >= 2) & (b <= n - 3) for b, n in zip(back, (12, 10, 8), strict=True)], axis=0)
        assert inside.any()
        resampled = "spacing" in how or how.get("fit") == "stretch"
        np.testing.assert_allclose(values[inside], places[i][inside], atol=0.3 if resampled else 0.01)  # mm


def test_png_depths(tmp_path):
    image = np.linspace(-1, 1, 512, dtype=np.float32).reshape(16, 32, 1)
    for kind, mode, top in (("png8", "L", 255), ("png16", "I;16", 65535)):
        export.write_image(tmp_path / "x.png", image, export.form(kind, (16, 32)))
        with PIL.Image.open(tmp_path / "x.png") as opened:
            assert opened.mode == mode and np.asarray(opened).max() == top


def test_nifti_says_where_it_lies(tmp_path):
    """A voxel of ours is where the affine puts it: D superior, H posterior, W left."""
    image = np.full((4, 5, 6, 1), -1, np.float32)
    image[3, 0, 0] = 1  # most superior, most anterior, most right
    form = export.form("nifti", (4, 5, 6), intensity="minmax", spacing=(3.0, 2.0, 0.5))
    export.write_image(tmp_path / "x.nii.gz", image, form)
    stored = nibabel.load(tmp_path / "x.nii.gz")
    assert nibabel.aff2axcodes(stored.affine) == ("R", "A", "S")
    assert stored.header.get_zooms() == (0.5, 2.0, 3.0)
    at = np.argwhere(stored.get_fdata() == 1)[0]
    np.testing.assert_allclose(stored.affine @ [*at, 1], [0.5 * 2.5, 2.0 * 2, 3.0 * 1.5, 1])
    given_affine = np.array([[0.5, 0, 0, -90], [0, 2, 0, -126], [0, 0, 3, -72], [0, 0, 0, 1.0]])
    form = export.form("nifti", (4, 5, 6), affine=given_affine)
    export.write_image(tmp_path / "y.nii.gz", image, form)
    np.testing.assert_array_equal(nibabel.load(tmp_path / "y.nii.gz").affine, given_affine)


def test_real_volumes_come_back(tmp_path, real_data):
    """Prepared real volumes, written and read, differ by the 16 bits they are kept in; and their spacing is kept."""
    size, folder = (16, 24, 16), real_data / "msd_hippocampus"
    reading = dict(size=size, intensity="percentile:0.5:99.5", cache=tmp_path / "cache")
    source = tmp_path / "few"
    source.mkdir()
    for path in sorted(folder.glob("*.nii.gz"))[:4]:
        (source / path.name).symlink_to(path)
    few = data.read_folder(source, **reading)
    images = np.stack([few.images[i] for i in range(4)])
    form = export.form("auto", size, intensity="percentile:0.5:99.5", spacing=(2.0, 2.0, 2.0))
    back = written_and_read(tmp_path / "out", images, form, size)
    np.testing.assert_allclose(back, images, atol=1 / 65535 + 1e-6)


@pytest.mark.parametrize("size", [(4, 4), (4, 4, 4)])
def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch, size):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export.os, "replace", full)
    form = export.form("auto", size)
    with pytest.raises(OSError, match="No space"):
        export.write_image(tmp_path / f"x{form.suffix}", np.zeros((*size, 1), np.float32), form)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "size", "channels", "told"),
    [
        ("tiff", (8, 8), 1, "config.sample.format must be one of auto, png8, png16, nifti, npy, not 'tiff'"),
        ("png8", (8, 8), 2, "cannot hold 2D images of 2 channels; use nifti or npy"),
        ("png8", (8, 8, 8), 1, "cannot hold 3D images of 1 channels; use nifti or npy"),
        ("png16", (8, 8), 3, "cannot hold 2D images of 3 channels"),
        ("npy", (8, 8), 7, "cannot hold 2D images of 7 channels; no format of ours holds more than 4"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(kind, size, channels, told):
    with pytest.raises(ValueError, match=told):
        export.form(kind, size, channels=channels)
