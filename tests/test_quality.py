"""Quality as a whole: what it says of good, blurred and repeated images; features by id; mistakes told."""

import json
from typing import NamedTuple

import jax
import numpy as np
import pytest

import data
from ldm import quality


class Set(NamedTuple):
    images: np.ndarray
    ids: np.ndarray
    patients: np.ndarray


def a_set(n, seed, patients=None, size=(24, 24), noise=0.15):
    """Smooth blobs, one per image, with some noise."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1, 1, s) for s in size), indexing="ij")
    centre, width = rng.uniform(-0.5, 0.5, (n, len(size))), rng.uniform(0.2, 0.6, n)
    blobs = [
        np.exp(-sum((a - c) ** 2 for a, c in zip(axes, cs, strict=True)) / w**2)
        for cs, w in zip(centre, width, strict=True)
    ]
    images = np.clip(2 * np.array(blobs) - 1 + noise * rng.standard_normal((n, *size)), -1, 1).astype(np.float32)
    ids = np.array([f"{seed}-{i}" for i in range(n)])
    return Set(images[..., None], ids, ids if patients is None else patients)


@jax.jit
def moments(x):
    """A feature space that sees where the blob is, how wide, and how noisy."""
    rows, columns = x.mean((2, 3)), x.mean((1, 3))
    rough = (x[:, 1:] - x[:, :-1]).std((1, 2, 3))[:, None] * 5
    return jax.numpy.concatenate([rows[:, ::4] + 1, columns[:, ::4] + 1, rough], axis=1)


SETTINGS = {"in_order": data.in_order, "neighbours": 5, "pairs": 100, "batch": 16, "seed": 0}


@pytest.fixture
def judged(tmp_path):
    good = a_set(90, 2)
    sets = {
        "good": good,
        "blurred": a_set(90, 3, noise=0.0),
        "repeated": good._replace(images=good.images[np.arange(90) % 3]),
    }
    reference = a_set(120, 1, patients=np.repeat(np.arange(60), 2).astype(str))
    return quality.evaluate(reference, sets, spaces={"moments": moments}, path=tmp_path / "quality.json", **SETTINGS)


def test_good_blurred_and_repeated_images_are_told_apart(judged, tmp_path):
    assert json.loads((tmp_path / "quality.json").read_text()) == judged
    assert judged["sets"]["reference"] == {"n": 120, "n_patients": 60}
    good, blurred, repeated = (judged["spaces"]["moments"][name] for name in ("good", "blurred", "repeated"))
    assert good["frechet_infinity"]["ci"][0] <= 0 <= good["frechet_infinity"]["ci"][1]
    assert good["kernel"]["ci"][0] <= 0 <= good["kernel"]["ci"][1]
    assert good["frechet"]["value"] > good["frechet_infinity"]["value"], "the plain one is biased upwards"
    assert blurred["kernel"]["ci"][0] > 0 and blurred["frechet_infinity"]["ci"][0] > 0
    assert blurred["precision"]["ci"][1] < good["precision"]["ci"][0]
    assert repeated["recall"]["ci"][1] < good["recall"]["ci"][0]
    assert repeated["coverage"]["ci"][1] < good["coverage_if_equal"]
    for row in (good, blurred, repeated):
        for name in ("precision", "recall", "coverage"):
            low, high = row[name]["ci"]
            assert 0 <= low <= row[name]["value"] <= high <= 1 and low < high


def test_diversity(judged):
    found = judged["ms_ssim"]
    assert found["scales"] == 2, "24 pixels have room for two"
    assert found["repeated"]["value"] > found["good"]["ci"][1]
    assert found["good"]["ci"][0] <= found["reference"]["value"] + 0.1
    assert found["good"]["n_pairs"] == 100


def test_volumes_go_the_same_way(tmp_path):
    reference, fake = (a_set(20, seed, size=(12, 16, 16)) for seed in (1, 2))
    pooled = jax.jit(lambda x: x.mean((1, 2, 4))[:, ::4] + 1)
    found = quality.evaluate(reference, {"fake": fake}, spaces={"rows": pooled}, path=tmp_path / "q.json", **SETTINGS)
    assert found["ms_ssim"]["scales"] == 1 and 0 < found["ms_ssim"]["fake"]["value"] < 1
    assert found["spaces"]["rows"]["fake"]["dimensions"] == 4


def test_pairs_are_of_different_patients_and_the_images_take_turns():
    patients = np.repeat(np.arange(10), 3).astype(str)
    index = quality.pairs_of(patients, 60, seed=0)
    assert np.all(patients[index[:, 0]] != patients[index[:, 1]])
    assert len(np.unique(np.sort(index, 1), axis=0)) == len(index)
    assert np.ptp(np.bincount(index.ravel(), minlength=30)) <= 4
    assert len(quality.pairs_of(np.arange(9).astype(str), 500, seed=0)) == 36, "all there are"


def test_too_few_patients_are_told_and_skipped(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(quality.log, "say", told.append)
    reference, fake = a_set(40, 1, patients=np.repeat(list("abcde"), 8)), a_set(40, 2)
    assert quality.evaluate(reference, {"x": fake}, spaces={}, path=tmp_path / "q.json", **SETTINGS) is None
    assert told == ["quality: not measured: the set 'reference' has 5 patients and 8 are needed"]
    why = json.loads((tmp_path / "q.json").read_text())
    assert why == {"reason": "the set 'reference' has 5 patients and 8 are needed"}, "a study waits for the file"


# ---- anyone's features


IDS = {"reference": ["a", "b"], "synthetic": ["b", "c"]}


def write(path, ids, features):
    np.savez(path, ids=np.array(ids), features=np.array(features, np.float32))
    return path


def test_features_are_matched_by_id(tmp_path):
    path = write(tmp_path / "f.npz", ["c", "synthetic/b", "reference/b", "a", "other"], [[1], [2], [3], [4], [5]])
    found = quality.read_features(path, IDS)
    assert found["reference"].tolist() == [[4], [3]] and found["synthetic"].tolist() == [[2], [1]]
    assert found["reference"].dtype == np.float64


@pytest.mark.parametrize(
    ("ids", "features", "told"),
    [
        (
            ["a", "reference/b", "synthetic/b"],
            [[1], [2], [3]],
            r"no features of 'c' and 0 more of the 2 images of 'synthetic'",
        ),
        (["a", "b", "c"], [[1], [2], [3]], r"two sets have an image 'b'; write its id as 'reference/b'"),
        (["a", "b", "a"], [[1], [2], [3]], r"the id 'a' is there 2 times"),
        (["a", "b"], [[1], [np.nan]], r"the features of 'b' hold NaN"),
        (["a", "b"], [1, 2], r"of shape \(2,\); 2 ids need numbers \(2, D\)"),
    ],
)
def test_features_that_do_not_fit(tmp_path, ids, features, told):
    with pytest.raises(ValueError, match=f"f.npz: .*{told}") as error:
        quality.read_features(write(tmp_path / "f.npz", ids, features), IDS)
    assert "\n" not in str(error.value)


def test_files_that_are_no_features(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"correct config\.quality\.features"):
        quality.read_features(tmp_path / "f.npz", IDS)
    np.savez(tmp_path / "f.npz", names=[1])
    with pytest.raises(ValueError, match=r"holds \['names'\], not \['features', 'ids'\]"):
        quality.read_features(tmp_path / "f.npz", IDS)
    (tmp_path / "f.npz").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"not an .npz file of plain arrays"):
        quality.read_features(tmp_path / "f.npz", IDS)
