"""Planted copies: what a crop and a local copy are, and which planted copies count as seen."""

import jax
import numpy as np
import pytest

from data import copies
from detection import controls


def images(n, size, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (n, *size, 1)).astype(np.float32)


def ramps(n, size):
    """Images whose values are the place along each axis in turn, as channels, from 0 to 1."""
    place = np.stack(np.meshgrid(*[(np.arange(s) + 0.5) / s for s in size], indexing="ij"), -1)
    return np.repeat(place[None].astype(np.float32), n, 0)


@pytest.mark.parametrize("size", [(40, 50), (20, 30, 40)])
@pytest.mark.parametrize("kept", [0.9, 0.8])
def test_a_crop_is_an_off_centre_window_enlarged_to_the_frame(size, kept):
    """Read off places as pixel values: each axis shows `kept` of itself, from its start or to its end."""
    x = ramps(64, size)
    y = np.asarray(copies.grid()["crop", kept](jax.random.key(0), x))
    assert y.shape == x.shape
    starts = []
    for axis, n in enumerate(size):
        line = np.moveaxis(y[..., axis], axis + 1, -1).reshape(64, -1, n)
        assert np.ptp(line, axis=1).max() < 1e-5, "axes do not mix"
        line = line[:, 0]
        middle = slice(n // 10, -(n // 10))  # linear but where the window's edge is repeated
        slope = np.diff(line[:, middle], axis=1) * n
        np.testing.assert_allclose(slope, kept, atol=0.03)
        centre = line.mean(1)
        near = np.abs(centre - kept / 2) < 0.02
        assert (near | (np.abs(centre - (1 - kept / 2)) < 0.02)).all(), (
            "at the start or at the end, never in the middle"
        )
        starts.append(near)
    corners = {tuple(row) for row in np.array(starts).T}
    assert len(corners) == 2 ** len(size), "every corner is drawn"


@pytest.mark.parametrize("size", [(40, 40), (20, 20, 20)])
def test_a_local_copy_is_the_middle_of_one_image_in_another(size):
    x = images(3, size)
    y = np.asarray(copies.grid()["local", 0.5](jax.random.key(0), x))
    n = size[0]
    inside = (slice(None), *[slice(round(0.29 * n), round(0.71 * n))] * len(size))
    np.testing.assert_allclose(y[inside], x[inside], atol=1e-6)
    host = np.flip(np.roll(x, -1, axis=0), len(size))
    rim = round(0.2 * n)
    np.testing.assert_allclose(y[:, :rim], host[:, :rim], atol=1e-6)
    share = np.isclose(y, x, atol=1e-6).mean()
    assert abs(share - 0.5 ** len(size)) < 0.1
    alone = np.asarray(copies.grid()["local", 0.5](jax.random.key(0), x[:1]))
    assert np.abs(alone - x[:1]).mean() > 0.1, "alone in its batch it is no copy of itself"


def test_kinds_that_are_not_looked_for_do_not_count():
    counted = controls.standard(copies.grid() | {("re-noise", 0.5): None})
    assert ("crop", 0.9) in counted and not {"local", "re-noise"} & {kind for kind, _ in counted}


def test_a_copy_is_seen_only_if_it_points_at_the_right_patient():
    patients, chosen = np.array(["a", "a", "b", "c"]), np.array([0, 2, 3])
    sim, nearest = np.array([0.9, 0.9, 0.1]), np.array([1, 3, 3])  # another image of a; c in place of b; c, but too far
    planted = [controls.Planted("flip", 1.0, True, sim, nearest), controls.Planted("local", 0.5, False, sim, nearest)]
    row = controls.recalls(planted, 0.5, patients, chosen)[0]
    assert row["recall"] == pytest.approx(1 / 3) and row["right_patient"] == pytest.approx(2 / 3)
    said = controls.overall(planted, 0.5, patients, chosen, seed=0)
    assert said["recall"] == pytest.approx(1 / 3) and said["n"] == 3
