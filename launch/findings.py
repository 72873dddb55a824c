"""What a study found: one table row a run, intervals across seeds and patients, rank tests, and text that says no more."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from launch import checkpoint, curves, measures, ranks, studies
from launch.law import law

SIGNIFICANT = 0.05
COUNTS = ("n_train", "n_train_patients", "n_val_patients", "n_syn")


def write(name: str, study: studies.Study, runs: Sequence[studies.Run], workdir: Path) -> str:
    """Writes `study.csv`, `study.html` and the pictures from the runs that are done; returns what the terminal shows."""
    asked = measures.of(study)
    rows = [row for run in runs if (row := row_of(run, workdir / "runs" / run.name, asked))]
    checkpoint.write_text(workdir / "study.csv", table(rows))
    if not rows:
        return "no run is done yet"
    levels, tests = summary(study, rows), tested(study, sighted(study, rows))
    text = said(study, rows, levels, tests)
    if any(level.n for level in study.levels):
        text += [*by_size(rows), law(rows)]
    missing = [run.name for run in runs if run.name not in {row["run"] for row in rows}]
    pictures = curves.draw(workdir, study, rows, levels)
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    html = environment.get_template("study.html.j2").render(
        name=name,
        study=study,
        text=text,
        measures=asked,
        levels=levels,
        tests=tests,
        deciding=study.deciding,
        missing=missing,
        rows=rows,
        pictures=pictures,
        command=json.loads((workdir / "settings.json").read_text()),
        shown=shown,
        seen_from=seen_from,
    )
    checkpoint.write_text(workdir / "study.html", html)
    lines = [f"{'':18}" + "".join(f"{m.label[:24]:>26}" for m in asked.values()) + f"{'seen from a copy rate of':>26}"]
    for level in levels:
        cells = "".join(f"{shown(level[key], asked[key].percent):>26}" for key in asked)
        lines.append(f"{level['level']:<14}{level['runs']:>2}  {cells}{seen_from(level['least']):>26}")
    lines += [*text, *([f"not done: {', '.join(missing)}"] if missing else []), f"report: {workdir}/study.html"]
    return "\n".join(lines)


def row_of(run: studies.Run, folder: Path, asked: Mapping[str, measures.Measure]) -> dict[str, Any] | None:
    """A run's row of `study.csv`; None unless it is done.

    `least`: the smallest copy rate that its audit would have found with 80 % probability, '' where there is none.
    `blind`, `doubtful`: see `measures`.
    """
    paths = folder / "audit" / "audit.json", folder / "quality.json"
    if not all(path.exists() for path in paths):
        return None
    audit, quality = (json.loads(path.read_text()) for path in paths)
    row = {"run": run.name, "level": run.level.name, "x": run.level.x, "seed": run.seed, "verdict": audit["verdict"]}
    row |= {key: audit[key] for key in COUNTS}
    row |= {"least": audit["power"]["min_detectable_copy_rate"], "blind": measures.blind(audit)}
    row |= {"doubtful": measures.doubtful(audit)}
    for key, measure in asked.items():
        for end, value in zip(("", "_low", "_high"), measure.of(audit, quality, folder), strict=True):
            row[key + end] = round(float(value), 6)
    return row | {"group": run.level.n or 0}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    if rows:
        columns = [key for key in rows[0] if key != "group"]
        out = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
        out.writeheader()
        out.writerows({key: "" if value != value else value for key, value in row.items()} for row in rows)
    return text.getvalue()


def summary(study: studies.Study, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each level that has runs: name, x, number of runs, each measure's [mean, low, high] over the seeds at which it was
    measured, NaN if at none, and `least`: the smallest copy rate that even the weakest of its audits would have found, None
    where one could find none."""
    levels = []
    for level in study.levels:
        mine = [row for row in rows if row["level"] == level.name]
        if not mine:
            continue
        found: dict[str, Any] = {"level": level.name, "x": level.x, "group": level.n or 0, "runs": len(mine)}
        found["least"] = None if any(row["least"] is None for row in mine) else max(row["least"] for row in mine)
        for key, measure in measures.of(study).items():
            has = [row for row in mine if not np.isnan(row[key])]
            value, low, high = (np.array([row[key + end] for row in has]) for end in ("", "_low", "_high"))
            around = reach(value, low, high)
            found[key] = ranks.mean_interval(value, *around, *measure.bounds) if has else [np.nan] * 3
        levels.append(found)
    return levels


def reach(value: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far intervals reach below their values and above them."""
    return np.maximum(value - low, 0.0), np.maximum(high - value, 0.0)


def blocks(rows: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """(B, L): a block for each seed (and number of patients, where a study has several) that has every level."""
    places = sorted({row["x"] for row in rows})
    by_block: dict[tuple, dict[float, float]] = {}
    for row in rows:
        if not np.isnan(row[key]):
            by_block.setdefault((row["seed"], row["group"]), {})[row["x"]] = row[key]
    return np.array([[found[x] for x in places] for found in by_block.values() if len(found) == len(places)])


def sighted(study: studies.Study, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What a trend is tested on: without the places at which an audit found nothing and could not have seen copies."""
    blind = {row["x"] for row in rows if row["blind"] and not row["copies"]} if study.ordered else set()
    return [row for row in rows if row["x"] not in blind]


def tested(study: studies.Study, rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each measure: p, the sign of the trend, the smallest p possible, and the last level less the first with its
    interval over blocks, images and patients (`ranks.mean_interval`); nothing where no block is whole or there is one level."""
    tests = {}
    for key, measure in measures.of(study).items():
        values_BxL = blocks(rows, key)
        if values_BxL.size == 0 or values_BxL.shape[1] < 2:
            continue
        change_B = values_BxL[:, -1] - values_BxL[:, 0]
        down_BxL, up_BxL = reach(values_BxL, blocks(rows, f"{key}_low"), blocks(rows, f"{key}_high"))
        down_B, up_B = np.hypot(down_BxL[:, -1], up_BxL[:, 0]), np.hypot(up_BxL[:, -1], down_BxL[:, 0])
        least, most = measure.bounds
        change, *ci = ranks.mean_interval(change_B, down_B, up_B, least - most, most - least)
        found = {"blocks": len(values_BxL), "means": values_BxL.mean(0), "change": change, "change_ci": ci}
        if study.ordered:
            t, p, least = ranks.trend(values_BxL)
            found |= {"p": p, "sign": int(np.sign(t)), "least": least}
        elif len(values_BxL) > 1:
            found |= dict(zip(("p", "least"), ranks.differ(values_BxL), strict=True))
        tests[key] = found
    return tests


def said(study: studies.Study, rows: Sequence, levels: Sequence[Mapping], tests: Mapping[str, Mapping]) -> list[str]:
    """What the deciding measure supports, and how that compares with the paper: sentences, never more than the test."""
    test, measure = tests.get(study.deciding), measures.of(study)[study.deciding]
    text, left = [], sighted(study, rows)
    for x in sorted({row["x"] for row in rows} - {row["x"] for row in left}):
        names = ", ".join(level["level"] for level in levels if level["x"] == x)
        text.append(f"{names}: left out of the test, since {could_not_see(rows, [x])}.")
    if test is None or "p" not in test:
        return [*text, "Too few runs are done for a test: at least one seed at every level is needed."]
    able = ""
    if test["least"] > SIGNIFICANT:
        able = f"; with so few runs, or so many ties, no p could be below {test['least']:.2g}"
    over = f"over {test['blocks']} repetition{'s' * (test['blocks'] > 1)}"
    if (doubtful := sum(row["doubtful"] for row in rows)) > 0:
        text.append(
            f"In {doubtful} of the {len(rows)} audits the negative control is too high: unseen patients look like copies "
            "more often than chance has it, so that what these find may be too much."
        )
    if not study.ordered:
        order = ", ".join(f"{level['level']} {shown(level[study.deciding], measure.percent)}" for level in levels)
        verb = "differ" if test["p"] <= SIGNIFICANT else "are not shown to differ"
        how = f"(exact Friedman test {over}: p = {test['p']:.2g}{able})"
        text = [f"Levels {verb} in the {measure.noun} {how}: {order}.", *text]
        unseen = [(level["level"], could_not_see(rows, [level["x"]])) for level in levels]
        return text + [f"{name}: {why}; a difference from it is not shown." for name, why in unseen if why]
    how = f"(exact permutation test of Page's L {over}: p = {test['p']:.2g}{able})"
    direction = {1: "rises", -1: "falls", 0: "neither rises nor falls"}[test["sign"]]
    if test["p"] > SIGNIFICANT:
        text = [f"No trend of the {measure.noun} is shown {how}.", *text]
        return [*text, f"Dar et al. report that copies {rise(study.paper)}: not shown here."] if study.paper else text
    steps = np.diff(test["means"]) * test["sign"]
    if (steps > 0).all():
        every = " from each level to the next"
    elif (steps >= 0).all():
        every = ", and at no level the other way"
    else:
        every = ", though not from each level to the next"
    ends = [(100 if measure.percent else 1) * x for x in (test["change"], *test["change_ci"])]
    unit = " percentage points" if measure.percent else ""
    change = "{:+.1f}{} [{:+.1f}, {:+.1f}] over repetitions, images and patients".format(ends[0], unit, *ends[1:])
    first, *_, last = sorted({row["x"]: row["level"] for row in left}.items())
    between = f"From {first[1]} to {last[1]}" if not left[0]["group"] else "From the first to the last"
    text = [f"The mean {measure.noun} {direction}{every} {how}. {between} it changes by {change}.", *text]
    if study.paper:
        here = "reproduced here" if study.paper == direction else "the opposite was found here"
        text.append(f"Dar et al. report that copies {rise(study.paper)}: {here}.")
    return text


def rise(does: str) -> str:
    """'rises' or 'falls', of several."""
    return does.removesuffix("s")


def could_not_see(rows: Sequence[Mapping], places: Sequence[float]) -> str:
    """Of the levels at these x: that audits which found nothing there could not have seen copies, and why; '' if all
    that found nothing could."""
    nothing = [row for row in rows if row["x"] in places and not row["copies"]]
    blind = [row["blind"] for row in nothing if row["blind"]]
    if not blind:
        return ""
    some = (
        f"{len(blind)} of the {len(nothing)} audits that found nothing" if len(blind) < len(nothing) else "these audits"
    )
    why = sorted({reason for reasons in blind for reason in reasons.split("; ")})
    return f"{some} could not have seen copies ({', '.join(why)})"


def by_size(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a study of several numbers of training images says of them after the same number of steps: a sentence for each
    number of steps at which all were audited."""
    found: dict[int, dict[int, dict[int, float]]] = {}  # steps -> seed -> training images -> copy rate
    sizes = sorted({row["group"] for row in rows})
    for row in rows:
        by_seed = found.setdefault(round(row["x"] * row["group"]), {})
        by_seed.setdefault(row["seed"], {})[row["group"]] = row["copies"]
    text = []
    for steps, by_seed in sorted(found.items()):
        values_BxL = np.array([[rates[n] for n in sizes] for rates in by_seed.values() if len(rates) == len(sizes)])
        if not values_BxL.size or len(sizes) < 2:
            continue
        t, p, _ = ranks.trend(values_BxL)
        trend = "no trend is shown" if p > SIGNIFICANT else "it rises" if t > 0 else "it falls"
        rates = ", ".join(f"{n}: {100 * mean:.1f} %" for n, mean in zip(sizes, values_BxL.mean(0), strict=True))
        text.append(
            f"After the same {steps} steps, by the number of training images, {rates} of the samples are copies; {trend} "
            f"(exact permutation test of Page's L over {len(values_BxL)} seeds: p = {p:.2g})."
        )
        ends = [
            row for row in rows if round(row["x"] * row["group"]) == steps and row["group"] in (sizes[0], sizes[-1])
        ]
        if p <= SIGNIFICANT and (unseen := could_not_see(ends, [row["x"] for row in ends])):
            text[-1] += f" Not shown: {unseen}."
    return text


def seen_from(least: float | None) -> str:
    """The smallest copy rate that is found, for people."""
    return "none" if least is None else f"{100 * least:.1f} %"


def shown(value: Sequence[float], percent: bool) -> str:
    """[mean, low, high] for people."""
    if np.isnan(value[0]):
        return "not measured"
    if percent:
        return "{:.1f} % [{:.1f}, {:.1f}]".format(*(100 * v for v in value))
    return "{:.3f} [{:.3f}, {:.3f}]".format(*value)
