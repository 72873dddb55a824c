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

LEVEL = 0.95  # of every interval


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
      fdr: false-discovery rate of the calibrated test, and the nominal rate of the negative control.
    Returns:
      What is in `audit.json`.
    """
    views = like_for_like(sets, synthetic, render, in_order, batch, seed)
    sims = similarities(model, sets, synthetic, views, in_order, batch)
    train, val, control = (sets[name] for name in ("train", "val", "control"))
    result, p_K, flagged_K = judge(sims, train, val, control, fdr=fdr, percentile=percentile, seed=seed)
    result["rendering"] = views.report
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_verdicts(folder / "verdicts.csv", synthetic.ids, train, sims.hits, p_K, flagged_K)
        draw(folder, sims, synthetic, train, p_K, flagged_K, result, pairs)
        checkpoint.write_json(folder / "audit.json", result)
        log.say(table(result, folder))
    return result
