"""The audit: which synthetic images are copies of training patients, by the paper's rule and by the calibrated test."""

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from detection import calibrate, detector, figures, neighbours, rendering
from launch import checkpoint, log, mesh


class Similarities(NamedTuple):
    """Nearest-neighbour similarities, each over one direction and one set of candidates."""

    hits: neighbours.Neighbours  # of each synthetic image among the training images, both rendered alike
    null_M: np.ndarray  # of each validation image among the training images, likewise
    control_C: np.ndarray  # of each control image, likewise
    paper_val_N: np.ndarray  # of each training image among the validation images, as they are
    paper_syn_N: np.ndarray  # of each training image among the synthetic images
    paper_train_K: np.ndarray  # of each synthetic image among the training images
    paper_control_C: np.ndarray  # of each control image, rendered as a sample, among the training images
    train_NxD: np.ndarray
    control_CxD: np.ndarray


def audit(
    model: detector.Detector,
    sets: Mapping[str, Any],
    synthetic: Any,
    *,
    render: Callable[[jax.Array], jax.Array] | None,
    in_order: Callable[..., Iterator],
    folder: Path,
    caveats: Sequence[str],
    fdr: float,
    percentile: float,
    pairs: int,
    batch: int,
    seed: int,
) -> dict[str, Any]:
    """Audits `synthetic` against `sets['train']`; writes `audit.json`, `verdicts.csv`, `pairs.png`, `histogram.png`.

    Args:
      sets: 'train', 'val' and 'control', each with `images`, `ids` and `patients`.
      synthetic: the images to audit, with `images` and `ids`.
      render: how the generator renders an image (the autoencoder's round trip); the real images are passed through it,
        so that like is compared with like. None, for images made elsewhere: real and synthetic images are filtered to
        their common power spectrum instead.
      caveats: what the reader must know before any number; in `audit.json` and above the table.
      fdr: false-discovery rate of the calibrated test, and the nominal rate of the negative control.
    Returns:
      What is in `audit.json`.
    """
    views = like_for_like(sets, synthetic, render, in_order, batch, seed)
    sims = similarities(model, sets, synthetic, views, in_order, batch)
    train, val, control = (sets[name] for name in ("train", "val", "control"))
    result, test = judge(sims, train, val, control, fdr=fdr, percentile=percentile, seed=seed)
    result = {"caveats": list(caveats), **result, "rendering": views.report}
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_verdicts(folder / "verdicts.csv", synthetic.ids, train, sims, test)
        draw(folder, sims, synthetic, train, test, result, pairs)
        checkpoint.write_json(folder / "audit.json", result)
        log.say(table(result, folder))
    return result


class Views(NamedTuple):
    """How each set is rendered before it is compared: functions of a batch on the device, and the check of it."""

    real: Callable[[jax.Array], jax.Array]
    synthetic: Callable[[jax.Array], jax.Array]
    report: dict[str, Any]


def as_it_is(x: jax.Array) -> jax.Array:
    """The view of images that need no rendering."""
    return x


def like_for_like(
    sets: Mapping[str, Any],
    synthetic: Any,
    render: Callable | None,
    in_order: Callable,
    batch: int,
    seed: int,
) -> Views:
    """Renders real images as the synthetic ones are (see `audit`) and measures what difference is left."""
    val = sets["val"]

    def spectra(images: Sequence, view: Callable) -> np.ndarray:
        return np.concatenate(list(mesh.stream(lambda x: rendering.spectra(view(x)), in_order(images, batch))))

    syn_KxF = spectra(synthetic.images, as_it_is)
    if render is None:
        filters = rendering.common_filters(spectra(val.images, as_it_is), syn_KxF)
        view = lambda gain: lambda x: rendering.apply_filter(x, gain)
        real, fake, kind = view(filters.real), view(filters.synthetic), "low-pass to the common spectrum"
        syn_KxF = spectra(synthetic.images, fake)
    else:
        real, fake, kind = render, as_it_is, "round trip through the autoencoder"
    report = rendering.compare(spectra(val.images, real), val.patients, syn_KxF, seed=seed)
    return Views(real, fake, {"kind": kind, **report})


def similarities(
    model: detector.Detector, sets: Mapping[str, Any], synthetic: Any, views: Views, in_order: Callable, batch: int
) -> Similarities:
    """Embeds every set, as it is and as it is rendered, and finds nearest neighbours in each direction."""
    embed = detector.embedder(model)
    train, val, control = (sets[name].images for name in ("train", "val", "control"))
    syn = synthetic.images
    todo = [
        (train, as_it_is),
        (val, as_it_is),
        (syn, as_it_is),
        (train, views.real),
        (val, views.real),
        (control, views.real),
    ]
    todo += [(syn, views.synthetic)] if views.synthetic is not as_it_is else []
    with log.progress("embedding", sum(len(images) for images, _ in todo), unit="image") as bar:

        def embeddings(images: Sequence, view: Callable) -> np.ndarray:
            parts = []
            for part in mesh.stream(lambda x: embed(view(x)), in_order(images, batch)):
                parts.append(part)
                bar.update(len(part))
            return neighbours.standardise(np.concatenate(parts))

        train_NxD, val_MxD, syn_KxD, like_train_NxD, like_val_MxD, control_CxD, *rest = (embeddings(*t) for t in todo)
    like_syn_KxD = rest[0] if rest else syn_KxD
    best = lambda query, key: neighbours.nearest(query, key).sim[:, 0]
    return Similarities(
        hits=neighbours.nearest(like_syn_KxD, like_train_NxD),
        null_M=best(like_val_MxD, like_train_NxD),
        control_C=best(control_CxD, like_train_NxD),
        paper_val_N=best(train_NxD, val_MxD),
        paper_syn_N=best(train_NxD, syn_KxD),
        paper_train_K=best(syn_KxD, train_NxD),
        paper_control_C=best(control_CxD, train_NxD),
        train_NxD=train_NxD,
        control_CxD=control_CxD,
    )


def judge(
    sims: Similarities, train: Any, val: Any, control: Any, *, fdr: float, percentile: float, seed: int
) -> tuple[dict[str, Any], calibrate.Calibrated]:
    """Both rules, their nulls and the negative control, as `audit.json` holds them."""
    k = len(sims.paper_train_K)
    rule = calibrate.paper_rule(sims.paper_val_N, sims.paper_syn_N, sims.paper_train_K, percentile)
    above_N = neighbours.count_above(sims.train_NxD, sims.control_CxD, rule.threshold)
    floor = calibrate.null_floor(rule.threshold, sims.paper_control_C, control.patients, above_N, k, seed=seed)
    test = calibrate.calibrated_test(sims.hits.sim[:, 0], sims.null_M, val.patients, fdr=fdr, seed=seed)
    pointed_at = np.unique(sims.hits.index[test.flagged_K, 0])
    n_val_patients = len(np.unique(val.patients))
    result = {
        "n_train": len(train.ids),
        "n_val": len(val.ids),
        "n_syn": k,
        "n_train_patients": len(np.unique(train.patients)),
        "n_val_patients": n_val_patients,
        "paper": {
            "threshold": rule.threshold,
            "n_mem": int(rule.mem_N.sum()),
            "n_copies": int(rule.copies_K.sum()),
            "mem_rate": float(rule.mem_N.mean()),
            "mem_rate_ci": list(calibrate.rate_interval(rule.mem_N, train.patients, seed=seed)),
            "n_mem_patients": len(np.unique(train.patients[rule.mem_N])),
            "copy_rate": float(rule.copies_K.mean()),
            "copy_rate_ci": list(calibrate.clopper_pearson(rule.copies_K.sum(), k)),
            "null_mem_rate": floor.mem_rate,
            "null_mem_rate_extrapolated": floor.extrapolated,
            "null_copy_rate": floor.copy_rate,
            "null_copy_rate_ci": list(floor.copy_rate_ci),
        },
        "calibrated": {
            "fdr": fdr,
            "threshold": test.threshold,
            "n_copies": int(test.flagged_K.sum()),
            "copy_rate": test.rate,
            "copy_rate_ci": list(test.rate_ci),
            "n_mem": len(pointed_at),
            "n_mem_patients": len(np.unique(train.patients[pointed_at])),
            "smallest_p_value": 1 / (1 + n_val_patients),
            "smallest_flaggable_copy_rate": finite(calibrate.smallest_flaggable_rate(n_val_patients, k, fdr)),
            "copy_rate_found_in_80_percent": finite(calibrate.detectable_rate(n_val_patients, k, fdr, recall=1.0)),
        },
        "negative_control": calibrate.negative_control(
            sims.control_C, control.patients, sims.null_M, val.patients, nominal=fdr, seed=seed
        ),
    }
    return result, test


def finite(rate: float) -> float | None:
    """JSON has no infinity: None where no rate is enough."""
    return rate if rate <= 1 else None


def write_verdicts(path: Path, ids: np.ndarray, train: Any, sims: Similarities, test: calibrate.Calibrated) -> None:
    """One row per synthetic image, in the order given."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["image", "nearest", "nearest_patient", "similarity", "p_value", "flagged"])
    for image, j, sim, p, flag in zip(
        ids, sims.hits.index[:, 0], sims.hits.sim[:, 0], test.p_K, test.flagged_K, strict=True
    ):
        rows.writerow([image, train.ids[j], train.patients[j], f"{sim:.6f}", f"{p:.6g}", int(flag)])
    checkpoint.write_text(path, text.getvalue())


def draw(
    folder: Path, sims: Similarities, synthetic: Any, train: Any, test: calibrate.Calibrated, result: dict, pairs: int
) -> None:
    """`pairs.png` and `histogram.png`."""
    sim_K, index_K = sims.hits.sim[:, 0], sims.hits.index[:, 0]
    top = np.argsort(-sim_K, kind="stable")[:pairs]
    captions = [
        (f"{synthetic.ids[i]}  r = {sim_K[i]:.3f}, p = {test.p_K[i]:.3f}", f"nearest: {train.ids[index_K[i]]}")
        for i in top
    ]
    figures.pairs(
        folder / "pairs.png",
        [synthetic.images[i] for i in top],
        [train.images[index_K[i]] for i in top],
        captions,
        test.flagged_K[top],
        f"The {len(top)} most similar pairs: synthetic image, nearest training image, difference (red: flagged as copy)",
    )
    figures.histogram(
        folder / "histogram.png",
        sim_K,
        sims.null_M,
        [
            (f"calibrated threshold (FDR {result['calibrated']['fdr']:g})", test.threshold, "-"),
            ("score the fewest flaggable copies would need", None if test.flagged_K.any() else test.needed, ":"),
            ("the paper's rule, set on images as they are", result["paper"]["threshold"], "--"),
        ],
        f"{result['calibrated']['n_copies']} of {result['n_syn']} synthetic images flagged as copies",
    )


def table(result: dict[str, Any], folder: Path) -> str:
    """The audit in a few lines for the terminal."""
    percent = lambda rate: f"{100 * rate:.1f} %"
    span = lambda ci: f"[{100 * ci[0]:.1f}, {100 * ci[1]:.1f}]"
    paper, calibrated, negative = result["paper"], result["calibrated"], result["negative_control"]
    least, likely = calibrated["smallest_flaggable_copy_rate"], calibrated["copy_rate_found_in_80_percent"]
    can = f"{percent(least)}" if least else "none, there are too few unseen patients"
    can += (
        f" (found with 80 % probability from {percent(likely)}, if every copy outscores all unseen)" if likely else ""
    )
    null_copies = percent(paper["null_copy_rate"]) + " " + span(paper["null_copy_rate_ci"])
    null_mem = percent(paper["null_mem_rate"]) + (", extrapolated" if paper["null_mem_rate_extrapolated"] else "")
    lines = [
        *(f"CAUTION: {caveat}" for caveat in result["caveats"]),
        f"audit of {result['n_syn']} synthetic images against {result['n_train']} training images of "
        f"{result['n_train_patients']} patients; null: {result['n_val']} images of {result['n_val_patients']} unseen patients",
        f"{'':34}{'calibrated':>24}{'paper rule':>24}{'paper rule, null floor':>26}",
        f"{'copies, of synthetic images':34}{calibrated['n_copies']:>24}{paper['n_copies']:>24}{'':>26}",
        f"{'  rate, 95 % interval':34}{percent(calibrated['copy_rate']) + ' ' + span(calibrated['copy_rate_ci']):>24}"
        f"{percent(paper['copy_rate']) + ' ' + span(paper['copy_rate_ci']):>24}{null_copies:>26}",
        f"{'memorized training images':34}{calibrated['n_mem']:>24}{paper['n_mem']:>24}{null_mem:>26}",
        f"{'  patients':34}{calibrated['n_mem_patients']:>24}{paper['n_mem_patients']:>24}",
        f"negative control: {percent(negative['flag_rate'])} {span(negative['flag_rate_ci'])} of {negative['n']} images of "
        f"{negative['n_patients']} unseen patients have p <= {negative['nominal']:g} (nominal {percent(negative['nominal'])}; "
        f"chance of as many: {negative['excess_p_value']:.3f})",
        f"smallest copy rate that could be flagged: {can}; rendering differs: {'YES' if result['rendering']['differs'] else 'no'} "
        f"({result['rendering']['worst_gap_db']:+.1f} dB)",
        f"report: {folder}/audit.json, verdicts.csv, pairs.png, histogram.png",
    ]
    return "\n".join(lines)
