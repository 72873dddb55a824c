"""The part of a synthetic set that may be released: without its copies and without what goes with them."""

import csv
import hashlib
import io
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from launch import checkpoint, stage

FIELDS = ("path", "sha256", "similarity", "p_value")


def without_copies(
    flagged_K: np.ndarray, nearest_K: np.ndarray, syn_KxD: np.ndarray, threshold: float | None, search: Callable
) -> np.ndarray:
    """Which synthetic images stay: those neither flagged nor in the cluster of a flagged one.

    Of a cluster are the images that have the same nearest training image as a flagged one, and those as similar to a
    flagged one as copies are to their originals (at least `threshold`): near misses of the same patient.

    Args:
      nearest_K: index of the nearest training image. syn_KxD, search: as the audit's space has them; see `spaces.Space`.
    """
    keep_K = ~flagged_K & ~np.isin(nearest_K, nearest_K[flagged_K])
    if threshold is not None and keep_K.any() and flagged_K.any():
        near = search(syn_KxD[keep_K], syn_KxD[flagged_K]).sim[:, 0] >= threshold
        keep_K[np.flatnonzero(keep_K)[near]] = False
    return keep_K


def write(
    folder: Path, source: Path, ids: Sequence[str], keep_K: np.ndarray, sim_K: np.ndarray, p_K: np.ndarray
) -> int:
    """Copies the files kept from `source` into `folder`, with `manifest.csv` (path, sha256, similarity, p_value).

    The folder is made aside and moved into place whole. An image's id is its path, where a '#' parts the slices of one
    file; a file goes only if all of its slices do.

    Returns:
      The number of files released.
    Raises:
      FileExistsError: the folder holds anything but an earlier release: a release is never mixed with what was there.
    """
    refuse_strangers(folder)
    barred = {str(name).split("#")[0] for name, keep in zip(ids, keep_K, strict=True) if not keep}
    aside = folder.with_name(f".{folder.name}.aside")
    done: set[str] = set()
    if jax.process_index() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(FIELDS)
        for i in np.flatnonzero(keep_K):
            path = str(ids[i]).split("#")[0]
            if path in barred or path in done:
                continue
            done.add(path)
            target = aside / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, target)
            digest = hashlib.sha256(target.read_bytes()).hexdigest()
            rows.writerow([path, digest, f"{sim_K[i]:.6f}", f"{p_K[i]:.6g}"])
        checkpoint.write_text(aside / "manifest.csv", text.getvalue())
        shutil.rmtree(folder, ignore_errors=True)
    stage.replace_folder(aside, folder)
    return len(done)


def refuse_strangers(folder: Path) -> None:
    """Raises FileExistsError if the folder holds files that no earlier release lists in its `manifest.csv`."""
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    listed = set()
    if "manifest.csv" in there:
        with open(folder / "manifest.csv", newline="") as lines:
            listed = {row.get("path") for row in csv.DictReader(lines)} | {"manifest.csv"}
    if strange := sorted(there - listed):
        raise FileExistsError(
            f"{folder}: holds {strange[0]}, which is no earlier release's; give config.audit.release another folder"
        )


def summary(folder: Path, flagged_K: np.ndarray, keep_K: np.ndarray) -> dict[str, Any]:
    """Counts of what is released, as `audit.json` holds them."""
    return {
        "folder": str(folder),
        "n_kept": int(keep_K.sum()),
        "n_flagged": int(flagged_K.sum()),
        "n_removed_with_them": int((~keep_K & ~flagged_K).sum()),
    }
