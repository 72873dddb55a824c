"""Similarity spaces: pair scores by brute force, candidates, what is said of a space, on eight devices."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics

from data import augment, copies
from data import in_order as ordered
from detection import controls, detector, embeddings, neighbours, roc, spaces, views
from ldm import similarity


def in_order(images, batch):
    """`data.in_order` without its threads."""
    for start in range(0, len(images), batch):
        rows = np.stack([images[i] for i in range(start, min(start + batch, len(images)))]).astype(np.float32)
        yield np.concatenate([rows, np.repeat(rows[-1:], batch - len(rows), 0)]), len(rows)


def smooth(rng, n, size=(16, 16), channels=1):
    """Smooth random images in [-1, 1]."""
    x = jnp.asarray(rng.standard_normal((n, *size, channels)), jnp.float32)
    x = np.asarray(augment.blur(x, 1.5))
    return (x / np.abs(x).max(tuple(range(1, x.ndim)), keepdims=True)).astype(np.float32)


def rows_of(space, images):
    return space.keep(np.asarray(space.embed(jnp.asarray(images))))


def best_window(a, b, reach):
    """The definition, window by window, of one pair of images."""
    found = []
    middle = tuple(slice(r, n - r) for r, n in zip(reach, b.shape, strict=False))
    for version in (a, a[..., ::-1, :]):
        for move in np.ndindex(*(2 * r + 1 for r in reach)):
            window = version[tuple(slice(m, m + n - 2 * r) for m, r, n in zip(move, reach, a.shape, strict=False))]
            found.append(np.corrcoef(window.ravel(), b[middle].ravel())[0, 1])
    return max(found)


@pytest.mark.parametrize("size, channels", [((16, 12), 1), ((16, 16), 2), ((6, 12, 10), 1)])
def test_shifted_correlation_is_the_best_window(size, channels):
    rng = np.random.default_rng(0)
    a, b = smooth(rng, 5, size, channels), smooth(rng, 5, size, channels)
    score = spaces.shifted_correlation((*size, channels), shift=0.13)
    reach = tuple(round(0.13 * n) for n in size)
    expected = [best_window(x, y, reach) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(score(a, b), expected, atol=1e-4)


def test_shifted_correlation_sees_shifts_and_flips_and_no_more():
    rng = np.random.default_rng(1)
    scene = smooth(rng, 4, (24, 24))
    score = spaces.shifted_correlation((16, 16, 1), shift=0.125)
    a = scene[:, 4:20, 4:20]
    np.testing.assert_allclose(score(a, scene[:, 2:18, 6:22]), 1, atol=1e-4)
    np.testing.assert_allclose(score(a[..., ::-1, :], scene[:, 5:21, 3:19]), 1, atol=1e-4)
    assert (score(a, scene[:, 0:16, 8:24]) < 0.98).all()
    assert (score(a, np.zeros_like(a)) == 0).all()


@pytest.mark.parametrize("flips", [False, True])
def test_with_all_candidates_the_search_is_brute_force(flips):
    rng = np.random.default_rng(2)
    train, query = smooth(rng, 30), smooth(rng, 11)
    query[3] = train[8]
    train[20] = train[8]  # equal scores go to the smaller index
    space = spaces.by_pairs(similarity.ssim, (16, 16, 1), "SSIM", flips=flips, candidates=30, batch=64)
    found = space.search(rows_of(space, query), rows_of(space, train))
    all_QxN = np.stack([similarity.ssim(np.repeat(q[None], 30, 0), train) for q in query])
    np.testing.assert_array_equal(found.index[:, 0], all_QxN.argmax(1))
    np.testing.assert_allclose(found.sim[:, 0], all_QxN.max(1), rtol=1e-5)
    assert found.index[3, 0] == 8 and "30 training images" in space.note


def test_few_candidates_are_enough_for_shifted_and_mirrored_copies():
    rng = np.random.default_rng(3)
    train = smooth(rng, 200, (32, 32))
    moved = np.array(augment.shift(jnp.asarray(train[:40]), 0.06))
    moved[::2] = moved[::2, :, ::-1]
    score = spaces.shifted_correlation((32, 32, 1))
    space = spaces.by_pairs(score, (32, 32, 1), "shifted pixel correlation", flips=True, candidates=8)
    found = space.search(rows_of(space, moved), rows_of(space, train))
    assert (found.index[:, 0] == np.arange(40)).mean() > 0.95 and np.median(found.sim) > 0.98
    pixels = spaces.by_correlation(views.pixels)
    plain = pixels.search(rows_of(pixels, moved), rows_of(pixels, train))
    assert (plain.index[:, 0] == np.arange(40))[::2].mean() < 0.2, "which aligned correlation does not see"


def test_large_images_are_averaged_in_blocks_and_it_is_said():
    x = np.random.default_rng(4).standard_normal((2, 256, 256, 1)).astype(np.float32)
    small = views.averaged(jnp.asarray(x), 2**14)
    np.testing.assert_allclose(small, x.reshape(2, 128, 2, 128, 2, 1).mean((2, 4)), atol=1e-6)
    assert (
        "block averages of size (128, 128)" in spaces.by_pairs(similarity.ssim, (256, 256, 1), "SSIM", flips=False).note
    )


def flags_and_space(rng, copied):
    """A space with 40 synthetic images whose first `copied` are far above the 60 unseen."""
    scores = np.concatenate([rng.uniform(0.9, 1, copied), rng.uniform(0, 0.5, 40 - copied)])
    planted = [
        controls.Planted(k, 1.0, k != "hard", rng.uniform(0.4, 1, 10), np.arange(10)) for k in ("a", "b", "hard")
    ]
    return spaces.Measured(neighbours.Neighbours(scores[:, None], None), rng.uniform(0, 0.6, 60), planted)


def test_section_says_recall_flags_and_agreement():
    rng = np.random.default_rng(5)
    what, detector_flags = flags_and_space(rng, 20), np.arange(40) < 25
    of = what, np.arange(60), np.arange(10), detector_flags
    said = spaces.section(*of, np.arange(40), fdr=0.05, seed=0, note="x")
    grouped = spaces.section(*of, np.arange(40) // 4, fdr=0.05, seed=0)
    assert grouped["flag_rate_ci"][0] < said["flag_rate_ci"][0] and said["flag_rate_ci"][1] < grouped["flag_rate_ci"][1]
    flags = np.arange(40) < 20
    assert said["n_flagged"] == 20 and said["agreement"] == pytest.approx(metrics.jaccard_score(detector_flags, flags))
    assert said["kappa"] == pytest.approx(metrics.cohen_kappa_score(detector_flags, flags))
    sim = np.concatenate([p.sim_Q for p in what.planted[:2]])
    expected = roc.summary(sim, np.tile(np.arange(10), 2), what.null_M, np.arange(60), seed=0)
    assert {name: said[name] for name in expected} == expected
    json.dumps(said, allow_nan=False)


def test_nothing_flagged_anywhere_and_no_copies_planted_are_null_not_zero():
    rng = np.random.default_rng(6)
    vectors = {name: rng.standard_normal((n, 8)) for name, n in (("train", 50), ("val", 60), ("synthetic", 40))}
    what = spaces.given(vectors)
    said = spaces.section(what, np.arange(60), np.arange(0), np.zeros(40, bool), np.arange(40), fdr=0.05, seed=0)
    assert said["agreement"] is None and said["kappa"] is None and said["auc"] is None and said["fpr_05_ci"] is None
    expected = np.corrcoef(vectors["synthetic"], vectors["train"])[:40, 40:].max(1)
    np.testing.assert_allclose(what.hits.sim[:, 0], expected, atol=1e-6)
    json.dumps(said, allow_nan=False)


def test_spaces_measured_alike_on_eight_devices(tmp_path):
    """Pixels see identity and not flips; a shifted score sees both; an untrained detector is some space too."""
    rng = np.random.default_rng(7)
    everyone = smooth(rng, 150)
    train, val, syn = everyone[:60], everyone[60:110], np.concatenate([everyone[:8], everyone[110:]])
    plants = {k: v for k, v in copies.grid().items() if k[0] in ("identity", "flip")}
    chosen = controls.choose(np.arange(60), 24, 0)
    double = lambda x: 2 * x  # a view: correlations do not change, vectors do
    sets = {name: SimpleNamespace(images=x) for name, x in (("train", train), ("val", val), ("synthetic", syn))}
    how = {"in_order": in_order, "batch": 16}
    model = detector.build(
        (16, 16, 1),
        tmp_path,
        temperature=0.07,
        flips=False,
        arch="resnet",
        widths=(8, 16),
        blocks=(1, 1),
        bottleneck=False,
        stem=3,
        dim=16,
    )
    shifted = spaces.shifted_correlation((16, 16, 1))
    found = {}
    examined = {
        "pixels": spaces.by_correlation(views.pixels),
        "untrained": spaces.by_correlation(detector.untrained(model, jax.random.key(0))),
        "shifted": spaces.by_pairs(shifted, (16, 16, 1), "shifted pixel correlation", flips=True),
    }
    content = {name: views.fingerprint(x.images, **how) for name, x in sets.items()}
    view = dict.fromkeys(sets, double)
    rows = embeddings.of_sets(examined, {}, sets, {}, view, content, **how, cache=tmp_path / "kept")
    copied = embeddings.of_copies(examined, plants, train[chosen], double, seed=0, **how)
    for name, space in examined.items():
        what = spaces.measured(space, rows[name], copied[name], plants)
        identity, flip = what.planted
        np.testing.assert_allclose(identity.sim_Q, 1, atol=1e-4)
        np.testing.assert_array_equal(identity.nearest_Q, chosen)
        np.testing.assert_allclose(what.hits.sim[:8, 0], 1, atol=1e-4)
        assert len(what.hits.sim) == 48 and len(what.null_M) == 50
        found[name] = spaces.section(what, np.arange(50), chosen, np.arange(48) < 8, np.arange(48), fdr=0.2, seed=0)
        found[name]["flip"] = (flip.nearest_Q == chosen).mean()
    assert found["pixels"]["flip"] < 0.3 and found["shifted"]["flip"] == 1
    assert found["shifted"]["auc"] > 0.99 > found["pixels"]["auc"] + 0.1
    assert found["shifted"]["agreement"] > 0.8 and found["pixels"]["agreement"] > 0.8


def test_a_long_search_keeps_what_is_done_beside_the_rows(tmp_path, monkeypatch):
    rng, write, seen = np.random.default_rng(9), neighbours._Kept.write, []
    np.save(tmp_path / "train.npy", neighbours.standardise(rng.standard_normal((70, 9))))
    train, query = np.load(tmp_path / "train.npy", mmap_mode="r"), rng.standard_normal((20, 9)).astype(np.float32)
    monkeypatch.setattr(neighbours._Kept, "write", lambda *a: seen.append(a[0].path(a[1]).parent) or write(*a))
    spaces.nearest(query[:, :4], train[:, :4], 1, False)
    assert not seen, "not worth it"
    monkeypatch.setattr(neighbours, "_LONG", 0)
    found = spaces.nearest(query[:, :4], train[:, :4], 1, False)
    assert set(seen) == {tmp_path} and [f.name for f in tmp_path.iterdir()] == ["train.npy"]
    np.testing.assert_array_equal(found.index[:, 0], (query[:, :4] @ train[:, :4].T).argmax(1))


def test_the_batches_of_data_will_do():
    """`in_order` here is `data.in_order` in small."""
    images = smooth(np.random.default_rng(8), 5)
    for (a, n), (b, m) in zip(in_order(images, 2), ordered(images, 2), strict=True):
        np.testing.assert_array_equal(a, b)
        assert n == m
