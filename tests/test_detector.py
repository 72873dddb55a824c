"""The contrastive loss against numpy, the encoders' shapes, the detector's input scaling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detection import detector, encoder
from launch import layers


def reference_nt_xent(a, b, temperature):
    """Chen et al. 2020, Eq. 1, as a loop."""
    z = np.concatenate([a, b]).astype(np.float64)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    n, total = len(z), 0.0
    for i in range(n):
        j = (i + n // 2) % n
        others = [np.exp(z[i] @ z[k] / temperature) for k in range(n) if k != i]
        total -= np.log(np.exp(z[i] @ z[j] / temperature) / sum(others))
    return total / n


@settings(max_examples=20, deadline=None)
@given(n=st.integers(2, 9), d=st.integers(2, 7), temperature=st.sampled_from([0.07, 0.5, 1.0]), seed=st.integers(0, 99))
def test_nt_xent_is_the_loop(n, d, temperature, seed):
    a, b = np.random.default_rng(seed).standard_normal((2, n, d)).astype(np.float32)
    ours = float(jax.jit(detector.nt_xent)(a, b, temperature))  # one compilation a shape, not one for each operation
    assert ours == pytest.approx(reference_nt_xent(a, b, temperature), rel=1e-4, abs=1e-5)


def test_nt_xent_is_the_same_over_a_sharded_batch(mesh_of):
    a, b = np.random.default_rng(0).standard_normal((2, 16, 8)).astype(np.float32)
    grad = jax.jit(jax.value_and_grad(lambda a, b: detector.nt_xent(a, b, 0.1)))
    whole = grad(a, b)
    with jax.set_mesh(mesh := mesh_of(8, 2)):
        rows = jax.sharding.NamedSharding(mesh, jax.P(("data", "fsdp")))
        parts = grad(jax.device_put(a, rows), jax.device_put(b, rows))
    for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=1e-5)


RESNET = dict(arch="resnet", widths=(8, 16), blocks=(1, 2), stem=3, dim=5)


@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("shape", [(16, 24, 1), (8, 8, 12, 1)])
def test_resnet_at_any_rank(shape, bottleneck):
    model = encoder.build(**RESNET, bottleneck=bottleneck)
    params = layers.init(lambda key: model.init(key, jnp.zeros((1, *shape))), jax.random.key(0))
    out = model.apply(params, jax.random.normal(jax.random.key(1), (3, *shape)))
    assert out.shape == (3, 5) and np.all(np.isfinite(out)) and np.std(out, axis=0).min() > 0


GRID = dict(arch="grid", widths=(8, 16), blocks=(1, 2), fold=4, squeeze=4, dim=5)


@pytest.mark.parametrize("shape", [(32, 32, 1), (30, 45, 1), (96, 40, 1), (8, 12, 16, 1)])
def test_grid_at_any_rank_and_size(shape):
    model = encoder.build(**GRID)
    params = layers.init(lambda key: model.init(key, jnp.zeros((1, *shape))), jax.random.key(0))
    out = model.apply(params, jax.random.normal(jax.random.key(1), (3, *shape)))
    assert out.shape == (3, 5) and np.all(np.isfinite(out)) and np.std(out, axis=0).min() > 0
    assert max(p.size for p in jax.tree.leaves(params)) <= 5 * (16 + 8 ** (len(shape) - 1) * 4) + 3**3 * 16 * 64 * 8


@pytest.mark.parametrize("shape", [(5, 8, 12, 1), (2, 4, 8, 4, 2)])
def test_folded_keeps_every_value_in_its_block(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    out = np.asarray(encoder.folded(jnp.asarray(x), 4))
    rank = len(shape) - 2
    for place in np.ndindex(*out.shape[1:-1]):
        block = x[(slice(None), *(slice(4 * i, 4 * i + 4) for i in place))]
        np.testing.assert_array_equal(out[(slice(None), *place)], block.reshape(len(x), -1))
    assert out.shape[-1] == 4**rank * shape[-1]


def test_a_flipped_copy_embeds_alike(tmp_path):
    model = detector.build((16, 16, 1), tmp_path, temperature=0.07, flips=True, **GRID)
    embed = detector.untrained(model, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (4, 16, 16, 1))
    np.testing.assert_allclose(embed(x), embed(x[:, :, ::-1]), atol=1e-5)
    one_sided = detector.untrained(model._replace(flips=False), jax.random.key(0))
    assert np.abs(one_sided(x) - one_sided(x[:, :, ::-1])).max() > 1e-3


def test_resnet_50_has_its_layers():
    """25.6 M parameters with 1,000 classes and 3 channels; here one channel and 128 outputs: 23.8 M."""
    model = encoder.build("resnet", widths=(64, 128, 256, 512), blocks=(3, 4, 6, 3), bottleneck=True, stem=7, dim=128)
    params = jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, 224, 224, 1))), jax.random.key(0))
    kernels = [p for path, p in jax.tree_util.tree_leaves_with_path(params) if path[-1].key == "kernel"]
    assert len(kernels) == 1 + 3 * 16 + 4 + 1
    torchvision = 25_557_032 - (2048 * 1000 + 1000) - 2 * 64 * 49  # minus its head and two of its input channels
    ours = sum(p.size for p in jax.tree.leaves(params)) - (2048 * 128 + 128)
    biases = sum(p.shape[-1] for p in kernels if len(p.shape) == 4)  # torchvision's convolutions have none
    assert ours - biases == torchvision


def test_the_papers_3d_encoder_reaches_its_grid():
    strides = ((1, 2, 2), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2))
    model = encoder.build("strided", strides=strides, hidden=2, dim=32)
    shapes = jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, 32, 256, 256, 1))), jax.random.key(0))["params"]
    assert shapes["Dense_0"]["kernel"].shape == (4 * 4 * 4 * 8, 128) and shapes["Dense_1"]["kernel"].shape == (128, 32)


def test_a_batch_holds_no_image_twice(mesh_of, monkeypatch, capsys):
    monkeypatch.delenv("FACSIMILE_QUIET")
    for batch, n, used in ((64, 40, 40), (64, 45, 40), (64, 64, 64), (16, 100, 16)):
        for devices in (1, 2, 4, 8):  # and is the same on any number of them
            with jax.set_mesh(mesh_of(devices, 1)):
                assert detector.at_most(batch, n) == used
                said = capsys.readouterr().err
                assert (
                    (f"with {n} training images" in said) == (used < batch) == (f"batches of {used} are used" in said)
                )
    with jax.set_mesh(mesh_of(4, 1)):
        assert detector.at_most(64, 7) == 4
    with jax.set_mesh(mesh_of(8, 1)), pytest.raises(ValueError, match="8 devices cannot share a batch of 4, the most"):
        detector.at_most(64, 7)


def test_unknown_arch_is_told():
    with pytest.raises(ValueError, match=r"config\.detector\.arch='vit'"):
        encoder.build("vit")


@given(low=st.floats(-1, 0), high=st.floats(0.1, 1), seed=st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_rescale_undoes_windowing(low, high, seed):
    x = jax.random.uniform(jax.random.key(seed), (2, 6, 6, 1))
    np.testing.assert_allclose(detector.rescale(low + (high - low) * x), detector.rescale(x), atol=1e-4)
    assert detector.rescale(x).min() == -1 and float(detector.rescale(x).max()) == pytest.approx(1, abs=1e-6)
    assert np.all(np.isfinite(detector.rescale(jnp.full((1, 6, 6, 1), 0.3))))
