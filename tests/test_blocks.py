"""The networks' blocks against numpy and scipy in double precision, 2D and 3D, to 1e-5."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage
from scipy.special import expit, softmax

from launch import layers
from ldm import blocks, unet

SHAPES = [(2, 6, 5, 8), (2, 4, 6, 5, 8)]


def made(module, *args):
    """Parameters none of which is at its initial zero, and the module's output."""
    params = layers.init(lambda key: module.init(key, *args), jax.random.key(0))
    params = jax.tree.map(
        lambda p: p + 0.1 * np.random.default_rng(p.size).standard_normal(p.shape).astype("f"), params
    )
    with jax.default_matmul_precision("highest"):
        y = jax.jit(module.apply)(params, *args)
    return jax.tree.map(lambda p: np.asarray(p, np.float64), params["params"]), np.asarray(y)


def conv(x, p, name="kernel"):
    """Zero-padded correlation, one pair of channels at a time."""
    y = np.zeros((*x.shape[:-1], p["bias"].size))
    for b in range(len(x)):
        for i in range(x.shape[-1]):
            for o in range(p["bias"].size):
                y[b, ..., o] += ndimage.correlate(x[b, ..., i], p[name][..., i, o], mode="constant")
    return y + p["bias"]


def norm(x, p, groups):
    inside = tuple(range(1, x.ndim - 1))
    parts = x.reshape(*x.shape[:-1], groups, -1)
    mean, var = (f(parts, axis=(*inside, -1), keepdims=True) for f in (np.mean, np.var))
    return ((parts - mean) / np.sqrt(var + 1e-5)).reshape(x.shape) * p["scale"] + p["bias"]


def silu(x):
    return x * expit(x)


def residual(x, p, emb=None):
    h = conv(silu(norm(x, p["GroupNorm_0"], x.shape[-1])), p["Conv_0"])
    h = norm(h, p["GroupNorm_1"], h.shape[-1])
    if emb is not None:
        film = silu(emb) @ p["Dense_0"]["zero"] + p["Dense_0"]["bias"]
        scale, shift = np.split(film.reshape(len(x), *(1,) * (x.ndim - 2), -1), 2, axis=-1)
        h = h * (1 + scale) + shift
    h = conv(silu(h), p["Conv_1"], "zero")
    return h + (x if x.shape == h.shape else x @ p["Conv_2"]["kernel"].reshape(x.shape[-1], -1) + p["Conv_2"]["bias"])


def attention(x, p, heads):
    h = norm(x, p["GroupNorm_0"], x.shape[-1]).reshape(len(x), -1, x.shape[-1])
    q, k, v = np.split(h @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"], 3, axis=-1)
    cut = lambda a: a.reshape(*a.shape[:2], heads, -1).swapaxes(1, 2)
    weights = softmax(cut(q) @ cut(k).swapaxes(-1, -2) / np.sqrt(x.shape[-1] // heads), axis=-1)
    out = (weights @ cut(v)).swapaxes(1, 2).reshape(x.shape)
    return x + out @ p["Dense_1"]["zero"] + p["Dense_1"]["bias"]


def batch(shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("features", [8, 4])
def test_residual_block(shape, features):
    x, emb = batch(shape), batch((2, 6))
    p, y = made(blocks.ResBlock(features), x, emb)
    np.testing.assert_allclose(y, residual(x.astype(float), p, emb), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_attention(shape):
    x = batch(shape)
    p, y = made(blocks.Attention(heads=2), x)
    np.testing.assert_allclose(y, attention(x.astype(float), p, 2), atol=1e-5, rtol=1e-5)


# ---- against MONAI, whose results on the same inputs tests/make_reference.py has written down


def monai(name, rank):
    """(input, output, weights by MONAI's names) of its block; channels last."""
    with np.load(pathlib.Path(__file__).with_name("reference.npz")) as file:
        found = {key.split("/")[-1]: file[key] for key in file.files if key.startswith(f"{name}/{rank}/")}
    x, y = (np.moveaxis(found.pop(key), 1, -1) for key in ("input", "output"))
    return x, y, {key: np.float32(value) / 256 for key, value in found.items()}


def of(w, name, kernel="kernel"):
    """A norm's, a convolution's or a linear map's parameters under our names."""
    weight = w[f"{name}.weight"]
    return {"scale" if weight.ndim == 1 else kernel: np.moveaxis(weight, (0, 1)[: weight.ndim], (-1, -2)[: weight.ndim]),
            "bias": w[f"{name}.bias"]}  # fmt: skip


@pytest.mark.parametrize("rank", [2, 3])
def test_residual_block_is_monais(rank):
    x, y, w = monai("residual", rank)
    p = {"GroupNorm_0": of(w, "norm1"), "Conv_0": of(w, "conv1.conv"), "GroupNorm_1": of(w, "norm2")}
    p["Conv_1"] = of(w, "conv2.conv", kernel="zero")
    if rank == 2:  # from 64 channels to 32
        p["Conv_2"] = of(w, "nin_shortcut.conv")
    with jax.default_matmul_precision("highest"):
        mine = jax.jit(blocks.ResBlock(32).apply)({"params": p}, x)
    np.testing.assert_allclose(mine, y, atol=1e-5 * np.abs(y).max())


@pytest.mark.parametrize("rank", [2, 3])
def test_attention_is_monais(rank):
    x, y, w = monai("attention", rank)
    q, k, v = (of(w, f"attn.to_{letter}") for letter in "qkv")
    p = {"GroupNorm_0": of(w, "norm"), "Dense_1": of(w, "attn.out_proj", kernel="zero")}
    p["Dense_0"] = {name: np.concatenate([part[name] for part in (q, k, v)], -1) for name in ("kernel", "bias")}
    with jax.default_matmul_precision("highest"):
        mine = jax.jit(blocks.Attention(heads=4).apply)({"params": p}, x)
    np.testing.assert_allclose(mine, y, atol=1e-5 * np.abs(y).max())


def test_time_embedding():
    """sin and cos of t 10000^(-2i/d) (Vaswani et al. 2017, Sec. 3.5), sines first."""
    t = np.array([0.0, 1.0, 517.0])
    angle = t[:, None] * 10_000.0 ** (-np.arange(4) / 4)
    expected = np.concatenate([np.sin(angle), np.cos(angle)], -1)
    np.testing.assert_allclose(unet.time_embedding(jnp.asarray(t), 8), expected, atol=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 4, 4, 3), (2, 2, 4, 4, 3)])
def test_unet(shape):
    """The whole network, two levels, put together again from its parameters."""
    z, t = batch(shape), np.array([0.2, 0.7], np.float32)
    p, y = made(unet.UNet(width=8, mults=(1, 2), blocks=1, attention=(False, True), heads=2), z, t)
    dense = lambda x, q: x @ q["kernel"] + q["bias"]
    emb = np.asarray(unet.time_embedding(1000 * jnp.asarray(t), 8), np.float64)
    emb = dense(silu(dense(emb, p["Dense_0"])), p["Dense_1"])
    made_blocks, made_attention = iter(range(9)), iter(range(9))
    res = lambda h: residual(h, p[f"ResBlock_{next(made_blocks)}"], emb)
    att = lambda h: attention(h, p[f"Attention_{next(made_attention)}"], 2)
    every_other = (slice(None), *(slice(None, None, 2),) * (len(shape) - 2))
    double = lambda h: np.kron(h, np.ones((1, *(2,) * (len(shape) - 2), 1)))
    h0 = conv(z.astype(float), p["Conv_0"])
    h1 = res(h0)
    h2 = conv(h1, p["Conv_1"])[every_other]
    h3 = att(res(h2))
    h = res(att(res(h3)))
    for skip in (h3, h2):
        h = att(res(np.concatenate([h, skip], -1)))
    h = conv(double(h), p["Conv_2"])
    for skip in (h1, h0):
        h = res(np.concatenate([h, skip], -1))
    np.testing.assert_allclose(y, conv(silu(norm(h, p["GroupNorm_0"], 8)), p["Conv_3"], "zero"), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [blocks.ResBlock(8), blocks.Attention(2)])
def test_gradients_are_those_of_the_plain_program(shape, block):
    """What is done for a CPU's sake changes no gradient: neither of parameters, nor of gradients themselves."""
    x = batch(shape)
    params = layers.init(lambda key: block.init(key, x), jax.random.key(0))
    params = jax.tree.map(
        lambda p: p + 0.1 * np.random.default_rng(p.size).standard_normal(p.shape).astype("f"), params
    )
    loss = lambda params, x: (block.apply(params, x) ** 3).mean()
    penalty = lambda params, x: (jax.grad(loss, argnums=1)(params, x) ** 2).sum()
    both = [jax.jit(jax.value_and_grad(fn, argnums=(0, 1))) for fn in (loss, penalty)]
    kept = lambda: "optimization_barrier" in str(jax.make_jaxpr(both[0])(params, x))
    found = [fn(params, x) for fn in both]
    assert kept()
    with layers.lowered_for("accelerator"):  # the same functions, which are traced anew for it
        plain = [fn(params, x) for fn in both]
        assert not kept()
    for a, b in zip(found, plain, strict=True):
        large = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(b))
        jax.tree.map(lambda a, b, atol=1e-5 * large: np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol), a, b)
