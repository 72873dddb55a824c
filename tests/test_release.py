"""What is released: no copy that the audit's test is too careful to name, few innocent images lost, and a bound that holds."""

import csv
import json

import numpy as np
import pytest
from scipy import stats

from detection import calibrate, controls, neighbours, outputs, release, spaces, views
from tests import test_audit
from tests.test_audit import SIZE, named, people

HALF = spaces.by_correlation(lambda x: views.pixels(x[:, ::2, ::2]))  # stands for the detector of another seed
PIXELS = spaces.by_correlation(views.pixels)


@pytest.fixture(scope="module")
def sets():
    return {
        name: named(people(i, n), name) for i, (name, n) in enumerate({"train": 60, "val": 150, "control": 60}.items())
    }


def run(sets, synthetic, folder, **other):
    """An audit with a release: (what it says, the folder)."""
    (folder / "source").mkdir(exist_ok=True)
    for name in named(synthetic, "syn").ids:
        (folder / "source" / name).write_bytes(name.encode())
    to = folder / "release"
    return test_audit.run(sets, synthetic, folder, **{"space": PIXELS, "again": HALF, "release_to": to} | other), to


# ---- the line


@pytest.mark.parametrize("patients", [5, 19, 39, 160])
@pytest.mark.parametrize("images", [1, 3])
def test_the_line_is_the_lowest_score_with_so_small_a_p_value(patients, images):
    rng = np.random.default_rng(patients)
    null = np.round(rng.normal(size=patients * images), 1).astype(np.float32)  # with ties
    who = np.repeat(np.arange(patients), images)
    line = release.line(null, who, 0.05)
    p = lambda s: calibrate.conformal_p(np.array([s], np.float32), null, who)[0]
    below = np.nextafter(np.float32(line), np.float32(-np.inf))
    if 1 / (1 + patients) <= 0.05 and line < null.max():
        assert p(line) <= 0.05 < p(below)
    else:
        assert line == null.max()
    assert (null >= np.float32(line)).any() or p(line) <= 0.05


def test_innocent_images_are_lost_at_the_level():
    rng = np.random.default_rng(0)
    lost = [
        (rng.normal(size=100) >= release.line(rng.normal(size=160), np.arange(160), 0.05)).mean() for _ in range(400)
    ]
    assert np.mean(lost) == pytest.approx(0.05, abs=0.006)


def test_no_copy_is_released_that_the_test_was_too_careful_to_name(sets, tmp_path):
    """15 exact copies of 128, 150 unseen patients: none is flagged, and none goes out."""
    synthetic = np.concatenate([sets["train"].images[:15], people(9, 113)])
    result, to = run(sets, synthetic, tmp_path, fdr=0.05, release_anyway=True)
    said = result["release"]
    assert result["calibrated"]["n_copies"] == said["n_flagged"] == 0 and said["n_over_line"] >= 15
    out = {path.name for path in to.iterdir()}
    assert not out & {f"syn-{i:03d}.png" for i in range(15)}
    assert said["n_kept"] == len(out) - 2 >= 90


@pytest.mark.parametrize("alike", [0.0, 0.8])
def test_of_an_innocent_set_little_is_lost(sets, tmp_path, alike):
    """Also of one whose images resemble each other: the cluster of an image that was removed does not swallow the set."""
    lost = []
    for seed in range(2):
        own, shared = people(50 + seed, 100), people(70 + seed, 1)
        synthetic = (alike * shared + (1 - alike) * own).astype(np.float32)
        (tmp_path / str(seed)).mkdir()
        result, _ = run(sets, synthetic, tmp_path / str(seed))
        with open(tmp_path / str(seed) / "audit" / "verdicts.csv", newline="") as lines:
            near = np.mean([float(row["p_value"]) <= 0.1 for row in csv.DictReader(lines)])
        lost.append(1 - result["release"]["n_kept"] / 100)
        assert result["calibrated"]["n_copies"] > 0 or lost[-1] <= near, "no twin that is not itself near the line"
    assert np.mean(lost) <= 0.15, lost


def test_what_is_left_out_and_why():
    """By hand: five groups of vectors on a circle; similarity is the cosine."""
    train = np.eye(6)
    near = lambda i, s: s * train[i] + np.sqrt(1 - s**2) * train[5]
    rows = np.stack(
        [near(0, 0.99), near(0, 0.6), near(1, 0.9), near(1, 0.89), near(2, 0.3), near(3, 0.5), near(4, 0.2)]
    )
    found = neighbours.Neighbours((rows @ train[:5].T).max(1)[:, None], (rows @ train[:5].T).argmax(1)[:, None])
    search = lambda q, t: neighbours.Neighbours((q @ t.T).max(1)[:, None], (q @ t.T).argmax(1)[:, None])
    p = np.array([0.01, 0.3, 0.04, 0.06, 0.7, 0.2, 0.8])
    flagged, duplicate = (np.arange(7) == i for i in (0, 6))
    draws = np.array(list("abcdbef"))
    left = release.without_copies(
        found.sim[:, 0],
        p,
        flagged,
        duplicate,
        found.index[:, 0],
        draws,
        rows,
        search,
        line=0.9,
        level=0.05,
        threshold=0.99,
    )
    # 1 points where the flagged 0 does, 3 is like 2 and points where it does, 4 is a slice of 1's file
    assert left.keep_K.tolist() == [False, False, False, False, False, True, False]
    assert left.counts == {"n_flagged": 1, "n_over_line": 1, "n_duplicates": 1, "n_removed_with_them": 3}
    assert left.over_K.tolist() == [True, False, True, False, False, False, False]


def test_a_training_image_is_known_by_its_grey_levels():
    train = people(1, 20)
    stored = np.round((train[3:5] + 1) * 127.5) / 127.5 - 1  # as a PNG has them
    other = np.concatenate([stored, people(2, 5), train[:1] + 0.02]).astype(np.float32)
    assert release.training_images(other, train, test_audit.data.in_order, 4).tolist() == [True] * 2 + [False] * 6


# ---- the bound on what is left


def test_copies_left_is_the_largest_number_that_the_binomial_allows():
    for n_over in (0, 1, 7, 40):
        for recall in (0.3, 0.8, 0.95, 0.999):
            left = release.copies_left(n_over, recall)
            assert stats.binom.cdf(n_over, n_over + left, recall) >= release.RISK
            assert stats.binom.cdf(n_over, n_over + left + 1, recall) < release.RISK
    assert release.copies_left(3, 0.0) is None


@pytest.fixture(scope="module")
def lower_limits():
    """Lower end of the recall's interval by how many of 64 planted copies are caught."""
    plant = lambda n: controls.Planted("identity", 0.0, True, (np.arange(64) < n).astype(float), np.zeros(64, int))
    return [
        controls.overall([plant(n)], 0.5, np.zeros(64, int), np.zeros(64, int), 0)["recall_ci"][0] for n in range(65)
    ]


@pytest.mark.parametrize("copies", [0, 1, 5, 30, 200])
@pytest.mark.parametrize("recall", [0.3, 0.8, 0.95, 0.99])
def test_the_bound_covers_the_copies_left(copies, recall, lower_limits):
    """With the recall estimated from 64 planted patients and innocent images over the line: at least 95 % of the time."""
    rng, times = np.random.default_rng(copies), 1000
    covered, tight = 0, []
    for _ in range(times):
        caught = rng.binomial(copies, recall)
        low = lower_limits[rng.binomial(64, recall)]
        left = release.copies_left(caught + rng.binomial(100, 0.05), low)
        covered += left >= copies - caught
        tight.append(left)
    assert stats.binom.cdf(covered, times, 0.95) > 1e-3, covered / times
    # and it says something: not many more than the mean of what is left, at the lower end of the recall's interval
    worst = calibrate.clopper_pearson(round(64 * recall), 64)[0] - 0.08
    assert np.mean(tight) <= 3 + 2 * (copies + 5) * (1 - worst) / worst


def test_a_second_look_is_credited_only_with_what_the_filter_missed():
    first = [controls.Planted("a", 1.0, True, np.array([0.9, 0.2, 0.3, 0.9] * 5), None)] * 2
    second = [controls.Planted("a", 1.0, True, np.array([0.9, 0.9, 0.1, 0.1] * 5), None)] * 2
    idle = controls.Planted("b", 2.0, False, np.zeros(20), None)
    said = release.seen_of_missed([*first, idle], 0.5, [*second, idle], 0.5, np.arange(20), 0)
    assert said["n_missed"] == 20 and said["recall"] == 0.5 and said["recall_ci"][0] < 0.5 < said["recall_ci"][1]
    few = release.seen_of_missed(first, 0.25, second, 0.5, np.arange(20), 0)
    assert few["n_missed"] == 10 and few["recall"] == 1.0
    none = release.seen_of_missed(first, 0.1, second, 0.5, np.arange(20), 0)
    assert none == {"n_missed": 0, "recall": None, "recall_ci": None}


CONTROL = {"n_patients": 60, "flag_rate": 0.05, "nominal": 0.05, "excess_p_value": 0.5, "smallest_excess_p_value": 1e-9}
MAIN = {
    "n_syn": 200,
    "stated": True,
    "bounds": {"at_least": 12, "contradict": False},
    "rendering": {"differs": False, "worst_of": "gradient", "worst_effect": 1.3},
    "negative_control": CONTROL,
}
KINDS = [{"kind": "flip", "recall": 0.9}]
GOOD = {"recall": 0.98, "recall_ci": [0.95, 0.99]}
LOOKS = [{"space": "one", "verdict": "INCONCLUSIVE", "reasons": ["blind"]}]
POLICY = {"max_copy_rate": 0.05, "max_patients": 0, "min_recall": 0.8, "min_recall_of_kind": 0.5, "min_power": 0.8}


@pytest.mark.parametrize(
    ("main", "recall", "n_over", "kept", "again", "word", "told"),
    [
        ({}, GOOD, 10, 200, LOOKS, "PASS", "at most 2 (1.0 %) of the 200 images left"),
        (
            {},
            GOOD,
            10,
            200,
            [*LOOKS, {"space": "two", "verdict": "FAIL", "reasons": ["3 copies"]}],
            "FAIL",
            "two: 3 copies",
        ),
        ({"rendering": {"differs": True}}, GOOD, 10, 200, LOOKS, "INCONCLUSIVE", "rendered differently"),
        ({"negative_control": {"excess_p_value": 0.001}}, GOOD, 10, 200, LOOKS, "INCONCLUSIVE", "negative control"),
        (
            {"negative_control": {"smallest_excess_p_value": 1.0}},
            GOOD,
            10,
            200,
            LOOKS,
            "INCONCLUSIVE",
            "not have failed",
        ),
        ({"stated": False}, GOOD, 10, 200, LOOKS, "INCONCLUSIVE", "nobody stated"),
        ({"bounds": {"contradict": True}}, GOOD, 10, 200, LOOKS, "INCONCLUSIVE", "less similar to their originals"),
        ({}, {"recall": 0.6, "recall_ci": [0.5, 0.7]}, 0, 200, LOOKS, "INCONCLUSIVE", "filter sees 60.0 %"),
        ({}, {"recall": 0.85, "recall_ci": [0.7, 0.9]}, 0, 200, LOOKS, "INCONCLUSIVE", "plant more copies"),
        ({"kinds": [*KINDS, {"kind": "crop", "recall": 0.2}]}, GOOD, 10, 200, LOOKS, "INCONCLUSIVE", "crop (20.0 %)"),
        ({}, GOOD, 100, 20, LOOKS, "INCONCLUSIVE", "of the 20 images left may be copies"),
        ({}, {"recall": 0.9, "recall_ci": [0.0, 1.0]}, 0, 20, LOOKS, "INCONCLUSIVE", "plant more copies"),
        ({}, GOOD, 128, 0, [], "INCONCLUSIVE", "nothing to release"),
    ],
)
def test_verdicts_on_what_is_left(main, recall, n_over, kept, again, word, told):
    kinds = main.pop("kinds", KINDS) if "kinds" in main else KINDS
    result = {
        key: {**of, **main.get(key, {})} if isinstance(of, dict) else main.get(key, of) for key, of in MAIN.items()
    }
    got, reasons, bound = release.decide(result, recall, kinds, n_over, kept, again, POLICY)
    assert got == word and told in reasons[0]
    assert (bound["copy_rate_at_most"] is None) == (not kept or not recall["recall_ci"][0])


def test_broken_instruments_release_nothing(sets, tmp_path):
    """Samples rendered unlike anything the filters can match: the main audit is INCONCLUSIVE, and so is what is left."""
    rough = (people(9, 60) + np.random.default_rng(0).normal(0, 0.4, (60, SIZE, SIZE, 1))).clip(-1, 1)
    result, to = run(sets, rough.astype(np.float32), tmp_path, render=lambda x: x)
    assert result["rendering"]["differs"] and result["verdict"] == "INCONCLUSIVE"
    assert result["release"]["verdict"] == "INCONCLUSIVE" and not to.exists()


# ---- the folder


def test_a_name_may_hold_any_sign(sets, tmp_path):
    """'#', say, which parts slices from files in the ids of images."""
    ids = np.array([f"sub/img#{i:04d}.png" for i in range(3)])
    (tmp_path / "sub").mkdir()
    for name in ids:
        (tmp_path / name).write_bytes(name.encode())
    release.write(tmp_path / "to", tmp_path, ids[[0, 2, 2]], {"verdict": "PASS"})
    assert {path.name for path in (tmp_path / "to" / "sub").iterdir()} == {"img#0000.png", "img#0002.png"}
    assert len((tmp_path / "to" / "manifest.csv").read_text().splitlines()) == 3


def test_nothing_is_written_unless_it_passes_or_is_told_to(sets, tmp_path):
    synthetic = np.concatenate([sets["train"].images[:10], people(9, 50)])
    result, to = run(sets, synthetic, tmp_path, policy={**test_audit.POLICY, "max_copy_rate": 0.0})
    assert result["release"]["verdict"] == "INCONCLUSIVE" and result["release"]["released"] is False
    assert {path.name for path in tmp_path.iterdir()} == {"source", "audit"}, "not even aside"
    told = outputs.release_lines(result["release"])[0]
    assert told.startswith("release: nothing was released") and result["release"]["reasons"][0] in told
    result, to = run(sets, synthetic, tmp_path, policy={**test_audit.POLICY, "max_copy_rate": 0.0}, release_anyway=True)
    assert result["release"]["verdict"] == "INCONCLUSIVE" and result["release"]["released"] is True
    said = json.loads((to / "RELEASE.json").read_text())
    assert said["verdict"] == "INCONCLUSIVE" and said["reasons"] == result["release"]["reasons"]
    rows = list(csv.DictReader((to / "manifest.csv").read_text().splitlines()))
    assert rows[0].keys() == {"path", "sha256"} and len(rows) == result["release"]["n_kept"]
    assert not {"similarity", "p_value"} & said.keys()


@pytest.mark.parametrize("level", [0.0, 1.0, -0.1])
def test_a_wrong_level_is_refused(sets, tmp_path, level):
    with pytest.raises(ValueError, match=r"config\.audit\.release_level="):
        run(sets, people(9, 20), tmp_path, release_level=level)
