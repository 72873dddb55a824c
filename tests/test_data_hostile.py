"""Files, folders and tables that are not what they say: one line that names them, or left out and counted."""

import builtins
import contextlib
import csv
import errno
import gzip
import os
import resource
import time

import numpy as np
import PIL.Image
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from data import files, listing, manifest, splits
from tests import make_files
from tests.make_files import EIGHT

SIZE = (12, 16)


def read(path, **settings):
    return files.read_image(str(path), size=SIZE, **settings).array


# ---- files


def hostile(folder):
    """Yields (path, words its error must have)."""

    def put(name, content):
        (folder / name).write_bytes(content)
        return folder / name

    good = make_files.picture(folder / "good.png", EIGHT).read_bytes()
    yield put("empty.png", b""), "is empty"
    yield put("cut.png", good[: len(good) // 2]), "cannot be read as .png"
    yield put("text.png", b"not an image\n" * 9), "cannot be read as .png"
    yield put("text.jpg", b"\xff\xd8\xff\xe0 secret"), "cannot be read as .jpg"
    yield put("png.nii.gz", good), "cannot be read as .nii.gz"
    yield put("png.dcm", good), "cannot be read as .dcm"
    yield put("png.npy", good), "cannot be read as .npy"
    yield put("png.npz", good), "cannot be read as .npz"
    yield put("png.h5", good), "cannot be read as .h5"
    yield put("text.nrrd", b"NRRD0004\ntype: secret\n"), "cannot be read as .nrrd"
    yield put("text.mha", b"ObjectType = secret\n"), "cannot be read as .mha"
    yield put("x.bmp", good), "no reader"
    yield folder / "absent.png", "no such file"
    os.symlink(folder / "loop.png", folder / "loop.png")
    yield folder / "loop.png", "no such file"
    (folder / "folder.png").mkdir()
    yield folder / "folder.png", "no such file"
    for name, array, words in [
        ("object.npy", np.array([{"name": "secret"}]), "cannot be read as .npy"),
        ("complex.npy", np.ones(SIZE, complex), "instead of real numbers"),
        ("nan.npy", np.where(np.eye(*SIZE), np.nan, 1), "NaN or infinite"),
        ("inf.npy", np.full(SIZE, 1e300), "NaN or infinite"),
        ("3d.npy", np.ones((9, *SIZE), np.uint8), "has shape 9x12x16x1"),
        ("none.npy", np.ones((0, 16), np.uint8), "has shape 0x16x1"),
        ("flat.npy", np.full(SIZE, 7, np.uint8), "is constant"),
    ]:
        np.save(folder / name, array, allow_pickle=True)
        yield folder / name, words
    PIL.Image.fromarray(np.stack([EIGHT] * 3, -1)).convert("CMYK").save(folder / "cmyk.tif")
    yield folder / "cmyk.tif", "is stored as CMYK"


def test_hostile_files_are_one_line_without_their_content(tmp_path):
    for path, words in hostile(tmp_path):
        with pytest.raises(ValueError) as error:
            read(path)
        message = str(error.value)
        assert message.startswith(f"{path}: ") and words in message and ";" in message, message
        assert "\n" not in message and "secret" not in message and len(message) < 300
    for policy in ("type", "minmax", "percentile:1:99", "window:0:255"):
        with pytest.raises(ValueError, match="is constant"):
            read(tmp_path / "flat.npy", intensity=policy)


def huge(folder):
    """Small files whose headers promise terabytes, and small files that do unpack to gigabytes."""
    import h5py
    import nibabel

    head = b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, 'shape': (999999, 999999), }"
    yield "huge.npy", head.ljust(127) + b"\n" + b"0" * 64
    make_files.picture(folder / "x.png", EIGHT)
    png = bytearray((folder / "x.png").read_bytes())
    png[16:24] = (60000).to_bytes(4, "big") * 2
    yield "bomb.png", bytes(png)
    PIL.Image.fromarray(np.zeros((9000, 9000), np.uint8)).save(folder / "real.png", compress_level=9)  # 81 MB in 78 kB
    yield "real.png", (folder / "real.png").read_bytes()
    nibabel.save(nibabel.Nifti1Image(EIGHT[:, :, None], np.eye(4)), folder / "x.nii.gz")
    nibabel.save(nibabel.Nifti1Image(EIGHT[:, :, None], np.eye(4)), folder / "x.nii")
    nii = bytearray((folder / "x.nii").read_bytes())
    nii[42:48] = np.array([30000] * 3, "<i2").tobytes()
    yield "huge.nii", bytes(nii)
    yield "huge.nii.gz", gzip.compress(bytes(nii))
    yield (
        "huge.nrrd",
        b"NRRD0004\ntype: double\ndimension: 3\nsizes: 99999 99999 9999\nencoding: gzip\nendian: little\n\n"
        + bytes(64),
    )
    yield (
        "huge.mha",
        b"NDims = 3\nDimSize = 99999 99999 9999\nElementType = MET_DOUBLE\nElementDataFile = LOCAL\n" + bytes(64),
    )
    np.savez(folder / "x.npz", image=EIGHT)
    yield "huge.npz", (folder / "x.npz").read_bytes().replace(b"(12, 16), }    ", b"(12, 999999), }")
    with h5py.File(folder / "huge.h5", "w") as file:
        file.create_dataset("image", (99999, 99999, 9999), "f8", chunks=(1, 8, 8))
    yield "huge.h5", (folder / "huge.h5").read_bytes()
    for name, syntax in (
        ("raw.dcm", make_files.ExplicitVRLittleEndian),
        ("rle.dcm", make_files.RLELossless),
        ("j2k.dcm", make_files.JPEG2000Lossless),
    ):
        make_files.dicom(folder / name, EIGHT, syntax=syntax)
        content = (folder / name).read_bytes()
        yield (
            name,
            content.replace(b"US\x02\x00\x0c\x00", b"US\x02\x00\xff\xff").replace(
                b"US\x02\x00\x10\x00", b"US\x02\x00\xff\xff"
            ),
        )


def test_what_is_promised_is_not_allocated(tmp_path):
    files_ = dict(huge(tmp_path))
    read(make_files.dicom(tmp_path / "warm.dcm", EIGHT, syntax=make_files.JPEG2000Lossless))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, content in files_.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError) as error:
            read(tmp_path / name)
        assert str(error.value).startswith(f"{tmp_path / name}: ") and "\n" not in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Name -> bytes of one readable file of each kind."""
    paths = make_files.everything(tmp_path_factory.mktemp("good"))
    for path in paths:
        assert read(path).shape == (*SIZE, 1)  # undamaged, all are read
    return {path.name: path.read_bytes() for path in paths}


@st.composite
def damages(draw):
    """(kind, where as a fraction of the file, bytes): changed, cut off, or put in between."""
    where = draw(st.floats(0, 1) | st.floats(0, 0.1))  # headers are short
    return draw(st.sampled_from(["change", "change", "cut", "insert"])), where, draw(st.binary(min_size=1, max_size=8))


def damaged(content, damage):
    kind, where, put = damage
    at = int(where * len(content))
    return {
        "change": content[:at] + put + content[at + len(put) :],
        "cut": content[:at],
        "insert": content[:at] + put + content[at:],
    }[kind]


@settings(max_examples=600, deadline=None)
@given(st.data())
def test_damaged_files_are_read_or_refused(tmp_path_factory, good, draw):
    """Any file, changed at random: a finite image in range, or one line that names it; in bounded time and memory."""
    name = draw.draw(st.sampled_from(sorted(good)))
    content = good[name]
    for damage in draw.draw(st.lists(damages(), min_size=1, max_size=4)):
        content = damaged(content, damage)
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        image = read(path, intensity=draw.draw(st.sampled_from(["type", "minmax", "percentile:1:99"])))
    except ValueError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error) and len(str(error)) < 400
    else:
        assert image.shape == (*SIZE, 1) and image.dtype == np.float32
        assert np.isfinite(image).all() and abs(image).max() <= 1
    assert time.monotonic() - begin < 60 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_a_decoder_that_ends_its_process_is_one_line(tmp_path, monkeypatch):
    from data import sandbox

    path = tmp_path / "x.nrrd"
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(EIGHT), str(path))
    assert read(path).shape == (*SIZE, 1)
    (child,) = sandbox._child
    child.kill()
    with pytest.raises(ValueError, match=r"x\.nrrd: cannot be read as \.nrrd \(Died\)"):
        read(path)
    assert read(path).shape == (*SIZE, 1)  # by a new process
    monkeypatch.setattr(sandbox, "SECONDS", 0.2)
    with pytest.raises(sandbox.Died):
        sandbox.call(time.sleep, 60)


def test_truncated_files_of_every_kind_are_refused(tmp_path, good):
    """Never half an image: one line, wherever the file ends."""
    for name, content in good.items():
        for kept in (1, len(content) // 3, len(content) * 2 // 3):
            (tmp_path / name).write_bytes(content[:kept])
            with pytest.raises(ValueError, match=f"^{tmp_path / name}: "):
                read(tmp_path / name)


# ---- folders and tables


def picture_folder(root, count=6):
    root.mkdir(parents=True)
    for i in range(count):
        make_files.picture(root / f"p{i}.png", np.roll(EIGHT, i))
    return root


def load(root, **how):
    given = dict(patient_pattern=r"p\d", size=SIZE, fractions={"train": 1.0}, cache=root.parent / "cache")
    return data.load(path=root, **(given | how))["train"].ids.tolist()


def test_skipping_leaves_out_and_counts(tmp_path, caplog, monkeypatch):
    from absl import logging

    monkeypatch.setattr(logging.get_absl_logger(), "propagate", True)
    root = picture_folder(tmp_path / "x")
    (root / "p1.png").write_bytes(b"")
    (root / "p2.png").write_bytes(b"text")
    open(os.fsencode(root) + b"/p7\xff.png", "wb").close()
    with pytest.raises(ValueError, match=r"the name '.*p7.udcff.png' is not UTF-8; rename it"):
        load(root)
    assert load(root, on_error="skip") == ["p0.png", "p3.png", "p4.png", "p5.png"]
    assert (
        "2 of 6 images could not be read and are left out" in caplog.text
        and "1 files or lines are left out" in caplog.text
    )
    leftovers = [name for name in os.listdir(tmp_path / "cache") if "partial" in name]
    assert leftovers == []


def test_whatever_is_hostile_is_skipped_and_counted(tmp_path):
    """One good file among all the hostile ones, with nothing half-written after an error and after skipping."""
    root = tmp_path / "x"
    root.mkdir()
    hostile_ = {path.name for path, _ in hostile(root)} - {"absent.png", "folder.png", "x.bmp"}  # no files of images
    cache = tmp_path / "cache"
    load_ = lambda on_error: data.load(
        path=root, patient_pattern=".*", size=SIZE, fractions={"train": 1.0}, cache=cache, on_error=on_error
    )["train"]
    with pytest.raises(ValueError, match=rf"^{root}/.*; ") as error:
        load_("raise")
    assert "\n" not in str(error.value) and "secret" not in str(error.value)
    assert not [name for name in os.listdir(cache) if name.endswith(("-raise", "-skip"))]  # nothing to be used
    found = load_("skip")
    assert found.ids.tolist() == ["good.png"] and np.isfinite(found.images[0]).all()
    assert found.notes[0].startswith("1 files are of kinds that are not read: .bmp (1) in ")
    assert found.notes[1].startswith(
        f"{len(hostile_)} of {len(hostile_) + 1} images could not be read and are left out"
    )
    assert not [name for name in os.listdir(cache) if "partial" in name]


def test_what_may_not_be_read(tmp_path, monkeypatch):
    """As a user who may not; root may read everything, so the refusal is simulated."""
    root = picture_folder(tmp_path / "x")
    picture_folder(root / "locked")
    (tmp_path / "m.csv").write_text("path,patient_id\nx/p0.png,1\n")
    denied = lambda path: PermissionError(13, "Permission denied", os.fspath(path))
    real_scandir, real_open = os.scandir, builtins.open

    def scandir(path="."):
        if str(path).endswith("locked"):
            raise denied(path)
        return real_scandir(path)

    def open_(path, *args, **kwargs):
        if str(path).endswith(("p3.png", "m.csv")):
            raise denied(path)
        return real_open(path, *args, **kwargs)

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(builtins, "open", open_)
    with pytest.raises(ValueError, match=r"x/locked: cannot be listed \(Permission denied\); mend its permissions"):
        load(root)
    assert len(load(root, on_error="skip")) == 5
    with pytest.raises(ValueError, match=r"m\.csv: cannot be read \(Permission denied\); mend its permissions"):
        manifest.read(tmp_path / "m.csv")
    monkeypatch.setattr(os, "scandir", real_scandir)
    with pytest.raises(ValueError, match=r"p3\.png: cannot be read as \.png \(PermissionError\)"):
        load(root, patient_pattern=".*", cache=tmp_path / "other")
    monkeypatch.setattr(os, "listdir", lambda path: (_ for _ in ()).throw(denied(path)))
    with pytest.raises(ValueError, match=r"x: cannot be read \(Permission denied\)"):
        manifest.read(root)


@pytest.mark.parametrize(
    "failure, told",
    [
        (OSError(errno.EIO, "x"), r"cannot be read now \(Input/output error\); run the command again"),
        (OSError(errno.ESTALE, "x"), r"cannot be read now \(Stale file handle\)"),
        (MemoryError(), r"memory ran out as it was read; lower data\.workers, or remove it"),
    ],
)
def test_a_failing_machine_is_no_unreadable_file(tmp_path, monkeypatch, failure, told):
    """Under 'skip' it is an error: left out, it would be remembered as damaged once the disk is there again."""
    root = picture_folder(tmp_path / "x")
    real = files.readers.READERS[".png"]

    def reader(path, item=""):
        if path.endswith("p3.png"):
            raise failure
        return real(path, item)

    monkeypatch.setitem(files.readers.READERS, ".png", reader)
    with pytest.raises(ValueError, match=rf"p3\.png: {told}") as error:
        load(root, on_error="skip")
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    assert len(load(root, on_error="skip")) == 6


def test_symbolic_links_in_circles(tmp_path):
    root = picture_folder(tmp_path / "x")
    os.symlink(root, root / "again")
    os.symlink(root / "b", root / "a")
    os.symlink(root / "a", root / "b")
    os.symlink(tmp_path / "gone", root / "p9.png")
    with pytest.raises(ValueError, match=r"p9\.png: there is no such file"):
        load(root)
    assert len(load(root, on_error="skip")) == 6
    with pytest.raises(FileNotFoundError, match=r"no such file or folder; correct data.path"):
        load(root / "a")


@pytest.mark.parametrize(
    "lines, kept",
    [
        (["a.png,1", "b.png"], 1),
        (["a.png,1", "b.png,2,3"], 1),
        (["a.png,1", ",2"], 1),
        (["a.png,1", "b.png,2", "./b.png,3", "c.png,4"], 2),  # whose is b.png?
    ],
)
def test_lines_that_cannot_be(tmp_path, lines, kept):
    path = tmp_path / "m.csv"
    path.write_text("\n".join(["path,patient_id", *lines]) + "\n")
    with pytest.raises(ValueError) as error:
        manifest.read(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    found = manifest.read(path, on_error="skip")
    assert len(found.rows) == kept and "1 files or lines are left out; the first: " in found.notes[0]


def test_mixed_shapes_are_fitted_and_counted_and_mixed_ranks_are_refused(tmp_path):
    root = picture_folder(tmp_path / "x")
    make_files.picture(root / "p6.png", np.tile(EIGHT, (2, 3)))
    assert len(load(root)) == 7
    np.save(root / "p7.npy", np.stack([EIGHT] * 5))
    with pytest.raises(ValueError, match=r"p7\.npy: has shape 5x12x16x1"):
        load(root)
    assert len(load(root, on_error="skip")) == 7


# ---- the patient never leaks

NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="\x00\r\n", exclude_categories=["Cs"]), min_size=1, max_size=6
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(NAMES, st.sampled_from(["", "", "train", "val", "test"])), min_size=1, max_size=80),
    st.randoms(),
    st.integers(0, 9),
)
def test_no_patient_is_in_two_splits_of_any_manifest(tmp_path_factory, rows, random, seed):
    """Random tables, read and split in two orders and with more patients: everyone is in one split, and always the same."""
    rows = [(f"{i}.png", patient.strip(), split) for i, (patient, split) in enumerate(rows) if patient.strip()]
    said = {patient: split for _, patient, split in rows if split}
    path = tmp_path_factory.getbasetemp() / "leak.csv"

    def split_of(rows):
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([("path", "patient_id", "split"), *rows])
        found = manifest.read(path).rows
        assert [(r.path, r.patient, r.split) for r in found] == rows
        patients, given_ = [r.patient for r in found], [r.split for r in found]
        return list(zip(patients, splits.assign(patients, given_, seed=seed).tolist(), strict=True))

    if not rows:
        return
    if any(split and split != said[patient] for _, patient, split in rows):
        with pytest.raises(ValueError, match=r"patient .* is in the splits"):
            split_of(rows)
        return
    first = split_of(rows)
    table = dict(first)
    assert all(table[patient] == split for patient, split in first)  # one patient, one split
    random.shuffle(rows)
    assert dict(split_of(rows)) == table and dict(split_of(rows)) == table
    half = rows[: len(rows) // 2 + 1]
    if {r[2] for r in half} == {r[2] for r in rows}:  # which splits are given decides what is carved out of them
        present = dict(split_of(half))
        if {p for p, s in said.items() if p in present} == {r[1] for r in half if r[2]}:
            assert all(table[patient] == split for patient, split in present.items())


def test_what_was_left_out_is_counted_once():
    ask = listing.Ask(skip=True)
    with contextlib.suppress(ValueError):
        ask.refuse("a")
    assert ask.left_out == ["a"] and listing.Ask().left_out == []
