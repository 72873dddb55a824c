"""The law of memorization: how the number of steps until half of the samples are copies grows with the training set."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from launch import ranks

HALF = 0.5


class Crossing(NamedTuple):
    """Log of the number of steps at which the copy rate crosses one half, and how far its interval reaches each way."""

    time: float
    below: float
    above: float


def crossing(points: Sequence[tuple[float, float, float, float]]) -> Crossing | None:
    """Between the first two audits, in order, of which one is below one half and the next is not; None if there are none.

    Linear in the rate against the logarithm of steps. The rates' own intervals are carried along to first order: a
    higher rate is an earlier time.

    Args:
      points: (steps, rate, low, high).
    """
    for (s0, r0, low0, high0), (s1, r1, low1, high1) in itertools.pairwise(points):
        if r0 < HALF <= r1:
            octave, rise = np.log(s1 / s0), r1 - r0
            slope0, slope1 = octave * (r1 - HALF) / rise**2, octave * (HALF - r0) / rise**2  # - d time / d rate
            below, above = (
                np.hypot(slope0 * (high0 - r0), slope1 * (high1 - r1)),
                np.hypot(slope0 * (r0 - low0), slope1 * (r1 - low1)),
            )
            return Crossing(float(np.log(s0) + octave * (HALF - r0) / rise), float(below), float(above))
    return None


def exponent(times: Mapping[int, Crossing]) -> tuple[float, float, float]:
    """Slope of the least-squares line of log time on log n, and how far its interval reaches below and above."""
    x = np.log(list(times))
    weight = (x - x.mean()) / np.square(x - x.mean()).sum()
    time, below, above = np.array(list(times.values())).T
    down, up = np.where(weight > 0, below, above), np.where(weight > 0, above, below)
    return float(weight @ time), float(np.linalg.norm(weight * down)), float(np.linalg.norm(weight * up))


def law(rows: Sequence[Mapping[str, Any]]) -> str:
    """The exponent of a power law, its interval over seeds, images and patients, and where no crossing was seen."""
    sizes = sorted({row["group"] for row in rows})
    found, never = [], []
    used: set[int] = set()
    for seed in sorted({row["seed"] for row in rows}):
        times = {}
        for n in sizes:
            mine = [row for row in rows if (row["seed"], row["group"]) == (seed, n)]
            points = sorted((row["x"] * n, *(row[f"copies{end}"] for end in ("", "_low", "_high"))) for row in mine)
            if (at := crossing(points)) is None:
                never.append(f"seed {seed} at {n}")
            else:
                times[n] = at
        if len(times) >= 3:
            found.append(exponent(times))
            used |= set(times)
    window = (
        f"audited after {min(row['x'] for row in rows):g} to {max(row['x'] for row in rows):g} steps a training image"
    )
    missing = f"; no crossing there: {', '.join(never)}" if never else ""
    if not found:
        return f"In no seed does the copy rate cross one half at three numbers of images or more, {window}{missing}: no exponent."
    mean, low, high = ranks.mean_interval(*np.array(found).T)
    over = f"{len(found)} seeds, images and patients" if len(found) > 1 else "images and patients of one seed"
    return (
        f"The number of steps until half of the samples are copies grows as n to the power {mean:.2f} [{low:.2f}, {high:.2f}] "
        f"over {over}, n from {min(used)} to {max(used)}, {window} (published: 1){missing}."
    )
