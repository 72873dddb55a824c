"""The audit as a whole, on made-up patients and plain pixel correlation: known copies, known innocents, known traps."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import ndimage

import data
from data import augment
from detection import audit, spaces, verdict, views

SIZE = 32
POLICY = {"max_copy_rate": 0.3, "max_patients": 0, "min_recall": 0.8, "min_power": 0.8}
PLANTS = {("identity", 0.0): lambda key, x: x, ("noise", 0.1): lambda key, x: augment.noise(key, x, 0.1)}


def people(seed, n):
    """n images of n patients: random fields with the spectrum of natural images, in [-1, 1]."""
    rng = np.random.default_rng(seed)
    f = np.hypot(*np.meshgrid(np.fft.fftfreq(SIZE), np.fft.fftfreq(SIZE)))
    f[0, 0] = np.inf
    fields = np.fft.ifft2(np.fft.fft2(rng.normal(size=(n, SIZE, SIZE))) / f).real
    return (fields / (3.5 * fields.std())).clip(-1, 1).astype(np.float32)[..., None]


def named(images, name):
    ids = np.array([f"{name}-{i:03d}.png" for i in range(len(images))])
    return SimpleNamespace(images=images, ids=ids, patients=ids)


@pytest.fixture(scope="module")
def sets():
    return {
        name: named(people(i, n), name) for i, (name, n) in enumerate({"train": 60, "val": 150, "control": 60}.items())
    }


def run(sets, synthetic, folder, **other):
    settings = dict(
        render=None, plants=PLANTS, again=None, others={}, losses=None, levels=(), described={}, redact=False, source=folder / "source", in_order=data.in_order, folder=folder / "audit",
        caveats=[], policy=POLICY, release_to=None, release_level=0.05, release_anyway=False, quality=None, fdr=0.1, percentile=95.0, pairs=4, planted=40, batch=32, seed=0,
    )  # fmt: skip
    space = other.pop("space", spaces.registered(views.pixels, (SIZE, SIZE, 1), candidates=8))
    return audit(space, sets, named(synthetic, "syn"), **settings | other)


def test_training_images_are_all_copies(sets, tmp_path):
    result = run(sets, sets["train"].images, tmp_path)
    assert result["calibrated"]["copy_rate"] == 1 and result["calibrated"]["n_mem_patients"] == 60
    assert result["paper"]["n_copies"] == result["paper"]["n_mem"] == 60
    assert result["verdict"] == "FAIL"
    assert json.loads((tmp_path / "audit" / "audit.json").read_text())["verdict"] == "FAIL"


@pytest.mark.parametrize("seed", range(3))
def test_unseen_patients_are_no_copies(sets, tmp_path, seed):
    result = run(sets, people(100 + seed, 60), tmp_path)
    assert result["calibrated"]["n_copies"] == 0
    assert result["verdict"] == "PASS", result["reasons"]
    assert all(row["recall"] == 1 for row in result["positive_control"] if row["kind"] == "identity")


BLUR = lambda x: np.stack([ndimage.gaussian_filter(i, (1.2, 1.2, 0)) for i in x])
RENDERINGS = {
    "smoother": BLUR,
    "noisier": lambda x: x + np.random.default_rng(5).normal(0, 0.15, x.shape).astype(np.float32),
    "sharper": lambda x: x + 1.5 * (x - BLUR(x)),
    "windowed": lambda x: 1.6 * x + 0.2,
}


@pytest.mark.parametrize("kind", RENDERINGS)
def test_a_rendering_is_not_memorization_and_does_not_hide_it(sets, tmp_path, kind):
    """Unseen patients, rendered otherwise than real images, are not accused; training patients so rendered are caught."""
    drawn = lambda x: RENDERINGS[kind](x).clip(-1, 1).astype(np.float32)
    innocent = run(sets, drawn(people(7, 60)), tmp_path / "innocent")
    assert innocent["calibrated"]["n_copies"] <= 2
    assert innocent["verdict"] != "FAIL" or innocent["calibrated"]["n_copies"] > 0
    guilty = run(sets, drawn(sets["train"].images[:30].copy()), tmp_path / "guilty")
    assert guilty["calibrated"]["copy_rate"] > 0.9


def test_the_trap_is_one(sets):
    """Held against raw unseen patients, smoothed innocents would be accused: the test above can fail."""
    from detection import calibrate, neighbours

    scores = lambda x: neighbours.nearest(neighbours.standardise(views.pixels(x)), neighbours.standardise(views.pixels(sets["train"].images))).sim[:, 0]  # fmt: skip
    test = calibrate.calibrated_test(
        scores(BLUR(people(7, 60))), scores(sets["val"].images), sets["val"].patients, fdr=0.1, seed=0
    )
    assert test.flagged_K.sum() > 10


@pytest.mark.parametrize(
    ("space", "least"),
    [(spaces.by_correlation(views.pixels), 35), (spaces.registered(views.pixels, (SIZE, SIZE, 1), candidates=8), 30)],
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
    result = run(cut, people(9, 20), tmp_path, losses=losses, levels=(0.2, 0.5))
    assert result["membership"] is None and told in result["absent"]["membership"]
    assert (result["baselines"] is None) == ("train" in few) == ("baselines" in result["absent"])
    written = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert written["absent"] == result["absent"]
    page = (tmp_path / "audit" / "report.html").read_text()
    assert all(why.split("'")[0] in page for why in result["absent"].values())


def test_the_score_that_copies_would_need_is_given_where_none_is_flagged(sets, tmp_path):
    none = run(sets, people(100, 60), tmp_path)["calibrated"]
    assert none["threshold"] is None and none["needed_score"] > 0
    some = run(sets, sets["train"].images, tmp_path)["calibrated"]
    assert some["needed_score"] is None and some["threshold"] > 0


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


BASE = {
    "n_syn": 200,
    "n_val_patients": 500,
    "calibrated": {"n_copies": 0, "copy_rate": 0.0, "copy_rate_ci": [0.0, 0.02], "n_mem_patients": 0},
    "power": {"recall": 0.95, "recall_ci": [0.9, 0.98], "at_max_copy_rate": 0.9, "min_detectable_copy_rate": 0.04},
    "negative_control": {"flag_rate": 0.05, "nominal": 0.05, "excess_p_value": 0.5},
    "rendering": {"differs": False, "worst_gap_db": 0.3},
}
RULES = {"max_copy_rate": 0.05, "max_patients": 0, "min_recall": 0.8, "min_power": 0.8}
COPIES = {"n_copies": 40, "copy_rate": 0.2, "copy_rate_ci": [0.15, 0.26], "n_mem_patients": 12}


@pytest.mark.parametrize(
    ("change", "policy", "word", "told"),
    [
        ({}, {}, "PASS", "upper bound 2.0 %"),
        ({"calibrated": COPIES}, {}, "FAIL", "40 of 200 synthetic images are flagged"),
        ({"calibrated": COPIES}, {"max_patients": 100}, "FAIL", "allows a rate of 5.0 %"),
        ({"calibrated": COPIES}, {"max_patients": 100, "max_copy_rate": 0.5}, "PASS", "allowed 50.0 %"),
        ({"power": {"recall": 0.5}}, {}, "INCONCLUSIVE", "sees 50.0 %"),
        ({"power": {"at_max_copy_rate": 0.1, "min_detectable_copy_rate": None}}, {}, "INCONCLUSIVE", "impossible"),
        ({"calibrated": {"copy_rate_ci": [0.0, 0.07]}}, {}, "INCONCLUSIVE", "upper bound is 7.0 %"),
        ({"rendering": {"differs": True}, "calibrated": COPIES}, {}, "INCONCLUSIVE", "rendered differently"),
        ({"negative_control": {"excess_p_value": 0.001}, "calibrated": COPIES}, {}, "INCONCLUSIVE", "negative control"),
        ({"calibrated": COPIES, "power": {"recall": 0.1}}, {}, "FAIL", "40 of 200"),
    ],
)
def test_verdicts(change, policy, word, told):
    result = {k: {**v, **change.get(k, {})} if isinstance(v, dict) else v for k, v in BASE.items()}
    got, reasons = verdict.decide(result, {**RULES, **policy})
    assert got == word and told in reasons[0]


def test_a_wrong_policy_is_refused():
    with pytest.raises(ValueError, match=r"config\.audit\.policy\.min_recall=95"):
        verdict.decide(BASE, {**RULES, "min_recall": 95})
