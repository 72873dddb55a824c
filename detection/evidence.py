"""What an audit reports beside its test: other spaces, baselines, extraction, membership. Nothing here decides."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from detection import baselines, calibrate, controls, extraction, membership, neighbours, spaces, tail
from launch import log, mesh


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
    sets: Mapping[str, tuple[Sequence, Callable[[jax.Array], jax.Array]]],
    plants: controls.Plants,
    chosen_Q: np.ndarray,
    flagged_K: np.ndarray,
    patients_M: np.ndarray,
    patients_N: np.ndarray,
    *,
    fdr: float,
    in_order: Callable[..., Iterator],
    batch: int,
    seed: int,
) -> dict[str, Any]:
    """The section `spaces`: the detector and each other space, by planted copies and by what it flags.

    Args:
      others: a space, or vectors of 'train', 'val' and 'synthetic' made elsewhere.
      sets: see `spaces.measured`. patients_M, patients_N: of the validation and the training images.
    """
    how = {"in_order": in_order, "batch": batch, "seed": seed}
    told = lambda what, note: spaces.section(
        what, patients_M, patients_N[chosen_Q], flagged_K, fdr=fdr, seed=seed, note=note
    )
    result = {"detector": told(detector, note)}
    for name, space in others.items():
        if isinstance(space, spaces.Space):
            result[name] = told(spaces.measured(space, sets, plants, chosen_Q, **how), space.note)
        else:
            result[name] = told(spaces.given(space), "vectors given by the user, compared as they are")
    return result


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


def of_distances(
    train_NxD: np.ndarray,
    syn_KxD: np.ndarray,
    val_MxD: np.ndarray,
    control_CxD: np.ndarray,
    val: Any,
    control: Any,
    seed: int,
) -> tuple[dict[str, Any] | None, str | None]:
    """The section `baselines`, in the detector's space, and None; or None and why there is none."""
    if len(train_NxD) < 2:
        return None, "they need two training images: enlarge config.data.fractions.train"
    how = (val.patients, control_CxD, control.patients)
    return baselines.baselines(train_NxD, syn_KxD, val_MxD, *how, seed=seed), None
