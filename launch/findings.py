"""What a study found: one table row a run, intervals across seeds and patients, rank tests, and text that says no more."""

import csv
import io
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from launch import checkpoint, curves, ranks, studies

SIGNIFICANT = 0.05


class Measure(NamedTuple):
    """A number of a run with its 95 % interval, (value, low, high) = of(audit.json, quality.json); `rate`: in [0, 1]."""

    label: str
    of: Callable[[dict, dict], tuple[float, float, float]]
    rate: bool = True


def _memorized(audit: dict, quality: dict) -> tuple[float, float, float]:
    found, n = audit["calibrated"], audit["n_train_patients"]
    return found["n_mem_patients"] / n, *(min(1.0, end / n) for end in found["n_mem_patients_ci"])


def _rate(section: str, name: str) -> Callable[[dict, dict], tuple[float, float, float]]:
    return lambda audit, quality: (audit[section][name], *audit[section][f"{name}_ci"])


def _quality(name: str) -> Callable[[dict, dict], tuple[float, float, float]]:
    def of(audit: dict, quality: dict) -> tuple[float, float, float]:
        found = quality["spaces"]["detector"]["synthetic"][name]
        return found["value"], *found["ci"]

    return of


MEASURES: Mapping[str, Measure] = {
    "copies": Measure("copies, calibrated test", _rate("calibrated", "copy_rate")),
    "memorized": Measure("memorized patients, calibrated test", _memorized),
    "paper_copies": Measure("copies, paper's rule", _rate("paper", "copy_rate")),
    "paper_copies_floor": Measure("null floor of that", _rate("paper", "null_copy_rate")),
    "paper_memorized": Measure("memorized images, paper's rule", _rate("paper", "mem_rate")),
    "kernel": Measure("kernel distance (quality; low: good)", _quality("kernel"), rate=False),
    "recall": Measure("recall (quality; high: good)", _quality("recall")),
}
DECIDING = "copies"  # the one measure that is tested; others' tests are shown beside it, unadjusted
COUNTS = ("n_train", "n_train_patients", "n_val_patients", "n_syn")


def write(name: str, study: studies.Study, runs: Sequence[studies.Run], workdir: Path) -> str:
    """Writes `study.csv`, `study.html` and the pictures from the runs that are done; returns what the terminal shows."""
    rows = [row for run in runs if (row := row_of(run, workdir / "runs" / run.name))]
    checkpoint.write_text(workdir / "study.csv", table(rows))
    if not rows:
        return "no run is done yet"
    levels, tests = summary(study, rows), tested(study, rows)
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
        measures=MEASURES,
        levels=levels,
        tests=tests,
        deciding=DECIDING,
        missing=missing,
        rows=rows,
        pictures=pictures,
        command=json.loads((workdir / "settings.json").read_text()),
        shown=shown,
    )
    checkpoint.write_text(workdir / "study.html", html)
    lines = [f"{'':18}" + "".join(f"{m.label[:24]:>26}" for m in MEASURES.values())]
    for level in levels:
        cells = "".join(f"{shown(level[key], MEASURES[key].rate):>26}" for key in MEASURES)
        lines.append(f"{level['level']:<14}{level['runs']:>2}  {cells}")
    lines += [*text, *([f"not done: {', '.join(missing)}"] if missing else []), f"report: {workdir}/study.html"]
    return "\n".join(lines)


def row_of(run: studies.Run, folder: Path) -> dict[str, Any] | None:
    """A run's row of `study.csv`; None unless it is done."""
    paths = folder / "audit" / "audit.json", folder / "quality.json"
    if not all(path.exists() for path in paths):
        return None
    audit, quality = (json.loads(path.read_text()) for path in paths)
    row = {"run": run.name, "level": run.level.name, "x": run.level.x, "seed": run.seed, "verdict": audit["verdict"]}
    row |= {key: audit[key] for key in COUNTS}
    for key, measure in MEASURES.items():
        for end, value in zip(("", "_low", "_high"), measure.of(audit, quality), strict=True):
            row[key + end] = round(float(value), 6)
    return row | {"group": run.level.n or 0}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    if rows:
        columns = [key for key in rows[0] if key != "group"]
        out = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
        out.writeheader()
        out.writerows(rows)
    return text.getvalue()


def summary(study: studies.Study, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each level that has runs: name, x, number of runs, and each measure's [mean, low, high] over the seeds."""
    levels = []
    for level in study.levels:
        mine = [row for row in rows if row["level"] == level.name]
        if not mine:
            continue
        found: dict[str, Any] = {"level": level.name, "x": level.x, "group": level.n or 0, "runs": len(mine)}
        for key, measure in MEASURES.items():
            value, low, high = (np.array([row[key + end] for row in mine]) for end in ("", "_low", "_high"))
            bounds = (0.0, 1.0) if measure.rate else (-np.inf, np.inf)
            found[key] = ranks.mean_interval(value, (high - low) / 2, *bounds)
        levels.append(found)
    return levels


def blocks(rows: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """(B, L): a block for each seed (and number of patients, where a study has several) that has every level."""
    places = sorted({row["x"] for row in rows})
    by_block: dict[tuple, dict[float, float]] = {}
    for row in rows:
        by_block.setdefault((row["seed"], row["group"]), {})[row["x"]] = row[key]
    return np.array([[found[x] for x in places] for found in by_block.values() if len(found) == len(places)])


def tested(study: studies.Study, rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each measure: p, the sign of the trend, the smallest p possible, and the last level less the first with its
    interval over blocks, images and patients (`ranks.mean_interval`); nothing where no block is whole or there is one level."""
    tests = {}
    for key in MEASURES:
        values_BxL = blocks(rows, key)
        if values_BxL.size == 0 or values_BxL.shape[1] < 2:
            continue
        change_B = values_BxL[:, -1] - values_BxL[:, 0]
        half_BxL = (blocks(rows, f"{key}_high") - blocks(rows, f"{key}_low")) / 2
        end = 1.0 if MEASURES[key].rate else np.inf
        change, *ci = ranks.mean_interval(change_B, np.hypot(half_BxL[:, -1], half_BxL[:, 0]), -end, end)
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
    test = tests.get(DECIDING)
    if test is None or "p" not in test:
        return ["Too few runs are done for a test: at least one seed at every level is needed."]
    able = ""
    if test["least"] > SIGNIFICANT:
        able = f"; with so few runs, or so many ties, no p could be below {test['least']:.2g}"
    over = f"over {test['blocks']} repetition{'s' * (test['blocks'] > 1)}"
    if not study.ordered:
        order = ", ".join(f"{level['level']} {shown(level[DECIDING], True)}" for level in levels)
        verb = "differ" if test["p"] <= SIGNIFICANT else "are not shown to differ"
        return [f"Copy rates {verb} between levels (exact Friedman test {over}: p = {test['p']:.2g}{able}): {order}."]
    how = f"(exact permutation test of Page's L {over}: p = {test['p']:.2g}{able})"
    direction = {1: "rises", -1: "falls", 0: "neither rises nor falls"}[test["sign"]]
    if test["p"] > SIGNIFICANT:
        text = f"No trend of the copy rate is shown {how}."
        return [text, f"Dar et al. report that it {study.paper}: not shown here."] if study.paper else [text]
    steps = np.diff(test["means"]) * test["sign"]
    if (steps > 0).all():
        every = " from each level to the next"
    elif (steps >= 0).all():
        every = ", and at no level the other way"
    else:
        every = ", though not from each level to the next"
    ends = [100 * x for x in (test["change"], *test["change_ci"])]
    change = "{:+.1f} percentage points [{:+.1f}, {:+.1f}] over repetitions, images and patients".format(*ends)
    text = [f"The mean copy rate {direction}{every} {how}. From the first level to the last it changes by {change}."]
    if study.paper:
        same = study.paper == direction
        text.append(
            f"Dar et al. report that it {study.paper}: {'reproduced' if same else 'the opposite was found'} here."
        )
    return text


def by_size(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a study of several numbers of training images says of them after the same number of steps: a sentence for each
    number of steps at which all were audited."""
    found: dict[int, dict[int, dict[int, float]]] = {}  # steps -> seed -> training images -> copy rate
    sizes = sorted({row["group"] for row in rows})
    for row in rows:
        by_seed = found.setdefault(round(row["x"] * row["group"]), {})
        by_seed.setdefault(row["seed"], {})[row["group"]] = row[DECIDING]
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
    return text


def law(rows: Sequence[Mapping[str, Any]]) -> str:
    """Steps until half of the samples are copies, against n: the exponent of a power law, with its interval over seeds."""
    slopes, used = [], set()
    for seed in sorted({row["seed"] for row in rows}):
        times = {}
        for n in sorted({row["group"] for row in rows}):
            mine = sorted((row["x"] * n, row[DECIDING]) for row in rows if (row["seed"], row["group"]) == (seed, n))
            for (s0, r0), (s1, r1) in itertools.pairwise(mine):
                if r0 < 0.5 <= r1:
                    times[n] = np.log(s0) + (0.5 - r0) / (r1 - r0) * np.log(s1 / s0)
                    break
        if len(times) >= 3:
            slopes.append(float(np.polyfit(np.log(list(times)), list(times.values()), 1)[0]))
            used |= set(times)
    if not slopes:
        return "In no seed does the copy rate cross one half at three numbers of patients or more: no exponent."
    mean, low, high = ranks.mean_interval(np.array(slopes), np.zeros(len(slopes)))
    interval = f" [{low:.2f}, {high:.2f}] over {len(slopes)} seeds" if len(slopes) > 1 else " (one seed: no interval)"
    return (
        f"The number of steps until half of the samples are copies grows as n to the power {mean:.2f}{interval}, "
        f"n from {min(used)} to {max(used)} (published: 1)."
    )


def shown(value: Sequence[float], rate: bool) -> str:
    """[mean, low, high] for people."""
    if rate:
        return "{:.1f} % [{:.1f}, {:.1f}]".format(*(100 * v for v in value))
    return "{:.3f} [{:.3f}, {:.3f}]".format(*value)
