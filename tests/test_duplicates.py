"""The same image twice: found where it matters, let pass where it does not."""

import io

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from data import duplicates, geometry
from data.sets import ImageSet


def textures(n, size=(32, 32), seed=0):
    """Images of different patients: smooth random fields, float32 (n, *size, 1) in [-1, 1]."""
    coarse = np.random.default_rng(seed).uniform(-1, 1, (n, *[max(3, s // 4) for s in size], 1)).astype(np.float32)
    return np.stack([geometry.resample(x, size) for x in coarse])


def sets_of(**splits):
    """`split=[(id, patient, image), ...]` -> sets made by hand."""
    columns = {name: list(zip(*rows, strict=True)) for name, rows in splits.items()}
    return {name: ImageSet(images, np.array(ids), np.array(of)) for name, (ids, of, images) in columns.items()}


def altered(image):
    """Name -> the image as another file of it may hold it; (*size, 1) -> (*size, 1)."""
    grey = np.round((image[..., 0] + 1) * 127.5).astype(np.uint8)

    def jpeg(plane):
        stored = io.BytesIO()
        PIL.Image.fromarray(plane).save(stored, "jpeg", quality=90)
        return np.asarray(PIL.Image.open(stored))

    again = np.stack([jpeg(p) for p in grey]) if grey.ndim == 3 else jpeg(grey)
    back = lambda a: (a.astype(np.float32) / 127.5 - 1)[..., None]
    size = image.shape[:-1]
    resized = lambda factor: geometry.resample(geometry.resample(image, [round(n * factor) for n in size]), size)
    return {
        "jpeg": back(again),
        "8 bits": back(grey),
        "doubled and back": resized(2),
        "halved and back": resized(0.5),
        "brighter": np.clip(1.1 * (image + 1) - 1, -1, 1),
        "darker": 0.9 * (image + 1) - 1,
        "shifted up": np.clip(image + 0.1, -1, 1),
        "gamma": 2 * ((image + 1) / 2) ** 1.1 - 1,
    }


# ---- against brute force


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=10),
    st.sets(st.integers(0, 9), max_size=3),
)
def test_an_alarm_is_raised_where_brute_force_raises_one(rows, accepted):
    """Rows are (picture, patient, split); a patient is kept in the split where it was seen first."""
    pictures, home, content = textures(4, (24, 24)), {}, {}
    for k, (picture, patient, split) in enumerate(rows):
        split = home.setdefault(patient, f"s{split}")
        content.setdefault(split, []).append((f"{k}", f"p{patient}", pictures[picture]))
    of = {k: (picture, patient) for k, (picture, patient, _) in enumerate(rows)}
    found = duplicates.find(sets_of(**content), [str(k) for k in accepted])
    wrong = {(i, j) for i in of for j in of if i < j and of[i][0] == of[j][0] and of[i][1] != of[j][1]}
    left = {pair for pair in wrong if not accepted & {*pair}}
    told = {tuple(sorted(map(int, pair.ids))) for pair in found.pairs}
    assert told <= left and bool(told) == bool(left)
    assert all(pair.leak == (home[of[int(pair.ids[0])][1]] != home[of[int(pair.ids[1])][1]]) for pair in found.pairs)
    assert {i for pair in left for i in pair} == {int(i) for pair in found.pairs for i in pair.ids} or len(told) < len(
        left
    )
    assert left or bool(found.accepted) == bool(wrong)


@pytest.mark.parametrize("tile", [3, 7, 4096])
def test_tiles_find_what_one_product_finds(monkeypatch, tile):
    monkeypatch.setattr(duplicates, "TILE", tile)
    monkeypatch.setattr(duplicates, "BATCH_BYTES", 20_000)
    images = textures(20, (16, 16))
    images = np.concatenate([images, images[3:6] * 0.95, images[:1]])
    known = duplicates.scan(images)
    prints = duplicates.fingerprints(images).astype(np.float64)
    sim = np.triu(prints @ prints.T, 1)
    expected = {(i, j) for i, j in np.argwhere(sim >= duplicates.NEAR).tolist() if j != 23}
    assert {*map(tuple, known.pairs.tolist())} == expected == {(3, 20), (4, 21), (5, 22)}
    np.testing.assert_allclose(known.similarity, [sim[i, j] for i, j in known.pairs], atol=1e-5)
    assert known.digest[0] == known.digest[23] and len({*known.digest.tolist()}) == 23


# ---- what is near and what is not


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (24, 32, 28)])
def test_another_file_of_the_same_image_is_found_and_another_patient_is_not(size):
    for image, other in textures(6, size).reshape(3, 2, *size, 1):
        for name, copy in altered(image).items():
            alike = duplicates.fingerprints(np.stack([image, copy, other]))
            assert alike[0] @ alike[1] >= duplicates.NEAR, name
            assert alike[1] @ alike[2] < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("size", [(64, 64), (24, 32, 24)])
def test_aligned_brains_are_not_taken_for_each_other(size, tmp_path):
    """Their pixels correlate by 0.85 and more, and no pair of subjects is called the same."""
    subjects = {"train": 60 if len(size) == 3 else 300, "select": 4, "val": 10, "control": 10}
    sets = data.load(cohort={"subjects": subjects}, size=size, cache=tmp_path)
    assert duplicates.find(sets).pairs == []
    images = np.stack([sets["train"].images[i] for i in range(50)])
    pixels = images.reshape(50, -1)
    assert np.sort(np.corrcoef(pixels)[np.triu_indices(50, 1)])[-10] > 0.85
    for image in images[:10]:
        for name, copy in altered(image).items():
            assert np.prod(duplicates.fingerprints(np.stack([image, copy])), axis=0).sum() >= duplicates.NEAR, name


@pytest.mark.parametrize(
    ("folder", "settings"),
    [
        ("nih_cxr64", {"size": (64, 64)}),
        (
            "msd_hippocampus",
            {"size": (32, 48, 32), "intensity": "percentile:0.5:99.5", "patient_pattern": r"_(\d+)\.nii"},
        ),
    ],
)
def test_no_false_alarm_on_real_patients(real_data, tmp_path, folder, settings):
    sets = data.load(path=real_data / folder, cache=tmp_path, accept_duplicates=(), **settings)
    assert not [note for note in sets["train"].notes if "same image" in note]
    image = sets["train"].images[0]
    for name, copy in altered(image).items():
        assert np.prod(duplicates.fingerprints(np.stack([image, copy])), axis=0).sum() >= duplicates.NEAR, name


def test_real_duplicates_are_found(real_data, tmp_path):
    """Four CT slices are in that folder twice, always of one patient: found where patients are unknown, else counted."""
    settings = {"path": real_data / "tcga_luad_ct", "intensity": "window:-1000:400", "cache": tmp_path}
    unknown = {"patient_pattern": r"ID_\d+"}  # each file a patient of its own
    found = duplicates.find(data.load(**settings, **unknown))
    assert {tuple(sorted(name[:7] for name in pair.ids)) for pair in found.pairs} == {
        ("ID_0010", "ID_0013"),
        ("ID_0032", "ID_0034"),
        ("ID_0084", "ID_0085"),
        ("ID_0098", "ID_0099"),
    }
    with pytest.raises(ValueError, match="4 pairs of images of different or unknown patients"):
        data.load(**settings, **unknown, accept_duplicates=())
    found = duplicates.find(data.load(**settings, fractions={"train": 0.6, "val": 0.4}))  # patients from the headers
    assert found.pairs == [] and sum(found.within.values()) == 4


@pytest.mark.parametrize("value", [-1.0, 0.3])
def test_constant_images_are_equal_and_never_near(value):
    blank = np.full((2, 16, 16, 1), value, np.float32)
    known = duplicates.scan(np.concatenate([blank, blank[:1] + 1e-3, textures(1, (16, 16))]))
    assert len(known.pairs) == 0 and known.digest[0] == known.digest[1] != known.digest[2]


def test_more_pairs_than_can_be_listed_are_one_line(monkeypatch):
    monkeypatch.setattr(duplicates, "MOST_PAIRS", 20)
    image = textures(1)[0]
    with pytest.raises(ValueError, match="more than 20 pairs of images are nearly the same"):
        duplicates.scan([image * (1 - 0.01 * k) for k in range(10)])


# ---- what is said


def test_ten_are_listed_and_the_rest_counted():
    images = textures(14, (24, 24))
    content = sets_of(
        train=[(f"a{k}", f"p{k}", image) for k, image in enumerate(images)],
        val=[(f"b{k}", f"q{k}", image) for k, image in enumerate(images[:3])],
        control=[(f"c{k}", f"r{k}", 0.9 * image) for k, image in enumerate(images)],
    )
    with pytest.raises(ValueError) as told:
        duplicates.refuse(duplicates.find(content))
    text = str(told.value)
    assert text.count(" = ") + text.count(" ~ ") == 10 and "\n" not in text
    assert text.startswith("20 pairs of images") and "20 of them across splits" in text and "and 10 more pairs" in text
    assert "train a0 = val b0; " in text  # equal ones come first


def test_accepted_by_name_by_file_or_all(tmp_path):
    a, b = textures(2)
    content = sets_of(train=[("x.png", "p", a), ("y.png", "q", b)], val=[("z.png", "r", a), ("w.png", "s", b)])
    listing = tmp_path / "accepted.txt"
    listing.write_text("z.png\n\ny.png\n")
    assert len(duplicates.find(content).pairs) == 2
    assert [pair.ids for pair in duplicates.find(content, ["x.png"]).pairs] == [("y.png", "w.png")]
    for accept in (["x.png", "w.png"], [str(listing)], ["all"], ("all", "x.png")):
        found = duplicates.find(content, accept)
        duplicates.refuse(found)
        (note,) = duplicates.notes(found)
        assert note.startswith("2 pairs of images") and "2 across splits" in note and "accept_duplicates" in note
    assert duplicates.notes(duplicates.find(sets_of(train=[("x", "p", a)]))) == []


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_list_that_cannot_be_read_is_one_line(tmp_path, content):
    path = tmp_path / "accepted.txt"
    if content:
        path.write_bytes(content)
    with pytest.raises((FileNotFoundError, ValueError), match="accepted"):
        duplicates.find(sets_of(train=[("x", "p", textures(1)[0])]), [str(path)])


def test_a_patients_own_repeats_are_only_counted():
    a, b = textures(2)
    content = sets_of(train=[("1", "p", a), ("2", "p", a), ("3", "p", 0.95 * a), ("4", "q", b)], val=[("5", "r", -b)])
    found = duplicates.find(content)
    assert found.pairs == [] and found.within == {"train": 2, "val": 0}


def test_images_of_unknown_patients_are_different_patients():
    a = textures(1)[0]
    (pair,) = duplicates.find(sets_of(train=[("1", "", a), ("2", "", a)])).pairs
    assert pair.ids == ("1", "2") and pair.exact and not pair.leak


def test_sets_made_by_hand_must_be_of_different_patients():
    a, b, c = textures(3)
    content = sets_of(train=[("1", "p", a), ("2", "q", b)], val=[("3", "q", c)])
    with pytest.raises(ValueError, match="the splits 'train' and 'val' share patients: q; give each one split"):
        duplicates.find(content)


# ---- through `load`


def test_the_cohorts_own_copies_are_accepted_and_told(tmp_path):
    cohort = {"subjects": {"train": 12, "select": 2, "val": 4, "control": 4}, "duplicates": 3, "copies": 2}
    sets = data.load(cohort=cohort, size=(16, 16), cache=tmp_path, accept_duplicates=())
    (note,) = sets["val"].notes
    assert note.startswith("6 pairs") and "planted by data.cohort" in note
    leaking = data.load(cohort={**cohort, "into": "val"}, size=(16, 16), cache=tmp_path, accept_duplicates=())
    assert "6 across splits; unseen images that are training images" in leaking["train"].notes[0]
    assert data.load(cohort=cohort, size=(16, 16), cache=tmp_path)["train"].notes == ()


def test_a_second_run_reads_no_image(tmp_path, monkeypatch):
    images = textures(12)
    (tmp_path / "in").mkdir()
    for k, image in enumerate([*images, images[5]]):
        grey = np.round((image[..., 0] + 1) * 127.5).astype(np.uint8)
        PIL.Image.fromarray(grey).save(tmp_path / "in" / f"p{k}.png")
    settings = {"path": tmp_path / "in", "size": (32, 32), "patient_pattern": r"p\d+", "cache": tmp_path / "cache"}
    settings |= {"fractions": {"train": 0.5, "val": 0.5}}
    first = duplicates.find(data.load(**settings))
    assert [sorted(pair.ids) for pair in first.pairs] == [["p12.png", "p5.png"]]
    monkeypatch.setattr(duplicates, "fingerprints", None)
    assert duplicates.find(data.load(**settings)) == first
    again = duplicates.find(data.load(**settings, seed=1))  # another partition of the same images
    assert [pair.ids for pair in again.pairs] and again.pairs[0].exact
    with pytest.raises(ValueError, match=r"1 pair of images .*p5.png"):
        data.load(**settings, accept_duplicates=())
    assert "accepted by" in data.load(**settings, accept_duplicates=("p5.png",))["train"].notes[0]
