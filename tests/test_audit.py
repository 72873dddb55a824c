"""The audit as a whole, on made-up patients and plain pixel correlation: known copies, known innocents, known traps."""

import contextlib
import csv
import json
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from scipy import ndimage

import data
from data import augment
from detection import audit, outputs, report, spaces, verdict, views

SIZE = 32
POLICY = {"max_copy_rate": 0.3, "max_patients": 0, "min_recall": 0.8, "min_recall_of_kind": 0.5, "min_power": 0.8}
PLANTS = {("identity", 0.0): lambda key, x: x, ("noise", 0.1): lambda key, x: augment.noise(key, x, 0.1)}
PIXELS = spaces.by_correlation(views.pixels)
REGISTERED = spaces.registered(views.pixels, (SIZE, SIZE, 1), candidates=4)


def people(seed, n):
    """n images of n patients: random fields with the spectrum of natural images, in [-1, 1]."""
    rng = np.random.default_rng(seed)
    f = np.hypot(*np.meshgrid(np.fft.fftfreq(SIZE), np.fft.fftfreq(SIZE)))
    f[0, 0] = np.inf
    fields = np.fft.ifft2(np.fft.fft2(rng.normal(size=(n, SIZE, SIZE))) / f).real
    return (fields / (3.5 * fields.std())).clip(-1, 1).astype(np.float32)[..., None]


def named(images, name, per=1):
    """Images of patients, or of draws of a generator, who have so many each; in a file each."""
    ids = np.array([f"{name}-{i:03d}.png" for i in range(len(images))])
    return SimpleNamespace(
        images=images, ids=ids, patients=np.arange(len(images)) // per if per > 1 else ids, files=ids
    )


@pytest.fixture(scope="module")
def sets():
    return {
        name: named(people(i, n), name) for i, (name, n) in enumerate({"train": 60, "val": 150, "control": 60}.items())
    }


def run(sets, synthetic, folder, drawn=False, per=1, **other):
    """An audit; its pictures and its page only if `drawn`. `per`: synthetic images of one draw."""
    settings = dict(
        render=None, plants=PLANTS, again=None, others={}, losses=None, levels=(), described={}, redact=False, source=folder / "source", in_order=data.in_order, folder=folder / "audit",
        stated=True, caveats=[], policy=POLICY, release_to=None, release_level=0.05, release_anyway=False, quality=None, fdr=0.1, percentile=95.0, pairs=4, planted=40, slow_images=2000, batch=32, seed=0,
    )  # fmt: skip
    space = other.pop("space", REGISTERED)
    with contextlib.ExitStack() as stack:
        if not drawn:
            stack.enter_context(mock.patch.object(outputs, "draw"))
            stack.enter_context(mock.patch.object(report, "write"))
        return audit(space, sets, named(synthetic, "syn", per), **settings | other)


def test_training_images_are_all_copies(sets, tmp_path):
    result = run(sets, sets["train"].images, tmp_path, drawn=True)
    assert result["calibrated"]["copy_rate"] == 1 and result["calibrated"]["n_mem_patients"] == 60
    assert result["calibrated"]["needed_score"] is None and result["calibrated"]["threshold"] > 0
    assert result["paper"]["n_copies"] == result["paper"]["n_mem"] == 60
    assert result["verdict"] == "FAIL"
    assert json.loads((tmp_path / "audit" / "audit.json").read_text())["verdict"] == "FAIL"
    assert {"pairs.png", "histogram.png", "report.html"} <= {path.name for path in (tmp_path / "audit").iterdir()}


@pytest.mark.parametrize("seed", range(3))
def test_unseen_patients_are_no_copies(sets, tmp_path, seed):
    result = run(sets, people(100 + seed, 60), tmp_path)
    assert result["calibrated"]["n_copies"] == 0 == result["bounds"]["at_least"]
    assert result["calibrated"]["threshold"] is None and result["calibrated"]["needed_score"] > 0
    assert result["verdict"] == "PASS", result["reasons"]
    assert result["bounds"]["at_most_rate"] <= 0.3 and result["power"]["recall"] > 0.9
    assert all(row["recall"] == 1 for row in result["positive_control"] if row["kind"] == "identity")


def test_slices_of_a_few_volumes_are_no_many_images(sets, tmp_path):
    """60 innocent slices of 10 volumes: ten draws say little of the generator, and one volume alone accuses nobody."""
    alone = run(sets, people(100, 60), tmp_path / "alone", space=PIXELS)
    synthetic = np.concatenate([people(100, 54), 0.9 * sets["train"].images[:6] + 0.1 * people(8, 6)])
    result = run(sets, synthetic, tmp_path / "volumes", per=6, space=PIXELS)
    assert (alone["n_draws"], result["n_syn"], result["n_draws"]) == (60, 60, 10)
    assert not alone["caveats"] and "parts of 10 draws of the generator" in result["caveats"][0]
    assert result["bounds"]["n_above"] >= 6 and result["bounds"]["at_least"] == 0, (
        "a volume that is near is one that is near"
    )
    assert run(sets, synthetic, tmp_path / "images", space=PIXELS)["bounds"]["at_least"] >= 1, (
        "as images they would accuse"
    )
    again = run(sets, people(100, 60), tmp_path / "alone", per=6, space=PIXELS)
    assert alone["verdict"] == "PASS" and again["verdict"] == "INCONCLUSIVE"
    assert again["bounds"]["at_most_rate"] > 0.3 > alone["bounds"]["at_most_rate"]
    low, high = again["calibrated"]["copy_rate_ci"]
    assert low == 0 and high >= 0.3, "nothing of 10"


def test_no_pictures_if_none_are_wanted(sets, tmp_path):
    run(sets, people(9, 20), tmp_path, drawn=True, space=PIXELS)
    assert (tmp_path / "audit" / "pairs.png").exists()
    run(sets, people(9, 20), tmp_path, drawn=True, space=PIXELS, pairs=0)
    there = {path.name for path in (tmp_path / "audit").iterdir()}
    assert "pairs.png" not in there and {"audit.json", "histogram.png", "verdicts.csv", "report.html"} <= there


BLUR = lambda x: np.stack([ndimage.gaussian_filter(i, (1.2, 1.2, 0)) for i in x])
RENDERINGS = {
    "smoother": BLUR,
    "noisier": lambda x: x + np.random.default_rng(5).normal(0, 0.15, x.shape).astype(np.float32),
    "sharper": lambda x: x + 1.5 * (x - BLUR(x)),
    "windowed": lambda x: 1.6 * x + 0.2,
}


def rendered(sets, how, tmp_path, seed, **settings):
    """What is said of unseen patients and of training patients, both so rendered."""
    shown = lambda x: how(x).clip(-1, 1).astype(np.float32)
    innocent = run(sets, shown(people(70 + seed, 60)), tmp_path / "innocent", seed=seed, fdr=0.05, **settings)
    guilty = run(sets, shown(sets["train"].images[:30].copy()), tmp_path / "guilty", seed=seed, **settings)
    return innocent, guilty


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", RENDERINGS)
def test_a_rendering_is_not_memorization_and_does_not_hide_it(sets, tmp_path, kind, seed):
    """Unseen patients, rendered otherwise than real images, are not accused; training patients so rendered are not passed."""
    innocent, guilty = rendered(sets, RENDERINGS[kind], tmp_path, seed, space=PIXELS)
    assert innocent["verdict"] != "FAIL", innocent["reasons"]
    assert guilty["verdict"] != "PASS", guilty["reasons"]


@pytest.mark.parametrize("kind", RENDERINGS)
def test_nor_is_it_where_registration_decides(sets, tmp_path, kind):
    innocent, guilty = rendered(sets, RENDERINGS[kind], tmp_path, 0)
    assert innocent["calibrated"]["n_copies"] == innocent["bounds"]["at_least"] == 0
    assert innocent["verdict"] in ("PASS", "INCONCLUSIVE"), innocent["reasons"]
    assert guilty["calibrated"]["copy_rate"] > 0.9 and guilty["bounds"]["at_least_rate"] > 0.8


@pytest.mark.parametrize("seed", range(3))
def test_a_generators_own_decoder_is_not_memorization_and_does_not_hide_it(sets, tmp_path, seed):
    """Samples come through a decoder that smooths: judged by real images that went through it too, and refused without."""
    decoder = lambda x: augment.blur(x, 1.2)
    how = lambda x: np.asarray(decoder(x))
    innocent, guilty = rendered(sets, how, tmp_path / "trip", seed, space=PIXELS, render=decoder)
    assert not innocent["rendering"]["differs"] and innocent["calibrated"]["n_copies"] <= 1
    assert innocent["verdict"] != "FAIL", innocent["reasons"]
    assert guilty["verdict"] == "FAIL" and guilty["calibrated"]["copy_rate"] > 0.9
    innocent, guilty = rendered(sets, how, tmp_path / "raw", seed, space=PIXELS, render=views.as_it_is)
    assert innocent["calibrated"]["n_copies"] > 10, "the trap: smoothness alone looks like copying"
    for result in (innocent, guilty):
        assert result["verdict"] == "INCONCLUSIVE" and "rendered differently" in result["reasons"][0]


def test_a_large_gap_before_the_filter_is_a_caveat(sets, tmp_path):
    blurred = np.asarray(augment.blur(people(7, 60), 2.0))
    told = [c for c in run(sets, blurred, tmp_path, space=PIXELS)["caveats"] if "before real and synthetic" in c]
    assert len(told) == 1 and "of the power of unseen ones" in told[0]
    assert not run(sets, people(7, 60), tmp_path, space=PIXELS)["caveats"]


def test_the_trap_is_one(sets):
    """Held against raw unseen patients, smoothed innocents would be accused: the test above can fail."""
    from detection import calibrate, neighbours

    scores = lambda x: neighbours.nearest(neighbours.standardise(views.pixels(x)), neighbours.standardise(views.pixels(sets["train"].images))).sim[:, 0]  # fmt: skip
    test = calibrate.calibrated_test(
        scores(BLUR(people(7, 60))), scores(sets["val"].images), sets["val"].patients, fdr=0.1, seed=0
    )
    assert test.flagged_K.sum() > 10


def test_few_copies_fail_an_audit_that_can_name_none(sets, tmp_path):
    """Eight of 128 stand out together; Benjamini-Hochberg asks for 17 at once."""
    synthetic = np.concatenate([sets["train"].images[:8], people(9, 120)])
    result = run(sets, synthetic, tmp_path, space=spaces.by_correlation(views.pixels), fdr=0.05)
    assert result["calibrated"]["n_copies"] == 0, "none can be named"
    said, power = result["bounds"], result["power"]
    assert said["n_above"] >= 8 >= said["at_least"] >= 1 and said["at_most_rate"] > 8 / 128
    assert result["verdict"] == "FAIL" and "though 0 can be named" in result["reasons"][0]
    assert power["smallest_seen_copy_rate"] < 8 / 128 < power["smallest_flaggable_copy_rate"] == 17 / 128


@pytest.mark.parametrize(
    ("space", "least"),
    [(PIXELS, 35), (REGISTERED, 30)],
    ids=["vectors", "registered"],
)
def test_release_leaves_out_copies_and_what_goes_with_them(sets, tmp_path, space, least):
    source = tmp_path / "source"
    source.mkdir()
    synthetic = np.concatenate([sets["train"].images[:10], people(9, 50)])
    for name in named(synthetic, "syn").ids:
        (source / name).write_bytes(name.encode())
    release = tmp_path / "release"
    half = spaces.by_correlation(lambda x: views.pixels(x[:, ::2, ::2]))
    result = run(sets, synthetic, tmp_path, space=space, again=half, release_to=release)
    assert result["verdict"] == "FAIL" and result["calibrated"]["n_copies"] == 10
    assert result["release"]["n_flagged"] == 10 and result["release"]["n_kept"] <= 50 and result["release"]["released"]
    assert result["release"]["verdict"] == "PASS", result["release"]
    rows = list(csv.DictReader((release / "manifest.csv").read_text().splitlines()))
    assert len(rows) == result["release"]["n_kept"] >= least
    assert {r["path"] for r in rows} | {"manifest.csv", "RELEASE.json"} == {p.name for p in release.iterdir()}
    copies = {f"syn-{i:03d}.png" for i in range(10)}
    assert not copies & {r["path"] for r in rows}
    assert all((release / r["path"]).read_bytes() == r["path"].encode() for r in rows)
    run(sets, synthetic, tmp_path, space=space, again=half, release_to=release)  # its own release is replaced
    (release / "notes.txt").write_text("a stranger's")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        run(sets, synthetic, tmp_path, space=space, again=half, release_to=release)


@pytest.mark.parametrize(
    ("few", "broken", "told"),
    [
        (
            {"control": 3},
            False,
            "membership needs at least 4 control patients, not 3: enlarge config.data.fractions.control",
        ),
        ({"train": 1}, False, "membership needs at least 4 train patients, not 1"),
        ({}, True, "the generator's losses of the train images are not finite"),
    ],
)
def test_what_cannot_be_computed_is_null_and_told(sets, tmp_path, few, broken, told):
    """After all the work that an audit is, one section that cannot be had ends nothing."""
    cut = {name: named(s.images[: few.get(name)], name) for name, s in sets.items()}
    losses = lambda x: x.reshape(len(x), -1)[:, :2] * (np.nan if broken else 1)
    result = run(cut, people(9, 20), tmp_path, drawn=True, space=PIXELS, losses=losses, levels=(0.2, 0.5))
    assert result["membership"] is None and told in result["absent"]["membership"]
    assert (result["baselines"] is None) == ("train" in few) == ("baselines" in result["absent"])
    written = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert written["absent"] == result["absent"]
    page = (tmp_path / "audit" / "report.html").read_text()
    assert all(why.split("'")[0] in page for why in result["absent"].values())


def test_embeddings_are_computed_once(sets, tmp_path):
    seen = []

    def embed(x):
        seen.append(len(x))
        return views.pixels(x)

    one = run(sets, people(3, 60), tmp_path, space=spaces.by_correlation(embed))
    first = len(seen)
    seen.clear()
    two = run(sets, people(3, 60), tmp_path, space=spaces.by_correlation(embed))
    assert one == two
    assert len(seen) < first
    stale = run(sets, people(3, 60), tmp_path, space=spaces.by_correlation(lambda x: views.pixels(x[:, ::2])))
    assert stale["histogram"] != one["histogram"], "another detector's embeddings are not taken for this one's"


def test_slow_spaces_and_baselines_say_what_they_are_of(sets, tmp_path):
    error = lambda a, b: -((a - b) ** 2).mean((1, 2, 3))
    others = {"pixels": spaces.by_correlation(views.pixels)}
    others["error"] = spaces.by_pairs(error, (SIZE, SIZE, 1), "error", flips=False)
    result = run(sets, sets["train"].images[:50], tmp_path, others=others, planted=20, slow_images=30)
    assert "30 of 60 train, 30 of 150 val, 30 of 50 synthetic" in result["spaces"]["error"]["note"]
    assert result["spaces"]["error"]["auc"] > 0.99 and "30 of" not in result["spaces"]["pixels"]["note"]
    assert result["spaces"]["pixels"]["n_flagged"] == 50 > 30 >= result["spaces"]["error"]["n_flagged"]
    assert result["baselines"]["d1_d2"]["rate"] == result["baselines"]["detector"]["d1_d2"]["rate"] == 1
    assert "latents" not in result["baselines"]


BASE = {
    "n_syn": 200,
    "n_draws": 200,
    "stated": True,
    "n_val_patients": 500,
    "calibrated": {"n_copies": 0, "copy_rate": 0.0, "copy_rate_ci": [0.0, 0.02], "n_mem_patients": 0},
    "bounds": {
        "confidence": 0.95, "p_value": 1.0, "at_least": 0, "at_least_rate": 0.0, "at_most_rate": 0.021, "contradict": False,
        "rank": 1, "n_above": 0, "n_above_expected": 0.4, "by_kind": [{"kind": "flip", "recall": 0.9}],
    },
    "power": {
        "recall": 0.95, "recall_ci": [0.9, 0.98], "at_max_copy_rate": 0.9, "min_detectable_copy_rate": 0.04,
        "probability": 0.8, "enough": {"n_syn": 200, "n_val_patients": 500},
    },
    "negative_control": {
        "n_patients": 60, "flag_rate": 0.05, "nominal": 0.05, "excess_p_value": 0.5, "smallest_excess_p_value": 1e-9,
    },
    "rendering": {"differs": False, "worst_of": "gradient", "worst_effect": 0.3},
}  # fmt: skip
RULES = {"max_copy_rate": 0.05, "max_patients": 0, "min_recall": 0.8, "min_recall_of_kind": 0.5, "min_power": 0.8}
COPIES = {
    "calibrated": {"n_copies": 40, "copy_rate": 0.2, "copy_rate_ci": [0.15, 0.26], "n_mem_patients": 12},
    "bounds": {"p_value": 1e-9, "at_least": 36, "at_least_rate": 0.18, "at_most_rate": 0.29, "n_above": 41},
}
SOME = {"bounds": {"p_value": 0.007, "at_least": 3, "at_least_rate": 0.015, "at_most_rate": 0.04, "n_above": 6}}
MANY = {"bounds": {"p_value": 1e-6, "at_least": 12, "at_least_rate": 0.06, "at_most_rate": 0.12, "n_above": 15}}
WEAK = {"power": {"recall_ci": [0.75, 0.98]}}


@pytest.mark.parametrize(
    ("change", "policy", "word", "told"),
    [
        ({}, {}, "PASS", "between 0.0 % and 2.1 %"),
        (COPIES, {}, "FAIL", "40 of 200 synthetic images are flagged"),
        (COPIES, {"max_patients": 100}, "FAIL", "allows a rate of 5.0 %"),
        (COPIES, {"max_patients": 100, "max_copy_rate": 0.5}, "PASS", "allowed are 50.0 %"),
        (SOME, {}, "FAIL", "at least 3 of 200 synthetic images are copies"),
        (SOME, {"max_patients": 1}, "PASS", "between 1.5 % and 4.0 %"),
        (MANY, {"max_patients": 1}, "FAIL", "between 6.0 % and 12.0 %"),
        (COPIES | {"power": {"recall": 0.1, "recall_ci": [0.0, 0.2]}}, {}, "FAIL", "40 of 200"),
        (WEAK, {}, "INCONCLUSIVE", "plant more copies"),
        ({"power": {"recall": 0.5, "recall_ci": [0.4, 0.6]}}, {}, "INCONCLUSIVE", "sees 50.0 % [40.0, 60.0]"),
        ({"bounds": {"by_kind": [{"kind": "crop", "recall": 0.4}]}}, {}, "INCONCLUSIVE", "crop (40.0 %)"),
        ({"power": {"at_max_copy_rate": 0.1, "min_detectable_copy_rate": None}}, {}, "INCONCLUSIVE", "impossible"),
        ({"bounds": {"at_most_rate": 0.07, "n_above": 2}}, {}, "INCONCLUSIVE", "pass four times in five"),
        (
            {"bounds": {"at_most_rate": 0.07}, "power": {"enough": {"n_syn": 317, "n_val_patients": None}}},
            {}, "INCONCLUSIVE", "about 317 synthetic images with these 500 unseen patients",
        ),
        (
            {"bounds": {"at_most_rate": 0.07}, "power": {"enough": {"n_syn": None, "n_val_patients": None}}},
            {}, "INCONCLUSIVE", "more of both",
        ),
        ({"negative_control": {"smallest_excess_p_value": 0.05}}, {}, "INCONCLUSIVE", "could not have failed"),
        ({"stated": False}, {}, "INCONCLUSIVE", "nobody stated which patients"),
        ({"stated": False} | COPIES, {}, "FAIL", "40 of 200"),
        (
            {"bounds": {"at_least": 4, "at_least_rate": 0.02, "at_most_rate": 1.0, "contradict": True}},
            {"max_patients": 1}, "INCONCLUSIVE", "at least 4 of 200 synthetic images are copies, more than the planted",
        ),
        (
            {"n_draws": 20, "bounds": {"at_most_rate": 0.3}, "power": {"enough": {"n_syn": 126, "n_val_patients": None}}},
            {}, "INCONCLUSIVE", "about 126 independent synthetic images with these 500",
        ),
        ({"rendering": {"differs": True}} | COPIES, {}, "INCONCLUSIVE", "rendered differently"),
        ({"negative_control": {"excess_p_value": 0.001}} | COPIES, {}, "INCONCLUSIVE", "negative control"),
    ],
)  # fmt: skip
def test_verdicts(change, policy, word, told):
    result = {k: {**v, **change.get(k, {})} if isinstance(v, dict) else change.get(k, v) for k, v in BASE.items()}
    got, reasons = verdict.decide(result, {**RULES, **policy})
    assert got == word and told in reasons[0]


@pytest.mark.parametrize(
    ("whole", "left", "released", "code"),
    [
        ("PASS", None, None, 0), ("FAIL", None, None, 3), ("INCONCLUSIVE", None, None, 4), ("FAIL", "PASS", True, 0),
        ("FAIL", "INCONCLUSIVE", False, 3), ("FAIL", "FAIL", False, 3), ("PASS", "INCONCLUSIVE", False, 4),
        ("FAIL", "INCONCLUSIVE", True, 4), ("INCONCLUSIVE", "FAIL", False, 3),
    ],
)  # fmt: skip
def test_exit_codes(whole, left, released, code):
    release = left and {"verdict": left, "released": released}
    assert verdict.exit_code({"verdict": whole, "release": release}) == code


def test_a_control_that_could_not_fail_is_told_beside_a_fail():
    control = BASE["negative_control"] | {"smallest_excess_p_value": 1.0}
    told = verdict.decide({**BASE, "bounds": BASE["bounds"] | MANY["bounds"], "negative_control": control}, RULES)
    assert told[0] == "FAIL" and "could not have failed" in told[1][-1]


def test_a_wrong_policy_is_refused():
    with pytest.raises(ValueError, match=r"config\.audit\.policy\.min_recall=95"):
        verdict.decide(BASE, {**RULES, "min_recall": 95})
