"""Loading from disk to ImageSets: the cache, its key, and errors of one line."""

import functools
import os
import time

import numpy as np
import PIL.Image
import pytest
import SimpleITK
from absl import logging

import data
from data import cohort, files, readers
from tests import make_files

RNG = np.random.default_rng(0)
STEP = np.repeat(np.array([0, 255], np.uint8), 32).reshape(8, 8)
HALVES = {"train": 0.4, "select": 0.2, "val": 0.2, "control": 0.2}


@pytest.fixture
def folder(tmp_path):
    """60 images of 30 patients, 8 bit, 8x8."""
    root = tmp_path / "images"
    root.mkdir()
    for i in range(60):
        PIL.Image.fromarray(RNG.integers(0, 256, (8, 8), dtype=np.uint8)).save(root / f"p{i // 2:02}_{i % 2}.png")
    return root


@pytest.fixture
def load(folder, tmp_path):
    given = dict(path=folder, size=(8, 8), patient_pattern=r"p\d+", fractions=HALVES, cache=tmp_path / "cache")
    return functools.partial(data.load, **given, workers=1)


@pytest.fixture
def reads(monkeypatch):
    """Counts the files read afresh."""
    seen = []
    real = files.read_images
    monkeypatch.setattr(files, "read_images", lambda row, **how: seen.append(row) or real(row, **how))
    return seen


def test_load_gives_every_image_once_with_its_patient(load, folder):
    sets = load()
    assert list(sets) == ["train", "select", "val", "control"]
    assert sorted(i for s in sets.values() for i in s.ids) == sorted(os.listdir(folder))
    assert sum(len(set(s.patients)) for s in sets.values()) == 30
    for images, ids, patients, *_ in sets.values():
        assert len(images) == len(ids) == len(patients) > 0 and all(map(str.startswith, ids, patients))
        for image, id_ in zip(images, ids, strict=True):
            assert image.shape == (8, 8, 1) and image.dtype == np.float32
            np.testing.assert_allclose(image[..., 0], np.asarray(PIL.Image.open(folder / id_)) / 127.5 - 1, atol=1e-6)
    with pytest.raises(IndexError):
        sets["val"].images[len(sets["val"].ids)]
    batch = next(data.batches(sets["train"].images, batch=64, seed=0))
    assert batch.shape == (64, 8, 8, 1) and len(np.unique(batch, axis=0)) == min(64, len(sets["train"].ids))


def test_nothing_is_read_twice_and_no_stale_cache_is_used(load, folder, tmp_path, reads, monkeypatch):
    again = lambda **how: (reads.clear(), load(**how), len(reads))[2]
    assert again() == 60
    assert again() == 0
    assert again(fractions=HALVES | {"train": 0.3, "val": 0.3}, seed=3, limit={"train": 3}) == 0  # the same pixels
    assert again(patient_pattern=None, patients="per_image") == 0
    assert again(intensity="minmax") == again(size=(4, 4)) == again(fit="crop") == 60
    assert again(intensity="minmax") == 0
    os.utime(folder / "p00_0.png", ns=(1, 1))
    assert again() == 60
    PIL.Image.fromarray(STEP).save(folder / "p00_0.png")
    assert again() == 60 and any((image[:4] == -1).all() for s in load().values() for image in s.images)
    PIL.Image.fromarray(STEP).save(folder / "p99_0.png")
    assert again() == 61
    (tmp_path / "files.py").write_text("# other code")
    monkeypatch.setattr(files, "__file__", str(tmp_path / "files.py"))
    assert again() == 61


def test_a_file_changed_in_place_is_read_again(load, folder, reads):
    """Of the same size and with its old time, as a restore or a copy that keeps times leaves it."""
    path = folder / "p00_0.tif"
    PIL.Image.fromarray(STEP).save(path)
    before = path.stat()
    load()
    PIL.Image.fromarray(STEP[::-1].copy()).save(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    reads.clear()
    image = next(x for s in load().values() for i, x in zip(s.ids, s.images, strict=True) if i == "p00_0.tif")
    assert len(reads) == 61 and (image[4:] == -1).all()


@pytest.mark.parametrize("name", ["x.nhdr", "x.mhd"])
def test_a_header_is_stale_when_its_numbers_change(tmp_path, name):
    (tmp_path / "x").mkdir()
    volume = RNG.integers(0, 256, (4, 5, 6), dtype=np.uint8)
    how = dict(
        path=tmp_path / "x", patients="per_image", fractions={"train": 1.0}, size=(4, 5, 6), cache=tmp_path / "c"
    )
    for array in (volume, 255 - volume):
        header = tmp_path / "x" / name
        there = header.read_bytes() if header.exists() else None
        times = header.stat() if there else None
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), str(header))
        if there:  # only the numbers are others
            (raw,) = [path for path in (tmp_path / "x").iterdir() if path != header]
            assert header.read_bytes() == there and readers.detached(str(header)) == [str(raw)]
            os.utime(header, ns=(times.st_atime_ns, times.st_mtime_ns))
        (image,) = data.load(**how)["train"].images
        np.testing.assert_allclose(image[..., 0], array / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize(
    "line, names",
    [
        ("ElementDataFile = a.raw", ["a.raw"]),
        ("ElementDataFile = LOCAL", []),
        ("ElementDataFile = LIST\na.raw\nb.raw", ["a.raw", "b.raw"]),
        ("ElementDataFile = s%02d.raw 1 3 2", ["s01.raw", "s03.raw"]),
    ],
)
def test_the_files_that_a_header_names(tmp_path, line, names):
    for name in ("a.raw", "b.raw", "s01.raw", "s02.raw", "s03.raw"):
        (tmp_path / name).write_bytes(b"0")
    (tmp_path / "x.mhd").write_text(f"NDims = 3\n{line}\n")
    assert readers.detached(str(tmp_path / "x.mhd")) == [str(tmp_path / name) for name in names]


def test_another_decoder_is_another_cache(load, reads, monkeypatch):
    load()
    reads.clear()
    real = readers.version
    monkeypatch.setattr(readers, "version", lambda name: "999" if name == "pillow" else real(name))
    load()
    assert len(reads) == 60 and real("pillow") and real("no such") is None


def test_cache_folder_from_the_environment(load, tmp_path, monkeypatch):
    monkeypatch.setenv("FACSIMILE_CACHE", str(tmp_path / "elsewhere"))
    load(cache=None)
    assert any(name.startswith("images-") for name in os.listdir(tmp_path / "elsewhere"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot make the cache folder"):
        load(cache=tmp_path / "file" / "x")


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_prepared_is_its_owners_alone(load, folder, tmp_path, workers):
    """Also in a folder that all may read, as on a scratch disk."""
    (tmp_path / "scratch").mkdir(mode=0o755)
    (tmp_path / "scratch").chmod(0o755)
    make_files.dicom(folder / "p00_9.dcm", RNG.integers(0, 256, (8, 8), dtype=np.uint8))
    load(cache=tmp_path / "scratch", workers=workers, patient_pattern=None, patients="per_image")
    kept = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "scratch").iterdir()}
    assert [mode for name, mode in kept.items() if name.endswith("-raise")] == [0o700]
    assert [mode for name, mode in kept.items() if name.startswith("headers-")] == [0o600]


def test_some_images_of_a_set_are_a_set(load):
    """By numbers, as for samples that are still missing, and by bools."""
    images = load(fractions={"train": 1.0})["train"].images
    for some in (np.array([3, 1, 1], np.int32), np.arange(60) % 7 == 2):
        chosen = np.arange(60)[some]
        assert len(images[some]) == len(chosen)
        np.testing.assert_array_equal(list(images[some]), [images[i] for i in chosen])
    np.testing.assert_array_equal(next(data.in_order(images[np.array([5])], 1))[0][0], images[5])


def test_limit_and_adding_data(load, folder):
    whole, cut = load(), load(limit={"train": 5, "val": None})
    assert len(cut["train"].ids) == len(cut["train"].images) == 5 and set(cut["train"].ids) <= set(whole["train"].ids)
    assert len(cut["val"].ids) == len(whole["val"].ids)
    for i in range(60):
        PIL.Image.fromarray(STEP).save(folder / f"p{40 + i}_0.png")
    for name, more in load().items():
        assert set(whole[name].ids) <= set(more.ids)


def test_content_is_who_is_in_a_split_and_the_pixels(load, folder, tmp_path):
    """The same wherever the folder lies; another once a patient, a split or a pixel of the named splits is another."""
    of = lambda *names, **how: data.content(load(**how), *names)
    before, unseen = of("train", "select"), of("val", "control")
    assert before == of("select", "train") != of("train") and before != unseen
    moved = tmp_path / "moved"
    folder.rename(moved)
    os.utime(moved / "p00_0.png", ns=(1, 1))
    assert of("train", "select", path=moved) == before and of("val", "control", path=moved) == unseen
    sets = load(path=moved)
    trained, held = sets["train"].ids[0], sets["val"].ids[0]
    PIL.Image.fromarray(STEP).save(moved / held)  # an unseen patient's image is another
    assert of("train", "select", path=moved) == before and of("val", "control", path=moved) != unseen
    PIL.Image.fromarray(RNG.integers(0, 65536, (8, 8), dtype=np.uint16)).save(
        moved / held
    )  # so all are kept at 16 bits
    assert of("train", "select", path=moved) == before
    PIL.Image.fromarray(STEP).save(moved / trained)
    replaced = of("train", "select", path=moved)
    assert replaced != before
    (moved / trained).unlink()  # a patient withdraws
    assert of("train", "select", path=moved) not in (before, replaced)
    assert of("train", "select", path=moved, seed=1) != of("train", "select", path=moved)


def test_mixed_depths_are_kept_at_sixteen_bits(load, folder):
    for name in ("p00_0.png", "p07_1.png"):
        deep = RNG.integers(0, 65536, (8, 8), dtype=np.uint16)
        PIL.Image.fromarray(deep).save(folder / name)
        sets = load()
        stored = {i: x for s in sets.values() for i, x in zip(s.ids, s.images, strict=True)}
        np.testing.assert_allclose(stored[name][..., 0], deep / 32767.5 - 1, atol=1e-6)
        eight = np.asarray(PIL.Image.open(folder / "p09_0.png"))
        np.testing.assert_allclose(stored["p09_0.png"][..., 0], eight / 127.5 - 1, atol=2e-5)
        assert len(stored) == 60


def test_unreadable_files(load, folder, caplog, monkeypatch):
    (folder / "p03_0.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"p03_0\.png: the file is empty") as error:
        load()
    assert "\n" not in str(error.value)
    monkeypatch.setattr(logging.get_absl_logger(), "propagate", True)
    for _ in range(2):  # said again when the cache is used
        caplog.clear()
        sets = load(on_error="skip")
        assert sum(len(s.ids) for s in sets.values()) == 59
        assert "1 of 60 images could not be read" in caplog.text and "p03_0.png" in caplog.text
    with pytest.raises(ValueError, match=r"p03_0\.png"):
        load()
    for path in folder.iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="none of 60 images could be read"):
        load(on_error="skip")


@pytest.mark.parametrize(
    "how, message",
    [
        (dict(fractions={"train": 1.0}), None),
        (dict(fractions={"train": 0.999, "val": 0.001}), "the split 'val' has no images; .* has 30 patients"),
        (
            dict(fractions={"train": 1.0}, need=("train", "val")),
            r"'val' has no images; data\.fractions\.val=0: give it",
        ),
        (dict(limit={"train": 0}), r"data\.limit\.train must be None, or 1 or more, not 0"),
        (dict(on_error="ignore"), "data.on_error"),
        (dict(fit="squeeze"), "data.fit"),
        (dict(size=(8,)), "data.size"),
        (dict(size=(0, 8)), "data.size"),
        (dict(intensity="window:3:1"), "data.intensity"),
        (dict(path=None, layout="nih"), "there is no data.path"),
        (dict(path=None, channels=3), "has one channel"),
        (dict(path=None, cohort={"subjects": {"train": 3, "select": 1, "val": 1}}), "split 'control' has no images"),
    ],
)
def test_settings_that_cannot_be(load, how, message):
    if message is None:
        assert [len(s.ids) for s in load(**how).values()] == [60, 0, 0, 0]
        return
    with pytest.raises(ValueError, match=message) as error:
        load(**how)
    assert "\n" not in str(error.value)


def test_splits_of_the_manifest(tmp_path, folder, load):
    said = ["train"] * 40 + ["val"] * 10 + ["test"] * 10
    rows = [f"images/p{i // 2:02}_{i % 2}.png,{i // 2},{said[i]}" for i in range(60)]
    (tmp_path / "m.csv").write_text("\n".join(["path,patient_id,split", *rows]))
    sets = load(path=tmp_path / "m.csv")
    assert {*sets["train"].patients, *sets["select"].patients} == {str(i) for i in range(20)}
    assert set(sets["val"].patients) == {str(i) for i in range(20, 25)} and len(sets["control"].ids) == 10
    (tmp_path / "m.csv").write_text("path,patient_id\nimages/absent.png,1")
    with pytest.raises(ValueError, match=r"absent\.png: there is no such file; correct the manifest"):
        load(path=tmp_path / "m.csv", fractions={"train": 1.0})


def said(tmp_path, split_of, name="s.csv"):
    (tmp_path / name).write_text("\n".join(["patient_id,split", *(f"{p},{split}" for p, split in split_of.items())]))
    return str(tmp_path / name)


def test_a_file_of_splits_wins_in_every_layout(tmp_path, folder, load):
    of = {f"p{i:02}": ("train", "train", "val", "none")[i % 4] for i in range(30)}
    given = said(tmp_path, of | {"someone else": "train"})
    rows = [f"images/p{i // 2:02}_{i % 2}.png,p{i // 2:02},control" for i in range(60)]
    (tmp_path / "m.csv").write_text("\n".join(["path,patient_id,split", *rows]))
    for path in (folder, tmp_path / "m.csv"):
        sets = load(path=path, splits=given)
        assert set(sets["train"].patients) == {p for p, split in of.items() if split == "train"}
        unseen = {p for name in ("select", "val", "control") for p in sets[name].patients}
        assert unseen == {p for p, split in of.items() if split == "val"}
        assert all(s.stated for s in sets.values())
    subjects = {"train": 4, "select": 1, "val": 2, "control": 1}
    ids = [r.patient for r in cohort.records(subjects=subjects)]
    turned = dict(zip(reversed(ids), ["val", "select", "control", *["train"] * 5], strict=True))
    sets = data.load(
        size=(8, 8), cohort={"subjects": subjects}, splits=said(tmp_path, turned, "c.csv"), cache=tmp_path / "c"
    )
    assert {p: name for name, s in sets.items() for p in s.patients} == turned


def test_who_says_the_splits(tmp_path, folder, load):
    """`stated` only where 'train' is just those of whom it is said, so that no one seen is looked for among the unseen."""
    four = ("train", "select", "val", "control")

    def stated(split_of, **how):
        rows = [f"images/p{i // 2:02}_{i % 2}.png,p{i // 2:02},{split_of(i // 2)}" for i in range(60)]
        (tmp_path / "m.csv").write_text("\n".join(["path,patient_id,split", *rows]))
        (found,) = {s.stated for s in load(path=tmp_path / "m.csv", **how).values()}
        return found

    assert not load()["train"].stated
    assert stated(lambda i: four[i % 4])
    assert not stated(lambda i: four[i % 4] if i else "")  # the hash has one of them
    assert not stated(lambda i: ("train", "val", "control")[i % 3])  # 'select' is carved out of 'train'
    assert not stated(lambda i: four[i % 4], splits="hash")
    assert not stated(lambda i: four[i % 4], fold=0) and not stated(lambda i: four[i % 4], limit={"train": 3})


@pytest.mark.parametrize(
    "content, message",
    [
        (
            "patient_id,split\np00,train\n",
            r"29 of 30 patients are not in it \(p01\); add them, in the split none if",
        ),
        (
            "patient_id,split\np00,train\np00,val\n",
            "line 3 puts p00 in val and an earlier one in train; correct it",
        ),
        ("patient_id,split\np00,\n", "line 2 lacks its patient_id or split, which may be 'none'; fill it"),
        ("patient,split\np00,train\n", "no column 'patient_id'"),
        (None, r"data\.splits must be None or 'hash', or a CSV with patient_id,split: there is no "),
    ],
)
def test_a_file_of_splits_that_cannot_be_is_one_line(tmp_path, load, content, message):
    path = tmp_path / "s.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load(splits=str(path))
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_synthetic_folder(folder, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.get_absl_logger(), "propagate", True)
    made = data.read_folder(folder, (8, 8), cache=tmp_path / "cache")
    assert made.ids.tolist() == sorted(os.listdir(folder)) and not caplog.text
    assert made.patients.tolist() == list(made.files) == made.ids.tolist()
    assert data.read_folder(folder, (6, 6), cache=tmp_path / "cache").images[0].shape == (6, 6, 1)
    assert "60 of 60 synthetic images had another shape or spacing and were resampled to (6, 6)" in caplog.text


def test_cohort(tmp_path):
    subjects = {"train": 4, "select": 1, "val": 2, "control": 1}
    given = dict(size=(16, 16), cache=tmp_path, cohort={"subjects": subjects, "scans": 2, "duplicates": 3, "seed": 5})
    sets = data.load(**given)
    assert {name: len(s.ids) for name, s in sets.items()} == {"train": 11, "select": 2, "val": 4, "control": 2}
    copies = [r for r in cohort.records(**given["cohort"]) if r.duplicate_of]
    image = dict(zip(sets["train"].ids, sets["train"].images, strict=True))
    for copy in copies:
        np.testing.assert_array_equal(image[copy.id], image[copy.duplicate_of])
    drawn = cohort.subject(0, size=(16, 16), scan=1, seed=5)
    assert abs(image["sub-0000_scan-1"] - drawn).max() < 2e-5  # kept at 16 bits
    volume = data.load(size=(8, 8, 8), cache=tmp_path, cohort={"subjects": dict.fromkeys(subjects, 1)}, layout="cohort")
    assert volume["val"].images[0].shape == (8, 8, 8, 1)


def test_nih_for_real(real_data, tmp_path):
    start = time.monotonic()
    sets = data.load(path=real_data / "nih_cxr64", cache=tmp_path)
    assert sum(len(s.ids) for s in sets.values()) == 1000 and time.monotonic() - start < 30
    start = time.monotonic()
    sets = data.load(path=real_data / "nih_cxr64", cache=tmp_path)
    everything = np.stack([image for s in sets.values() for image in s.images])
    assert everything.shape == (1000, 64, 64, 1) and time.monotonic() - start < 2
    assert everything.min() == -1 and 0.9 < everything.max() <= 1 and everything.std() > 0.2
