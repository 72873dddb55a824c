"""The part of a synthetic set that may be released: without its copies and without what goes with them.

The test of the audit limits false accusations: with few unseen patients it names few copies, or none. A filter has the
other duty, so it draws a line for each image by itself and pays for it with innocent ones. What it leaves is judged by
scores that it did not use, and by a bound on the copies that it missed.
"""

import csv
import hashlib
import io
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy

from detection import calibrate, controls, verdict
from launch import checkpoint, stage

FIELDS = ("path", "sha256")  # similarities and p-values would tell an attacker which images to try first
FEWEST = 10  # planted copies that the filter missed, of which a second look's recall is worth saying
RISK = 0.025  # of each of the two limits that the bound on the copies left is made of


class Filter(NamedTuple):
    """Which synthetic images stay, and why the others do not: an image is counted for the first reason that holds."""

    keep_K: np.ndarray
    flagged_K: np.ndarray  # by the audit's test
    over_K: np.ndarray  # at or above the line, flagged or not
    counts: dict[str, int]


def check(level: float) -> None:
    """Raises ValueError unless the level of the line is one."""
    if not 0 < level < 1:
        raise ValueError(f"config.audit.release_level={level!r}: give a number between 0 and 1, say 0.05")


def line(null_M: np.ndarray, patients_M: np.ndarray, level: float) -> float:
    """The similarity from which on an image is removed: the lowest whose conformal p-value is at most `level`.

    Where there are too few unseen patients for that, or where it is lower: that of the most similar unseen image. Of
    innocent images about the share `level` is lost, or 1 / (1 + patients) if that is more.
    """
    null = np.unique(calibrate.finite(null_M))
    above = np.nextafter(null, np.inf, dtype=null.dtype)
    passes = calibrate.conformal_p(above, null_M, patients_M) <= level * (1 + 1e-9)
    return float(min([null[-1], *above[passes]]))


def without_copies(
    sim_K: np.ndarray,
    p_K: np.ndarray,
    flagged_K: np.ndarray,
    duplicate_K: np.ndarray,
    nearest_K: np.ndarray,
    draws_K: np.ndarray,
    rows_KxD: np.ndarray,
    search: Callable,
    *,
    line: float,
    level: float,
    threshold: float | None,
) -> Filter:
    """Leaves out what the audit flags, what is over the line, what is a training image, near-twins of these, and the rest
    of their draws, as the other slices of a volume.

    Twins of one over the line are images as similar to it as copies are to originals (`line`) that point at the same
    training image and are themselves near the line: p at most twice the level, which bounds what an innocent set loses,
    however much its images are alike. Twins of a flagged one point at the same training image, or are as similar to it as
    the least similar flagged one is to its original (`threshold`), and half of the unseen patients are less similar to a
    training image. Twins of twins stay.

    Args:
      sim_K, nearest_K: similarity to and index of the nearest training image. p_K, level: of the line. flagged_K, threshold: see
        `calibrate.calibrated_test`. duplicate_K: see `training_images`. draws_K: the draw of the generator that each
        is of; no file holds parts of two.
      rows_KxD, search: as the audit's space has them; see `spaces.Space`.
    """
    over_K = sim_K >= line
    removed_K = flagged_K | over_K | duplicate_K
    twin_K = np.isin(nearest_K, nearest_K[flagged_K]) & (p_K <= 0.5)
    near_K = p_K <= 2 * level
    if removed_K.any() and not removed_K.all():
        others = np.flatnonzero(~removed_K)
        found = search(rows_KxD[others], rows_KxD[removed_K])
        same = nearest_K[removed_K][found.index[:, 0]] == nearest_K[others]
        twin_K[others] |= same & near_K[others] & (found.sim[:, 0] >= line)
        if flagged_K.any():
            close = search(rows_KxD[others], rows_KxD[flagged_K]).sim[:, 0] >= threshold
            twin_K[others] |= close & (p_K[others] <= 0.5)
    parts_K = np.isin(draws_K, draws_K[removed_K | twin_K])
    reasons = {"n_flagged": flagged_K, "n_over_line": over_K, "n_duplicates": duplicate_K}
    counts, seen_K = {}, np.zeros(len(sim_K), bool)
    for name, which_K in {**reasons, "n_removed_with_them": parts_K}.items():
        counts[name] = int((which_K & ~seen_K).sum())
        seen_K |= which_K
    return Filter(~parts_K, flagged_K, over_K, counts)


def training_images(synthetic: Sequence, train: Sequence, in_order: Callable[..., Iterator], batch: int) -> np.ndarray:
    """Which synthetic images are a training image to the last of 256 grey levels, whatever any score says: (K,) bool."""

    def contents(images: Sequence) -> list[bytes]:
        found = []
        for rows, valid in in_order(images, batch):
            grey = np.round((np.clip(np.asarray(rows[:valid], np.float32), -1, 1) + 1) * 127.5).astype(np.uint8)
            found += [hashlib.sha256(image.tobytes()).digest() for image in grey]
        return found

    known = set(contents(train))
    return np.array([content in known for content in contents(synthetic)], bool)


# ---- what is left


def copies_left(n_over: int, recall: float) -> int | None:
    """Upper limit, 97.5 %, of the copies that stayed under the line when `n_over` images were at or above it.

    Each copy is caught with probability `recall`, independently; of c copies Binomial(c, recall) are. The limit is the
    largest c - n_over under which so few would be caught with a probability of at least 2.5 %: what fails before the
    (n_over + 1)-th success is negative binomial, and this its upper quantile. Innocent images among the n_over only
    raise it. It covers the number left, not its mean: that would be (n_over / recall) (1 - recall).

    Returns:
      None where nothing is known to be caught.
    """
    return int(scipy.stats.nbinom.ppf(1 - RISK, n_over + 1, recall)) if recall > 0 else None


def seen_of_missed(
    first: Sequence[controls.Planted],
    line: float,
    second: Sequence[controls.Planted],
    threshold: float,
    patients_Q: np.ndarray,
    seed: int,
) -> dict[str, Any]:
    """What a second score sees of the planted copies that the filter missed: all that it has to find among what is left.

    What passed the filter has a low first score, and scores agree: the recall on all planted copies would flatter.

    Args:
      first, second: the same copies (standard strengths count) by both scores. line: of the filter. threshold: from which
        the second score flags. patients_Q: whose copies they are.
    Returns:
      n_missed: planted copies under the line. recall, recall_ci: the share of them at or above `threshold`, by patient;
      None where there are fewer than `FEWEST`.
    """
    counted = [
        (one.sim_Q < line, other.sim_Q >= threshold) for one, other in zip(first, second, strict=True) if one.standard
    ]
    missed, seen = (np.concatenate(parts) for parts in zip(*counted, strict=True))
    n = int(missed.sum())
    if n < FEWEST:
        return {"n_missed": n, "recall": None, "recall_ci": None}
    patients = np.tile(patients_Q, len(counted))[missed]
    ci = calibrate.rate_interval(seen[missed], patients, seed=seed)
    return {"n_missed": n, "recall": float(seen[missed].mean()), "recall_ci": list(ci)}


def said_of_missed(seen: Mapping[str, Any]) -> str:
    """What `seen_of_missed` found, in words."""
    missed = f"{seen['n_missed']} planted copies escaped the filter"
    if seen["recall"] is None:
        return f"{missed}, too few to tell what this sees of such"
    return f"{missed}, of which this sees {100 * seen['recall']:.1f} %"


def decide(
    result: Mapping[str, Any],
    recall: Mapping[str, Any],
    by_kind: Sequence[Mapping[str, Any]],
    n_over: int,
    kept: int,
    again: Sequence[Mapping[str, Any]],
    policy: Mapping[str, float],
) -> tuple[str, list[str], dict[str, Any]]:
    """The verdict on what is left.

    FAIL: a second look finds copies beyond the policy. PASS: the audit's instruments are in order, and no more copies can
    be left than the policy allows, if the generator's copies are as the planted ones. INCONCLUSIVE otherwise.

    Args:
      result: `audit.json` of the whole set. recall, by_kind: `controls.overall` and the rows of `controls.recalls` that count,
        at the line. n_over: images at or above it.
      again: rows of the second looks, each with `space`, `verdict` and `reasons`.
    Returns:
      (verdict, reasons, {copies_left_at_most, copy_rate_at_most}); the last two None where nothing bounds them.
    """
    percent = lambda rate: f"{100 * rate:.1f} %"
    left = copies_left(n_over, recall["recall_ci"][0])
    bound = {
        "copies_left_at_most": None if left is None else min(left, kept),
        "copy_rate_at_most": min(left / kept, 1.0) if kept and left is not None else None,
    }
    if found := [f"{row['space']}: {row['reasons'][0]}" for row in again if row["verdict"] == "FAIL"]:
        return "FAIL", found, bound
    if not kept:
        return "INCONCLUSIVE", ["the filter removed every image: there is nothing to release"], bound
    doubts = [*verdict.broken(result), *verdict.untested(result), *verdict.missed("filter", recall, by_kind, policy)]
    rate = bound["copy_rate_at_most"]
    if rate is None or rate > policy["max_copy_rate"]:
        most = "any number" if rate is None else f"up to {bound['copies_left_at_most']} ({percent(rate)})"
        doubts.append(
            f"{most} of the {kept} images left may be copies that the filter missed; the policy allows "
            f"{percent(policy['max_copy_rate'])}: it caught {n_over} images, and at least {percent(recall['recall_ci'][0])} of planted copies"
        )
    if doubts:
        return "INCONCLUSIVE", doubts, bound
    return (
        "PASS",
        [
            f"at most {bound['copies_left_at_most']} ({percent(rate)}) of the {kept} images left are copies that the filter missed, "
            f"if the generator's copies are as the planted ones; the policy allows {percent(policy['max_copy_rate'])}",
            "no second look finds copies beyond the policy",
        ],
        bound,
    )


# ---- files


def write(folder: Path, source: Path, files: Sequence[str], said: Mapping[str, Any]) -> None:
    """Copies `files` from `source` into `folder`, with `manifest.csv` (path, sha256) and `RELEASE.json` (`said`).

    The folder is made aside and moved into place whole. A file of several images may be named several times.

    Raises:
      FileExistsError: the folder holds anything but an earlier release: a release is never mixed with what was there.
    """
    refuse_strangers(folder)
    aside = folder.with_name(f".{folder.name}.aside")
    if jax.process_index() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(FIELDS)
        for path in dict.fromkeys(map(str, files)):
            target = aside / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, target)
            rows.writerow([path, hashlib.sha256(target.read_bytes()).hexdigest()])
        checkpoint.write_text(aside / "manifest.csv", text.getvalue())
        checkpoint.write_json(aside / "RELEASE.json", dict(said))
        shutil.rmtree(folder, ignore_errors=True)
    stage.replace_folder(aside, folder)


def refuse_strangers(folder: Path) -> None:
    """Raises FileExistsError if the folder holds files that no earlier release lists in its `manifest.csv`."""
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    listed = set()
    if "manifest.csv" in there:
        with open(folder / "manifest.csv", newline="") as lines:
            listed = {row.get("path") for row in csv.DictReader(lines)} | {"manifest.csv", "RELEASE.json"}
    if strange := sorted(there - listed):
        raise FileExistsError(
            f"{folder}: holds {strange[0]}, which is no earlier release's; give config.audit.release another folder"
        )
