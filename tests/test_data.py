"""Manifests, splits by patient, and the order of training."""

import csv
import functools
import os

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from data import manifest, splits
from tests import make_files

PATIENTS = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=60)
FRACTIONS = st.tuples(*[st.floats(0, 1)] * 4).filter(lambda f: sum(f) > 0.1)


def normalised(shares):
    return dict(zip(splits.NAMES, (s / sum(shares) for s in shares), strict=True))


# ---- splits


@given(PATIENTS, FRACTIONS, st.integers(0, 5), st.data())
def test_no_patient_is_in_two_splits(patients, shares, seed, draw):
    given_ = {p: draw.draw(st.sampled_from(["", "train", "val", "test", "control", "select"])) for p in set(patients)}
    said = [draw.draw(st.sampled_from([given_[p], ""])) for p in patients]  # some rows of a patient say, others do not
    split_of = splits.assign(patients, said, fractions=normalised(shares), seed=seed)
    assert len({(p, s) for p, s in zip(patients, split_of, strict=True)}) == len(set(patients))
    assert set(split_of) <= set(splits.NAMES)  # fractions that sum to 1 lose nobody


@given(PATIENTS, PATIENTS, FRACTIONS, st.randoms())
def test_adding_patients_moves_nobody(old, new, shares, random):
    fractions = normalised(shares)
    before = dict(zip(old, splits.assign(old, fractions=fractions), strict=True))
    everyone = old + new
    random.shuffle(everyone)
    after = dict(zip(everyone, splits.assign(everyone, fractions=fractions), strict=True))
    assert all(after[p] == s for p, s in before.items())


def test_fractions_are_the_shares_of_patients_and_may_leave_some_out():
    patients = [str(i) for i in range(20_000)]
    split_of = splits.assign(patients, fractions={"train": 0.5, "val": 0.2})
    for name, share in {"train": 0.5, "val": 0.2, "": 0.3, "select": 0, "control": 0}.items():
        assert abs(np.mean(split_of == name) - share) < 0.015
    other = splits.assign(patients, fractions={"train": 0.5, "val": 0.2}, seed=1)
    assert abs(np.mean((split_of == "train") & (other == "train")) - 0.25) < 0.015  # another seed, another partition


def test_what_the_manifest_says_wins_and_select_and_control_are_carved_from_it():
    patients = [str(i) for i in range(4000)]
    said = ["train" if i < 3000 else "val" for i in range(4000)]
    split_of = splits.assign(patients, said, fractions={"train": 0.6, "select": 0.2, "val": 0.1, "control": 0.1})
    assert set(split_of[:3000]) == {"train", "select"} and set(split_of[3000:]) == {"val", "control"}
    assert abs(np.mean(split_of[:3000] == "select") - 0.25) < 0.03
    everything = splits.assign(patients[:5], ["train", "select", "val", "test", "control"])
    assert everything.tolist() == ["train", "select", "val", "control", "control"]
    assert set(splits.assign(patients, ["train"] * 2000 + ["test"] * 2000)[2000:]) == {"val", "control"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(given=["train", "val", ""]), "patient a is in the splits train and val"),
        (dict(given=["train", "", "tain"]), "patient b: no split 'tain'"),
        (dict(given=["train", "none", ""]), "patient a is in the splits none and train"),
        (dict(fractions={"train": 0.9, "val": 0.2}), "at most 1"),
        (dict(fractions={"train": -0.1, "val": 0.2}), "at most 1"),
        (dict(fractions={"training": 0.1}), "shares of train, select, val, control"),
    ],
)
def test_bad_splits_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        splits.assign(["a", "a", "b"], **arguments)


@pytest.mark.parametrize("unseen", ["val", "test"])
def test_whoever_a_generator_has_seen_stays_in_train(unseen):
    """What is not given is carved out of the unseen, in the proportions of the fractions; 'none' is in no split."""
    patients = [f"p{i}" for i in range(9000)]
    given_ = ["train"] * 3000 + [unseen] * 5000 + ["none"] * 1000
    found = splits.assign(patients, given_, whole_train=True)
    assert set(found[:3000]) == {"train"} and set(found[8000:]) == {""}
    for name, share in splits.FRACTIONS.items():
        if name != "train":
            assert abs(np.mean(found[3000:8000] == name) - share / 0.4) < 0.03
    named = splits.assign(patients, ["select" if i % 2 else split for i, split in enumerate(given_)], whole_train=True)
    assert set(named[0:3000:2]) == {"train"} and set(named[3000:8000:2]) == {"val", "control"}


@given(PATIENTS, st.integers(0, 70))
def test_first_keeps_whole_patients_but_the_last(patients, count):
    chosen = splits.first(patients, count)
    assert len(chosen) == min(count, len(patients)) and list(chosen) == sorted(set(chosen))
    kept = [patients[i] for i in chosen]
    assert sum(0 < kept.count(p) < patients.count(p) for p in set(patients)) <= 1
    more = splits.first(patients, count + 3)
    assert set(chosen) <= set(more)


# ---- manifests


def write_csv(path, *rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return str(path)


def test_manifest_csv(tmp_path):
    path = write_csv(tmp_path / "m.csv", ["path", "patient_id", "split", "age"], ["a/./x.png", " p1 ", "train", "60"])
    found = manifest.read(path)
    assert found.root == str(tmp_path) and found.rows == [manifest.Row("a/x.png", "p1", split="train")]
    os.rename(path, tmp_path / "manifest.csv")  # as a folder
    assert manifest.read(tmp_path).rows == found.rows


@pytest.mark.parametrize(
    "header, read, told",
    [
        ("Path, PATIENT_ID ,Split,age", ("p1", "train"), ""),
        ("path,patient,split,age", ("p1", "train"), ""),
        ("path,patient_id,splits,age", ("p1", ""), "splits"),
        ("path,PatientID,split,age", ("", "train"), "patientid"),
        ("path,patient_id,split,patient", ("p1", "train"), ""),  # patient_id is the one
        ("path,patient_id,split,splits", ("p1", "train"), ""),  # so 'splits' is something else
    ],
)
def test_the_columns_of_a_manifest(tmp_path, header, read, told):
    path = write_csv(tmp_path / "m.csv", header.split(","), ["x.png", "p1", "train", "60"])
    found = manifest.read(path, patients="per_image")
    assert found.rows == [manifest.Row("x.png", read[0] or "x.png", split=read[1])]
    note = f"1 columns that may be patient_id or split misspelt are not read: {told} in {path}"
    assert found.notes == ([note] if told else [])


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "no column 'path'"),
        (b"path,patient_id,Split,split\nx.png,1,train,val\n", "its header has two columns 'split'; rename one"),
        (b"file,patient_id\nx.png,1\n", "no column 'path', its header has file, patient_id"),
        (b"path,patient_id\nx.png\n", "line 2 has not the header's 2 fields"),
        (b"path,patient_id\nx.png,1,2\n", "line 2 has not the header's 2 fields"),
        (b"path,patient_id\n,1\n", "line 2 has no path"),
        (b"path,patient_id\nx.png,\n", "1 of 1 images have no patient id"),
        (b"path\nx.png\n", "have no patient id"),
        (b"path,patient_id\nx.png,1\n./x.png,2\n", "x.png is listed 2 times"),
        (b"path,patient_id\nx.png,\xff\n", "is not UTF-8"),
        (b'path,patient_id\n"x.png,1\n', "is not CSV"),
        (b"path,patient_id\n", "no images found"),
    ],
)
def test_hostile_csv_is_one_line(tmp_path, content, message):
    path = tmp_path / "m.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        manifest.read(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def test_folder_with_a_pattern(tmp_path):
    touch(tmp_path, "p2/b.PNG", "p1/a.png", "p1/c.nii.gz", "p1/notes.txt", ".hidden/x.png", "p1/._a.png")
    os.symlink(tmp_path, tmp_path / "p1" / "loop")
    found = manifest.read(tmp_path, patient_pattern=r"^(p\d)/")
    assert [(r.path, r.patient) for r in found.rows] == [("p1/a.png", "p1"), ("p1/c.nii.gz", "p1"), ("p2/b.PNG", "p2")]
    assert [r.patient for r in manifest.read(tmp_path, patient_pattern=r"p\d").rows] == ["p1", "p1", "p2"]
    assert [r.patient for r in manifest.read(tmp_path, patients="per_image").rows] == [r.path for r in found.rows]


def test_the_first_file_decides_where_links_lead(tmp_path):
    """As it is listed: what is hidden does not count, what a link leads to does, and no link leads round in a circle."""
    make_files.dicom(tmp_path / "1-001.dcm", make_files.EIGHT)
    (tmp_path / "x" / ".hidden").mkdir(parents=True)
    os.symlink(tmp_path / "x", tmp_path / "x" / "again")
    make_files.picture(tmp_path / "x" / ".hidden" / "a.png", make_files.EIGHT)
    (tmp_path / "study").mkdir()
    os.rename(tmp_path / "1-001.dcm", tmp_path / "study" / "1-001.dcm")
    os.symlink(tmp_path / "study", tmp_path / "x" / "study")
    (row,) = manifest.read(tmp_path / "x", volumes=True).rows
    assert row.parts and row.patient == "p1"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(), "2 of 2 images have no patient id"),
        (dict(patient_pattern="(q)"), "2 of 2 images have no patient id"),
        (dict(patient_pattern="a(b)?"), "2 of 2 images have no patient id"),
        (dict(patient_pattern="(p"), "not a regular expression"),
        (dict(layout="dicoms"), "data.layout 'dicoms'"),
        (dict(layout="nih"), "one Data_Entry"),
        (dict(patients="any"), "data.patients"),
    ],
)
def test_a_folder_it_cannot_use_is_one_line(tmp_path, arguments, message):
    touch(tmp_path, "a.png", "b.png")
    with pytest.raises(ValueError, match=message) as error:
        manifest.read(tmp_path, **arguments)
    assert "\n" not in str(error.value)


def test_paths_it_cannot_use(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        manifest.read(tmp_path / "absent")
    with pytest.raises(ValueError, match="no images found"):
        manifest.read(tmp_path)
    touch(tmp_path, "x.txt")
    with pytest.raises(ValueError, match="neither a folder nor a"):
        manifest.read(tmp_path / "x.txt")
    open(os.fsencode(tmp_path) + b"/\xff.png", "wb").close()
    with pytest.raises(ValueError, match="not UTF-8"):
        manifest.read(tmp_path, patients="per_image")


def test_nih_layout(tmp_path):
    touch(tmp_path, "images_001/images/00000001_000.png", "images_002/images/00000002_000.png", "images_002/odd.png")
    header = ["Image Index", "Finding Labels", "Follow-up #", "Patient ID"]
    rows = [["00000002_000.png", "Mass", "0", "2"], ["00000001_000.png", "", "3", "1"], ["9.png", "", "0", "9"]]
    write_csv(tmp_path / "Data_Entry_2017.csv", header, *rows)
    found = manifest.read(tmp_path)
    assert found.rows == [
        manifest.Row("images_001/images/00000001_000.png", "1", "3"),
        manifest.Row("images_002/images/00000002_000.png", "2", "0", label="Mass"),
    ]
    assert len(found.notes) == 2 and "1 of the images listed" in found.notes[0] and "1 images are not" in found.notes[1]


def test_nihs_own_split_is_kept(tmp_path):
    names = [f"{patient:08d}_{scan:03d}.png" for patient in range(40) for scan in range(2)]
    touch(tmp_path, *(f"images_001/images/{name}" for name in names))
    write_csv(tmp_path / "Data_Entry_2017.csv", ["Image Index", "Patient ID"], *([n, str(int(n[:8]))] for n in names))
    (tmp_path / "train_val_list.txt").write_text("\n".join(names[:50]))
    assert {row.split for row in manifest.read(tmp_path).rows} == {""}  # one list alone says nothing
    (tmp_path / "test_list.txt").write_text("\r\n".join(names[50:]) + "\r\n")
    rows = manifest.read(tmp_path).rows
    assert [row.split for row in rows] == ["train"] * 50 + ["test"] * 30
    found = splits.assign([row.patient for row in rows], [row.split for row in rows])
    assert set(found[:50]) == {"train", "select"} and set(found[50:]) == {"val", "control"}


def test_nih_for_real(real_data):
    rows = manifest.read(real_data / "nih_cxr64").rows
    assert len(rows) == 1000 and len({row.patient for row in rows}) == 264
    assert all(int(os.path.basename(row.path)[:8]) == int(row.patient) for row in rows)


# ---- the order of training


def take(iterator, n):
    return [next(iterator) for _ in range(n)]


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 40), st.integers(1, 4), st.integers(0, 2**31), st.integers(0, 12))
def test_batches_are_a_function_of_seed_and_step(n, scale, seed, start):
    batches = functools.partial(data.batches, seed=seed, threads=1)
    images, batch = np.arange(n, dtype=np.float64)[:, None] * np.ones(2), 4 * scale
    whole = take(batches(images, batch=batch), start + 3)
    assert whole[0].shape == (batch, 2) and whole[0].dtype == np.float32
    for step, rows in enumerate(take(batches(images, batch=batch, start=start), 3), start):
        np.testing.assert_array_equal(rows, whole[step])
    for count in (2, 4):
        parts = [take(batches(images, batch=batch, start=start, process=(i, count)), 3) for i in range(count)]
        np.testing.assert_array_equal(np.concatenate(parts, 1), whole[start:])


def test_each_epoch_sees_every_image_once_in_another_order():
    seen = np.concatenate(take(data.batches(np.arange(30), batch=10, seed=3), 6))
    assert sorted(seen[:30]) == sorted(seen[30:]) == list(range(30)) and (seen[:30] != seen[30:]).any()
    other = np.concatenate(take(data.batches(np.arange(30), batch=10, seed=4), 3))
    assert (seen[:30] != other).any() and seen.dtype == np.int64


def test_batches_of_trees():
    class Latents:
        def __len__(self):
            return 5

        def __getitem__(self, i):
            return np.full((2, 3), i, np.float32), np.full((4,), -i, np.float32)

    mu, logvar = next(data.batches(Latents(), batch=8, seed=0))
    assert mu.shape == (8, 2, 3) and logvar.shape == (8, 4)
    np.testing.assert_array_equal(mu[:, 0, 0], -logvar[:, 0])
    ((mu, logvar), n), ((last, _), m) = data.in_order(Latents(), 3)
    assert (n, m) == (3, 2) and mu[:, 0, 0].tolist() == [0, 1, 2] and last[:, 0, 0].tolist() == [3, 4, 4]


@given(st.integers(0, 20), st.integers(1, 9))
@settings(max_examples=20, deadline=None)
def test_in_order_is_one_padded_pass(n, batch):
    passed = list(data.in_order(np.arange(n), batch))
    assert all(rows.shape == (batch,) for rows, _ in passed)
    assert np.concatenate([rows[:k] for rows, k in passed] or [[]]).tolist() == list(range(n))


def test_batches_refuse_what_cannot_be(monkeypatch):
    with pytest.raises(ValueError, match="no images"):
        data.batches([], batch=2, seed=0)
    with pytest.raises(ValueError, match="cannot be shared by 2"):
        data.batches(np.arange(3), batch=3, seed=0, process=(0, 2))
    with pytest.raises(ValueError, match="cannot be shared by 2"):
        data.batches(np.arange(3), batch=2, seed=0, process=(2, 2))
    monkeypatch.setattr(grain, "MapDataset", None)  # nothing is built for what is refused
    with pytest.raises(ValueError, match="no images"):
        data.batches([], batch=2, seed=0)
