"""Membership from losses: references by brute force, the null by patient, and no flattery by choosing a level."""

import json

import numpy as np
import pytest
from scipy import stats

from detection import membership, roc

LEVELS = np.linspace(0.1, 0.9, 6)


def losses(rng, patients, gap=0.0, images=3):
    """Images of a patient alike; `gap` lowers the loss at the third level."""
    count = rng.integers(1, images + 1, patients)
    who = np.repeat(np.arange(patients), count)
    loss = rng.normal(size=(patients, 6))[who] + 0.5 * rng.normal(size=(len(who), 6)) + 10
    loss[:, 2] -= gap
    return membership.Losses(loss, who)


def test_what_is_said_of_members_that_are_told():
    rng = np.random.default_rng(0)
    train, val, control = losses(rng, 150, 2.0), losses(rng, 120), losses(rng, 100)
    said = membership.membership(train, val, control, LEVELS, seed=0)
    assert said["best"]["level"] == LEVELS[2] and said["p_value"] == 1 / 1000
    low, high = said["best"]["auc_ci"]
    assert low < stats.norm.cdf(2 / np.sqrt(2.5)) < high and said["auc_ci"][2][0] > 0.8
    assert said["gap"][2] == pytest.approx(2, abs=0.6) and said["gap_ci"][2][0] > 1.5
    assert said["best"]["recall_at_fpr_05"] > 0.3 and said["control"]["p_value"] > 0.01
    assert said["train_loss"][2] == pytest.approx(8, abs=0.3)
    assert (said["n_train"], said["n_train_patients"]) == (len(train.patients), 150)
    assert (said["best"]["n_train_patients"], said["best"]["n_val_patients"]) == (75, 60)
    json.dumps(said, allow_nan=False)


def test_auc_of_a_level_is_that_of_minus_the_loss():
    rng = np.random.default_rng(1)
    train, val = losses(rng, 20), losses(rng, 25)
    said = membership.membership(train, val, None, LEVELS, seed=0)
    for i in range(6):
        expected, ci = roc.area(-train.loss[:, i], train.patients, -val.loss[:, i], val.patients)
        assert said["auc"][i] == expected and said["auc_ci"][i] == list(ci)
    assert said["control"] is None


def test_with_one_image_a_patient_the_gap_is_welchs():
    rng = np.random.default_rng(2)
    train, val = losses(rng, 30, 0.5, images=1), losses(rng, 40, images=1)
    said = membership.membership(train, val, None, LEVELS, seed=0)
    for i in range(6):
        reference = stats.ttest_ind(val.loss[:, i], train.loss[:, i], equal_var=False).confidence_interval(0.95)
        np.testing.assert_allclose(said["gap_ci"][i], reference)


def test_permutation_statistic_is_the_largest_area(monkeypatch):
    """With ties and several images a patient; one permutation by hand."""
    rng = np.random.default_rng(3)
    train, val = (membership.Losses(np.round(x.loss), x.patients) for x in (losses(rng, 9, 1.0), losses(rng, 7)))
    monkeypatch.setattr(membership, "PERMUTATIONS", 400)
    p = membership.any_level_p(train, val, np.random.default_rng(0))
    loss, patients = np.concatenate([train.loss, val.loss]), np.concatenate([train.patients, val.patients + 9])

    def largest(members):
        inside = np.isin(patients, members)
        sides = (inside, ~inside)
        return max(roc.area(*[x for s in sides for x in (-loss[s, i], patients[s])])[0] for i in range(6))

    draw = np.random.default_rng(1)
    reached = sum(largest(draw.permutation(16)[:9]) >= largest(np.arange(9)) - 1e-12 for _ in range(400))
    assert p == pytest.approx((1 + reached) / 401, abs=4 * np.sqrt(0.25 / 400))
    assert p < 0.5


@pytest.mark.slow
def test_unseen_patients_are_told_at_the_nominal_rate_and_choosing_a_level_does_not_flatter(monkeypatch):
    """200 generators that memorize nothing: the p-value, the reported half, and what choosing on all would have said."""
    monkeypatch.setattr(membership, "PERMUTATIONS", 99)
    monkeypatch.setattr(membership.roc, "summary", lambda *a, seed: dict(zip(("auc", "ci"), roc.area(*a), strict=True)))
    small, covered, honest, flattered = 0, 0, [], []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        said = membership.membership(losses(rng, 40), losses(rng, 30), None, LEVELS, seed=seed)
        small += said["p_value"] <= 0.05
        covered += said["best"]["ci"][0] <= 0.5 <= said["best"]["ci"][1]
        honest.append(said["best"]["auc"])
        flattered.append(max(said["auc"]))
    assert stats.binom.sf(small - 1, 200, 0.05) > 1e-3 and small > 0
    assert stats.binom.cdf(covered, 200, 0.95) > 1e-3
    assert np.mean(honest) == pytest.approx(0.5, abs=4 * np.std(honest) / 200**0.5) and np.mean(flattered) > 0.55


def test_broken_losses_are_told_in_one_line():
    rng = np.random.default_rng(4)
    train, val = losses(rng, 10), losses(rng, 10)
    with pytest.raises(ValueError, match=r"train losses must be finite.*1 not finite"):
        train.loss[3, 2] = np.nan
        membership.membership(train, val, None, LEVELS, seed=0)
    with pytest.raises(ValueError, match="val losses"):
        membership.membership(val, val._replace(loss=val.loss[:, :2]), None, LEVELS, seed=0)
    with pytest.raises(ValueError, match=r"4 train patients, not 3: enlarge config\.data\.fractions\.train"):
        membership.membership(losses(rng, 3), val, None, LEVELS, seed=0)
