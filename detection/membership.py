"""Membership: does the generator denoise its training patients better than patients it never saw?

From losses of single images at several noise levels, computed by whoever has the generator. A member is told by a low
loss. Patients are the unit: each counts once, its images sharing that, and intervals are over patients of both sets,
the generator taken as it is.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import scipy

from detection import calibrate, roc

PERMUTATIONS = 999
FEWEST = 4  # patients of a set: half of them choose the level, and a variance needs two


class Losses(NamedTuple):
    """Denoising losses of one set: `loss` (n, L), image by noise level, averaged over noise draws; `patients` (n,)."""

    loss: np.ndarray
    patients: np.ndarray


def membership(train: Losses, val: Losses, control: Losses | None, levels: np.ndarray, *, seed: int) -> dict[str, Any]:
    """The denoising-loss gap by noise level, and how well it tells members, as `audit.json` holds it.

    Losses of all sets must come from images treated alike (no augmentation) and equally many noise draws. A level chosen for its ROC area on the same patients on which that
    area is then reported would flatter: so the patients of both sets are halved at random, one half chooses, the other
    is reported (`best`).

    Args:
      levels: (L,) noise levels, as t / T.
      control: unseen patients that are not in `val` either; None where there are none.
    Returns:
      levels, train_loss, val_loss: mean over patients. gap, gap_ci: validation minus training, by level, with a 95 %
      interval over patients (Welch). auc, auc_ci: ROC area by level (`roc.area`); each interval is for its level alone.
      p_value: that any level tells members, by permuting patients between the sets and taking the largest area of all
      levels each time; this is the test, whatever the number of levels. best: {level, auc, recall_at_fpr_01, ..05,
      each with its `_ci`; fpr_01_ci, fpr_05_ci: what the false-positive rate at the two thresholds may truly be;
      n_train_patients, n_val_patients: in the reported half}. control: {auc, auc_ci, p_value} of control against val,
      which should tell nothing: areas around 0.5 and no small p-value; None without. n_train, n_val and patients.
    Raises:
      ValueError: losses that are not finite or do not fit the levels, or a set with fewer than four patients.
    """
    levels = np.asarray(levels, float)
    sets = {"train": train, "val": val} | ({"control": control} if control else {})
    for name, (loss, patients) in sets.items():
        if loss.shape != (len(patients), len(levels)) or not np.isfinite(loss).all():
            raise ValueError(
                f"membership: the {name} losses must be finite, one per image and level, ({len(patients)}, {len(levels)}); "
                f"they are {loss.shape}, {(~np.isfinite(loss)).sum()} not finite"
            )
    if refused := too_few({name: patients for name, (_, patients) in sets.items()}):
        raise ValueError(refused)
    rng = np.random.default_rng(seed)
    means = {name: roc.by_patient(set.loss, set.patients) for name, set in sets.items()}
    gap, half = _welch(means["val"], means["train"])
    areas = [roc.area(*_scores(train, i), *_scores(val, i)) for i in range(len(levels))]
    halves = {name: _halved(sets[name], rng) for name in ("train", "val")}
    chosen = int(
        np.argmax(
            [roc.area(*_scores(halves["train"][0], i), *_scores(halves["val"][0], i))[0] for i in range(len(levels))]
        )
    )
    kept_train, kept_val = halves["train"][1], halves["val"][1]
    best = roc.summary(*_scores(kept_train, chosen), *_scores(kept_val, chosen), seed=seed)
    return {
        "levels": levels.tolist(),
        "train_loss": means["train"].mean(0).tolist(),
        "val_loss": means["val"].mean(0).tolist(),
        "gap": gap.tolist(),
        "gap_ci": np.stack([gap - half, gap + half], 1).tolist(),
        "auc": [area for area, _ in areas],
        "auc_ci": [list(ci) for _, ci in areas],
        "p_value": any_level_p(train, val, rng),
        "best": {
            "level": float(levels[chosen]),
            **best,
            "n_train_patients": len(np.unique(kept_train.patients)),
            "n_val_patients": len(np.unique(kept_val.patients)),
        },
        "control": _control(control, val, len(levels), rng) if control else None,
        **{f"n_{name}": len(set.patients) for name, set in sets.items()},
        **{f"n_{name}_patients": len(np.unique(set.patients)) for name, set in sets.items()},
    }


def too_few(patients: Mapping[str, np.ndarray]) -> str | None:
    """Why sets of these patients are too small to measure membership; None where they are not."""
    for name, of in patients.items():
        if (count := len(np.unique(of))) < FEWEST:
            return (
                f"membership needs at least {FEWEST} {name} patients, not {count}: enlarge config.data.fractions.{name}"
            )
    return None


def any_level_p(one: Losses, other: Losses, rng: np.random.Generator) -> float:
    """Chance of as large a ROC area at any level if patients of both sets are alike: a permutation test of patients.

    The statistic is the largest area over the levels, so it accounts for there being several. Exact where patients with
    as many images are exchangeable between the sets.
    """
    loss = np.concatenate([one.loss, other.loss])
    _, a = np.unique(one.patients, return_inverse=True)
    _, b = np.unique(other.patients, return_inverse=True)
    patient, n_one = np.concatenate([a, b + a.max() + 1]), a.max() + 1
    n = patient.max() + 1
    weight = calibrate.patient_weights(patient)
    order_L = [np.argsort(loss[:, i], kind="stable") for i in range(loss.shape[1])]
    tied_L = [np.unique(loss[order, i], return_inverse=True)[1] for i, order in enumerate(order_L)]

    def largest(member_P):
        areas = []
        for order, tied in zip(order_L, tied_L, strict=True):
            member, w = member_P[patient[order]], weight[order]
            ours, theirs = (np.bincount(tied, weights=w * side) for side in (member, ~member))
            above = theirs.sum() - np.cumsum(theirs) + theirs / 2  # weight of the others with a higher loss
            areas.append((ours * above).sum() / (ours.sum() * theirs.sum()))
        return max(areas)

    member_P = np.arange(n) < n_one
    seen = largest(member_P)
    reached = sum(largest(rng.permutation(member_P)) >= seen - 1e-12 for _ in range(PERMUTATIONS))
    return float((1 + reached) / (1 + PERMUTATIONS))


def _control(control: Losses, val: Losses, n_levels: int, rng: np.random.Generator) -> dict[str, Any]:
    areas = [roc.area(*_scores(control, i), *_scores(val, i)) for i in range(n_levels)]
    said = {"auc": [area for area, _ in areas], "auc_ci": [list(ci) for _, ci in areas]}
    return said | {"p_value": any_level_p(control, val, rng)}


def _scores(set: Losses, level: int) -> tuple[np.ndarray, np.ndarray]:
    """(score that is high for members, patients)."""
    return -set.loss[:, level], set.patients


def _halved(set: Losses, rng: np.random.Generator) -> tuple[Losses, Losses]:
    names = np.unique(set.patients)
    first = np.isin(set.patients, rng.permutation(names)[: len(names) // 2])
    return tuple(Losses(set.loss[part], set.patients[part]) for part in (first, ~first))


def _welch(one_PxL: np.ndarray, other_QxL: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """(difference of means, half the width of its interval), by column; Welch's t with unequal variances."""
    a, b = (x.var(0, ddof=1) / len(x) for x in (one_PxL, other_QxL))
    freedom = (a + b) ** 2 / np.maximum(a**2 / (len(one_PxL) - 1) + b**2 / (len(other_QxL) - 1), 1e-300)
    reach = scipy.stats.t.ppf((1 + level) / 2, np.maximum(freedom, 1))
    return one_PxL.mean(0) - other_QxL.mean(0), reach * np.sqrt(a + b)
