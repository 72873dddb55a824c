"""The optimal denoiser of a training set: the textbook formula, and that it draws nothing but the training set."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from ldm import controls, diffusion, samplers
from tests.test_main import run

SMALL = "--config=configs/brain.py:small"


@pytest.mark.parametrize("kind", diffusion.SCHEDULES)
@pytest.mark.parametrize("shape", [(4, 4, 2), (2, 3, 4, 1)])
def test_it_is_the_posterior_mean(kind, shape):
    rng = np.random.default_rng(0)
    schedule = diffusion.schedule(kind, 100)
    z, z_t = rng.standard_normal((23, *shape)), rng.standard_normal((5, *shape))
    t = np.array([5, 30, 60, 90, 99])
    alpha, sigma = (np.asarray(c, float)[t][:, None] for c in schedule)
    squares = ((z_t[:, None] - (alpha.reshape(-1, *(1,) * (len(shape) + 1)) * z[None])) ** 2).reshape(5, 23, -1).sum(-1)
    expected = np.einsum("bn,n...->b...", scipy.special.softmax(-squares / (2 * sigma**2), axis=1), z)
    for block in (4, 23, 1000):
        found = controls.optimal(schedule).apply(controls.known(z, block), z_t.astype(np.float32), jnp.asarray(t) / 100)
        np.testing.assert_allclose(found, expected, atol=2e-3)


@pytest.mark.parametrize(
    ("kind", "sampler"), [("cosine", "ddim"), ("cosine", "ddpm"), ("linear", "dpmpp"), ("flow", "heun")]
)
def test_it_draws_the_training_set_and_nothing_else(kind, sampler):
    z = np.random.default_rng(1).standard_normal((20, 6, 6, 2)).astype(np.float32)
    schedule = diffusion.schedule(kind, 200)
    keys = jax.random.split(jax.random.key(0), 64)
    steps = 200 if sampler == "ddpm" else 40
    drawn = samplers.sample(
        controls.optimal(schedule), controls.known(z, 7), keys, z.shape[1:], sampler=sampler, steps=steps
    )
    distance = np.sqrt(((np.asarray(drawn)[:, None] - z[None]) ** 2).reshape(64, 20, -1).mean(-1))
    assert distance.min(1).max() < 0.02
    assert len(np.unique(distance.argmin(1))) >= 15, "all of them come up"


def test_unknown_control():
    with pytest.raises(ValueError, match=r"config\.sample\.control='perfect': use one of optimal, held_out"):
        controls.check("perfect")


@pytest.mark.slow
def test_audits_of_the_controls_end_in_what_is_known_of_them(tmp_path, cache):
    """Through the entrypoint, one autoencoder and detector for both: all that the optimal denoiser draws is a copy; of
    unseen patients none is, and as many p-values are small as their level says."""
    overrides = ["--config.train.diffusion.steps=1", "--config.quality.enabled=False", "--config.sample.n=16"]
    found, p = {}, {}
    for control in controls.CONTROLS:
        done = run(
            tmp_path / control, "--mode=train,sample,audit", f"--config.sample.control={control}",
            f"--config.share={tmp_path / 'share'}", "--config.audit.spaces=()", *overrides, cache=cache, config=SMALL,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found[control] = json.loads((tmp_path / control / "audit" / "audit.json").read_text())
        with open(tmp_path / control / "audit" / "verdicts.csv") as file:
            p[control] = np.array([float(row["p_value"]) for row in csv.DictReader(file)])
    optimal, held_out = (found[control] for control in controls.CONTROLS)
    assert optimal["calibrated"]["n_copies"] == optimal["n_syn"] == 16 and optimal["verdict"] == "FAIL"
    assert held_out["calibrated"]["n_copies"] == 0 and held_out["n_syn"] == 60 and held_out["verdict"] != "FAIL"
    for level in (0.1, 0.3, 0.5):  # 60 unseen patients against 240 others: beta-binomial, here as normal
        spread = np.sqrt(level * (1 - level) * (1 / 60 + 1 / 240))
        assert abs((p["held_out"] <= level).mean() - level) < 3 * spread
