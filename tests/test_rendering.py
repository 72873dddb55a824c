"""Like for like: spectra, common filters, and the trap of smooth samples."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import fft, ndimage

from detection import calibrate, neighbours, rendering


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


def test_blurred_unseen_images_are_no_copies_and_blurred_copies_are():
    rng = np.random.default_rng(3)
    train, val, unseen = (fields(rng, n) for n in (200, 150, 150))
    innocent, guilty = blurred(unseen, 1.5), blurred(train[:150], 1.5)
    raw_rate, _ = flagged(innocent, train, val)
    assert raw_rate > 0.15, "the trap: smoothness alone looks like copying"
    for syn, is_copy in ((innocent, False), (guilty, True)):
        filters = rendering.common_filters(spectra(val), spectra(syn))
        alike = filtered(syn, filters.synthetic), filtered(train, filters.real), filtered(val, filters.real)
        rate, bh = flagged(*alike)
        report = rendering.compare(spectra(alike[2]), np.arange(150), spectra(alike[0]), seed=0)
        assert not report["differs"]
        if is_copy:
            assert bh.mean() > 0.95
        else:
            assert rate < 0.11 and not bh.any()


def test_the_check_tells_a_blur_from_chance():
    rng = np.random.default_rng(4)
    val, same = fields(rng, 80), fields(rng, 80)
    assert not rendering.compare(spectra(val), np.arange(80), spectra(same), seed=0)["differs"]
    told = rendering.compare(spectra(val), np.arange(80), spectra(blurred(same, 1.5)), seed=0)
    assert told["differs"] and told["worst_gap_db"] < -3 and told["p_value"] == 0.001
