"""Autoencoders: shapes at any rank and factor, KL against its closed form, folding, the loss and its players."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch import layers, loop
from ldm import adversary, autoencoder, blocks, perceptual, reconstruction, vq

SMALL = dict(widths=(8, 16), latent=3, blocks=1)
AIMS = reconstruction.Aims(
    error="l1",
    kl_weight=1e-3,
    calibrated=False,
    commitment=0.25,
    perceptual=0.0,
    perceptual_weights=None,
    adversarial=0.0,
    adversary_widths=(8, 8),
)


@functools.cache
def made(shape=(16, 16, 1), codes=0, aims=AIMS, adversarial=False):
    """(model, task, params) of a small autoencoder."""
    model = autoencoder.build(shape, strides=(2,), **SMALL, codes=codes)
    task = reconstruction.task(model, aims, adversarial=adversarial)
    return model, task, jax.jit(lambda key: layers.init(task.init, key))(jax.random.key(0))


def images(shape=(16, 16, 1), n=4):
    """Smooth random images in [-1, 1]."""
    noise = jax.random.normal(jax.random.key(1), (n, *shape))
    for axis in range(1, len(shape)):
        noise = noise + jnp.roll(noise, 1, axis)
    return jnp.tanh(noise)


@pytest.mark.parametrize(
    ("shape", "strides", "patch", "codes", "latent"),
    [
        ((16, 24, 1), (2,), 1, 0, (8, 12, 3)),
        ((16, 16, 2), (2,), 2, 7, (4, 4, 3)),
        ((4, 16, 16, 1), ((1, 2, 2),), 1, 7, (4, 8, 8, 3)),
        ((8, 8, 8, 1), (2,), (1, 2, 2), 0, (4, 2, 2, 3)),
    ],
)
def test_shapes(shape, strides, patch, codes, latent):
    model = autoencoder.build(shape, strides=strides, patch=patch, codes=codes, **SMALL)
    params = jax.jit(lambda key: layers.init(model.init, key))(jax.random.key(0))
    x = jax.random.uniform(jax.random.key(1), (2, *shape), minval=-1)
    q = model.encode(params, x)
    assert model.latent_shape == latent == q.mu.shape[1:] == q.logvar.shape[1:]
    assert model.decode(params, q.mu).shape == x.shape
    z = autoencoder.draw(q, jax.random.key(2))
    assert z.shape == q.mu.shape and np.isfinite(z).all() and (np.asarray(z == q.mu).all() == bool(codes))


def test_misfits_are_told():
    with pytest.raises(ValueError, match=r"config.data.size\[1\]=18 must be a multiple of 4, the factor of config.vae"):
        autoencoder.build((16, 18, 1), strides=(2,), patch=2, **SMALL, section="vae")
    with pytest.raises(ValueError, match=r"config.autoencoder.strides has 2 entries"):
        autoencoder.build((16, 16, 1), strides=(2, 2), **SMALL)
    with pytest.raises(ValueError, match=r"config.autoencoder: strides .* must fit images of size \(16, 16\)"):
        autoencoder.build((16, 16, 1), strides=((1, 2, 2),), **SMALL)
    with pytest.raises(ValueError, match=r"config\.autoencoder\.error='l3': use one of l1, l2"):
        reconstruction.check(AIMS._replace(error="l3"))
    with pytest.raises(ValueError, match=r"config\.autoencoder\.perceptual is 0: set it too"):
        reconstruction.check(AIMS._replace(perceptual_weights="w.npz"))
    with pytest.raises(ValueError, match="3 attention heads cannot share 16 channels"):
        blocks.Attention(heads=3).init(jax.random.key(0), jnp.zeros((1, 4, 4, 16)))


def test_kl_is_its_closed_form_by_quadrature():
    """KL by numerical integration of q log(q / p)."""
    mu, sigma = np.array([0.3, -1.2]), np.array([0.5, 1.7])
    x = np.linspace(-15, 15, 60001)
    q = np.exp(-((x - mu[:, None]) ** 2) / (2 * sigma[:, None] ** 2)) / (sigma[:, None] * np.sqrt(2 * np.pi))
    log_p = -0.5 * x**2 - 0.5 * np.log(2 * np.pi)
    expected = np.trapezoid(np.where(q > 0, q * (np.log(np.maximum(q, 1e-300)) - log_p), 0), x).sum()
    posterior = autoencoder.Posterior(jnp.array(mu)[None], jnp.log(jnp.array(sigma) ** 2)[None])
    assert float(autoencoder.kl(posterior)[0]) == pytest.approx(expected, rel=1e-4)
    assert float(autoencoder.kl(autoencoder.Posterior(jnp.zeros((1, 9)), jnp.zeros((1, 9))))[0]) == 0


@settings(max_examples=8, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=2, max_size=3), st.integers(1, 3))
def test_unfold_inverts_fold(axes, channels):
    factors, cells = zip(*axes, strict=True)
    x = np.random.default_rng(0).standard_normal((2, *(f * c for f, c in axes), channels)).astype(np.float32)
    folded = blocks.fold(jnp.asarray(x), factors)
    assert folded.shape == (2, *cells, channels * int(np.prod(factors)))
    corner = x[(slice(None), *(slice(0, f) for f in factors))].reshape(2, -1)
    np.testing.assert_array_equal(np.asarray(folded)[(slice(None), *(0,) * len(cells))], corner)
    np.testing.assert_array_equal(blocks.unfold(folded, factors), x)
    means = x.reshape(2, *(n for f, c in axes for n in (c, f)), channels).mean(tuple(range(2, 2 * len(axes) + 1, 2)))
    np.testing.assert_allclose(blocks.pool(jnp.asarray(x), factors), means, atol=1e-6)


# ---- the loss


@pytest.mark.parametrize("error", ["l1", "l2"])
def test_the_loss_is_the_sum_of_its_terms(error):
    aims = AIMS._replace(error=error, perceptual=0.5)
    model, task, params = made(aims=aims)
    x, key = images(), jax.random.key(2)
    loss, metrics = task.loss(params, x, key)
    x_hat = model.decode(params, autoencoder.draw(model.encode(params, x), key))
    pixel = {"l1": jnp.abs(x_hat - x).mean(), "l2": ((x_hat - x) ** 2).mean()}[error]
    expected = pixel + 0.5 * perceptual.distance(x_hat, x) + 1e-3 * metrics["kl"] / 256
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert float(metrics[error]) == pytest.approx(float(pixel), rel=1e-5)


def test_a_calibrated_loss_has_the_gradient_of_the_best_laplace_bound():
    """pixels * log(mean error) + KL, the bound with the scale put in that fits best, has the gradient of the calibrated
    loss over the error."""
    model, task, params = made(aims=AIMS._replace(kl_weight=1.0, calibrated=True))
    x, key = images(), jax.random.key(2)

    def bound(params):
        q = model.encode(params, x)
        error = jnp.abs(model.decode(params, autoencoder.draw(q, key)) - x).mean()
        return jnp.log(error) + autoencoder.kl(q).mean() / 256, error

    (_, error), expected = jax.jit(jax.value_and_grad(bound, has_aux=True))(params)
    grads = jax.jit(jax.grad(lambda p: task.loss(p, x, key)[0]))(params)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a / error, b, atol=1e-5)


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("shape", [(16, 16, 1), pytest.param((4, 8, 8, 1), marks=pytest.mark.slow)])
def test_one_backward_pass_serves_both_players(shape):
    """The discriminator gets the gradient of its hinge loss, the autoencoder that of its own loss and the weighed adversary,
    whose weight makes the two as long at the last layer; the value stays the reconstruction's."""
    aims = AIMS._replace(adversarial=0.7, perceptual=0.3)
    model, task, params = made(shape, aims=aims, adversarial=True)
    alone = reconstruction.task(model, aims, adversarial=False)
    x, key = images(shape), jax.random.key(2)
    (loss, metrics), grads = jax.jit(jax.value_and_grad(task.loss, has_aux=True))(params, x, key)
    (value, _), own = jax.jit(jax.value_and_grad(alone.loss, has_aux=True))(params, x, key)
    assert float(loss) == pytest.approx(float(value), rel=1e-6)
    assert not any(leaf.any() for leaf in leaves(own["discriminator"]))
    discriminator = adversary.PatchDiscriminator(aims.adversary_widths)
    decode = lambda p: model.decode(p, autoencoder.draw(model.encode(p, x), key))
    judge = lambda p, image: discriminator.apply(p["discriminator"], image)

    hinge = lambda d: adversary.hinge(*(judge({"discriminator": d}, i) for i in (x, decode(params))))
    for a, b in zip(
        leaves(grads["discriminator"]), leaves(jax.jit(jax.grad(hinge))(params["discriminator"])), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-6)

    fool = lambda p: -judge(params, decode(p)).mean()
    pixels_and_bands = lambda p: jnp.abs(decode(p) - x).mean() + 0.3 * perceptual.distance(decode(p), x)
    last = lambda p: p["decoder"]["params"][model.decoder.last]
    assert last(params)["bias"].shape == (shape[-1],)
    norm = lambda f: np.sqrt(sum((leaf**2).sum() for leaf in leaves(last(jax.jit(jax.grad(f))(params)))))
    weight = 0.7 * norm(pixels_and_bands) / norm(fool)
    assert float(metrics["adversarial_weight"]) == pytest.approx(weight, rel=0.02)
    pushed = jax.jit(jax.grad(fool))(params)
    for part in ("encoder", "decoder"):
        for a, b, c in zip(leaves(grads[part]), leaves(own[part]), leaves(pushed[part]), strict=True):
            np.testing.assert_allclose(a, b + float(metrics["adversarial_weight"]) * c, atol=2e-5)


def test_every_part_is_trained_by_its_own_optimiser():
    """A step moves discriminator and codebook, each by its own rule, and clipping one does not touch the other."""
    aims = AIMS._replace(adversarial=1.0)
    model, task, _ = made(codes=8, aims=aims, adversarial=True)
    tx = reconstruction.optimiser(model, aims, steps=10, rate=1e-3)
    make = functools.partial(loop.create, task=task, tx=tx, ema=(), select=False)
    step = jax.jit(functools.partial(loop.train_step, task=task, tx=tx, key=jax.random.key(3)))
    before = jax.jit(make)(jax.random.key(0))
    after, metrics = step(before, images())
    moved = {name: max(np.abs(a - b).max() for a, b in zip(leaves(after.params[name]), leaves(before.params[name]), strict=True))
             for name in before.params}  # fmt: skip
    for name in ("encoder", "decoder", "discriminator"):
        assert moved[name] == pytest.approx(1e-3, rel=0.05), "the first step of Adam is its rate"
    count = after.params["codebook"]["count"]["zero"]
    np.testing.assert_allclose(
        count, [8 * (1 - vq.DECAY), *[1.0] * 7], atol=1e-6, err_msg="all chose the first of eight"
    )
    assert np.ptp(np.asarray(after.params["codebook"]["total"]["zero"]), axis=0).min() > 0
    assert float(metrics["codes_used"]) == 1 / 8, "all codes were at zero"


# ---- the perceptual distance


@pytest.mark.parametrize("shape", [(32, 32, 1), (6, 16, 16, 2), (16, 12, 16, 1)])
def test_perceptual_distance_tells_blur_from_noise_free_copies(shape):
    x, distance = images(shape), jax.jit(perceptual.distance)
    blurred = x
    for axis in range(1, len(shape)):
        blurred = (jnp.roll(blurred, 1, axis) + 2 * blurred + jnp.roll(blurred, -1, axis)) / 4
    assert float(distance(x, x)) == 0
    assert float(distance(jnp.zeros_like(x), x)) == pytest.approx(1, abs=0.02)
    gain = float(distance(0.5 * x, x))
    assert gain == pytest.approx(0.5, abs=0.02), "proportional to what is missing"
    assert float(distance(blurred, x)) > 0.2
    assert float(distance(x + 0.3, x)) < 1e-4, "a constant is not the business of derivatives"


def test_perceptual_responses_are_scipys():
    """The finest scale of the bank by scipy's correlations, borders repeated."""
    import itertools

    from scipy import ndimage

    x = np.asarray(images((12, 10, 1), n=2), np.float64)
    finest = np.asarray(next(perceptual.bank(jnp.asarray(x, jnp.float32))))
    orders = [o for o in itertools.product(range(3), repeat=2) if 1 <= sum(o) <= 2]
    assert finest.shape == (2, 12, 10, 5)
    for f, order in enumerate(orders):
        expected = x[..., 0]
        for axis, o in enumerate(order, start=1):
            expected = ndimage.correlate1d(expected, perceptual.TAPS[o], axis=axis, mode="nearest")
        np.testing.assert_allclose(finest[..., f], expected, atol=1e-5)


def network(path, **changed):
    """Writes a network of two stages, of two layers and one; None leaves an array out."""
    rng = np.random.default_rng(0)
    shapes = {"conv1_1": (3, 4), "conv1_2": (4, 4), "conv2_1": (4, 6)}
    arrays = {f"{name}.kernel": rng.standard_normal((3, 3, *ends)) for name, ends in shapes.items()}
    arrays |= {f"{name}.bias": rng.standard_normal(ends[1]) for name, ends in shapes.items()}
    arrays |= {"mean": np.array([0.1, -0.2, 0.0]), "std": np.array([0.5, 0.4, 1.0])}
    arrays = {name: value for name, value in (arrays | changed).items() if value is not None}
    np.savez(path, **arrays)
    return arrays


def test_distance_by_a_network_is_its_formula_by_scipy(tmp_path):
    from scipy import ndimage

    w = network(tmp_path / "w.npz")
    a, b = (np.asarray(images((12, 10, 1), n=4), float)[part] for part in (slice(0, 2), slice(2, 4)))

    def layer(x, name):
        kernel = w[f"{name}.kernel"]
        y = np.stack([
            sum(ndimage.correlate(x[..., i], kernel[None, ..., i, o], mode="constant") for i in range(x.shape[-1]))
            for o in range(kernel.shape[-1])
        ], -1)  # fmt: skip
        return np.maximum(y + w[f"{name}.bias"], 0)

    def stages(x):
        first = layer(layer((np.repeat(x, 3, -1) - w["mean"]) / w["std"], "conv1_1"), "conv1_2")
        second = layer(first.reshape(2, 6, 2, 5, 2, -1).max((2, 4)), "conv2_1")
        return [f / np.sqrt((f**2).sum(-1, keepdims=True) + 1e-10) for f in (first, second)]

    expected = np.mean([((f - g) ** 2).sum(-1).mean() for f, g in zip(stages(a), stages(b), strict=True)])
    with jax.default_matmul_precision("highest"):
        distance = perceptual.by_network(perceptual.read_network(tmp_path / "w.npz"))
        found = distance(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), jax.random.key(0))
    assert float(found) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("shape", [(16, 16, 2), (6, 8, 10, 1), (6, 8, 2, 2)])
def test_a_loss_by_a_network(tmp_path, shape):
    network(tmp_path / "w.npz")
    aims = AIMS._replace(perceptual=0.5, perceptual_weights=str(tmp_path / "w.npz"))
    _, task, params = made(shape, aims=aims)
    x, key = images(shape), jax.random.key(2)
    loss, metrics = jax.jit(task.loss)(params, x, key)
    rest = metrics["l1"] + 1e-3 * metrics["kl"] / np.prod(shape)
    assert 0 < float(metrics["perceptual"]) < 2
    assert float(loss) == pytest.approx(float(rest + 0.5 * metrics["perceptual"]), rel=1e-5)
    distance = jax.jit(perceptual.by_network(perceptual.read_network(tmp_path / "w.npz")))
    assert float(distance(x, x, key)) == 0
    pull = jax.jit(jax.grad(distance))(0.9 * x, x, key)
    assert np.isfinite(pull).all() and np.abs(pull).max() > 0


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"conv1_2.kernel": np.zeros((3, 3, 5, 4))}, r"w\.npz: conv1_2\.kernel has shape .* wanted \(3, 3, 4, 'any'\)"),
        ({"conv2_1.bias": None}, r"conv2_1\.bias must be there, of shape \(6,\)"),
        ({"std": np.zeros(3)}, r"mean and std must be 3 numbers each"),
        (
            {f"conv{layer}.kernel": None for layer in ("1_1", "1_2", "2_1")},
            r"no array named conv1_1\.kernel; it holds conv",
        ),
    ],
)
def test_mistakes_in_a_networks_weights_are_told(tmp_path, changed, told):
    network(tmp_path / "w.npz", **changed)
    with pytest.raises(ValueError, match=told):
        perceptual.read_network(tmp_path / "w.npz")
    with pytest.raises(FileNotFoundError, match="no such file"):
        perceptual.read_network(tmp_path / "other.npz")


# ---- the report


@pytest.mark.parametrize(("shape", "codes"), [((16, 16, 1), 8), ((8, 8, 8, 1), 0)])
def test_report_on_unseen_images(tmp_path, shape, codes):
    import json

    import PIL.Image

    model, _, params = made(shape, codes)
    x = np.asarray(images(shape, n=11))
    batches = [(x[:8], 8), (np.concatenate([x[8:], np.repeat(x[-1:], 5, 0)]), 3)]
    result = reconstruction.report(model, params, batches, tmp_path)
    assert json.loads((tmp_path / "reconstruction.json").read_text()) == result
    assert result["n_images"] == 11 and result["psnr_db"]["worst"] <= result["psnr_db"]["mean"]
    assert -1 <= result["ssim"]["worst"] <= result["ssim"]["mean"] < 1
    assert len(result["latent_std"]) == 3 and ("perplexity" in result) == bool(codes)
    assert PIL.Image.open(tmp_path / "reconstruction.png").size == (8 * shape[-2], 3 * shape[-3])


def test_octaves_hear_a_blur():
    """A cosine of half the Nyquist frequency lies in one octave; halved in amplitude, it has a quarter of the power."""
    n = 32
    wave = np.cos(np.pi / n * 12 * (np.arange(n) + 0.5))[None, :, None, None] * np.ones((1, n, n, 1))
    power = np.array(reconstruction.octave_power(wave))
    assert power.argmax() == 2 and power[2] / power.sum() > 0.999
    ratio = np.array(reconstruction.octave_power(0.5 * wave)) / power
    assert ratio[2] == pytest.approx(0.25)
