"""Every config and variant: it resolves, says how it is run, and its networks fit its images. Nothing is trained."""

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import configs
import main
from configs import ct, default, mri
from data import files, geometry, load, splits
from detection import detector
from launch import layers, stage
from ldm import autoencoder, reconstruction
from tests.conftest import ROOT

FILES = sorted(module.name for module in pkgutil.iter_modules(configs.__path__))


def variants():
    """(file, variant) of all, as the files themselves list them to someone who asks for another."""
    for name in FILES:
        with pytest.raises(ValueError, match="no variant 'x' in this config") as error:
            importlib.import_module(f"configs.{name}").get_config("x")
        for variant in re.findall(r"'(\w*)'", str(error.value).partition("it has: ")[2]):
            yield name, variant


ALL = list(variants())


def test_they_are_all_there():
    assert {"brain", "ct", "default", "fastmri", "hippocampus", "mri", "xray"} <= set(FILES)
    assert {name for name, variant in ALL if variant == "tiny"} == {*FILES} - {"default"}


@pytest.mark.parametrize("name", [name for name in FILES if name != "default"])
def test_each_says_how_it_is_run(name):
    said = importlib.import_module(f"configs.{name}").__doc__
    assert f"python main.py --config=configs/{name}.py" in said and "--mode=train,sample,audit" in said


@pytest.mark.parametrize("name, variant", ALL)
def test_only_known_keys_are_set(name, variant):
    """A config is not locked while it is made: a misspelt key would be a new one that nobody reads."""
    config = importlib.import_module(f"configs.{name}").get_config(variant)
    known = stage.flatten(importlib.import_module("configs.default").get_config().to_dict())
    loose = re.compile(r"data\.(fractions|limit|cohort\.subjects)\.|(augment\.\w+|detector\.augment)\.")
    assert not [key for key in stage.flatten(config.to_dict()) if key not in known and not loose.match(key)]


@pytest.mark.parametrize("name, variant", ALL)
def test_settings_of_the_data_are_possible(name, variant):
    data = importlib.import_module(f"configs.{name}").get_config(variant).data
    assert files.parse_intensity(data.intensity) and data.fit in geometry.FITS
    assert data.slices is None or (files.parse_slices(data.slices) and len(data.size) == 2)
    assert data.spacing is None or len(data.spacing) == len(data.size)
    assert set(splits.assign(list("abcdefgh") * 20, fractions=data.fractions.to_dict())) <= {*splits.NAMES, ""}


@pytest.mark.parametrize("name, variant", ALL)
def test_networks_fit_the_images(name, variant, tmp_path):
    config = importlib.import_module(f"configs.{name}").get_config(variant)
    shape = (*config.data.size, 1)
    generator = main.build_generator(config, tmp_path)
    coder, key = generator.autoencoder, jax.random.key(0)
    x, z = jnp.zeros((2, *shape)), jnp.zeros((2, *coder.latent_shape))

    def through(x, z):
        params = coder.init(key)
        q = coder.encode(params, x)
        denoised = generator.denoiser.apply(generator.init_unet(key), z, jnp.zeros(2))
        return q.mu, coder.decode(params, q.mu), denoised

    mu, decoded, denoised = jax.eval_shape(through, x, z)
    assert mu.shape == denoised.shape == z.shape and decoded.shape == x.shape
    assert np.prod(coder.latent_shape) < np.prod(shape), "no smaller than the image"
    model = detector.build(shape, tmp_path, **main.detector_of(config))
    embedded = jax.eval_shape(lambda x: model.encoder.apply(model.encoder.init(key, x[:1]), x), x)
    assert embedded.shape == (2, config.detector.dim)


@pytest.mark.parametrize("name, variant", ALL)
def test_augmentations_fit_the_images(name, variant):
    config = importlib.import_module(f"configs.{name}").get_config(variant)
    x = jnp.zeros((2, *config.data.size, 1))
    for section in (config.augment.autoencoder, config.augment.diffusion, config.detector.augment):
        if augment := main.augmentation(section):
            assert jax.eval_shape(augment, jax.random.key(0), x).shape == x.shape


def test_mrnet_is_split_as_in_the_paper():
    data = mri.get_config().data
    exams = [f"{number:04d}" for number in range(1250)]
    found = splits.assign(exams, fractions=data.fractions.to_dict(), seed=data.seed)
    count = {split: int((found == split).sum()) for split in splits.NAMES}
    assert (count["train"], count["val"]) == (904, 226) and sum(count.values()) == 1250
    assert count["select"] >= 16 and count["control"] >= 90
    folds = [splits.assign(exams, fractions=data.fractions.to_dict(), seed=data.seed, fold=k) for k in range(5)]
    unseen = [set(np.flatnonzero(fold == "val")) for fold in folds]
    assert data.fold == 0 and [len(fold) for fold in unseen] == [226] * 5 and len(set.union(*unseen)) == 1130
    for fold in folds:
        assert (fold == "train").sum() == 904
        for kept in ("select", "control"):
            np.testing.assert_array_equal(fold == kept, found == kept)
    with pytest.raises(ValueError, match=r"data\.fold must be 0 to 4, not 5"):
        splits.assign(exams, fractions=data.fractions.to_dict(), fold=5)


def test_mrnet_takes_another_partition(tmp_path):
    """By one flag, whatever the config says of the hash and of folds."""
    (tmp_path / "s.csv").write_text(
        "patient_id,split\n" + "".join(f"{i:04d},{splits.NAMES[i % 4]}\n" for i in range(40))
    )
    for part, exams in (("train", range(30)), ("valid", range(30, 40))):
        (tmp_path / "MRNet" / part / "sagittal").mkdir(parents=True)
        for i in exams:
            volume = np.random.default_rng(i).integers(0, 255, (2, 6, 6), dtype=np.uint8)
            np.save(tmp_path / "MRNet" / part / "sagittal" / f"{i:04d}.npy", volume)
    settings = mri.get_config("tiny").data.to_dict() | {
        "path": str(tmp_path / "MRNet"),
        "cache": str(tmp_path / "cache"),
    }
    sets = load(**(settings | {"splits": str(tmp_path / "s.csv"), "size": (2, 6, 6)}))
    for k, name in enumerate(splits.NAMES):
        assert sorted(map(int, sets[name].patients)) == list(range(k, 40, 4)) and sets[name].stated


def test_sub_volumes_of_ct_need_their_centres(tmp_path):
    """Without them the middle of each patient would be cut out, silently."""
    settings = ct.get_config().data.to_dict() | {"path": str(tmp_path), "cache": str(tmp_path / "cache")}
    with pytest.raises(ValueError, match=r"data\.centres is not said: .* or set data\.centres=none"):
        load(**settings)
    with pytest.raises(ValueError, match="no images found"):
        load(**(settings | {"centres": "none"}))


@pytest.mark.parametrize(
    ("name", "variant"), [("mri", ""), *(pytest.param(*ending, marks=pytest.mark.slow) for ending in
                          [("mri", "paper"), ("ct", ""), ("ct", "paper"), ("fastmri", "")])],
)  # fmt: skip
def test_sizes_of_the_paper_fit_24_gb(name, variant, capsys):
    """Every stage on one device, by the dry run."""
    config = importlib.import_module(f"configs.{name}").get_config(variant)
    config.plan.devices = 1
    main.dry_run(config)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {stage: cost["memory"] for stage, cost in found.items() if cost["memory"] > 24e9} == {}
    whole = {stage: cost["steps"] * cost["flops"] for stage, cost in found.items()}
    assert whole["looks"] < 0.2 * whole["diffusion"], "looking costs little beside training"
    assert len(found) == 5 and (name != "mri" or config.data.size == (32, 256, 256))


def test_the_kl_weight_is_monais_at_its_own_size():
    """On images of the tutorial's size twice its loss, whose images are in [0, 1], is ours."""
    size, weight = (8, 8, 4), 1e-3
    assert mri.get_config().autoencoder.kl_weight == pytest.approx(2e-6 * 96 * 96 * 64)
    aims = reconstruction.Aims("l1", default.monai_kl(weight, size), False, 0.0, 0.0, None, 0.0, ())
    model = autoencoder.build((*size, 1), widths=(4,), strides=(), latent=2)
    task = reconstruction.task(model, aims, adversarial=False)
    params = layers.init(task.init, jax.random.key(0))
    x, key = jax.random.uniform(jax.random.key(1), (3, *size, 1), minval=-1.0), jax.random.key(2)
    q = model.encode(params, x)
    x_hat = model.decode(params, autoencoder.draw(q, key))
    sigma = jnp.exp(0.5 * q.logvar)
    kl = 0.5 * (q.mu**2 + sigma**2 - jnp.log(sigma**2) - 1).sum((1, 2, 3, 4))
    theirs = jnp.abs((x_hat + 1) / 2 - (x + 1) / 2).mean() + weight * kl.sum() / len(kl)
    assert float(task.loss(params, x, key)[0]) == pytest.approx(2 * float(theirs), rel=1e-5)


@pytest.mark.slow
def test_the_whole_path_in_3d(real_data, tmp_path, cache):
    """Real volumes from files to an audit, with next to no training and narrow networks."""
    small = [f"--config.train.{part}.steps=2" for part in ("autoencoder", "diffusion", "detector")]
    small += [f"--config.{net}.widths=(8,16)" for net in ("autoencoder", "detector")] + ["--config.unet.width=16"]
    small += ["--config.audit.spaces=('detector alone','shifted pixels','latents')"]
    done = subprocess.run(
        [sys.executable, "main.py", "--config=configs/hippocampus.py:tiny", f"--workdir={tmp_path}"]
        + [f"--config.data.path={real_data / 'msd_hippocampus'}", "--mode=train,sample,audit", *small]
        + [
            "--config.sample.n=8",
            "--config.sample.steps=2",
            "--config.audit.planted=4",
            "--config.audit.batch=4",
            "--config.audit.register=1",
        ],
        cwd=ROOT,
        env={**os.environ, "FACSIMILE_CACHE": str(cache), "FACSIMILE_QUIET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 3, 4), done.stderr
    assert len(list((tmp_path / "samples").glob("*.nii.gz"))) == 8
    assert (tmp_path / "audit" / "report.html").stat().st_size > 10_000
