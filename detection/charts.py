"""Geometry of the report's charts: numbers of `audit.json` in, positions in percent of the plot out; the template draws.

Positions across are percentages and text has its own size, so that one drawing is legible on a telephone and on paper.
Labels stand in rows above the plot, each with a line down to what it names: they never collide, and no colour needs to
be told from another.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

FACTOR_DB = 3.0  # a factor of two in power, shaded in the spectrum
MOST_POINTS = 400  # of a curve: more than the pixels that show it


class Axis(NamedTuple):
    """`low` to `high` in `label`'s unit; ticks as (percent of the axis, text)."""

    low: float
    high: float
    label: str
    ticks: list[tuple[float, str]]

    def at(self, values: Any) -> np.ndarray:
        """Percent of the axis."""
        return 100 * (np.asarray(values, float) - self.low) / (self.high - self.low)


class Label(NamedTuple):
    """Text in a row of its own above the plot, and the point (percent right, percent down) that its line leads to."""

    style: str
    text: str
    x: float
    y: float


class Chart(NamedTuple):
    """A plot of `height` pixels; paths are in percent right and down of it."""

    says: str  # what is drawn, for those who cannot see it
    x: Axis
    y: Axis
    labels: Sequence[Label]
    areas: Sequence[tuple[str, str]] = ()  # (style, path)
    lines: Sequence[tuple[str, str]] = ()  # (style, path)
    rules: Sequence[tuple[str, float]] = ()  # (style, percent right): from top to bottom
    dots: Sequence[tuple[str, float, float, str]] = ()  # (style, right, down, what it is)
    height: int = 220


def round_numbers(low: float, high: float, most: int) -> np.ndarray:
    """About `most` of them in equal steps, from `low` or below to `high` or above."""
    from matplotlib.ticker import MaxNLocator  # here, since it is slow to load and no start of a training needs it

    return MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)


def axis(low: float, high: float, label: str, *, most: int = 5) -> Axis:
    """An axis with about `most` round ticks inside it."""
    if not high > low:
        low, high = low - 0.5, high + 0.5
    ticks = [t for t in round_numbers(low, high, most) if low <= t <= high]
    step = min(np.diff(ticks), default=1.0)
    places = next((p for p in range(9) if abs(round(step, p) - step) < 1e-9 * max(step, 1)), 9)
    return Axis(low, high, label, [(float(100 * (t - low) / (high - low)), f"{t:,.{places}f}") for t in ticks])


def round_top(values: Any, least: float = 0.0) -> float:
    """The round number an axis from 0 ends in so as to hold all values."""
    top = max(float(np.max(values, initial=least)), least) or 1.0
    return float(round_numbers(0, top, 5)[-1])


def histogram(result: Mapping[str, Any]) -> Chart:
    """Similarity by which the calibrated test decides, with the score that it flags from."""
    calibrated = result["calibrated"]
    flagged = ("calibrated", f"flagged from (FDR {calibrated['fdr']:g})", calibrated.get("threshold"))
    needed = ("calibrated", "score copies would have needed", calibrated.get("needed_score"))
    return similarities(result["histogram"], [needed if flagged[2] is None else flagged])


def paper_histogram(result: Mapping[str, Any]) -> Chart:
    """Similarity by which the paper's rule decides, with its threshold."""
    return similarities(result["paper"]["histogram"], [("paper", "the paper's rule", result["paper"]["threshold"])])


def similarities(counted: Mapping[str, Any], thresholds: Sequence[tuple[str, str, float | None]]) -> Chart:
    """Similarity to the nearest training image: share of the synthetic, the unseen and the control images per bin."""
    edges = np.asarray(counted["edges"], float)
    x = axis(edges[0], edges[-1], "similarity to the nearest training image", most=6)
    share = {
        name: 100 * np.asarray(counted[name], float) / max(sum(counted[name]), 1)
        for name in ("unseen", "control", "synthetic")
        if counted.get(name)
    }
    y = axis(0, round_top(np.concatenate(list(share.values()))), "% of the images")
    names = {"unseen": "unseen patients", "control": "negative control", "synthetic": "synthetic images"}
    labels, areas, lines = [], [], []
    for name, heights in share.items():
        path = steps(x.at(edges), 100 - y.at(heights))
        if name != "control":
            areas.append((name, path + "Z"))
        lines.append((name, path))
        top = int(np.argmax(heights))
        middle = float(x.at((edges[top] + edges[top + 1]) / 2))
        labels.append(Label(name, f"{names[name]} ({sum(counted[name]):,})", middle, float(100 - y.at(heights[top]))))
    marks = [
        (style, text, value) for style, text, value in thresholds if value is not None and x.low <= value <= x.high
    ]
    labels += [Label(style, f"{text}: {value:.3f}", float(x.at(value)), 100.0) for style, text, value in marks]
    return Chart(
        "Histogram of the similarity to the nearest training image: synthetic images, unseen patients, negative control",
        x,
        y,
        labels,
        areas,
        lines,
        [(style, float(x.at(value))) for style, _, value in marks],
    )


def extraction(result: Mapping[str, Any], what: str) -> Chart:
    """Distinct training 'images' or 'patients' that copies point at, against synthetic images drawn, with its interval."""
    curve = result["extraction"]
    keep = thinned(len(curve["draws"]))
    draws, found, interval = (np.asarray(curve[k], float)[keep] for k in ("draws", what, f"{what}_ci"))
    beyond = np.asarray(curve.get("extrapolated") or [False] * len(curve["draws"]), bool)[keep]
    x = axis(0, max(float(draws.max()), 1.0), "synthetic images drawn", most=4)
    y = axis(0, round_top(interval[:, 1], least=1.0), f"distinct training {what}")
    across, down = x.at(draws), 100 - y.at(found)
    band = ribbon(across, 100 - y.at(interval[:, 0]), 100 - y.at(interval[:, 1]))
    first = int(np.argmax(beyond)) if beyond.any() else len(draws)  # the dashed part starts at the last measured point
    lines = [("synthetic", polyline(across[:first], down[:first]))] if first else []
    labels = []
    if first:
        labels.append(
            Label(
                "synthetic",
                f"by {draws[first - 1]:,.0f} drawn: {found[first - 1]:,.1f}".replace(".0", ""),
                *at(across, down, first - 1),
            )
        )
    if beyond.any():
        lines.append(("beyond", polyline(across[max(first - 1, 0) :], down[max(first - 1, 0) :])))
        labels.append(
            Label(
                "beyond", f"extrapolated to {draws[-1]:,.0f}: {found[-1]:,.1f}".replace(".0", ""), *at(across, down, -1)
            )
        )
    return Chart(
        f"Distinct training {what} extracted against the number of synthetic images drawn",
        x,
        y,
        labels,
        [("synthetic", band)],
        lines,
        dots=[("synthetic", *at(across, down, first - 1), "")] if first else [],
        height=190,
    )


def membership(result: Mapping[str, Any], what: str) -> Chart:
    """By noise level: 'auc' of telling training from unseen patients by their loss, the 'gap' of losses, or both 'loss'es."""
    by = result["membership"]
    levels = np.asarray(by["levels"], float)
    x = axis(0, 1, "noise level t / T")
    across = x.at(levels)
    dots = lambda style, values, down: [
        (style, *at(across, down, i), f"{levels[i]:g}: {value:.4g}") for i, value in enumerate(values)
    ]
    if what == "loss":
        train, val = np.asarray(by["train_loss"], float), np.asarray(by["val_loss"], float)
        y = axis(0, round_top([train.max(), val.max()]), "mean denoising loss")
        apart = int(np.argmax(np.abs(train - val)))
        ends = [("unseen", "unseen patients", val), ("synthetic", "training patients", train)]
        return Chart(
            "Mean denoising loss of training and of unseen patients by noise level",
            x,
            y,
            [Label(style, text, *at(across, 100 - y.at(loss), apart)) for style, text, loss in ends],
            lines=[(style, polyline(across, 100 - y.at(loss))) for style, _, loss in ends],
            dots=[dot for style, _, loss in ends for dot in dots(style, loss, 100 - y.at(loss))],
            height=190,
        )
    values, interval = np.asarray(by[what], float), np.asarray(by[f"{what}_ci"], float)
    if what == "auc":
        y = axis(min(0.4, float(interval.min())), max(1.0, float(interval.max())), "ROC area")
        nothing, says = 0.5, "ROC area of the membership test by noise level; 0.5 is guessing"
    else:
        reach = max(float(interval.max()), 0.0) - min(float(interval.min()), 0.0)
        y = axis(
            min(float(interval.min()), 0.0), max(float(interval.max()), 0.0) + 0.05 * reach, "gap of denoising losses"
        )
        nothing, says = 0.0, "Denoising loss of unseen minus training patients by noise level"
    down, level = 100 - y.at(values), float(100 - y.at(nothing))
    most = int(np.argmax(values))
    labels = [Label("synthetic", f"highest: {values[most]:.3g} at {levels[most]:g}", *at(across, down, most))]
    lines = [("chance", f"M0 {level:.2f}H100")]
    control = (by.get("control") or {}).get(what)
    if control:
        lines.append(("control", polyline(across, 100 - y.at(control))))
        labels.append(Label("control", "control: unseen against unseen", *at(across, 100 - y.at(control), -1)))
    return Chart(
        says,
        x,
        y,
        labels,
        [("synthetic", ribbon(across, 100 - y.at(interval[:, 0]), 100 - y.at(interval[:, 1])))],
        [*lines, ("synthetic", polyline(across, down))],
        dots=dots("synthetic", values, down),
        height=190,
    )


def spectrum(result: Mapping[str, Any]) -> Chart:
    """Synthetic over unseen power per frequency band, before (if known) and after the common rendering, in decibels."""
    rendering = result["rendering"]
    series = [
        (style, text, np.array([np.nan if g is None else g for g in rendering[key]], float))
        for style, text, key in (
            ("unseen", "before the common rendering", "raw_gap_db"),
            ("synthetic", "as compared", "gap_db"),
        )
        if rendering.get(key)
    ]
    reach = max([np.nanmax(np.abs(g), initial=0.0) for _, _, g in series] + [1.3 * FACTOR_DB])
    top = round_top([reach])
    x = axis(0, 1, "spatial frequency, share of the finest")
    y = axis(-top, top, "synthetic over unseen power, dB")
    labels, lines, dots = [], [], []
    for style, text, gap in series:
        across, down = x.at((np.arange(len(gap)) + 0.5) / len(gap)), 100 - y.at(gap)
        known = np.flatnonzero(np.isfinite(gap))
        if not len(known):
            continue
        lines.append((style, polyline(across, down)))
        dots += [(style, *at(across, down, i), f"band {i + 1}: {gap[i]:+.2f} dB") for i in known]
        widest = int(known[np.argmax(np.abs(gap[known]))])
        labels.append(Label(style, text, *at(across, down, widest)))
    low, high = (float(100 - y.at(edge)) for edge in (-FACTOR_DB, FACTOR_DB))
    middle = float(100 - y.at(0))
    return Chart(
        "Ratio of synthetic to unseen power by spatial frequency, in decibels; 3 dB is a factor of two",
        x,
        y,
        labels,
        [("alike", f"M0 {low:.2f}H100V{high:.2f}H0Z")],
        [("chance", f"M0 {middle:.2f}H100"), *lines],
        dots=dots,
        height=190,
    )


class Rate(NamedTuple):
    """A rate with its interval on a line from 0 to `top`; `at`, `low`, `high` and a reference `tick` in percent of it."""

    name: str
    over: str
    keys: tuple[str, str]  # where it is in audit.json
    interval: tuple[str, str]
    top: float
    at: float
    low: float
    high: float
    tick: float | None


RATES = [  # name, over what, section, rate, reference
    (
        "Flagged by the calibrated test",
        "of the synthetic images: those named as copies",
        "calibrated",
        "copy_rate",
        None,
    ),
    ("Negative control", "of unseen patients' images; dashed: nominal", "negative_control", "flag_rate", "nominal"),
    (
        "Copies, the paper's rule",
        "of the synthetic images; dashed: its null floor",
        "paper",
        "copy_rate",
        "null_copy_rate",
    ),
    ("The paper's null floor", "of unseen patients' images, none of them a copy", "paper", "null_copy_rate", None),
    (
        "Memorized, the paper's rule",
        "of the training images; dashed: its null floor",
        "paper",
        "mem_rate",
        "null_mem_rate",
    ),
]


def rates(result: Mapping[str, Any]) -> list[Rate]:
    """The audit's rates on one line each, all to the same round `top`."""
    top = min(round_top([result[section][f"{rate}_ci"][1] for _, _, section, rate, _ in RATES]), 1.0)
    on = lambda value: min(max(100 * value / top, 0.0), 100.0)
    rows = []
    for name, over, section, rate, reference in RATES:
        values = result[section]
        low, high = values[f"{rate}_ci"]
        tick = None if reference is None or values.get(reference) is None else on(values[reference])
        keys = (section, rate), (section, f"{rate}_ci")
        rows.append(Rate(name, over, *keys, top, on(values[rate]), on(low), on(high), tick))
    return rows


def thinned(n: int) -> np.ndarray:
    """Indices of at most `MOST_POINTS` of n points, the first and the last among them."""
    return np.unique(np.linspace(0, n - 1, min(n, MOST_POINTS)).round().astype(int))


def at(across: np.ndarray, down: np.ndarray, index: int) -> tuple[float, float]:
    return float(across[index]), float(down[index])


def polyline(across: np.ndarray, down: np.ndarray) -> str:
    """A path through the points; a point that is not finite breaks it."""
    path, pen = [], "M"
    for x, y in zip(across, down, strict=True):
        if not np.isfinite(y):
            pen = "M"
            continue
        path.append(f"{pen}{x:.2f} {y:.2f}")
        pen = "L"
    return "".join(path)


def ribbon(across: np.ndarray, low: np.ndarray, high: np.ndarray) -> str:
    """The area between two curves."""
    there = polyline(across, high)
    back = polyline(across[::-1], low[::-1])
    return f"{there}L{back[1:]}Z"


def steps(edges: np.ndarray, tops: np.ndarray) -> str:
    """The outline of a histogram over a floor at 100."""
    path = [f"M{edges[0]:.2f} 100"]
    for left, right, top in zip(edges[:-1], edges[1:], tops, strict=True):
        path.append(f"L{left:.2f} {top:.2f}H{right:.2f}")
    return "".join(path) + "V100"
