"""Samplers: exact where the denoiser is, the moments of Gaussian data, orders of convergence, diffusers' own steps."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm import diffusion, samplers

MEAN = np.array([0.5, -0.2, 0.1, 0.8])
ROOT = np.array([[0.6, 0, 0, 0], [0.3, 0.4, 0, 0], [-0.2, 0.1, 0.3, 0], [0.1, 0.2, -0.1, 0.2]])
COVARIANCE = ROOT @ ROOT.T


def knowing(denoise, schedule, predict):
    """A denoiser made of `denoise(z_t, c) -> z_hat`."""
    T = len(schedule.alpha)

    def apply(params, z_t, t, key):
        c = diffusion.at(schedule, jnp.round(t * T).astype(int), z_t.ndim - 2)
        z_hat = denoise(z_t, c)
        return diffusion.target(predict, z_hat, (z_t - c.alpha * z_hat) / c.sigma, c)

    return diffusion.Denoiser(apply, schedule, predict)


def of_point(z, schedule, predict):
    """Knows the one training latent `z`."""
    return knowing(lambda z_t, c: jnp.broadcast_to(z, z_t.shape), schedule, predict)


def of_gaussian(schedule, predict):
    """The optimal denoiser of z ~ N(MEAN, COVARIANCE), in a latent of shape (2, 2, 1)."""

    power, axes = np.linalg.eigh(COVARIANCE)

    def denoise(z_t, c):
        alpha, sigma = (v.reshape(-1, 1) for v in c)
        along = (z_t.reshape(-1, 4) - alpha * MEAN) @ axes
        return (MEAN + (along * alpha * power / (alpha**2 * power + sigma**2)) @ axes.T).reshape(z_t.shape)

    return knowing(denoise, schedule, predict)


@pytest.mark.parametrize(("kind", "predict", "shape"), [("cosine", "v", (4, 4, 2)), ("flow", "flow", (3, 4, 4, 1))])
@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
@pytest.mark.parametrize("steps", [1, 30])
def test_with_one_training_latent_that_is_what_comes_out(kind, predict, shape, sampler, steps):
    z = jax.random.normal(jax.random.key(5), shape)
    model = of_point(z, diffusion.schedule(kind, 200), predict)
    keys = jax.random.split(jax.random.key(1), 3)
    out = samplers.sample(model, None, keys, shape, sampler=sampler, steps=steps)
    np.testing.assert_allclose(out, np.broadcast_to(z, out.shape), atol=1e-4)


@pytest.mark.parametrize("kind", ["cosine", "flow"])
@pytest.mark.parametrize(
    ("sampler", "eta"), [("ddim", 0.0), ("ddim", 0.5), ("ddpm", 0.0), ("dpmpp", 0.0), ("heun", 0.0)]
)
def test_gaussian_data_keep_their_mean_and_covariance(kind, sampler, eta):
    T, n = 100, 6000
    schedule = diffusion.schedule(kind, T)
    model = of_gaussian(schedule, "flow" if kind == "flow" else "v")
    keys = jax.random.split(jax.random.key(0), n)
    draw = functools.partial(samplers.sample, model, None, shape=(2, 2, 1), sampler=sampler, steps=T, eta=eta)
    z = np.asarray(jax.jit(draw)(keys_B=keys)).reshape(n, 4)
    np.testing.assert_allclose(z.mean(0), MEAN, atol=0.03)
    np.testing.assert_allclose(np.cov(z.T), COVARIANCE, atol=0.03)


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("euler", 1), ("dpmpp", 2), ("heun", 2)])
@pytest.mark.parametrize("kind", ["preserving", "flow"])
def test_order_of_convergence(sampler, order, kind):
    """On Gaussian data the probability-flow equation has a closed solution: (z_t - alpha m) / sqrt(alpha^2 s^2 + sigma^2)
    stays what it was. Twice the steps, evenly spaced in log SNR, must halve the error, or quarter it."""
    mean, std = 0.5, 0.3

    def error(steps):
        log_snr = np.linspace(9, -2, steps)  # of alpha / sigma; the last jump, to sigma = 0, is of no account
        ratio = np.exp(log_snr)
        norm = np.sqrt(1 + ratio**2) if kind == "preserving" else 1 + ratio
        schedule = diffusion.Coefficients(ratio / norm, 1 / norm)
        denoise = lambda z_t, c: mean + c.alpha * std**2 * (z_t - c.alpha * mean) / (c.alpha**2 * std**2 + c.sigma**2)
        model = knowing(denoise, schedule, "v" if kind == "preserving" else "flow")
        keys = jax.random.split(jax.random.key(0), 16)
        z = samplers.sample(model, None, keys, (2, 2, 1), sampler=sampler, steps=steps)
        noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), (2, 2, 1)))(keys)
        a, s = schedule.alpha[-1], schedule.sigma[-1]
        exact = mean + std * (noise - a * mean) / np.sqrt(a**2 * std**2 + s**2)
        return float(np.sqrt(((z - exact) ** 2).mean()))

    coarse, fine, finest = error(20), error(40), error(80)
    assert coarse < 0.1
    for ratio in (coarse / fine, fine / finest):
        assert 2**order * 0.8 < ratio < 2**order * 1.35, (coarse, fine, finest)


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_a_sample_depends_on_its_own_key_alone(sampler):
    keys = jax.random.split(jax.random.key(3), 5)
    model = of_gaussian(diffusion.schedule("cosine", 100), "v")
    draw = functools.partial(samplers.sample, model, None, shape=(2, 2, 1), sampler=sampler, steps=10)
    np.testing.assert_allclose(draw(keys)[2:4], draw(keys[2:4]), atol=1e-6)
    assert np.ptp(draw(keys), axis=0).min() > 1e-3


def test_timesteps_span_the_schedule():
    assert samplers.timesteps(1000, 1000).tolist() == list(range(999, -1, -1))
    assert samplers.timesteps(1000, 4).tolist() == [999, 749, 499, 249]
    with pytest.raises(ValueError, match=r"config.sample.steps=0"):
        samplers.timesteps(1000, 0)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (dict(sampler="plms", steps=3), r"config.sample.sampler='plms': use one of ddim"),
        (dict(sampler="heun", steps=3, eta=0.5), r"config.sample.eta=0.5 is a setting of 'ddim'"),
        (dict(sampler="ddim", steps=101), r"config.sample.steps=101 must be between 1 and config.diffusion.steps=100"),
    ],
)
def test_mistakes_are_told(settings, told):
    model = of_point(jnp.zeros((2, 2, 1)), diffusion.schedule("cosine", 100), "v")
    with pytest.raises(ValueError, match=told):
        samplers.sample(model, None, jax.random.split(jax.random.key(0), 2), (2, 2, 1), **settings)


def test_from_latents_it_goes_the_rest_of_the_way():
    """Step by step by hand, which starts with the latents' own noise; one program goes from any step."""
    schedule, keys, z = (
        diffusion.schedule("cosine", 200),
        jax.random.split(jax.random.key(2), 3),
        jnp.full((3, 4, 4, 2), 0.7),
    )
    model = diffusion.Denoiser(toy, schedule, "v")
    how = {"sampler": "ddim", "steps": 20}
    drawn = jax.jit(lambda first: samplers.sample(model, None, keys, (4, 4, 2), z=z, first=first, **how))
    plan = samplers.plan(schedule, 20)
    noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), (4, 4, 2)))(keys)
    split = lambda z_t, t, c: diffusion.split("v", z_t, toy(None, z_t, jnp.full(3, t / 200), None), c)
    for first in (0, 12, 19):
        expected = plan.now.alpha[first] * z + plan.now.sigma[first] * noise
        for i in range(first, 20):
            expected, _ = samplers.ddim(split, jax.tree.map(lambda x, i=i: x[i], plan), expected, None, None, 0.0)
        np.testing.assert_allclose(drawn(first), expected, atol=1e-5)
    assert drawn._cache_size() == 1


# ---- against diffusers, whose results on the same inputs tests/make_reference.py has written down

REFERENCE = np.load(pathlib.Path(__file__).with_name("reference.npz"))
START, T, BETA = REFERENCE["start"], 1000, (0.0015, 0.0195)
PATHS = [name.split("/")[1:] for name in REFERENCE.files if name.startswith("path/")]


def toy(params, z_t, t, key):
    """The network that theirs was given: `toy` of tests/make_reference.py."""
    return jnp.tanh(z_t * (0.3 + t.reshape(-1, 1, 1, 1))) + 0.1


@pytest.mark.parametrize("kind", ["cosine", "linear", "scaled_linear"])
def test_schedules_are_diffusers(kind):
    mine = diffusion.alpha_bar(kind, T, BETA)[[*range(0, T, 37), T - 1]]
    np.testing.assert_allclose(mine, REFERENCE[f"schedule/{kind}"], rtol=2e-4, atol=1e-9)


def test_all_paths_of_diffusers_are_there():
    assert len(PATHS) == 3 * 4 + 2 and {"ddim", "dpmpp", "euler", "heun"} == {sampler for sampler, *_ in PATHS}


@pytest.mark.parametrize(("sampler", "predict", "steps"), PATHS)
def test_deterministic_samplers_are_diffusers(monkeypatch, sampler, predict, steps):
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: jnp.asarray(START))  # what theirs start from
    schedule = diffusion.schedule("flow" if predict == "flow" else "scaled_linear", T, BETA)
    if predict != "flow":
        assert samplers.timesteps(T, int(steps)).tolist() == REFERENCE[f"times/{sampler}/{steps}"].tolist()
    model = diffusion.Denoiser(toy, schedule, predict)
    key = jax.random.key(0)[None]
    mine = samplers.sample(model, None, key, START.shape, sampler=sampler, steps=int(steps))[0]
    np.testing.assert_allclose(mine, REFERENCE[f"path/{sampler}/{predict}/{steps}"], rtol=2e-3, atol=2e-4)


def test_ancestral_steps_are_diffusers():
    """Mean and standard deviation of every step, from theirs with the noise set to 0 and to 1."""
    theirs = REFERENCE["ddpm"]
    T = len(theirs)
    plan = samplers.plan(diffusion.schedule("linear", T, (0.001, 0.2)), T)
    model = lambda z, t, c: diffusion.split("v", z, toy(None, z, t / T, None), c)
    for i in range(T):
        s = jax.tree.map(lambda x, i=i: x[i], plan)
        for noise in (0, 1):
            drawn = lambda step, noise=noise: jnp.full((1, *START.shape), float(noise))
            mine, _ = samplers.ddpm(model, s, jnp.asarray(START)[None], None, drawn, 0)
            err = f"step {i}, noise {noise}"
            np.testing.assert_allclose(mine[0], theirs[i, noise], atol=2e-3 if i == T - 1 else 2e-4, err_msg=err)


@pytest.mark.parametrize("level", [0.1, 0.5, 1.0])
def test_noise_and_denoising_of_a_given_latent(level):
    """With the optimal denoiser of Gaussian data, a latent comes back with what the noise left of it."""
    schedule = diffusion.schedule("cosine", 1000)
    z = jnp.asarray(np.random.default_rng(2).multivariate_normal(MEAN, COVARIANCE, 2000), jnp.float32)
    keys = jax.random.split(jax.random.key(1), len(z))
    how = {"sampler": "ddim", "steps": 200, "z": z.reshape(-1, 2, 2, 1), "first": 200 - round(level * 200)}
    out = samplers.sample(of_gaussian(schedule, "v"), None, keys, (2, 2, 1), **how).reshape(-1, 4)
    np.testing.assert_allclose(np.cov(np.asarray(out).T), COVARIANCE, atol=0.08)
    np.testing.assert_allclose(out.mean(0), MEAN, atol=0.08)
    alpha, sigma = (c[round(level * 1000) - 1] for c in schedule)
    # both z and out are the same linear map away from z_t, so they correlate as alpha^2 C / (alpha^2 C + sigma^2)
    power, axes = np.linalg.eigh(COVARIANCE)
    left, right = ((np.asarray(v) - MEAN) @ axes for v in (z, out))
    found = (left * right).mean(0) / np.sqrt((left**2).mean(0) * (right**2).mean(0))
    expected = np.sqrt(alpha**2 * power / (alpha**2 * power + sigma**2))
    np.testing.assert_allclose(found, expected, atol=0.08)
