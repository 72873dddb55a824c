"""Data through the entrypoint: what it was trained on, what the audit is told, and images of two channels."""

import json

import jax
import numpy as np
import PIL.Image
import pytest

import data
import main
from configs import brain
from launch import stage
from tests.conftest import make_mesh

RNG = np.random.default_rng(0)


def config_of(tmp_path, **data_):
    config = brain.get_config("tiny")
    config.data.update(cache=str(tmp_path / "cache"), **data_)
    return config


def test_a_stage_of_other_images_is_refused(tmp_path):
    config = config_of(tmp_path)
    claim = lambda content: main.claim(config, tmp_path / "detector", content, "detector", "train.detector")
    with claim("a" * 20), claim("a" * 20):
        pass
    assert json.loads((tmp_path / "detector" / "settings.json").read_text())["data.content"] == "a" * 20
    with pytest.raises(
        ValueError, match=r"other images or patients than data\.path holds now .*: use another --workdir"
    ):
        claim("b" * 20).__enter__()
    with pytest.raises(ValueError, match="other images or patients"):  # made before it was known of what
        settings = json.loads((tmp_path / "detector" / "settings.json").read_text())
        del settings["data.content"]
        (tmp_path / "detector" / "settings.json").write_text(json.dumps(settings))
        claim("a" * 20).__enter__()


def test_shared_stages_of_other_images_are_others(tmp_path):
    config = config_of(tmp_path)
    config.share = str(tmp_path / "store")
    for run, content in (("a", "1"), ("b", "1"), ("c", "2")):
        with main.claim(config, tmp_path / run / "detector", content, "detector"):
            pass
    made = [(tmp_path / run / "detector").resolve() for run in "abc"]
    assert made[0] == made[1] != made[2]


def test_a_data_folder_may_move(tmp_path):
    for path in ("here", "there"):
        config = config_of(tmp_path, path=path, splits=f"{path}.csv")  # and the file that says its splits
        with main.claim(config, tmp_path / "detector", "a", "detector"):
            pass
    with pytest.raises(ValueError, match=r"made with config\.data\.size=\[32, 32\], not \[16, 16\]"):
        main.claim(config_of(tmp_path, path="there", size=(16, 16)), tmp_path / "detector", "a", "detector").__enter__()


def test_what_synthetic_images_are_read_by(tmp_path):
    config = config_of(tmp_path, spacing=(0.4, 0.4), slices="z", channel=1, intensity="window:0:9", channels=2)
    foreign = config.audit.reading.to_dict()
    got = main.reading_of(config, tmp_path, foreign)
    assert {k: got[k] for k in foreign} == {
        "intensity": "window:0:9", "fit": "pad", "spacing": (0.4, 0.4), "channel": 1, "slices": "z", "draw": None,
    }  # fmt: skip
    got = main.reading_of(config, tmp_path, foreign | {"intensity": "minmax", "channel": 0})
    assert (got["intensity"], got["channel"], got["channels"]) == ("minmax", 0, 2)
    config.sample.format = "npy"
    assert set(main.reading_of(config, tmp_path, None)) == {
        "size", "channels", "fit", "on_error", "cache", "workers", "intensity",
    }  # fmt: skip


def test_caveats_have_what_was_not_judged(tmp_path):
    config = config_of(tmp_path, patients="per_image")
    real = data.ImageSet([], np.array([]), np.array([]), (1.0, 1.0), None, ("1 of 3 images ...: a.png",))
    made = data.ImageSet([], np.array([]), np.array([]), (2.0, 2.0), None, ("2 of 9 synthetic images ...: b.png",))
    said = main.caveats_of(config, {"train": real}, made)
    assert "every image counts as a patient" in said[0] and ": " not in said[0]
    assert said[1].startswith("voxels of the synthetic images are 2 x 2 mm and the data's 1 x 1 mm")
    assert said[2:] == [*real.notes, *made.notes]
    assert len(main.caveats_of(config, {"train": real}, made._replace(spacing=None))) == 3


def test_samples_that_cannot_be_written_are_refused_before_anything_is_read(tmp_path):
    config = config_of(tmp_path, channels=2, path=str(tmp_path / "absent"))
    config.sample.format = "png8"
    with pytest.raises(ValueError, match="'png8' cannot hold 2D images of 2 channels; use nifti or npy"):
        main.train(config, tmp_path)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "mode, foreign, select_on, name",
    [
        ("train", False, "select", "select"),
        ("audit", True, "select", "select"),
        ("audit", True, "val", "control"),
        ("train", False, "val", "select"),
    ],
)
def test_a_split_that_is_needed_and_has_no_share_is_refused_before_anything_is_read(
    tmp_path, mode, foreign, select_on, name
):
    """Not in a training loop that finds nothing to choose a checkpoint by."""
    (tmp_path / "x").mkdir()
    for i in range(30):
        (tmp_path / "x" / f"{i}.png").write_bytes(b"no picture")
    config = config_of(tmp_path, path=str(tmp_path / "x"), patients="per_image")
    config.data.fractions = {"train": 0.5, "select": 0.0, "val": 0.5, "control": 0.0 if name == "control" else 0.1}
    if name == "select":
        config.data.fractions.update(val=0.4)
    config.detector.select_on = select_on
    config.audit.synthetic = str(tmp_path / "x") if foreign else None
    with pytest.raises(
        ValueError, match=rf"^the split '{name}' has no images; data\.fractions\.{name}=0: give it a share"
    ):
        getattr(main, mode)(config, tmp_path / "run")


@pytest.fixture(scope="module")
def two_channels(tmp_path_factory):
    """64 patients of (16, 16, 2), 8 bits; trained and sampled."""
    root = tmp_path_factory.mktemp("two")
    (root / "images").mkdir()
    rows = np.add.outer(np.arange(16), np.arange(16)) * 4
    for i in range(64):
        image = np.stack([rows + RNG.integers(0, 99, (16, 16)), 255 - rows - RNG.integers(0, 99, (16, 16))], -1)
        np.save(root / "images" / f"p{i:02d}.npy", np.clip(image, 0, 255).astype(np.uint8))
    splits = ["train"] * 16 + ["select"] * 8 + ["val"] * 24 + ["control"] * 16
    lines = [f"images/p{i:02d}.npy,p{i:02d},{split}" for i, split in enumerate(splits)]
    (root / "m.csv").write_text("\n".join(["path,patient_id,split", *lines]))
    config = config_of(root, path=str(root / "m.csv"), size=(16, 16), channels=2)
    config.autoencoder.update(widths=(8,), strides=())
    config.audit.spaces = ("detector alone", "pixels", "SSIM", "latents")
    with jax.set_mesh(make_mesh(8, 1)):
        main.train(config, root / "run")
        main.sample(config, root / "run")
    return root, config, lines


@pytest.mark.slow
def test_images_of_two_channels_from_training_to_audit(two_channels):
    root, config, _ = two_channels
    samples = sorted((root / "run" / "samples").glob("*.npy"))
    assert len(samples) == 12 and np.load(samples[0]).shape == (16, 16, 2)
    assert main.audit(config, root / "run") == 0
    audit = json.loads((root / "run" / "audit" / "audit.json").read_text())
    assert (audit["n_train"], audit["n_val"], audit["n_syn"]) == (16, 24, 12)


@pytest.mark.slow
def test_another_split_of_the_same_images_is_refused(two_channels):
    """A training patient becomes an unseen one, as in a corrected manifest: trained on, it must not be the null."""
    root, config, lines = two_channels
    changed = [line.replace(",train", ",val") if line.startswith("images/p00") else line for line in lines]
    whole = (root / "m.csv").read_text()
    before = (root / "run" / "data.json").read_text()
    try:
        (root / "m.csv").write_text("\n".join(["path,patient_id,split", *changed]))
        for mode, folder in ((main.audit, "autoencoder"), (main.train, "autoencoder")):
            with pytest.raises(
                ValueError, match=rf"run/{folder} was made with other images or patients than data\.path"
            ):
                mode(config, root / "run")
        assert (root / "run" / "data.json").read_text() == before
    finally:
        (root / "m.csv").write_text(whole)


@pytest.mark.slow
def test_samples_of_an_earlier_generator_are_refused(two_channels, tmp_path):
    root, config, _ = two_channels
    settings = root / "run" / "samples" / "settings.json"
    whole = settings.read_text()
    try:
        settings.write_text(json.dumps(json.loads(whole) | {"data.content": "an earlier one"}))
        for mode in (main.sample, main.audit):
            with pytest.raises(ValueError, match="run/samples was made with other images or patients"):
                mode(config, root / "run")
    finally:
        settings.write_text(whole)


@pytest.mark.slow
def test_an_audit_of_images_made_elsewhere_says_what_it_left_out(two_channels):
    root, config, _ = two_channels
    made = root / "made"
    made.mkdir()
    for i in range(16):
        np.save(made / f"{i:02d}.npy", np.load(root / "images" / f"p{i:02d}.npy"))
    PIL.Image.fromarray(np.zeros((9, 9), np.uint8)).save(made / "patient.bmp")
    (made / "patient.png").write_bytes(b"")
    config.audit.synthetic, config.data.on_error = str(made), "skip"
    try:
        main.audit(config, root / "run")
    finally:
        config.audit.synthetic, config.data.on_error = None, "raise"
    caveats = json.loads((root / "run" / "audit" / "audit.json").read_text())["caveats"]
    assert [line.partition(": ")[0] for line in caveats] == [
        "1 files are of kinds that are not read",
        "1 of 17 synthetic images could not be read and are left out; the first",
    ]


def test_settings_say_nothing_of_content_until_they_are_claimed(tmp_path):
    assert stage.CONTENT not in main.settings_of(config_of(tmp_path), "detector")


def test_volumes_of_which_some_slices_are_judged_are_not_released(tmp_path):
    """Refused before a detector is trained: the other slices would go out with them."""
    (tmp_path / "x").mkdir()
    (tmp_path / "made").mkdir()
    for i in range(30):
        PIL.Image.fromarray(RNG.integers(0, 255, (16, 16)).astype(np.uint8)).save(tmp_path / "x" / f"{i}.png")
    np.save(tmp_path / "made" / "v.npy", RNG.integers(0, 255, (6, 16, 16)).astype(np.uint8))
    config = config_of(tmp_path, path=str(tmp_path / "x"), size=(16, 16), patients="per_image")
    config.data.fractions = dict.fromkeys(("train", "select", "val", "control"), 0.25)
    config.audit.synthetic, config.audit.release = str(tmp_path / "made"), str(tmp_path / "out")
    config.audit.reading.slices = "z:1:3"
    with pytest.raises(
        ValueError, match=r"made: audit\.release copies whole files, but audit\.reading\.slices=z:1:3 takes"
    ):
        main.audit(config, tmp_path / "run")
    assert not (tmp_path / "run").exists() and not (tmp_path / "out").exists()
