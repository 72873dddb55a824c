"""A study's pictures: measures against the factor, privacy against quality, and curves of several sizes on one axis."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np

from launch import checkpoint, studies

COLOURS = ("#b34700", "#14507a", "#00695c", "#7a5600", "#6b3fa0")
MARKS = "osDv^"


def draw(
    workdir: Path, study: studies.Study, rows: Sequence[Mapping], levels: Sequence[Mapping]
) -> list[tuple[str, str]]:
    """Writes the pictures; returns (file name, what it shows) of each."""
    made = [(*factor(study, rows, levels), "factor.png"), (*plane(rows, levels), "plane.png")]
    for figure, _, name in made:
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=150, metadata={"Software": None})
        checkpoint.write_bytes(workdir / name, data.getvalue())
    return [(name, says) for _, says, name in made]


def factor(study: studies.Study, rows: Sequence[Mapping], levels: Sequence[Mapping]) -> tuple[Any, str]:
    """Rates and quality against the factor: means with intervals, and every run as a dot."""
    groups = sorted({level["group"] for level in levels})
    x = [level["x"] for level in levels]
    by_place = not study.ordered or min(x) <= 0  # names, not amounts
    figure = matplotlib.figure.Figure((12, 4.6), layout="constrained")
    panels = figure.subplots(1, 3)
    shown = (
        (("copies", "paper_copies", "paper_copies_floor"), "copies, of the synthetic images"),
        (("memorized", "paper_memorized"), "memorized, of the training set"),
        (("kernel",), "kernel distance to unseen images"),
    )
    for axes, (keys, title) in zip(panels, shown, strict=True):
        lines = [(key, group) for key in keys for group in groups if len(groups) == 1 or key == keys[0]]
        for i, (key, group) in enumerate(lines):
            mine = [level for level in levels if level["group"] == group]
            aside = i - (len(lines) - 1) / 2  # so that intervals at one place do not lie on each other
            beside = lambda x, aside=aside: x + 0.03 * aside if by_place else x * 1.02**aside
            at = beside(np.array([level["x"] for level in mine], float))
            mean, low, high = np.array([level[key] for level in mine]).T
            name = LABELS[key] if len(groups) == 1 else f"{group} training images"
            style = {"color": COLOURS[i % 5], "marker": MARKS[i % 5], "ls": "none" if not study.ordered else "-"}
            style |= {"ls": "--"} if "floor" in key else {}
            axes.errorbar(at, mean, [mean - low, high - mean], label=name, capsize=3, ms=4, lw=1.2, **style)
            dots = [(beside(row["x"]), row[key]) for row in rows if row["group"] == group]
            axes.plot(*zip(*dots, strict=True), ".", color=COLOURS[i % 5], alpha=0.35, ms=4)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(study.factor, fontsize=9)
        if by_place:
            axes.set_xticks(x, [level["level"] for level in levels], fontsize=8)
        else:
            axes.set_xscale("log")
            axes.set_xticks(sorted(set(x)), [f"{v:g}" for v in sorted(set(x))], fontsize=8)
            axes.set_xticks([], minor=True)
        if keys != ("kernel",):
            axes.set_ylim(-0.03, 1.03)
            axes.yaxis.set_major_formatter(lambda v, _: f"{100 * v:.0f} %")
        if len(lines) > 1:
            axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)  # over no data
    return figure, (
        f"Against {study.factor}: means over seeds with 95 % intervals across seeds and patients, and every run as a dot."
    )


def plane(rows: Sequence[Mapping], levels: Sequence[Mapping]) -> tuple[Any, str]:
    """The privacy-quality plane: a dot for each run."""
    figure = matplotlib.figure.Figure((6, 4.2), layout="constrained")
    axes = figure.subplots()
    shades = np.linspace(0.1, 0.85, len(levels))
    for i, (level, shade) in enumerate(zip(levels, shades, strict=True)):
        mine = [row for row in rows if row["level"] == level["level"]]
        where = [row["kernel"] for row in mine], [row["copies"] for row in mine]
        axes.plot(*where, MARKS[i % 5], color=matplotlib.colormaps["viridis"](shade), label=level["level"], ms=6)
    axes.set_xlabel("kernel distance to unseen images (left: better images)")
    axes.set_ylabel("copies, calibrated test (down: more private)")
    axes.yaxis.set_major_formatter(lambda v, _: f"{100 * v:.0f} %")
    axes.legend(fontsize=7, ncols=1 + len(levels) // 8)
    return figure, "Privacy against quality, a mark for each run: good and private is bottom left."


LABELS = {
    "copies": "calibrated test",
    "paper_copies": "paper's rule",
    "paper_copies_floor": "paper's rule on unseen patients (its floor)",
    "memorized": "patients, calibrated test",
    "paper_memorized": "images, paper's rule",
    "kernel": "kernel distance",
}
