"""The semi-synthetic cohort: truth that holds by construction, and pictures that behave as patients do."""

import functools
import importlib.machinery
import importlib.util
import multiprocessing
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import cohort

SIZE = (64, 64)


@functools.cache
def _slices(count, scan=0):
    return np.stack([cohort.subject(i, size=SIZE, scan=scan) for i in range(count)])


def _correlations(a, b):
    """Pearson correlation of every image of a with every image of b."""
    a, b = (x.reshape(len(x), -1) - x.mean((1, 2, 3))[:, None] for x in (a, b))
    return (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T


@pytest.mark.parametrize("size", [(64, 64), (32, 48), (33, 20), (16, 20, 16), (9, 24, 30)])
def test_shape_range_and_background(size):
    image = cohort.subject(3, size=size)
    assert image.shape == (*size, 1) and image.dtype == np.float32
    assert image.min() >= -1 and image.max() <= 1 and image.max() > 0.2
    corners = image[tuple(np.ix_(*[[0, -1]] * len(size)))]
    assert corners.max() < -0.8  # Rician noise floor over empty air


def test_subject_is_a_pure_function_of_its_numbers():
    a = cohort.subject(7, size=SIZE)
    cohort.subject(8, size=SIZE)  # drawing someone else in between changes nothing
    np.testing.assert_array_equal(a, cohort.subject(7, size=SIZE))
    for other in (dict(number=8), dict(scan=1), dict(seed=1), dict(height=20.0)):
        assert not np.array_equal(a, cohort.subject(**{"number": 7, "size": SIZE} | other))


def test_a_process_pool_draws_the_same_pictures():
    rows = cohort.records(subjects={"train": 3, "val": 1})
    draw = functools.partial(cohort.render, size=(24, 24), seed=5)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for there, row in zip(pool.map(draw, rows), rows, strict=True):
            np.testing.assert_array_equal(there, draw(row))
            np.testing.assert_array_equal(there, cohort.subject(row.number, size=(24, 24), scan=row.scan, seed=5))


def test_rescans_are_nearer_than_any_other_subject():
    first, again = _slices(150), _slices(150, scan=1)
    same = np.diag(_correlations(first, again))
    others = _correlations(first, first)
    np.fill_diagonal(others, -1)
    # Not one stranger comes as near as the least alike pair of scans, and the typical gap is wide.
    assert others.max() < same.min()
    assert np.median(same) - np.median(others.max(1)) > 0.06
    assert np.median(others[others > -1]) > 0.6  # yet all are brains


def test_subjects_differ_in_anatomy_not_only_in_scanner():
    # Within the brain, with the bright outline out of the comparison, strangers are still far apart.
    core = np.s_[:, 22:44, 24:40]
    first, again = _slices(60)[core], _slices(60, scan=1)[core]
    others = _correlations(first, first)
    np.fill_diagonal(others, -1)
    assert np.median(np.diag(_correlations(first, again))) > np.median(others.max(1)) + 0.15


def test_anatomy_does_not_depend_on_the_size_asked_for():
    for number in range(3):
        fine = cohort.subject(number, size=(128, 128))
        coarse = fine.reshape(64, 2, 64, 2, 1).mean((1, 3))
        assert _correlations(coarse[None], cohort.subject(number, size=SIZE)[None])[0, 0] > 0.96


def test_a_slice_is_a_section_of_the_same_subject_volume():
    # The voxel size is the same (206 mm over 32 rows), so one axial section must be the slice, and of nobody else.
    volumes = np.stack([cohort.subject(i, size=(32, 32, 32)) for i in range(4)])
    slices = np.stack([cohort.subject(i, size=(32, 32)) for i in range(4)])
    best = np.stack([_correlations(slices, v).max(1) for v in volumes], 1)
    assert (best.argmax(1) == np.arange(4)).all() and np.diag(best).min() > 0.95


def test_slabs_do_not_show(monkeypatch):
    whole = cohort.subject(2, size=(12, 16, 12))
    monkeypatch.setattr(cohort, "_CHUNK", 16 * 12 * 5)
    np.testing.assert_allclose(whole, cohort.subject(2, size=(12, 16, 12)), atol=1e-5)


def test_warps_do_not_fold_the_brain(monkeypatch):
    seen = []
    sample = cohort._sample
    monkeypatch.setattr(cohort, "_sample", lambda source, stack: (seen.append(source), sample(source, stack))[1])
    for number in range(3):
        cohort.subject(number, size=(44, 52, 42))
        jacobian = np.stack([np.stack(np.gradient(seen[-1][..., k]), -1) for k in range(3)], -2)
        # y and x run backwards in the picture, which is an even number of flips: the determinant stays positive.
        assert (np.linalg.det(jacobian) > 0).mean() > 0.9995


def test_noise_is_rician():
    air = (cohort.subject(0, size=(128, 128))[:10, :20].ravel() + 1) / 2
    # Over air the magnitude is Rayleigh: mean / std = sqrt(pi / (4 - pi)), whatever sigma.
    assert abs(air.mean() / air.std() - np.sqrt(np.pi / (4 - np.pi))) < 0.3
    assert air.min() >= 0


def test_spline_fields_have_their_stated_spread_and_are_smooth():
    rng = np.random.default_rng(0)
    ticks = [np.linspace(-80, 80, n) + c for n, c in zip((40, 41, 42), cohort._CENTRE, strict=True)]
    fields = cohort._field(cohort._lattice(rng, 14.0, [2.0, 0.5]), 14.0, ticks)
    assert fields.shape == (40, 41, 42, 2)
    np.testing.assert_allclose(fields.std((0, 1, 2)), [2.0, 0.5], rtol=0.15)
    constant = cohort._field(np.ones((18, 18, 18, 1), np.float32), 14.0, ticks)
    np.testing.assert_allclose(constant, 1, atol=1e-5)  # B-splines are a partition of unity


def test_sampling_matches_scipy():
    import scipy.ndimage

    rng = np.random.default_rng(1)
    stack = np.pad(rng.random((5, 6, 7, 2), dtype=np.float32), [(1, 1)] * 3 + [(0, 0)])
    source = rng.uniform(-6, 24, (50, 3)).astype(np.float32)
    got = cohort._sample(source, (stack, 2.0, np.zeros(3, np.float32)))
    for k in range(2):
        want = scipy.ndimage.map_coordinates(stack[..., k], source.T / 2, order=1, mode="nearest")
        np.testing.assert_allclose(got[:, k], want, atol=1e-5)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(cohort.SPLITS), st.integers(0, 40), min_size=1), st.integers(1, 3), st.data())
def test_records_are_stable_and_disjoint(subjects, scans, data):
    rows = cohort.records(subjects=subjects, scans=scans)
    assert len({r.id for r in rows}) == len(rows) == scans * sum(subjects.values())
    assert all(r.duplicate_of == "" for r in rows)
    split_of = {}
    for r in rows:
        assert split_of.setdefault(r.patient, r.split) == r.split  # no patient in two splits
    grown = subjects | {"train": subjects.get("train", 0) + data.draw(st.integers(0, 50))}
    more = cohort.records(subjects=grown, scans=scans)
    for split in subjects:
        old, new = ([r for r in some if r.split == split] for some in (rows, more))
        assert new[: len(old)] == old
        assert split == "train" or new == old


@given(st.integers(1, 20), st.integers(0, 20), st.integers(1, 3), st.booleans(), st.sampled_from(["train", "val"]))
def test_planted_duplicates_tell_the_truth(train, duplicates, copies, rescanned, into):
    duplicates = min(duplicates, train)
    rows = cohort.records(
        subjects={"train": train, "val": 2},
        duplicates=duplicates,
        copies=copies,
        rescanned=rescanned,
        into=into,
        seed=3,
    )
    honest = {r.id: r for r in rows if not r.duplicate_of}
    planted = [r for r in rows if r.duplicate_of]
    assert len(honest) == train + 2 and len(planted) == duplicates * copies
    assert len({r.duplicate_of for r in planted}) == duplicates
    assert not {r.patient for r in planted} & {r.patient for r in honest.values()}
    assert len({r.id for r in rows}) == len(rows)
    for r in planted:
        source = honest[r.duplicate_of]
        assert r.split == into and source.split == "train" and r.number == source.number
        assert (r.scan == source.scan) != rescanned


def test_planted_pictures():
    exact = cohort.records(subjects={"train": 4}, duplicates=1)[-1]
    again = cohort.records(subjects={"train": 4}, duplicates=1, rescanned=True)[-1]
    assert exact.id != exact.duplicate_of == again.duplicate_of
    source = cohort.subject(exact.number, size=SIZE)
    np.testing.assert_array_equal(cohort.render(exact, size=SIZE), source)
    copy = cohort.render(again, size=SIZE)
    assert not np.array_equal(copy, source) and _correlations(copy[None], source[None])[0, 0] > 0.95


@pytest.mark.parametrize(
    "bad",
    [
        dict(subjects={"test": 3}),
        dict(subjects={"train": -1}),
        dict(subjects={"train": cohort.SPLIT_STRIDE + 1}),
        dict(subjects={"train": 3}, scans=0),
        dict(subjects={"train": 3}, duplicates=4),
        dict(subjects={"val": 3}, duplicates=1),
        dict(subjects={"train": 3}, duplicates=1, into="val"),
        dict(subjects={"train": 3}, duplicates=1, copies=0),
    ],
)
def test_bad_records_are_one_clear_line(bad):
    with pytest.raises(ValueError, match=r"^cohort: [^\n]+$"):
        cohort.records(**bad)


@pytest.mark.parametrize(
    "bad",
    [dict(size=(64,)), dict(size=(1, 64)), dict(size=(2, 3, 4, 5)), dict(number=-1), dict(scan=-1), dict(seed=-1)],
)
def test_bad_subjects_are_one_clear_line(bad):
    with pytest.raises(ValueError, match=r"^cohort: [^\n]+$"):
        cohort.subject(**{"number": 0, "size": (16, 16)} | bad)


def test_missing_templates_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install nilearn"):
        dict(cohort._read_templates())
    bare = importlib.machinery.ModuleSpec("nilearn", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: bare)
    with pytest.raises(FileNotFoundError, match="MNI152 templates"):
        dict(cohort._read_templates())


def test_speed():
    cohort.subject(0, size=SIZE)  # reads the templates
    start = time.process_time()
    for number in range(20):
        cohort.subject(number, size=SIZE)
    assert 20 / (time.process_time() - start) > 20  # subjects per second of processor time; 300 on an idle core
