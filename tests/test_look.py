"""The look while training: its test is valid over many looks, the guard keeps and stops, the picture shows the nearest."""

import numpy as np
import PIL.Image
import pytest

from launch import checkpoint
from ldm import look


def test_false_alarms_over_many_looks_stay_under_alpha():
    """Networks that treat both sides alike, whose images differ in difficulty and keep it: twenty looks at each."""
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(400):
        train, held_out = (rng.lognormal(0, 0.5, (n, 1)) for n in (40, 12))
        looks = [
            look.gap(*(side * rng.lognormal(0, 0.2, (len(side), 5)) for side in (train, held_out))) for _ in range(20)
        ]
        alarms += any(found.p_value < look.allowed(i) for i, found in enumerate(looks, 1))
    assert alarms / 400 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)


def test_the_shares_of_all_looks_sum_to_alpha():
    assert sum(look.allowed(i) for i in range(1, 10**5)) == pytest.approx(look.ALPHA, rel=1e-4)


def test_a_gap_is_seen_and_measured():
    rng = np.random.default_rng(1)
    train, held_out = rng.lognormal(0, 0.3, (40, 5)), 1.5 * rng.lognormal(0, 0.3, (16, 5))
    found = look.gap(train, held_out)
    assert found.relative == pytest.approx(0.5, abs=0.2) and found.p_value < 1e-3
    assert look.gap(held_out, train).p_value > 0.99, "one sided"
    assert look.gap(np.ones((5, 2)), np.ones((5, 2))).p_value == 1


def test_one_image_of_each_patient():
    patients = np.array(list("aabbbcddddd") * 3)
    index = look.one_per_patient(patients)
    assert sorted(patients[index]) == list("abcd")
    assert len(look.one_per_patient(np.arange(1000))) == look.PATIENTS


SAFE, OPEN = look.Gap(0.01, 0.4), look.Gap(0.8, 1e-9)


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(look.log, "say", lines.append)
    return lines


def test_warn_keeps_the_last_safe_averages_and_says_so_once(tmp_path, said):
    halts = [
        look.act(tmp_path, step, number, found, {"0.9": {"scale": np.full(3, float(step))}}, "warn")
        for number, (step, found) in enumerate([(10, SAFE), (20, SAFE), (30, OPEN), (40, SAFE), (50, OPEN)], 1)
    ]
    assert halts == [False] * 5
    assert look.opened(tmp_path) == {"opened_at": 30, "gap": 0.8, "p_value": 1e-9, "last_safe": 20}
    kept = checkpoint.load(tmp_path / "last_safe", {"0.9": {"scale": np.zeros(3)}})
    np.testing.assert_array_equal(kept["0.9"]["scale"], 20)
    (line,) = said
    assert "at step 30 unseen images are denoised 80 % worse" in line and "last_safe holds step 20" in line


def test_stop_halts_at_the_gap_and_again_after_a_resume_from_before_it(tmp_path, said):
    act = lambda step, number, found: look.act(tmp_path, step, number, found, {"scale": np.ones(2)}, "stop")
    assert [act(10, 1, SAFE), act(20, 2, OPEN)] == [False, True]
    assert [act(10, 1, SAFE), act(20, 2, OPEN)] == [False, True]
    assert checkpoint.published(tmp_path / "last_safe") == 10 and len(said) == 1


def test_open_at_the_first_look(tmp_path, said):
    assert look.act(tmp_path, 10, 1, OPEN, {"scale": np.ones(2)}, "stop")
    assert look.opened(tmp_path)["last_safe"] is None and "nothing safe to keep" in said[0]


def test_unknown_guard():
    with pytest.raises(ValueError, match=r"config\.train\.guard='halt': use one of warn, stop, off"):
        look.check("halt")


@pytest.mark.parametrize("shape", [(6, 6, 2), (3, 4, 5, 1)])
def test_nearest_is_brute_force(shape, monkeypatch):
    rng = np.random.default_rng(2)
    latents, z = rng.standard_normal((50, *shape)).astype(np.float32), rng.standard_normal((4, *shape))
    z[1] = (latents[17] - 1) / 2
    normalise = lambda mu: (mu - 1) / 2
    distance = np.sqrt(((z[:, None] - normalise(latents)[None]) ** 2).reshape(4, 50, -1).mean(-1))
    found = look.nearest(z, latents, normalise)
    np.testing.assert_array_equal(found.index, distance.argmin(1))
    np.testing.assert_allclose(found.distance, distance.min(1), atol=1e-5)
    two = np.sort(distance, 1)[:, :2]
    np.testing.assert_allclose(found.ratio, two[:, 0] / two[:, 1], atol=1e-5)
    assert found.index[1] == 17 and found.ratio[1] < look.COPIED
    monkeypatch.setattr(look, "SCANNED", 25 * int(np.prod(shape)) * 4)
    assert np.all(look.nearest(z, latents, normalise).index % 2 == 0), "every other one, where all would be too many"


@pytest.mark.parametrize("shape", [(32, 32, 1), (5, 20, 40, 1)])
def test_picture(tmp_path, shape):
    samples, training = np.full((3, *shape), -1.0), np.full((3, *shape), 1.0)
    near = look.Nearest(np.arange(3), np.array([0.1, 0.5, 0.9]), np.array([0.1, 0.9, 1.0]))
    look.picture(tmp_path / "x.png", samples, training, near)
    sheet = np.asarray(PIL.Image.open(tmp_path / "x.png").convert("RGB")).astype(int)
    tile, rows = (shape[-2] * max(1, -(-96 // shape[-2])), shape[-3] * max(1, -(-96 // shape[-2])))
    assert sheet[2 + rows // 2, 2 + tile // 2].tolist() == [0, 0, 0], "sample above"
    assert sheet[rows + 4 + 2 + rows // 2, 2 + tile // 2].tolist() == [255, 255, 255], "training image below"
    assert sheet[0, 0].tolist() == [255, 0, 0] and sheet[0, tile + 12].tolist() == [255, 255, 255], "red: a copy"
