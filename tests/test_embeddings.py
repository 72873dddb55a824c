"""Rows of an audit: one rendering an image, files that the next audit reads, whole batches of planted copies."""

from types import SimpleNamespace

import numpy as np
import pytest

from detection import controls, embeddings, evidence, spaces, views

IMAGES = np.random.default_rng(0).standard_normal((41, 6, 6, 1)).astype(np.float32)
SPACES = {
    "pixels": spaces.by_correlation(views.pixels),
    "half": spaces.by_correlation(lambda x: views.pixels(x[:, ::2])),
    "pairs": spaces.by_pairs(
        lambda a, b: -((a - b) ** 2).mean((1, 2, 3)), (6, 6, 1), "error", flips=True, candidates=3
    ),
}
PLANTS = {
    ("identity", 0.0): lambda key, x: x,
    ("gamma", 1.4): lambda key, x: x**3,
    ("gamma", 2.0): lambda key, x: x**5,
    ("flip", 1.0): lambda key, x: x[:, :, ::-1],
}


def in_order(images, batch):
    for start in range(0, len(images), batch):
        rows = np.stack([images[i] for i in range(start, min(start + batch, len(images)))])
        yield np.concatenate([rows, np.repeat(rows[-1:], batch - len(rows), 0)]), len(rows)


@pytest.fixture
def rendered():
    """A rendering, and the number of images it has rendered."""
    seen = []
    return lambda x: seen.append(len(x)) or 2 * x, seen


def of_images(view, cache, examined=SPACES, images=IMAGES):
    how = {"in_order": in_order, "batch": 16, "cache": cache}
    return embeddings.of_images(examined, images, view, "train", views.fingerprint(images, in_order, 16), **how)


def test_each_image_is_rendered_once_for_all_spaces_and_read_the_next_time(tmp_path, rendered):
    view, seen = rendered
    rows = of_images(view, tmp_path)
    assert seen == [16, 16, 16]
    for name, space in SPACES.items():
        assert isinstance(rows[name], np.memmap)
        np.testing.assert_array_equal(rows[name], space.keep(np.asarray(space.embed(2 * IMAGES))))
    again = of_images(view, tmp_path)
    assert len(seen) <= 5, "the first batch, and the next that was under way"
    for name in SPACES:
        np.testing.assert_array_equal(again[name], rows[name])
    seen.clear()
    more = {**SPACES, "other": spaces.by_correlation(lambda x: views.pixels(x)[:, 5:])}
    assert of_images(view, tmp_path, more)["other"].shape == (41, 31) and len(seen) == 3
    assert len(list(tmp_path.iterdir())) == 4, "nothing is left aside"
    other = IMAGES.copy()
    other[40] += IMAGES[3]
    assert (of_images(view, tmp_path, images=other)["pixels"][40] != rows["pixels"][40]).any(), "content counts"


def test_two_spaces_with_the_same_rows(tmp_path):
    rows = of_images(views.as_it_is, tmp_path, {"one": SPACES["pixels"], "two": spaces.by_correlation(views.pixels)})
    np.testing.assert_array_equal(rows["one"], rows["two"])
    assert len(list(tmp_path.iterdir())) == 1


def test_copies_of_all_kinds_fill_batches_and_come_in_order(rendered):
    view, seen = rendered
    how = {"in_order": in_order, "batch": 16, "seed": 0}
    deciding, beside = {"pixels": SPACES["pixels"]}, {"half": SPACES["half"], "pairs": SPACES["pairs"]}
    rows = embeddings.of_plants(deciding, beside, PLANTS, IMAGES[:5], view, **how)
    assert seen == [16] * 2, "15 standard copies and 5 others, not a batch for each kind"
    for space, kinds in (("pixels", PLANTS), ("half", controls.standard(PLANTS)), ("pairs", controls.standard(PLANTS))):
        made = np.concatenate([copy(None, IMAGES[:5]) for copy in kinds.values()])
        expected = SPACES[space].keep(np.asarray(SPACES[space].embed(2 * made)))
        np.testing.assert_allclose(rows[space], expected, atol=1e-6)


def test_slow_spaces_are_measured_on_some_images_that_hold_the_copied(tmp_path):
    sizes, needed = {"train": 41, "val": 12, "synthetic": 30}, np.array([3, 17, 40])
    some = evidence.some(sizes, 15, needed, seed=0)
    assert {name: len(index) for name, index in some.items()} == {"train": 15, "val": 12, "synthetic": 15}
    assert np.isin(needed, some["train"]).all() and all((np.diff(index) > 0).all() for index in some.values())
    sets = {name: SimpleNamespace(images=IMAGES[:n]) for name, n in (sizes | {"control": 5}).items()}
    view, content = dict.fromkeys(sets, views.as_it_is), {name: name for name in sets}
    slow, quick = {"pairs": SPACES["pairs"]}, {"pixels": SPACES["pixels"]}
    rows = embeddings.of_sets(quick, slow, sets, some, view, content, in_order=in_order, batch=16, cache=tmp_path)
    assert {name: len(of) for name, of in rows["pixels"].items()} == sizes | {"control": 5}
    assert {name: len(of) for name, of in rows["pairs"].items()} == {"train": 15, "val": 12, "synthetic": 15}
    expected = slow["pairs"].keep(np.asarray(slow["pairs"].embed(IMAGES[some["train"]])))
    np.testing.assert_array_equal(rows["pairs"]["train"], expected)
    said = evidence.said_of(some, sizes)
    assert "15 of 41 train" in said and "15 of 30 synthetic" in said and "val" not in said
    assert evidence.said_of(evidence.some(sizes, 2000, needed, seed=0), sizes) == ""
