"""The positive control: known copies of training images, planted; what share of them would the audit have flagged?"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from detection import calibrate, neighbours

# kinds that are reported and do not count: what the generator makes of noise may be another image, and rightly not found;
# a part copied into another image is not what a score of whole images looks for
NOT_COUNTED = ("re-noise", "local")
# (kind, strength) -> jitted `copy(key, x) -> x`, in the order of the report; the first strength of a kind is standard
Plants = Mapping[tuple[str, float], Callable[[jax.Array, jax.Array], jax.Array]]


class Planted(NamedTuple):
    """Copies of one kind and strength, one training patient each: their scores, and where they point."""

    kind: str
    strength: float
    standard: bool  # the first strength of its kind, which counts in the overall recall; see NOT_COUNTED
    sim_Q: np.ndarray
    nearest_Q: np.ndarray  # index of the nearest training image


def choose(patients_N: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Indices of at most `count` images to copy: patients at random, one image of each at random, ascending."""
    rng = np.random.default_rng(seed)
    return np.sort(rng.permutation(one_each(patients_N, rng))[:count])


def one_each(patients_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Indices of one image at random of each patient, in the order of their names."""
    order = rng.permutation(len(patients_N))
    return order[np.unique(patients_N[order], return_index=True)[1]]


def standard(plants: Plants) -> Plants:
    """The first strength of each kind that counts."""
    first: dict[str, tuple[str, float]] = {}
    for kind, strength in plants:
        if kind not in NOT_COUNTED:
            first.setdefault(kind, (kind, strength))
    return {place: plants[place] for place in first.values()}


def planted(plants: Plants, found: neighbours.Neighbours) -> list[Planted]:
    """What was found of the copies of all kinds, in the order of the report, as many of each (`embeddings.of_copies`)."""
    counted = standard(plants)
    sim_PxQ, nearest_PxQ = (x[:, 0].reshape(len(plants), -1) for x in found)
    return [Planted(*kind, kind in counted, *of) for kind, *of in zip(plants, sim_PxQ, nearest_PxQ, strict=True)]


def recalls(
    planted: list[Planted], threshold: float, patients_N: np.ndarray, chosen_Q: np.ndarray
) -> list[dict[str, Any]]:
    """Share of the copies of each kind and strength that are `seen`, with its exact interval over patients.

    `right_patient`: share whose nearest training image is of the patient they were made from, at or above the threshold or
    not.
    """
    rows = []
    for p in planted:
        seen_Q = seen(p, threshold, patients_N, chosen_Q)
        rows.append(
            {
                "kind": p.kind,
                "strength": p.strength,
                "standard": p.standard,
                "n": len(seen_Q),
                "recall": float(seen_Q.mean()),
                "recall_ci": list(calibrate.clopper_pearson(seen_Q.sum(), len(seen_Q))),
                "right_patient": float((patients_N[p.nearest_Q] == patients_N[chosen_Q]).mean()),
            }
        )
    return rows


def by_kind(
    planted: list[Planted], threshold: float, patients_N: np.ndarray, chosen_Q: np.ndarray
) -> list[dict[str, Any]]:
    """`recalls` of the copies that count, a row for each kind."""
    return recalls([p for p in planted if p.standard], threshold, patients_N, chosen_Q)


def seen(planted: Planted, threshold: float, patients_N: np.ndarray, chosen_Q: np.ndarray) -> np.ndarray:
    """Which copies lie at or above `threshold` and point at the patient they were made from: (Q,)."""
    return (planted.sim_Q >= threshold) & (patients_N[planted.nearest_Q] == patients_N[chosen_Q])


def overall(
    planted: list[Planted], threshold: float, patients_N: np.ndarray, chosen_Q: np.ndarray, seed: int
) -> dict[str, Any]:
    """Recall (`seen`) averaged over the standard strength of every kind, each kind counting alike.

    Returns:
      recall, n (patients copied), recall_ci: the hull of a bootstrap over patients, all kinds of a patient together, and
      of Clopper-Pearson for as many patients, which keeps an interval where all or none are seen.
    """
    seen_QxP = np.stack([seen(p, threshold, patients_N, chosen_Q) for p in planted if p.standard], axis=1)
    by_patient = seen_QxP.mean(1)
    n, rng = len(by_patient), np.random.default_rng(seed)
    draws = by_patient[rng.integers(0, n, (calibrate.DRAWS, n))].mean(1)
    exact = calibrate.beta_interval(float(by_patient.mean()), n)
    low, high = np.quantile(draws, [0.025, 0.975])
    return {
        "n": n,
        "recall": float(by_patient.mean()),
        "recall_ci": [min(float(low), exact[0]), max(float(high), exact[1])],
    }
