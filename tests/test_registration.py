"""Registration: copies moved by scipy are laid back onto their originals, other images are not, whatever their contrast."""

import jax
import numpy as np
import pytest
from scipy import ndimage

from detection import neighbours, registration, spaces, views

SIZES = [(64, 64), (28, 24, 24)]
overlaid = jax.jit(jax.vmap(registration.correlation))


def people(seed, n, size):
    """n random fields with the spectrum of natural images."""
    rng = np.random.default_rng(seed)
    f = np.sqrt(sum(np.square(g) for g in np.meshgrid(*[np.fft.fftfreq(m) for m in size], indexing="ij")))
    f.flat[0] = np.inf
    axes = range(1, len(size) + 1)
    fields = np.fft.ifftn(np.fft.fftn(rng.normal(size=(n, *size)), axes=axes) / f ** (len(size) / 2), axes=axes).real
    return (fields / (3.5 * fields.std())).clip(-1, 1).astype(np.float32)[..., None]


def moved(x, seed):
    """Each image turned by 5 degrees, its size off by 7 %, and shifted by up to 4 pixels, by scipy."""
    rng, rank = np.random.default_rng(seed), x.ndim - 2
    out = np.empty_like(x)
    for i, image in enumerate(x[..., 0]):
        angle, matrix = np.radians(rng.choice([-5, 5])), np.eye(rank)
        matrix[-2:, -2:] = [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
        matrix *= rng.choice([1.07, 1 / 1.07])
        middle = (np.array(image.shape) - 1) / 2
        offset = middle - matrix @ middle + rng.uniform(-4, 4, rank)
        out[i, ..., 0] = ndimage.affine_transform(image, matrix, offset, order=1, mode="nearest")
    return out


@pytest.mark.parametrize("size", SIZES)
def test_moved_copies_are_told_from_others(size):
    x = people(0, 16, size)
    looks = jax.jit(registration.looks)
    fixed, copy = np.asarray(looks(x)), np.asarray(looks(moved(x, 1)))
    same, other = np.asarray(overlaid(copy, fixed)), np.asarray(overlaid(copy, np.roll(fixed, 1, 0)))
    plain = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(copy, fixed, strict=True)]
    assert np.median(plain) < 0.75, "without registration they do not match: the test asks for something"
    assert same.min() > other.max() + 0.2 and np.median(same) > 0.85
    np.testing.assert_allclose(overlaid(fixed, fixed), 1, atol=1e-5)
    brighter = np.asarray(looks((0.5 * x + 0.3).astype(np.float32)))
    np.testing.assert_allclose(overlaid(brighter, fixed), 1, atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_a_blank_image_is_like_nothing(size):
    x = people(2, 2, size)
    looks = np.asarray(registration.looks(np.concatenate([x, np.zeros_like(x), np.full_like(x, 0.7)])))
    sim = np.asarray(overlaid(looks[[0, 2, 2, 3]], looks[[2, 1, 2, 3]]))
    assert np.isfinite(sim).all() and np.abs(sim).max() < 0.01


def test_what_is_registered_is_small():
    assert registration.shape((512, 512)) == (32, 32) and registration.shape((20, 31)) == (20, 31)
    assert np.prod(registration.shape((155, 240, 240))) <= registration.MOST[3]
    assert registration.looks(np.ones((2, 512, 500, 3), np.float32)).shape == (2, 32, 31), "in proportion"


@pytest.mark.parametrize(
    ("size", "small"),
    [
        ((4, 256, 256), (4, 70, 70)),
        ((2, 300, 300), (2, 100, 100)),
        ((8, 256, 256), (4, 70, 70)),
        ((1, 24, 24), (1, 24, 24)),
    ],
)
def test_thin_volumes_keep_their_planes(size, small):
    assert registration.shape(size) == small
    assert registration.band(size) == pytest.approx(np.array(registration.band((24, 24))) * small[1] / size[1])
    x = people(6, 4, size)
    looks = np.asarray(jax.jit(registration.looks)(x))
    shifted = np.asarray(registration.looks(np.roll(x, size[1] // 40, 1 + 1)))
    assert looks.shape == (4, *small) and np.isfinite(registration.spectra(looks)).all()
    same, other = np.asarray(overlaid(shifted, looks)), np.asarray(overlaid(shifted, np.roll(looks, 1, 0)))
    assert same.min() > other.max() + 0.2


def test_candidates_are_registered_and_mirrored_copies_found(monkeypatch):
    monkeypatch.setattr(spaces, "REGISTERED", 48 * 32 * 32)  # several batches, the last of them not full
    train = people(3, 40, (64, 64))
    query = np.concatenate([moved(train[:6], 4), moved(train[6:12], 5)[:, :, ::-1]])
    embed = lambda x: views.pixels(x) + views.pixels(x[:, :, ::-1])  # sees a mirrored image as its original
    space = spaces.registered(embed, (64, 64, 1), candidates=40)
    rows_of = lambda space, x: space.keep(np.asarray(space.embed(x)))
    rows = rows_of(space, train)
    found = space.search(rows_of(space, query), rows)
    np.testing.assert_array_equal(found.index[:, 0], np.arange(12))
    np.testing.assert_allclose(space.vectors(rows), neighbours.standardise(np.asarray(embed(train))), atol=1e-6)
    itself = space.search(rows, rows)
    np.testing.assert_array_equal(itself.index[:, 0], np.arange(40))
    assert (itself.sim > 0.9999).all() and itself.sim.shape == (40, 1)
    alone = spaces.registered(embed, (64, 64, 1), candidates=0)
    np.testing.assert_array_equal(
        alone.search(rows_of(alone, query), rows_of(alone, train)).sim,
        neighbours.nearest(*(neighbours.standardise(np.asarray(embed(x))) for x in (query, train))).sim,
    )


@pytest.mark.parametrize("size", SIZES)
def test_spectra_forgive_shifts_and_find_what_an_embedding_does_not(size):
    train = people(6, 60, size)
    query = np.concatenate([moved(train[:10], 7), moved(train[10:20], 8)[..., ::-1, :]])
    blind = lambda x: x.reshape(len(x), -1)[:, :5]  # a corner: it says nothing of the rest
    space = spaces.registered(blind, (*size, 1), candidates=8)
    rows, asked = (space.keep(np.asarray(space.embed(x))) for x in (train, query))
    found = spaces.alike(asked, rows, registration.shape(size), 4)
    assert found.shape == (20, 4) and all(len(set(row)) == 4 for row in found), "each once, however it was found"
    assert np.mean([i in row for i, row in enumerate(found)]) >= 0.9
    assert np.mean(space.search(asked, rows).index[:, 0] == np.arange(20)) >= 0.9
    near = neighbours.nearest(space.vectors(asked), space.vectors(rows), k=8).index
    assert np.mean([i in row for i, row in enumerate(near)]) < 0.5, "the embedding alone would not do"


@pytest.mark.parametrize("size", SIZES)
def test_the_spectrum_of_a_mirrored_image_is_that_of_the_image_turned(size):
    train = people(9, 30, size)
    shape, picked = registration.shape(size), []
    space = spaces.registered(lambda x: x.reshape(len(x), -1)[:, :5], (*size, 1), candidates=8)
    rows, asked = (space.keep(np.asarray(space.embed(x))) for x in (train, train[:4, ..., ::-1, :]))
    flat = lambda rows: neighbours.standardise(
        np.asarray(registration.spectra(rows[:, -np.prod(shape) :].reshape(-1, *shape)))
    )
    for flip in (False, True):
        looks = asked[:, -np.prod(shape) :].reshape(-1, *shape)
        spectra = np.asarray(registration.spectra(looks[..., ::-1] if flip else looks))
        picked.append(neighbours.nearest(neighbours.standardise(spectra), flat(rows), k=4))
    best = np.where(picked[0].sim[:, 0] >= picked[1].sim[:, 0], picked[0].index[:, 0], picked[1].index[:, 0])
    np.testing.assert_array_equal(spaces.alike(asked, rows, shape, 4)[:, 0], best)
    np.testing.assert_array_equal(best, np.arange(4))


def test_spectra_of_a_shift_within_empty_borders_are_those_of_the_image():
    x = np.zeros((1, 33, 33), np.float32)
    x[0, 14:19, 13:18] = np.random.default_rng(0).normal(size=(5, 5))
    one, other = (np.asarray(registration.spectra(np.roll(x, shift, (1, 2)))) for shift in ((0, 0), (1, -1)))
    assert np.corrcoef(one[0], other[0])[0, 1] > 0.99
    rolled = np.abs(np.fft.fft2(x[0] * np.outer(np.hanning(33), np.hanning(33))))
    np.testing.assert_allclose(one[0].max() ** 2, rolled[np.abs(np.fft.fftfreq(33)) <= 1 / 3].max(), rtol=1e-4)
