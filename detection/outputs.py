"""What an audit leaves behind besides its JSON: verdicts, pictures, and a few lines for the terminal."""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np

from detection import calibrate, figures, neighbours, verdict
from launch import checkpoint


def histogram(syn_K: np.ndarray, null_M: np.ndarray, control_C: np.ndarray) -> dict[str, list]:
    """Counts of the similarity to the nearest training image in 60 equal bins up to 1, for each set."""
    edges = np.linspace(min(syn_K.min(), null_M.min(), control_C.min()), 1.0, 61)
    edges[-1] = np.nextafter(np.float32(max(1.0, syn_K.max())), np.float32(2))  # rounding may leave a copy just above 1
    count = lambda sim: np.histogram(sim, edges)[0].tolist()
    return {"edges": edges.tolist(), "synthetic": count(syn_K), "unseen": count(null_M), "control": count(control_C)}


def write_verdicts(
    path: Path, ids: np.ndarray, train: Any, hits: neighbours.Neighbours, test: calibrate.Calibrated
) -> None:
    """One row per synthetic image, in the order given."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["image", "nearest", "nearest_patient", "similarity", "p_value", "flagged"])
    for image, j, sim, p, flag in zip(ids, hits.index[:, 0], hits.sim[:, 0], test.p_K, test.flagged_K, strict=True):
        rows.writerow([image, train.ids[j], train.patients[j], f"{sim:.6f}", f"{p:.6g}", int(flag)])
    checkpoint.write_text(path, text.getvalue())


def draw(
    folder: Path,
    hits: neighbours.Neighbours,
    synthetic: Any,
    train: Any,
    test: calibrate.Calibrated,
    result: dict,
    pairs: int,
) -> None:
    """`pairs.png`, unless no `pairs` are wanted, and `histogram.png`."""
    sim_K, index_K = hits.sim[:, 0], hits.index[:, 0]
    top = np.argsort(-sim_K, kind="stable")[:pairs]
    captions = [
        (f"{synthetic.ids[i]}  r = {sim_K[i]:.3f}, p = {test.p_K[i]:.3f}", f"nearest: {train.ids[index_K[i]]}")
        for i in top
    ]
    if len(top):
        figures.pairs(
            folder / "pairs.png",
            [synthetic.images[i] for i in top],
            [train.images[index_K[i]] for i in top],
            captions,
            test.flagged_K[top],
            f"The {len(top)} most similar pairs: synthetic image, nearest training image, difference (red: flagged as copy)",
        )
    else:
        (folder / "pairs.png").unlink(missing_ok=True)  # of an earlier audit
    calibrated, paper, k = result["calibrated"], result["paper"], result["n_syn"]
    figures.histogram(
        folder / "histogram.png",
        [
            (
                f"calibrated test: {calibrated['n_copies']} of {k} synthetic images flagged",
                result["histogram"],
                [
                    (f"flagged from (FDR {calibrated['fdr']:g})", test.threshold, "-"),
                    ("the fewest flaggable copies would need", None if test.flagged_K.any() else test.needed, ":"),
                ],
            ),
            (
                f"the paper's rule: {paper['n_copies']} of {k} above its threshold",
                paper["histogram"],
                [("the paper's threshold", paper["threshold"], "--")],
            ),
        ],
    )


def table(result: dict[str, Any], folder: Path) -> str:
    """The audit in a few lines for the terminal."""
    percent = lambda rate: f"{100 * rate:.1f} %"
    span = lambda ci: f"[{100 * ci[0]:.1f}, {100 * ci[1]:.1f}]"
    both = lambda rate, ci: f"{percent(rate)} {span(ci)}"
    paper, calibrated, negative, power = (result[k] for k in ("paper", "calibrated", "negative_control", "power"))
    bounds = result["bounds"]
    rate = lambda name: percent(power[name]) if power[name] else "none, by these unseen patients and planted copies"
    worst = max(bounds["by_kind"], key=lambda row: row["at_most_rate"])
    if_worst = f"up to {percent(worst['at_most_rate'])} if all were of the kind that is seen worst, {worst['kind']}"
    if_worst = f" ({if_worst})" if worst["at_most_rate"] > bounds["at_most_rate"] else ""
    null_mem = percent(paper["null_mem_rate"]) + (", extrapolated" if paper["null_mem_rate_extrapolated"] else "")
    weakest = min(result["positive_control"], key=lambda row: row["recall"])
    lines = [
        *(f"CAUTION: {caveat}" for caveat in result["caveats"]),
        f"audit of {result['n_syn']} synthetic images against {result['n_train']} training images of "
        f"{result['n_train_patients']} patients; null: {result['n_val']} images of {result['n_val_patients']} unseen patients",
        f"{'':34}{'calibrated':>24}{'paper rule':>24}{'paper rule, null floor':>26}",
        f"{'flagged as copies, of synthetic':34}{calibrated['n_copies']:>24}{paper['n_copies']:>24}{'':>26}",
        f"{'  share, 95 % interval':34}{both(calibrated['copy_rate'], calibrated['copy_rate_ci']):>24}"
        f"{both(paper['copy_rate'], paper['copy_rate_ci']):>24}{both(paper['null_copy_rate'], paper['null_copy_rate_ci']):>26}",
        f"{'memorized training images':34}{calibrated['n_mem']:>24}{paper['n_mem']:>24}{null_mem:>26}",
        f"{'  patients':34}{calibrated['n_mem_patients']:>24}{paper['n_mem_patients']:>24}",
        f"copies among the {result['n_syn']}: between {percent(bounds['at_least_rate'])} and {percent(bounds['at_most_rate'])}, "
        f"{100 * bounds['confidence']:g} % confidence at each end{if_worst}",
        f"  {bounds['n_above']} are more similar than {verdict.unseen_patients(bounds['rank'], result['n_val_patients'])}, "
        f"{bounds['n_above_expected']:.1f} would be by chance; chance of as many at any line if none is a copy: {bounds['p_value']:.2g}",
        f"negative control: {both(negative['flag_rate'], negative['flag_rate_ci'])} of {negative['n']} images of "
        f"{negative['n_patients']} unseen patients have p <= {negative['nominal']:g} (nominal {percent(negative['nominal'])}; "
        f"chance of as many: {negative['excess_p_value']:.3f})",
        f"positive control: {both(power['recall'], power['recall_ci'])} of planted copies seen, mean over kinds "
        f"({power['n']} training patients); weakest: {weakest['kind']} {weakest['strength']:g}, {percent(weakest['recall'])}",
        f"power: smallest copy rate that can be named: {rate('smallest_flaggable_copy_rate')}; noticed: "
        f"{rate('smallest_seen_copy_rate')}; found with {percent(power['probability'])} probability: {rate('min_detectable_copy_rate')}",
        f"rendering differs: {'YES' if result['rendering']['differs'] else 'no'} "
        f"({result['rendering']['worst_of']}: {result['rendering']['worst_effect']:+.2f} standard deviations, "
        f"p = {result['rendering']['p_value']:.3f}; largest gap before matching {result['rendering']['raw_worst_gap_db']:+.1f} dB)",
        *release_lines(result["release"]),
        f"verdict: {result['verdict']}: {result['reasons'][0]}",
        *(f"         {reason}" for reason in result["reasons"][1:]),
        f"report: {folder}/report.html, audit.json, verdicts.csv, pairs.png, histogram.png",
    ]
    return "\n".join(lines)


def release_lines(release: dict[str, Any] | None) -> list[str]:
    """What was released, or why nothing was, for the terminal."""
    if not release:
        return []
    out = [
        ("n_flagged", "flagged"),
        ("n_over_line", "over the line"),
        ("n_duplicates", "training images"),
        ("n_removed_with_them", "that go with them"),
    ]
    counts = ", ".join(f"{release[key]} {what}" for key, what in out)
    if release["released"]:
        first = f"release: {release['n_kept']} images in {release['folder']}"
    else:
        first = f"release: nothing was released, {release['n_kept']} images would be left"
        if Path(release["folder"], "manifest.csv").exists():
            first += f"; {release['folder']} holds an earlier release, which this audit does not vouch for"
    lines = [f"{first}; left out: {counts}; verdict on what is left: {release['verdict']}: {release['reasons'][0]}"]
    return lines + [
        f"  by {again['space']}: {again['n_copies']} copies flagged: {again['verdict']}, {again['reasons'][0]}"
        for again in release["again"]
    ]
