"""PSNR, SSIM and MS-SSIM against scikit-image and against values that pytorch-msssim 1.0.0 gave."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage import metrics

from ldm import similarity

# size -> (scales, MS-SSIM, SSIM) of the pairs of `waves`, from float64 and data_range=2; `ms_ssim` was given the first
# weights of Wang et al., summing to one, and run under `python -O`, as it asserts five scales' size. It pads odd sizes
# before halving them, which we do not: all sizes here are even down to the last scale
REFERENCE = {
    (192, 176): (5, [0.832527, 0.833098, 0.826889], [0.208215, 0.210677, 0.210851]),
    (64, 64): (3, [0.89133, 0.894479, 0.881912], [0.554294, 0.553853, 0.576666]),
    (44, 34): (2, [0.826386, 0.827346, 0.833781], [0.733039, 0.721166, 0.70092]),
    (32, 40, 24): (2, [0.90722, 0.805794, 0.883209], [0.775273, 0.7681, 0.769952]),
}


def waves(size):
    rng = np.random.default_rng(0)
    axes = np.meshgrid(*(np.linspace(0, 1, n) for n in size), indexing="ij")
    a = np.stack([np.cos(9 * sum((k + 1) * x for k, x in enumerate(axes)) + phase) for phase in (0.0, 1.0, 2.0)])
    b = 0.8 * a + 0.3 * rng.standard_normal(a.shape)
    return (np.clip(x, -1, 1)[..., None].astype(np.float32) for x in (a, b))


@pytest.mark.parametrize("size", REFERENCE, ids=str)
def test_as_pytorch_msssim(size):
    count, multi, single = REFERENCE[size]
    a, b = waves(size)
    assert similarity.scales(size) == count
    np.testing.assert_allclose(similarity.ms_ssim(a, b), multi, atol=2e-5)
    np.testing.assert_allclose(similarity.ssim(a, b), single, atol=2e-5)


@settings(max_examples=12, deadline=None)
@given(
    size=st.sampled_from([(11, 11), (17, 30), (12, 13, 14)]), channels=st.sampled_from([1, 3]), seed=st.integers(0, 99)
)
def test_as_scikit_image(size, channels, seed):
    a, b = np.clip(np.random.default_rng(seed).normal(0, 0.5, (2, 2, *size, channels)), -1, 1).astype(np.float32)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 2.0}
    theirs = [metrics.structural_similarity(x, y, channel_axis=-1, **settings) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(similarity.ssim(a, b), theirs, atol=2e-5)
    theirs = [metrics.peak_signal_noise_ratio(x, y, data_range=2.0) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(similarity.psnr(a, b), theirs, rtol=1e-5)


@pytest.mark.parametrize("size", [(5, 7), (8, 64, 64), (1, 1), (33, 21)])
def test_equal_images_are_equal_whatever_their_size(size):
    x = np.random.default_rng(1).uniform(-1, 1, (2, *size, 1)).astype(np.float32)
    np.testing.assert_allclose(similarity.ssim(x, x), 1, atol=1e-5)
    np.testing.assert_allclose(similarity.ms_ssim(x, x), 1, atol=1e-5)
    assert np.all(np.isinf(similarity.psnr(x, x)))


def test_scales():
    assert [similarity.scales((n, 200)) for n in (10, 11, 22, 44, 88, 176, 512)] == [1, 1, 2, 3, 4, 5, 5]
    assert similarity.scales((32, 256, 256)) == 2


def test_a_negative_of_an_image_is_not_nan():
    x = np.random.default_rng(1).uniform(-1, 1, (1, 64, 64, 1)).astype(np.float32)
    assert similarity.ms_ssim(x, -x)[0] == 0
