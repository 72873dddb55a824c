"""The generators as wholes: every kind trains on the one loop, resumes exactly, agrees over devices, samples by number."""

import json
import os
import re
import socket
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ldm
from launch import checkpoint, layers, loop, mesh
from ldm import autoencoder, diffusion, gan, generator, reconstruction
from tests.conftest import ROOT
from tests.test_loop import Killed, _Compiles, assert_same
from tests.test_main import run

CODER = dict(widths=(8, 16), strides=(2,), patch=2, latent=4, blocks=1, attention=False)
AIMS = dict(error="l1", kl_weight=1e-3, calibrated=False, commitment=0.25, perceptual=0.0, adversarial=0.0)
AIMS |= dict(perceptual_weights=None)
FIRST = {
    "ldm": dict(**CODER, **AIMS, codes=0, adversary_widths=(8, 8), adversary_from=0.5),
    "vae": dict(**CODER, **{**AIMS, "calibrated": True}, codes=0, adversary_widths=(8, 8), adversary_from=0.5),
    "gan": dict(widths=(8, 16), strides=(2,), latent=8, blocks=1, gamma=1.0),
}
NET = dict(width=8, mults=(1, 2), blocks=1, attention=(False, True), heads=4, dropout=0.0)
PROCESS = dict(schedule="cosine", steps=100, beta=(0.0015, 0.0195), predict="v", min_snr=0.0)
ADAM = dict(rate=1e-3, warmup=2, decay_to=0.1)
RNG = np.random.default_rng(0)
IMAGES = np.tanh(RNG.standard_normal((32, 16, 16, 1)) + RNG.standard_normal((32, 1, 1, 1))).astype(np.float32)


def build(kind, folder, first=None, **settings):
    return ldm.build(
        kind, (16, 16, 1), folder, first=FIRST.get(kind, {}) | (first or {}), net=NET, process=PROCESS, **settings
    )


def batches(images, *, batch, start):
    step = start
    while True:
        yield images[np.random.default_rng(step).permutation(len(images))[:batch]][mesh.rows(batch)]
        step += 1


def in_order(images, batch):
    for at in range(0, len(images), batch):
        part = np.stack([images[i] for i in range(at, min(at + batch, len(images)))])
        yield np.concatenate([part, np.repeat(part[-1:], batch - len(part), 0)]), len(part)


def train(model, name, feed=batches, steps=6, images=IMAGES, **settings):
    """Trains the stage; the loop's last state: parameters and optimiser states of all players."""
    ema = {} if name in ("autoencoder", "vae") else {"ema": (0.9,)}
    settings = dict(batch=16, optimiser=ADAM, save_every=2, eval_every=6, log_every=1, guard="off") | ema | settings
    states, fit = [], loop.fit
    with mock.patch.object(loop, "fit", lambda *args, **kwargs: states.append(fit(*args, **kwargs)) or states[-1]):
        ldm.train(
            model, name, images[:24], images[24:], batches=feed, in_order=in_order, augment=None, steps=steps,
            key=jax.random.key(0), patients=(np.arange(24), np.arange(8)), **settings,
        )  # fmt: skip
    return states[-1]


def killed_at(at):
    def feed(images, *, batch, start):
        for step, x in enumerate(batches(images, batch=batch, start=start), start):
            if step == at:
                raise Killed
            yield x

    return feed


PLAYERS = {
    "vq, adversary": ("ldm", "autoencoder", dict(codes=16, perceptual=0.3, adversarial=0.5)),
    "kl, adversary": ("ldm", "autoencoder", dict(perceptual=0.3, adversarial=0.5)),
    "vae": ("vae", "vae", dict(perceptual=0.3)),
    "gan": ("gan", "gan", {}),
}
SEVERAL = {players: PLAYERS[players] for players in ("vq, adversary", "vae", "gan")}  # for several processes


@pytest.mark.slow
@pytest.mark.parametrize("players", PLAYERS)
def test_one_compile_of_the_step_and_a_killed_run_ends_in_the_same_bits(tmp_path, players):
    """Once for each set of players; killed before and after the adversary's start, which is at step 3."""
    kind, name, first = PLAYERS[players]
    with _Compiles() as compiled:
        whole = train(build(kind, tmp_path / "whole", first), name)
    assert compiled.count("train_step") == (2 if "adversarial" in first else 1), compiled.names
    for at in (1, 5):
        with pytest.raises(Killed):
            train(build(kind, tmp_path / "killed", first), name, feed=killed_at(at))
    assert_same(whole, train(build(kind, tmp_path / "killed", first), name))


@pytest.mark.slow
@pytest.mark.parametrize("players", PLAYERS)
def test_any_number_of_devices_agrees(tmp_path, mesh_of, monkeypatch, players):
    """By gradient descent: Adam makes a whole step of rounding where the true gradient is zero, as of a bias before a norm."""
    monkeypatch.setattr(loop, "optimiser", lambda **_: optax.sgd(0.05))
    kind, name, first = PLAYERS[players]
    with jax.set_mesh(mesh_of(1, 1)):
        one = train(build(kind, tmp_path / "one", first), name)
    with jax.set_mesh(mesh_of(8, 2)):
        many = train(build(kind, tmp_path / "many", first), name)
    assert_same(one.params, many.params, exact=False)


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path, mesh_of, monkeypatch):
    """With discriminators and a codebook; by gradient descent, as above."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    settings = {**os.environ, "JAX_COORDINATOR_ADDRESS": address, "FACSIMILE_PROCESSES": "2"}
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.players", str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE, text=True,
            env=settings | {"FACSIMILE_PROCESS": str(i)},
        )
        for i in range(2)
    ]  # fmt: skip
    errors = [process.communicate(timeout=500)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    monkeypatch.setattr(loop, "optimiser", lambda **_: optax.sgd(0.05))
    for players, (kind, name, first) in SEVERAL.items():
        with jax.set_mesh(mesh_of(1, 1)):
            one = train(build(kind, tmp_path / "one" / players, first), name, steps=4)
        with np.load(tmp_path / f"{players}.npz") as file:
            assert_same(jax.tree.leaves(one.params), [file[leaf] for leaf in file.files], exact=False)


def test_the_adversary_starts_late(tmp_path):
    train(build("ldm", tmp_path, dict(adversarial=0.5)), "autoencoder")
    lines = [json.loads(line) for line in (tmp_path / "autoencoder" / "metrics.jsonl").read_text().splitlines()]
    told = [line["step"] for line in lines if "discriminator" in line]
    assert told == [4, 5, 6] and all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
    assert "discriminator" not in generator.load_autoencoder(build("ldm", tmp_path, dict(adversarial=0.5)))


def test_a_codebook_wants_its_batches_whole(tmp_path):
    """Of parts, each would draw a vector of its own for a dead code, and it would go to their mean, where no data is."""
    with pytest.raises(
        ValueError, match=r"config\.train\.autoencoder\.accumulate=2: with config\.autoencoder\.codes it must"
    ):
        train(build("ldm", tmp_path, dict(codes=8)), "autoencoder", accumulate=2)


@pytest.mark.parametrize("kind", ["ldm", "vae", "gan"])
def test_a_sample_is_a_function_of_its_number(tmp_path, kind):
    """A batch of eight and a later one of four agree where their numbers do; another seed gives other images."""
    model = build(kind, tmp_path, dict(codes=8) if kind == "ldm" else None)
    for name in ldm.stages(kind):
        train(model, name, steps=2)
    assert not (tmp_path / "diffusion" / "looks").exists(), "with the guard off nothing is looked for"
    weights = ldm.load(model, ema=0.9, decays=(0.9,), steps=2, guard="off")
    how = dict(sampler="ddim", steps=3, eta=0.0)
    draw = ldm.sampler(model, weights, key=jax.random.key(1), **how)
    eight, four = draw(np.arange(8)), draw(np.array([11, 5, 2, 7]))
    np.testing.assert_allclose(four[1:], eight[np.array([5, 2, 7])], atol=1e-5)
    assert eight.shape == (8, 16, 16, 1) and np.ptp(np.asarray(eight), axis=0).max() > 1e-3 and np.abs(eight).max() <= 1
    other = ldm.sampler(model, weights, key=jax.random.key(2), **how)(np.arange(8))
    assert np.abs(other - eight).max() > 1e-3
    trip = ldm.round_trip(model)
    assert trip is None if kind == "gan" else trip(IMAGES[:4]).shape == (4, 16, 16, 1)


def test_each_image_is_rendered_with_noise_of_its_own(tmp_path):
    """Whatever comes beside it and wherever it stands; unseen images share none with training images of the same rows."""
    model = build("ldm", tmp_path)
    train(model, "autoencoder", steps=2)
    trip, params = ldm.round_trip(model), generator.load_autoencoder(model)
    np.testing.assert_allclose(trip(np.concatenate([IMAGES[:8], IMAGES[:8]]))[8:], trip(IMAGES[:8]), atol=1e-5)
    np.testing.assert_allclose(trip(IMAGES[[11, 5, 2, 7]])[1:], trip(IMAGES[:8])[np.array([5, 2, 7])], atol=1e-5)
    posterior = lambda x: model.autoencoder.encode(params, x)
    render = lambda z: np.asarray(jnp.clip(model.autoencoder.decode(params, z), -1, 1))
    noise = lambda x, made: (np.asarray(made) - render(posterior(x).mu)).reshape(len(x), -1)
    same_rows = lambda made: np.mean(
        [
            np.corrcoef(*pair)[0, 1]
            for pair in zip(*(noise(x, made(x)) for x in (IMAGES[:16], IMAGES[16:])), strict=True)
        ]
    )
    shared = lambda x: render(autoencoder.draw(posterior(x), jax.random.key(0)))
    assert same_rows(shared) > 0.5, "noise by the row alone is the same for both"
    assert abs(same_rows(trip)) < 0.2


def test_looks_guard_and_averages_of_volumes_with_two_channels(tmp_path, monkeypatch):
    at_once, plain = [], in_order
    monkeypatch.setitem(globals(), "in_order", lambda items, batch: at_once.append(batch) or plain(items, batch))
    images = np.tanh(RNG.standard_normal((32, 8, 8, 8, 2))).astype(np.float32)
    net = NET | {"mults": (1,), "attention": (False,)}  # compilation of 3D networks is most of the time
    model = ldm.build("ldm", images.shape[1:], tmp_path, first=FIRST["ldm"], net=net, process=PROCESS)
    train(model, "autoencoder", steps=1, images=images)
    train(model, "diffusion", steps=4, images=images, eval_every=2, ema=(0.1, 0.9), guard="warn")
    assert max(at_once) == 16, "memory is planned for a stage's own batch"
    folder = tmp_path / "diffusion"
    assert [path.name for path in sorted((folder / "looks").iterdir())] == ["00000002.png", "00000004.png"]
    assert (folder / "last_safe").is_dir(), "nothing is memorized in four steps"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "gap_p_value" in line] == [2, 4]
    with pytest.raises(
        ValueError, match=r"diffusion holds weights of step 4, not of config\.train\.diffusion\.steps=9"
    ):
        ldm.load(model, ema=0.1, decays=(0.1, 0.9), steps=9, guard="stop")
    checkpoint.write_json(folder / "guard.json", {"opened_at": 6, "last_safe": 4})
    with pytest.raises(ValueError, match="run --mode=train to its end"):
        ldm.load(model, ema=0.1, decays=(0.1, 0.9), steps=9, guard="warn")
    drawn = []
    for ema in (0.1, 0.9):
        weights = ldm.load(model, ema=ema, decays=(0.1, 0.9), steps=9, guard="stop")
        drawn.append(ldm.sampler(model, weights, key=jax.random.key(1), sampler="ddim", steps=2, eta=0.0)(np.arange(8)))
    assert drawn[0].shape == (8, 8, 8, 8, 2) and np.abs(drawn[0] - drawn[1]).max() > 1e-5
    assert ldm.round_trip(model)(images[:8]).shape == (8, 8, 8, 8, 2)


def test_a_vae_samples_from_its_prior(tmp_path):
    model = build("vae", tmp_path)
    train(model, "vae", steps=2)
    weights = ldm.load(model, ema=0.9, decays=(), steps=2, guard="off")
    keys = [jax.random.fold_in(jax.random.key(1), i) for i in range(3)]
    z = jnp.stack([jax.random.normal(key, model.autoencoder.latent_shape) for key in keys])
    expected = jnp.clip(model.autoencoder.decode(weights.autoencoder, z), -1, 1)
    drawn = ldm.sampler(model, weights, key=jax.random.key(1), sampler="", steps=0, eta=0.0)(np.arange(3))
    np.testing.assert_allclose(drawn, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "settings", "told"),
    [
        ("dit", {}, "config.generator='dit': use one of ldm, vae, gan"),
        ("gan", {"dtype": "float16"}, "config.dtype='float16': use 'float32' or 'bfloat16'"),
        ("vae", {"first": dict(codes=8)}, "config.vae.codes must be 0"),
        ("vae", {"first": dict(error="l3")}, "config.vae.error='l3'"),
    ],
)
def test_mistakes_are_told(tmp_path, kind, settings, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        build(kind, tmp_path, **settings)


def test_the_control_that_memorizes_is_latent_diffusion(tmp_path):
    with pytest.raises(ValueError, match=r"config\.generator='gan' has none"):
        ldm.optimal(build("gan", tmp_path))


# ---- precision and memory


def tasks(model):
    """(task, batch) of every network of this kind of generator."""
    if model.gan is not None:
        return gan.task(model.gan)
    if model.kind == "vae":
        return reconstruction.task(model.autoencoder, model.aims, adversarial=False)
    return diffusion.task(model.denoiser, model.init_unet, lambda z, key: z)


@pytest.mark.parametrize("kind", ["ldm", "vae", "gan"])
def test_bf16_computes_nearly_the_same_and_keeps_fp32_parameters(tmp_path, kind):
    x = jnp.asarray(IMAGES[:8]) if kind != "ldm" else jax.random.normal(jax.random.key(3), (8, 4, 4, 4))
    found = {}
    for dtype in ("float32", "bfloat16"):
        task = tasks(build(kind, tmp_path, dtype=dtype))
        params = layers.init(task.init, jax.random.key(0))
        params = jax.tree.map(lambda p: p + 0.02 * jax.random.normal(jax.random.key(p.size), p.shape), params)
        (loss, _), grads = jax.jit(jax.value_and_grad(task.loss, has_aux=True))(params, x, jax.random.key(2))
        assert {leaf.dtype for leaf in jax.tree.leaves((params, grads, loss))} == {jnp.dtype("float32")}
        found[dtype] = float(loss), jnp.concatenate([g.ravel() for g in jax.tree.leaves(grads)])
    (exact, g), (near, g_near) = found["float32"], found["bfloat16"]
    assert near == pytest.approx(exact, rel=0.02) and near != exact
    assert g @ g_near / jnp.linalg.norm(g) / jnp.linalg.norm(g_near) > 0.98


@pytest.mark.parametrize("kind", ["ldm", "vae", "gan"])
def test_recomputing_activations_changes_nothing_but_memory(tmp_path, kind):
    x = jnp.asarray(IMAGES[:8]) if kind != "ldm" else jax.random.normal(jax.random.key(3), (8, 4, 4, 4))
    found, kept = [], []
    for remat in (False, True):
        task = tasks(build(kind, tmp_path, remat=remat))
        params = layers.init(task.init, jax.random.key(0))
        loss = lambda p, t=task: t.loss(p, x, jax.random.key(2))[0]
        found.append(jax.jit(jax.value_and_grad(loss))(params))
        residuals = jax.tree.leaves(jax.eval_shape(lambda p, f=loss: jax.vjp(f, p)[1], params))
        kept.append(sum(leaf.size for leaf in residuals) - sum(leaf.size for leaf in jax.tree.leaves(params)))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert kept[1] < 0.8 * kept[0], "arrays kept for the backward pass; XLA on a CPU takes no notice"


# ---- through the entrypoint


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vae", "gan"])
def test_the_whole_path(tmp_path, cache, kind):
    done = run(tmp_path, "--mode=train,sample,audit", f"--config.generator={kind}", cache=cache)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    audit = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert audit["n_syn"] == 12 and 0 <= audit["calibrated"]["copy_rate"] <= 1
    assert np.isfinite(
        json.loads((tmp_path / "quality.json").read_text())["spaces"]["detector"]["synthetic"]["recall"]["value"]
    )
    assert (tmp_path / "vae" / "reconstruction.json").exists() == (kind == "vae")
    assert not (tmp_path / "diffusion").exists()
    other = run(tmp_path, "--mode=sample", "--config.generator=ldm", cache=cache)
    assert other.returncode == 1 and "run --mode=train" in other.stderr
