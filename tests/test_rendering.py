"""Like for like: spectra, common filters, the trap of smooth samples, and what differs after all."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import fft, ndimage

import data
from detection import calibrate, neighbours, registration, rendering, views


def fields(rng, n, size=(32, 32)):
    """Smooth random images with some detail."""
    noise = rng.standard_normal((2, n, *size))
    smooth = lambda x, s: ndimage.gaussian_filter(x, (0, *(s,) * len(size)))
    x = 6 * smooth(noise[0], 4) + smooth(noise[1], 1)
    return x[..., None].astype(np.float32)


def blurred(x, sigma):
    return ndimage.gaussian_filter(x, (0, *(sigma,) * (x.ndim - 2), 0))


def spectra(x):
    return np.asarray(rendering.spectra(jnp.asarray(x)))


def filtered(x, gain):
    return np.asarray(rendering.apply_filter(jnp.asarray(x), jnp.asarray(gain)))


@pytest.mark.parametrize("size", [(16, 24), (8, 10, 12)])
def test_a_wave_lies_in_its_band(size):
    """A cosine of half the Nyquist frequency along one axis has all its power in the middle band."""
    axis = np.cos(np.pi / 2 * (np.arange(size[-1]) + 0.5))
    x = np.broadcast_to(axis, size)[None, ..., None].astype(np.float32)
    share = spectra(x)[0]
    bands = min(size) // 2
    assert share.shape == (bands,) and share[int(np.ceil(0.5 * bands)) - 1] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("size", [(16, 24), (7, 10, 12)])
def test_cosines_are_scipys(size):
    x = np.random.default_rng(0).standard_normal((3, *size, 2)).astype(np.float32)
    axes = tuple(range(1, 1 + len(size)))
    np.testing.assert_allclose(rendering.cosines(jnp.asarray(x)), fft.dctn(x, axes=axes, norm="ortho"), atol=1e-5)
    np.testing.assert_allclose(rendering.cosines(rendering.cosines(jnp.asarray(x)), inverse=True), x, atol=1e-5)


def test_the_border_does_not_hide_a_blur():
    """A ramp, whose opposite borders differ: the filters found from its blurred version undo the difference to 1 dB."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(-20, 20, 32)[:, None, None]
    sharp = fields(rng, 60) + ramp
    soft = blurred(fields(rng, 60) + ramp, 1.0)
    gain = rendering.common_filters(spectra(sharp), spectra(soft)).real[1:]
    truth = np.exp(-0.5 * (np.pi * (np.arange(1, 17) - 0.5) / 16) ** 2)  # transfer of a Gaussian of 1 pixel, mid-band
    np.testing.assert_allclose(20 * np.log10(gain[:10] / truth[:10]), 0, atol=1.5)


def test_shares_sum_to_one_and_a_unit_filter_changes_nothing():
    x = fields(np.random.default_rng(0), 3)
    np.testing.assert_allclose(spectra(x).sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(filtered(x, np.ones(17, np.float32)), x, atol=1e-5)


def pixel_scores(query, key):
    flat = lambda x: neighbours.standardise(x.reshape(len(x), -1))
    return neighbours.nearest(flat(query), flat(key)).sim[:, 0]


def flagged(syn, train, val):
    p = calibrate.conformal_p(pixel_scores(syn, train), pixel_scores(val, train), np.arange(len(val)))
    return (p <= 0.05).mean(), calibrate.benjamini_hochberg(p, 0.05)


BAND = (0.0, 1.0)


def seen(x, band=BAND):
    return rendering.Seen(*map(np.asarray, rendering.measure(jnp.asarray(x), band)))


def compared(val, syn, band=BAND, patients=None, **how):
    names = rendering.mark_names(val.shape[1:-1], band)
    patients = np.arange(len(val)) if patients is None else patients
    return rendering.compare(seen(val, band), patients, seen(syn, band), np.arange(len(syn)), names, seed=0, **how)


def made_elsewhere(val, syn, band=BAND, seed=0):
    """What an audit reports of images that another generator made: filtered by one half of them, compared by the other."""
    named = lambda x: SimpleNamespace(images=x, patients=np.arange(len(x)))
    return views.like_for_like({"val": named(val)}, named(syn), None, band, data.in_order, 64, seed).report


def test_blurred_unseen_images_are_no_copies_and_blurred_copies_are():
    rng = np.random.default_rng(3)
    train, val, unseen = (fields(rng, n) for n in (200, 150, 150))
    innocent, guilty = blurred(unseen, 1.5), blurred(train[:150], 1.5)
    raw_rate, _ = flagged(innocent, train, val)
    assert raw_rate > 0.15, "the trap: smoothness alone looks like copying"
    for syn, is_copy in ((innocent, False), (guilty, True)):
        filters = rendering.common_filters(spectra(val[::2]), spectra(syn[::2]))
        alike = filtered(syn, filters.synthetic), filtered(train, filters.real), filtered(val, filters.real)
        rate, bh = flagged(*alike)
        assert not compared(alike[2][1::2], alike[0][1::2], fitted=True)["differs"]
        assert not made_elsewhere(val, syn)["differs"]
        if is_copy:
            assert bh.mean() > 0.95
        else:
            assert rate < 0.11 and not bh.any()


def test_the_check_tells_a_blur_from_chance():
    rng = np.random.default_rng(4)
    val, same = fields(rng, 80), fields(rng, 80)
    assert not compared(val, same)["differs"]
    told = compared(val, blurred(same, 1.5))
    assert told["differs"] and told["worst_gap_db"] < -3 and told["p_value"] == 0.001
    assert told["worst_of"].startswith("power") and told["worst_effect"] < -rendering.TOLERANCE


def half(change):
    return lambda x: np.concatenate([change(x[::2]), x[1::2]])


UNLIKE = {
    "half of them blurred": half(lambda x: blurred(x, 2.0)),
    "half of them sharpened": half(lambda x: x + 3 * (x - blurred(x, 1.0))),
    "another gamma": lambda x: np.exp(1.2 * x / x.std()),
    "clipped by a window": lambda x: np.clip(x / x.std(), -0.3, 0.3),
}


@pytest.mark.parametrize("kind", UNLIKE)
def test_what_a_filter_to_the_mean_spectrum_hides_is_seen(kind):
    """All mean spectra agree to 1 dB once filtered, and yet the images are rendered otherwise."""
    rng = np.random.default_rng(5)
    told = made_elsewhere(fields(rng, 120), UNLIKE[kind](fields(rng, 120)).astype(np.float32))
    assert told["differs"], told
    assert abs(told["worst_gap_db"]) < 3
    assert told["worst_of"].startswith("dispersion" if "half" in kind else "intensity")


def test_unseen_images_do_not_differ_however_they_are_compared():
    """At 20 seeds with few images: never refused, and certain no more often than the level says."""
    certain = []
    for seed in range(20):
        rng = np.random.default_rng(100 + seed)
        val, same = fields(rng, 60), blurred(fields(rng, 40), 0.0)
        for told in (made_elsewhere(val, same, seed=seed), compared(val, same)):
            assert not told["differs"]
            certain.append(told["p_value"] <= 0.05)
    assert np.mean(certain) <= 0.15


def test_a_difference_that_is_certain_and_small_is_none():
    rng = np.random.default_rng(6)
    told = compared(fields(rng, 1500), blurred(fields(rng, 1500), 0.4))
    assert told["p_value"] == 0.001 and not told["differs"]
    assert 0.1 < abs(told["worst_effect"]) < rendering.TOLERANCE


def test_what_the_similarity_does_not_see_does_not_matter():
    """Noise finer than what registration keeps is no difference; the same noise is one where all frequencies count."""
    rng = np.random.default_rng(7)
    size = (64, 64)
    val, same = fields(rng, 100, size), fields(rng, 100, size)
    noise = rng.standard_normal(same.shape).astype(np.float32)
    syn = same + 0.5 * (noise - blurred(noise, 0.7))
    low, high = registration.band(size)
    assert 0 < low < high < 0.5
    assert compared(val, syn)["differs"] and not compared(val, syn, (low, high))["differs"]


def test_the_band_is_what_registration_keeps():
    """Waves in it come through `looks` and the finer band; waves of half its lowest and twice its highest hardly."""
    size = (60, 60)
    band = registration.band(size)
    ticks = np.arange(60) + 0.5

    def kept(frequency):
        wave = np.broadcast_to(np.cos(np.pi * frequency * ticks), (1, *size))[..., None].astype(np.float32)
        look = registration.looks(wave)
        return float(jnp.std(look - registration._blur(look, registration.MIDDLE)))

    middle = kept(np.sqrt(band[0] * band[1]))
    assert min(kept(band[0] * 1.1), kept(band[1] * 0.9)) > 0.2 * middle
    assert max(kept(band[0] / 2), kept(band[1] * 2)) < 0.15 * middle
    assert registration.band((32, 32)) == pytest.approx((0.125, 0.6), abs=0.01), "nothing is reduced"
    assert registration.band((512, 512))[1] < 0.05


def test_a_patient_of_many_images_counts_once():
    """One odd patient of 200 images among 60 of one image each."""
    rng = np.random.default_rng(8)
    val = np.concatenate([fields(rng, 60), blurred(fields(rng, 200), 2.0)])
    patients = np.append(np.arange(60), np.full(200, 60))
    syn = fields(rng, 80)
    assert not compared(val, syn, patients=patients)["differs"]
    assert compared(val, syn)["differs"]


def test_marks_are_named_and_finite():
    for size, band in (
        ((16, 24), BAND),
        ((64, 64), registration.band((64, 64))),
        ((8, 10, 12), (0.1, 0.6)),
        ((3, 2), BAND),
    ):
        x = np.random.default_rng(0).standard_normal((3, *size, 2)).astype(np.float32)
        x[2] = 0.5  # blank
        found = seen(x, band)
        assert found.marks.shape == (3, len(rendering.mark_names(size, band))) and np.isfinite(found.marks).all()


def test_halves_share_nothing_but_the_odd_one():
    rng = np.random.default_rng(0)
    patients = np.array(["b", "a", "b", "c", "d", "c"])
    one, other = views.halves(patients, rng)
    assert not set(patients[one]) & set(patients[other]) and (one | other).all()
    one, other = views.halves(np.arange(1), rng)
    assert one.all() and other.all()
