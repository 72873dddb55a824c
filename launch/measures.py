"""What a study measures of each run, from what its audit left: numbers with intervals, and whether it could see copies."""

import csv
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy

from launch import studies

DOUBT = 0.01  # below it a negative control is too high, as docs/audit.md has it
PLANTED_FROM = 400_000  # number of the first copy that the embedded cohort plants, as in data/cohort.py


class Measure(NamedTuple):
    """A number of a run with its 95 % interval, (value, low, high) = of(audit.json, quality.json, folder of the run); NaN
    where it was not measured.

    `noun` is what a sentence calls it; `percent`: it is shown in per cent; `bounds`: ends of its scale.
    """

    label: str
    noun: str
    of: Callable[[dict, dict, Path], tuple[float, float, float]]
    percent: bool = True
    bounds: tuple[float, float] = (0.0, 1.0)


def _memorized(audit: dict, quality: dict, folder: Path) -> tuple[float, float, float]:
    n = audit["n_train_patients"]
    value, low, high = _patients(audit, quality, folder)
    return value / n, low / n, min(1.0, high / n)


def _patients(audit: dict, quality: dict, folder: Path) -> tuple[float, float, float]:
    found = audit["calibrated"]
    return found["n_mem_patients"], *found["n_mem_patients_ci"]


def _rate(section: str, name: str) -> Callable[[dict, dict, Path], tuple[float, float, float]]:
    return lambda audit, quality, folder: (audit[section][name], *audit[section][f"{name}_ci"])


def _quality(name: str) -> Callable[[dict, dict, Path], tuple[float, float, float]]:
    def of(audit: dict, quality: dict, folder: Path) -> tuple[float, float, float]:
        if "spaces" not in quality:
            return math.nan, math.nan, math.nan
        found = quality["spaces"]["detector"]["synthetic"][name]
        return found["value"], *found["ci"]

    return of


def _duplicated(audit: dict, quality: dict, folder: Path) -> tuple[float, float, float]:
    """Share of the duplicated people whom copies point at, less that of the others; interval by Newcombe 1998, method 10,
    of exact intervals over people."""
    cohort = json.loads((folder / "config.json").read_text())["data"]["cohort"]
    with (folder / "audit" / "verdicts.csv").open() as file:
        patients = [row["nearest_patient"] for row in csv.DictReader(file) if row["flagged"] == "1"]
    people, several = cohort["subjects"]["train"], duplicated(cohort["subjects"]["train"])
    found = {person(patient, several, cohort["copies"]) for patient in patients}
    (a, a_low, a_high), (b, b_low, b_high) = (
        share(len(found & group), len(group)) for group in (set(several), set(range(people)) - set(several))
    )
    return a - b, a - b - np.hypot(a - a_low, b_high - b), a - b + np.hypot(a_high - a, b - b_low)


def duplicated(people: int) -> list[int]:
    """Whom the embedded cohort plants copies of, in its order (data/cohort.py: `records`); at one copy, whom it would."""
    return [int(number) for number in np.random.default_rng(0).permutation(people)[: studies.DUPLICATED]]


def person(patient: str, several: list[int], copies: int) -> int:
    """The number of the person that a patient of the embedded cohort is: copies have patients of their own."""
    number = int(patient.removeprefix("sub-"))
    return several[(number - PLANTED_FROM) // copies] if number >= PLANTED_FROM else number


def share(k: int, n: int) -> tuple[float, float, float]:
    """k / n with its exact (Clopper-Pearson) interval."""
    low = scipy.stats.beta.ppf(0.025, k, n - k + 1) if k else 0.0
    high = scipy.stats.beta.ppf(0.975, k + 1, n - k) if k < n else 1.0
    return k / n, float(low), float(high)


EVERY: Mapping[str, Measure] = {
    "copies": Measure("copies, calibrated test", "copy rate", _rate("calibrated", "copy_rate")),
    "memorized": Measure("memorized patients, calibrated test", "share of memorized patients", _memorized),
    "patients": Measure(
        "number of memorized patients", "number of memorized patients", _patients, percent=False, bounds=(0.0, np.inf)
    ),
    "seen": Measure("planted copies seen", "share of planted copies seen", _rate("power", "recall")),
    "paper_copies": Measure("copies, paper's rule", "copy rate by the paper's rule", _rate("paper", "copy_rate")),
    "paper_copies_floor": Measure("null floor of that", "null floor", _rate("paper", "null_copy_rate")),
    "paper_memorized": Measure(
        "memorized images, paper's rule", "share of memorized images by the paper's rule", _rate("paper", "mem_rate")
    ),
    "kernel": Measure(
        "kernel distance (quality; low: good)",
        "kernel distance",
        _quality("kernel"),
        percent=False,
        bounds=(-np.inf, np.inf),
    ),
    "recall": Measure("recall (quality; high: good)", "recall", _quality("recall")),
}
SOME: Mapping[str, Measure] = {  # of the studies that they decide
    "duplicated": Measure(
        "duplicated people found, less single ones",
        "share of duplicated people found, less that of single ones,",
        _duplicated,
        bounds=(-1.0, 1.0),
    ),
}


def of(study: studies.Study) -> Mapping[str, Measure]:
    """By name, the deciding one first: it alone is tested; the others' tests are shown beside it, unadjusted."""
    every = {**SOME, **EVERY}
    return {study.deciding: every[study.deciding]} | EVERY


def blind(audit: dict) -> str:
    """Why an INCONCLUSIVE audit could not have seen copies; '' where it could."""
    if audit["verdict"] != "INCONCLUSIVE":
        return ""
    power = audit["power"]
    why = {
        f"of planted copies fewer than {100 * audit['policy']['min_recall']:g} % are seen": power["recall"]
        < audit["policy"]["min_recall"],
        "synthetic and real images are rendered differently": audit["rendering"]["differs"],
    }
    return "; ".join(name for name, is_so in why.items() if is_so)


def doubtful(audit: dict) -> bool:
    """Whether unseen patients look like copies more often than chance has it: what is found may be too much, not too
    little."""
    return audit["negative_control"]["excess_p_value"] < DOUBT
