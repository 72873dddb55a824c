"""What an audit reports beside its test: the paper's rule, other spaces, membership. Nothing here decides."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from detection import calibrate, controls, extraction, membership, neighbours, outputs, redaction, spaces, tail
from launch import log, mesh


def of_draws(draws_K: np.ndarray) -> list[str]:
    """What the reader must know where several synthetic images are of one draw of the generator."""
    k, n, n_draws = len(draws_K), len(np.unique(draws_K)), calibrate.effective_number(draws_K)
    return [redaction.PARTS.format(k, n, n_draws)] if n < k else []


def of_memorized(
    hits: neighbours.Neighbours,
    test: calibrate.Calibrated,
    null_M: np.ndarray,
    val: Any,
    train: Any,
    *,
    fdr: float,
    seed: int,
) -> dict[str, Any]:
    """Intervals and size-matched counts of the memorized images and patients, and the labelled tail extrapolation."""
    scores_K, index_K = hits.sim[:, 0], hits.index[:, 0]
    how = {"fdr": fdr, "seed": seed}
    return {
        **extraction.memorized_interval(scores_K, index_K, null_M, val.patients, train.patients, **how),
        **extraction.size_matched(index_K, test.flagged_K, train.patients, len(val.ids), seed=seed),
        "tail": tail.extrapolated_test(scores_K, null_M, val.patients, **how)[0],
    }


def side_by_side(
    others: Mapping[str, spaces.Space | Mapping[str, np.ndarray]],
    detector: spaces.Measured,
    note: str,
    rows: Mapping[str, Mapping[str, np.ndarray]],
    copies: Mapping[str, np.ndarray],
    plants: controls.Plants,
    some: Mapping[str, np.ndarray],
    sizes: Mapping[str, int],
    patients_Q: np.ndarray,
    flagged_K: np.ndarray,
    draws_K: np.ndarray,
    patients_M: np.ndarray,
    *,
    fdr: float,
    seed: int,
) -> dict[str, Any]:
    """The section `spaces`: the detector and each other space, by planted copies and by what it flags.

    Args:
      others: a space, or vectors of 'train', 'val' and 'synthetic' made elsewhere.
      rows: space -> 'train', 'val' and 'synthetic' -> rows; copies: space -> rows of planted copies of all kinds of `plants`.
      some: of 'train', 'val' and 'synthetic', which of their `sizes` images the rows of slow spaces are of.
      patients_Q, patients_M: of the training images that are copied, and of the validation images. draws_K: of synthetic ones.
    """

    def told(what: spaces.Measured, note: str, slow: bool = False) -> dict[str, Any]:
        val, syn = (some[name] if slow else slice(None) for name in ("val", "synthetic"))
        of_K = flagged_K[syn], draws_K[syn]
        return spaces.section(what, patients_M[val], patients_Q, *of_K, fdr=fdr, seed=seed, note=note)

    result = {"detector": told(detector, note)}
    for name, space in others.items():
        if isinstance(space, spaces.Space):
            what = spaces.measured(space, rows[name], copies[name], plants)
            result[name] = told(what, space.note + (said_of(some, sizes) if space.slow else ""), space.slow)
        else:
            result[name] = told(spaces.given(space), "vectors given by the user, compared as they are")
    return result


def some(sizes: Mapping[str, int], most: int, needed_Q: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Which of each set's images a slow space is measured on: all, or `most` at random, ascending.

    Args:
      sizes: number of images in each set. needed_Q: training images that are among them, those that are copied.
    """
    rng, index = np.random.default_rng(seed), {}
    for name, n in sizes.items():
        order = rng.permutation(n)
        if name == "train":
            order = np.concatenate([needed_Q, order[~np.isin(order, needed_Q)]])
        index[name] = np.sort(order[: max(most, len(needed_Q) if name == "train" else 0)])
    return index


def said_of(some: Mapping[str, np.ndarray], sizes: Mapping[str, int]) -> str:
    """What the note of a slow space adds where it was not measured on all images."""
    parts = [f"{len(index):,} of {sizes[name]:,} {name}" for name, index in some.items() if len(index) < sizes[name]]
    return f"; slow, so on {', '.join(parts)} images chosen at random: copies of others go unseen" if parts else ""


def of_membership(
    losses: Callable[[jax.Array], jax.Array] | None,
    levels: Sequence[float],
    sets: Mapping[str, Any],
    *,
    in_order: Callable[..., Iterator],
    batch: int,
    seed: int,
) -> tuple[dict[str, Any] | None, str | None]:
    """The section `membership`, from `losses`: images (B, *S, C) -> (B, L) denoising losses of the audited generator.

    Returns:
      (the section, None), or (None, why there is none): an audit does not end for it.
    """
    if losses is None:
        return None, "it needs the generator itself, a diffusion model of ours, and config.audit.membership"
    names = ("train", "val", "control")
    if refused := membership.too_few({name: sets[name].patients for name in names}):
        return None, refused

    def measure(name: str) -> membership.Losses:
        with log.progress(f"loss of {name}", len(sets[name].ids), unit="image") as bar:
            parts = []
            for part in mesh.stream(losses, in_order(sets[name].images, batch)):
                parts.append(part)
                bar.update(len(part))
        return membership.Losses(np.concatenate(parts), sets[name].patients)

    measured = [measure(name) for name in names]
    if broken := [name for name, of in zip(names, measured, strict=True) if not np.isfinite(of.loss).all()]:
        return (
            None,
            f"the generator's losses of the {broken[0]} images are not finite: its weights are broken, train it again",
        )
    return membership.membership(*measured, np.asarray(levels), seed=seed), None


def of_paper(
    raw: Mapping[str, np.ndarray],
    control_CxD: np.ndarray,
    train: Any,
    control: Any,
    draws_K: np.ndarray,
    *,
    percentile: float,
    seed: int,
) -> dict[str, Any]:
    """The paper's rule, by embeddings of images as they are, and what it says of unseen people (`control_CxD`, rendered as samples)."""
    train_NxD, val_MxD, syn_KxD = (raw[name] for name in ("train", "val", "synthetic"))
    best = lambda query, key: neighbours.nearest(query, key).sim[:, 0]
    k = len(syn_KxD)
    syn_K, control_C = best(syn_KxD, train_NxD), best(control_CxD, train_NxD)
    rule = calibrate.paper_rule(best(train_NxD, val_MxD), best(train_NxD, syn_KxD), syn_K, percentile)
    above_N = neighbours.count_above(train_NxD, control_CxD, rule.threshold)
    floor = calibrate.null_floor(rule.threshold, control_C, control.patients, above_N, k, seed=seed)
    copied_N = neighbours.count_above(train_NxD, syn_KxD, rule.threshold)
    matched = extraction.mem_rate_size_matched(copied_N, train.patients, k, len(val_MxD), seed=seed)
    return {
        **matched,
        "threshold": rule.threshold,
        "n_mem": int(rule.mem_N.sum()),
        "n_copies": int(rule.copies_K.sum()),
        "mem_rate": float(rule.mem_N.mean()),
        "mem_rate_ci": list(calibrate.rate_interval(rule.mem_N, train.patients, seed=seed)),
        "n_mem_patients": len(np.unique(train.patients[rule.mem_N])),
        "copy_rate": float(rule.copies_K.mean()),
        "copy_rate_ci": list(calibrate.draws_interval(rule.copies_K, draws_K)),
        "null_mem_rate": floor.mem_rate,
        "null_mem_rate_extrapolated": floor.extrapolated,
        "null_copy_rate": floor.copy_rate,
        "null_copy_rate_ci": list(floor.copy_rate_ci),
        "histogram": outputs.histogram(syn_K, best(val_MxD, train_NxD), control_C),
    }
