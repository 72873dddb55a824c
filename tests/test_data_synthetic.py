"""Synthetic images that others made: how they are read, and what is said of those that are not."""

import nibabel
import numpy as np
import PIL.Image
import pytest

import data
from tests.make_files import dicom
from tests.test_data_volumes import ball, nifti

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (7, 12, 16), dtype=np.uint8)


@pytest.fixture
def read(tmp_path):
    return lambda path, size=(12, 16), **how: data.read_folder(path, size, cache=tmp_path / "cache", **how)


def put(folder, images=IMAGES):
    folder.mkdir()
    for i, image in enumerate(images):
        PIL.Image.fromarray(image).save(folder / f"x{i}.png")
    return folder


def scaled(images):
    return np.asarray(images, np.float32)[..., None] / 127.5 - 1


# ---- what is read


@pytest.mark.parametrize("form", ["npy", "npz", "channels first"])
def test_one_file_of_many_images(tmp_path, read, form):
    path = tmp_path / ("x.npz" if form == "npz" else "x.npy")
    images = IMAGES[:, None] if form == "channels first" else IMAGES
    np.savez_compressed(path, samples=images) if form == "npz" else np.save(path, images)
    made = read(path)
    assert made.ids.tolist() == [f"{path.name}#{i:06d}" for i in range(7)] and made.notes == ()
    np.testing.assert_allclose(np.stack(list(made.images)), scaled(IMAGES), atol=1e-6)


def test_volumes_of_one_file(tmp_path, read):
    volumes = RNG.uniform(-1, 1, (3, 5, 6, 7)).astype(np.float32)
    np.save(tmp_path / "x.npy", volumes)
    made = read(tmp_path / "x.npy", (5, 6, 7), intensity="window:-1:1")
    np.testing.assert_allclose(np.stack(list(made.images))[..., 0], volumes, atol=4e-5)


@pytest.mark.parametrize(
    "name, told",
    [
        ("absent", "absent: there are no synthetic images; correct audit.synthetic, or run --mode=sample first"),
        ("empty", "empty: no images in it; correct audit.synthetic"),
        ("bitmaps", "bitmaps: no images in it, but 2 files are of kinds that are not read: .bmp (2)"),
        ("x.txt", "x.txt: is no folder of images and no .npy or .npz of many; correct audit.synthetic"),
        ("flat.npy", "flat.npy: has 2 axes, so it is not a stack of images; correct audit.synthetic"),
        ("two.npz", "two.npz: holds several arrays; say which one by a file with the images alone"),
        ("cut.npy", "cut.npy: cannot be read as .npy"),
    ],
)
def test_a_wrong_path_is_one_line_that_names_the_key(tmp_path, read, name, told):
    for folder in ("empty", "bitmaps"):
        (tmp_path / folder).mkdir()
    for i in range(2):
        PIL.Image.fromarray(IMAGES[i]).save(tmp_path / "bitmaps" / f"{i}.bmp")
    (tmp_path / "x.txt").write_text("")
    np.save(tmp_path / "flat.npy", IMAGES[0])
    np.savez(tmp_path / "two.npz", a=IMAGES, b=IMAGES)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "flat.npy").read_bytes()[:9])
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        read(tmp_path / name)
    assert told in str(error.value) and "\n" not in str(error.value) and "data.path" not in str(error.value)


def test_errors_name_the_keys_of_the_reading(tmp_path, read):
    np.save(tmp_path / "x.npy", IMAGES.astype(np.float32))
    with pytest.raises(ValueError, match=r"no range to divide by; set audit\.reading\.intensity to minmax"):
        read(tmp_path / "x.npy")
    with pytest.raises(ValueError, match=r"correct audit\.reading\.channel$"):
        np.save(tmp_path / "y.npy", RNG.uniform(size=(7, 12, 16, 2)))
        read(tmp_path / "y.npy", channel=5, intensity="window:0:1")


def test_another_spacing_is_resampled_to_the_datas(tmp_path, read):
    """A ball in a NIfTI of 0.5 mm, asked for at 0.4 mm: as the same ball on a grid of 0.4 mm."""
    (tmp_path / "made").mkdir()
    nifti(tmp_path / "made" / "x.nii.gz", ball((20,) * 3, (0.5,) * 3, radius=3.0), (0.5,) * 3)
    how = dict(intensity="window:-1000:1000", fit="exact")
    made = read(tmp_path / "made", (20,) * 3, spacing=(0.4,) * 3, **how)
    wanted = ball((20,) * 3, (0.4,) * 3, radius=3.0) / 1000
    assert made.spacing == pytest.approx((0.4,) * 3, rel=1e-4)
    assert abs(made.images[0][..., 0] - wanted)[2:-2, 2:-2, 2:-2].max() < 0.1
    assert abs(read(tmp_path / "made", (20,) * 3, **how).images[0][..., 0] - wanted).max() > 0.2  # in its own voxels
    assert not [note for note in made.notes if "do not say" in note]


def test_an_unknown_spacing_is_said(tmp_path, read):
    made = read(put(tmp_path / "x"), spacing=(0.4, 0.4))
    assert made.notes[0].startswith(
        "7 of 7 synthetic images do not say their spacing, which is taken for that of the data"
    )
    np.testing.assert_allclose(np.stack(list(made.images)), scaled(IMAGES), atol=1e-6)
    assert read(tmp_path / "x").notes == ()


def test_volumes_are_cut_and_pictures_are_not(tmp_path, read):
    made = read(put(tmp_path / "pictures"), slices="z")
    assert len(made.ids) == 7
    (tmp_path / "volumes").mkdir()
    nifti(tmp_path / "volumes" / "v.nii.gz", IMAGES.astype(np.int16))
    cut = read(tmp_path / "volumes", slices="z", intensity="window:0:255")
    np.testing.assert_allclose(np.stack(list(cut.images)), scaled(IMAGES), atol=4e-5)


def test_sections_of_a_volume_are_one_draw(tmp_path, read):
    (tmp_path / "made").mkdir()
    for i in range(2):
        nifti(tmp_path / "made" / f"v{i}.nii.gz", np.roll(IMAGES, i, 0).astype(np.int16))
    made = read(tmp_path / "made", slices="z", intensity="window:0:255")
    assert made.ids[0] == "v0.nii.gz#z000" and made.patients.tolist() == ["v0.nii.gz"] * 7 + ["v1.nii.gz"] * 7
    assert list(made.files) == made.patients.tolist() and made.unread == ""
    np.save(tmp_path / "x.npy", np.stack([IMAGES, IMAGES[::-1]]))
    made = read(tmp_path / "x.npy", slices="z")
    assert made.patients.tolist() == ["x.npy#000000"] * 7 + ["x.npy#000001"] * 7 and set(made.files) == {"x.npy"}
    made = read(put(tmp_path / "pictures", IMAGES[:3]))
    assert made.patients.tolist() == list(made.files) == made.ids.tolist()
    some = data.subset(made, np.array([True, False, True]))
    assert list(some.files) == some.ids.tolist() == ["x0.png", "x2.png"] and len(some.digests) == 2


def test_a_pattern_finds_the_draw_of_a_file(tmp_path, read):
    put(put(tmp_path / "made") / "draw1")
    made = read(tmp_path / "made", draw="^(draw1|x)")
    assert made.patients.tolist() == ["draw1"] * 7 + ["x"] * 7 and made.files[0] == "draw1/x0.png"
    assert read(tmp_path / "made", draw=r"x\d").patients.tolist() == [f"x{i}" for i in range(7)] * 2
    for pattern, told in (
        ("draw1", r"made: audit\.reading\.draw 'draw1' finds nothing in x0\.png; correct it"),
        ("(", "is not a"),
    ):
        with pytest.raises(ValueError, match=told) as error:
            read(tmp_path / "made", draw=pattern)
        assert "\n" not in str(error.value) and "audit.reading.draw" in str(error.value)


def test_files_that_hold_more_than_was_read(tmp_path, read):
    """So that a release does not hand out what nobody looked at: other sections, channels, or what lies beyond the frame."""
    (tmp_path / "v").mkdir()
    padded = np.concatenate([np.zeros((1, 12, 16), np.uint8), IMAGES])  # a constant section shows nothing
    nifti(tmp_path / "v" / "x.nii.gz", padded.astype(np.int16))
    unread = lambda path, *size, **how: read(path, *size, intensity="window:0:255", **how).unread
    for slices in ("z", "z:0%:100%", "z:0%:100%:1"):
        assert unread(tmp_path / "v", slices=slices) == ""
    for slices in ("z:2:5", "z:0:7", "z:0%:100%:2", "z:10%:100%"):
        assert unread(tmp_path / "v", slices=slices).startswith(f"audit.reading.slices={slices} takes some sections")
    assert unread(tmp_path / "v", (8, 12, 16)) == unread(tmp_path / "v", (9, 12, 20), fit="exact") == ""
    shown = "the files of 1 of 1 synthetic images show more than was read"
    for size, fit in (((8, 12, 12), "exact"), ((8, 12, 12), "crop"), ((9, 10, 20), "exact")):
        assert unread(tmp_path / "v", size, fit=fit).startswith(shown)
    put(tmp_path / "p")
    assert unread(tmp_path / "p", slices="z:2:5", channel=0) == ""  # pictures of one channel
    np.save(tmp_path / "c.npy", np.stack([IMAGES, IMAGES[::-1]], -1))
    assert unread(tmp_path / "c.npy", channels=2) == ""
    assert unread(tmp_path / "c.npy", channel=1).startswith("the files of 7 of 7")


# ---- what is said


def test_files_that_are_not_judged_are_counted(tmp_path, read):
    folder = put(tmp_path / "patient")
    PIL.Image.fromarray(IMAGES[0]).save(folder / "secret.bmp")
    PIL.Image.fromarray(IMAGES[0]).save(folder / "secret.gif")
    (folder / "secret.txt").write_text("a prompt")
    (folder / "secret.png").write_bytes(b"")
    dicom(folder / "secret", IMAGES[0])
    PIL.Image.fromarray(np.tile(IMAGES[0], (2, 2))).save(folder / "large.png")
    with pytest.raises(ValueError, match=r"secret\.png: the file is empty"):
        read(folder)
    made = read(folder, on_error="skip")
    assert len(made.ids) == 8
    first = [note.partition(": ")[0] for note in made.notes]
    assert first == [
        "3 files are of kinds that are not read",
        "1 of 9 synthetic images could not be read and are left out; the first",
        "1 of 8 synthetic images had another shape or spacing and were resampled to (12, 16)",
    ]
    assert not any("secret" in part or "patient" in part for part in first)
    assert ".bmp (1), .gif (1), DICOM without a suffix (1)" in made.notes[0] and "secret.png" in made.notes[1]


@pytest.mark.parametrize("top, told", [(1.0, True), (1200.0, False)])
def test_images_in_other_units_are_told(tmp_path, read, top, told):
    np.save(tmp_path / "x.npy", IMAGES.astype(np.float32) / 255 * top)
    made = read(tmp_path / "x.npy", intensity="window:-200:1000")
    said = [note for note in made.notes if "of the range of intensities" in note]
    assert bool(said) == told and (not told or said[0].startswith("the synthetic images use 0.1 % of the range"))


def test_real_images_left_out_are_in_the_notes(tmp_path):
    folder = put(tmp_path / "x")
    PIL.Image.fromarray(IMAGES[0]).save(folder / "y.bmp")
    nibabel.save(nibabel.Nifti1Image(IMAGES[0][..., None], np.eye(4)), folder / "z.img.nii")
    (folder / "cut.png").write_bytes(b"")
    sets = data.load(
        path=folder,
        patients="per_image",
        size=(12, 16),
        on_error="skip",
        fractions={"train": 1.0},
        cache=tmp_path / "c",
    )
    notes = sets["train"].notes
    assert any(note.startswith("1 files are of kinds that are not read: .bmp (1)") for note in notes)
    assert any(note.startswith("1 of 9 images could not be read and are left out; the first: ") for note in notes)
