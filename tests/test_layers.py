"""Layers against independent numpy, and the parameter rule."""

import re

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy import signal

from launch import layers


def reference_conv(x, kernel, strides):
    """Zero-padded cross-correlation, one channel pair at a time, by scipy."""
    size = kernel.shape[:-2]
    pad = [(k // 2, k // 2) for k in size]
    out = []
    for b in range(x.shape[0]):
        planes = []
        for f in range(kernel.shape[-1]):
            total = sum(
                signal.correlate(np.pad(x[b, ..., c], pad), kernel[..., c, f], "valid", "direct")
                for c in range(x.shape[-1])
            )
            planes.append(total[tuple(slice(None, None, s) for s in strides)])
        out.append(np.stack(planes, -1))
    return np.stack(out)


@settings(max_examples=25, deadline=None)
@given(rank=st.sampled_from([2, 3]), k=st.sampled_from([1, 3, 5]), stride=st.integers(1, 3), seed=st.integers(0, 99))
def test_conv_is_correlation_at_any_rank(rank, k, stride, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, *rng.integers(4, 8, rank), 2)).astype(np.float32)
    kernel = rng.standard_normal((*(k,) * rank, 2, 3)).astype(np.float32)
    strides = (stride, *rng.integers(1, 3, rank - 1))
    ours = jax.jit(layers.conv, static_argnums=2)(x, kernel, tuple(int(s) for s in strides))
    np.testing.assert_allclose(ours, reference_conv(x, kernel, strides), rtol=1e-4, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    size=st.lists(st.integers(5, 9), min_size=1, max_size=2),
    k=st.integers(1, 5),
    stride=st.integers(1, 3),
    pad=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_gradients_of_a_convolution_on_a_cpu_are_jaxs_own(size, k, stride, pad, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3, *size, 2)).astype(np.float32)
    kernel = rng.standard_normal((*rng.integers(1, k + 1, len(size)), 2, 4)).astype(np.float32)
    strides = (stride, *rng.integers(1, 3, len(size) - 1).tolist())
    padding = tuple((p, p) for p in (pad, *rng.integers(0, 3, len(size) - 1).tolist()))
    # XLA's simplifier (jaxlib 0.10 to 0.12) aborts the process on some gradients by `x`, JAX's own as well as ours, where an
    # axis is convolved by a window of its own stride that dy's places fill without padding.
    axes = zip(size, kernel.shape, strides, padding, strict=False)
    assume(not any(n + p == t * ((n + 2 * p - k) // t) + 1 and k == t == p + 1 > 1 for n, k, t, (p, _) in axes))
    y, own = jax.vjp(lambda x, kernel: layers._convolve(x, kernel, strides, padding), x, kernel)
    ours, gradient = jax.vjp(lambda x, kernel: layers._conv_on_cpu(x, kernel, strides, padding), x, kernel)
    np.testing.assert_array_equal(ours, y)
    dy = rng.standard_normal(y.shape).astype(np.float32)
    for one, other in zip(gradient(dy), own(dy), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_convolutions_in_a_loop_are_of_the_kind_that_is_fast():
    """XLA for CPUs makes slow loops of those whose axes come in another order."""
    x, kernel = jnp.ones((2, 3, 8, 8, 4)), jnp.ones((3, 3, 4, 4))
    loss = lambda kernel, x: (layers.conv(jnp.tanh(layers.conv(x, kernel, (1, 1))), kernel, (2, 2)) ** 2).sum()
    steps = jax.jit(lambda kernel, x: jax.lax.scan(lambda k, one: (k - jax.grad(loss)(k, one), None), kernel, x)[0])
    convolutions = re.findall(r"dim_labels=(\S+?),", steps.lower(kernel, x).compile().as_text())
    assert len(convolutions) >= 5 and set(convolutions) == {"b01f_01io->b01f"}, convolutions


@pytest.mark.parametrize("layer", [layers.Conv(3, kernel=5), layers.Dense(3), layers.GroupNorm(groups=2)])
def test_parameters_of_another_shape_are_refused(layer):
    x = jnp.ones((2, 6, 6, 4))
    params = layers.init(lambda key: layer.init(key, x), jax.random.key(0))
    layer.apply(params, x)
    other = jax.tree.map(lambda p: jnp.ones((*p.shape[:-1], 2 * p.shape[-1])), params)
    with pytest.raises(flax.errors.ScopeParamShapeError):
        layer.apply(other, x)
    smaller = {"params": {**params["params"], "kernel": jnp.ones((3, 3, 4, 3))}}  # a convolution that would run
    if isinstance(layer, layers.Conv):
        with pytest.raises(flax.errors.ScopeParamShapeError):
            layer.apply(smaller, x)


@pytest.mark.parametrize("shape", [(2, 5, 7, 48), (2, 3, 4, 5, 6)])
def test_group_norm_is_linens(shape):
    x = jax.random.normal(jax.random.key(0), shape) * 3 + 2
    ours, theirs = layers.GroupNorm(groups=3), nn.GroupNorm(num_groups=3, epsilon=1e-5)
    params = {"params": {"scale": jnp.linspace(0.5, 2, shape[-1]), "bias": jnp.linspace(-1, 1, shape[-1])}}
    np.testing.assert_allclose(ours.apply(params, x), theirs.apply(params, x), atol=2e-5)


class Small(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = layers.Conv(64)(x)
        h = layers.GroupNorm()(h)
        return layers.Dense(256)(h), layers.Conv(3, zero=True)(h)


def test_init_follows_the_names_and_is_a_function_of_the_key():
    init_fn = lambda key: Small().init(key, jnp.zeros((1, 8, 8, 32)))
    params = jax.jit(lambda key: layers.init(init_fn, key))(jax.random.key(1))
    assert jax.tree.structure(params) == jax.tree.structure(jax.eval_shape(init_fn, jax.random.key(1)))
    inner = params["params"]
    for name, fan_in in (("Conv_0", 9 * 32), ("Dense_0", 64)):
        kernel = np.asarray(inner[name]["kernel"])
        assert abs(kernel.mean()) < 0.1 * fan_in**-0.5
        assert kernel.std() == pytest.approx(fan_in**-0.5, rel=0.05)
    assert not np.any(inner["Conv_1"]["zero"]) and not np.any(inner["Conv_0"]["bias"])
    assert np.all(np.asarray(inner["GroupNorm_0"]["scale"]) == 1)
    again = jax.jit(lambda key: layers.init(init_fn, key))(jax.random.key(2))
    assert not np.array_equal(inner["Dense_0"]["kernel"], again["params"]["Dense_0"]["kernel"])


@settings(max_examples=20, deadline=None)
@given(factors=st.lists(st.integers(1, 3), min_size=2, max_size=3), seed=st.integers(0, 99))
def test_convolving_what_is_upsampled_by_phases(factors, seed):
    rng = np.random.default_rng(seed)
    rank = len(factors)
    x = rng.standard_normal((2, *rng.integers(2, 5, rank), 2)).astype(np.float32)
    kernel = rng.standard_normal((*(3,) * rank, 2, 3)).astype(np.float32)
    large = x
    for axis, factor in enumerate(factors, start=1):
        large = large.repeat(factor, axis)
    ours = jax.jit(layers.conv_upsampled, static_argnums=2)(x, kernel, tuple(factors))
    np.testing.assert_allclose(ours, reference_conv(large, kernel, (1,) * rank), rtol=1e-4, atol=1e-4)


@settings(max_examples=5, deadline=None)
@given(
    size=st.lists(st.integers(3, 9), min_size=2, max_size=3),
    channels=st.sampled_from([2, 32, 64]),
    pad=st.integers(0, 3),
    few=st.booleans(),
    seed=st.integers(0, 99),
)
@example(size=[8, 9], channels=96, pad=1, few=False, seed=0)  # over both axes, under jax 0.10 as well
@example(size=[4, 6], channels=96, pad=1, few=True, seed=2)  # over the first
@example(size=[4, 6, 2], channels=96, pad=1, few=True, seed=3)  # over the first two of three
@example(size=[4, 6, 2], channels=2, pad=1, few=True, seed=3)  # over the first of three
def test_four_rows_at_a_time_agree_with_xla_and_so_do_their_gradients(size, channels, pad, few, seed):
    """Whatever is left over of four rows, and whether the last axis makes matrix products or not."""
    rng, rank = np.random.default_rng(seed), len(size)
    batch = 2 if few or rank == 3 else 128  # XLA's own 3D convolution takes its time
    x = rng.standard_normal((batch, *size, channels)).astype(np.float32)
    kernel = rng.standard_normal((*(3,) * rank, channels, channels)).astype(np.float32)
    ones, padding = (1,) * rank, (pad, *(1,) * (rank - 1))
    ours, mine = jax.vjp(jax.jit(lambda x, k: layers.conv(x, k, ones, padding)), x, kernel)
    wide = [(p, p) for p in padding]
    theirs, other = jax.vjp(jax.jit(lambda x, k: layers._convolve(x, k, ones, wide)), x, kernel)
    dy = rng.standard_normal(ours.shape).astype(np.float32)
    for a, b in zip((ours, *mine(dy)), (theirs, *other(dy)), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6 * float(jnp.abs(b).max()))
