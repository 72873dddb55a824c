"""Where voxels lie: turning volumes upright, and reading a frame of an image at another voxel size.

A frame is, for each axis, `start` and `span` in voxels of the image, counted from the outer edge of its first voxel: the
whole axis is start 0, span n. Outside the image everything is -1, the lowest intensity.
"""

import math
from collections.abc import Sequence

import numpy as np
import scipy

FITS = ("pad", "crop", "stretch", "exact")


def upright(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turns a volume so that D runs from inferior to superior, H from anterior to posterior, W from right to left.

    Args:
      array: (*three axes, ...) in any order of axes.
      affine: (4, 4), from an index of `array` to DICOM's patient coordinates in mm (to the left, posterior, superior).
    Returns:
      The array with its axes permuted and mirrored, and its affine.
    Raises:
      ValueError: the affine does not say where the axes point.
    """
    import nibabel.orientations as turning

    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise ValueError("the affine is singular")
    turn = turning.io_orientation(affine)  # where each axis goes among (left, posterior, superior), and its sign
    affine = affine @ turning.inv_ornt_aff(turn, array.shape[:3])
    return turning.apply_orientation(array, turn).swapaxes(0, 2), affine[:, [2, 1, 0, 3]]


def spacing_of(affine: np.ndarray) -> tuple[float, ...]:
    """Distance in mm between neighbouring voxels along each axis."""
    return tuple(float(length) for length in np.linalg.norm(affine[:3, :3], axis=0))


def spans_of(
    shape: Sequence[int], size: Sequence[int], fit: str, scale: Sequence[float] | None = None
) -> list[int | float]:
    """How much of an image, in its voxels and about its centre, becomes an image of `size`.

    Args:
      shape, size: voxels along each axis, of the image and wanted.
      fit: 'pad' shows the whole image and 'crop' fills the frame, both in the aspect of the voxel grid; 'exact' keeps
        voxels as they are, cropping or padding; 'stretch' shows just the image, in another aspect.
      scale: voxels of the image to one voxel of the grid on which `fit` is meant, for each axis; None: the image's own.
    """
    if fit == "stretch":
        return list(shape)
    factors = [old / new / k for old, new, k in zip(shape, size, scale or [1] * len(size), strict=True)]
    factor = {"pad": max(factors), "crop": min(factors), "exact": 1}[fit]
    if scale is None:
        return [max(1, round(new * factor)) for new in size]
    return [new * factor * k for new, k in zip(size, scale, strict=True)]


def framed(affine: np.ndarray, shape: Sequence[int], size: Sequence[int], spans: Sequence[int | float]) -> np.ndarray:
    """The affine (4, 4) of what `resample` makes of an image of `shape` with this affine, about its centre."""
    scale = np.array([span / new for span, new in zip(spans, size, strict=True)])
    starts = np.array([_margin(old, span) for old, span in zip(shape, spans, strict=True)])
    inner = np.diag([*scale, 1.0])
    inner[:3, 3] = starts + scale / 2 - 0.5
    return affine @ inner


def starts_at(centre: Sequence[float], size: Sequence[int], spans: Sequence[float]) -> list[float]:
    """Starts of the frame about `centre`, an index into the image. Voxels that keep their size are not interpolated."""
    starts = [c + 0.5 - span / 2 for c, span in zip(centre, spans, strict=True)]
    return [math.floor(s) if span == new else s for s, span, new in zip(starts, spans, size, strict=True)]


def resample(
    array: np.ndarray,
    size: Sequence[int],
    spans: Sequence[float] | None = None,
    starts: Sequence[float] | None = None,
) -> np.ndarray:
    """Reads a frame of the leading axes as `size` voxels, by a triangle filter as wide as an output voxel.

    No aliasing where it reduces, linear where it enlarges. For whole numbers the same as
    `jax.image.resize(..., 'linear', antialias=True)` of the array first cropped, or padded with -1, to the frame.

    Args:
      array: (*axes, ...) float32 in [-1, 1].
      size: voxels wanted along each leading axis.
      spans, starts: the frame; by default the whole array, and about the centre.
    Returns:
      float32 (*size, ...).
    """
    weights, window = [], []
    for axis, new in enumerate(size):
        old = array.shape[axis]
        span = spans[axis] if spans else old
        start = starts[axis] if starts else _margin(old, span)
        same = old == span == new and start == 0
        matrix = None if same else _triangle(old, span, start, new)
        used = matrix.indices if matrix is not None and matrix.nnz else np.array([0, old - 1])
        window.append(slice(used.min(), used.max() + 1))
        weights.append(None if matrix is None else matrix[:, window[-1]])
    array = array[tuple(window)]
    for axis, matrix in enumerate(weights):
        if matrix is not None:
            kept = np.moveaxis(array, axis, 0)
            flat = matrix @ (kept.reshape(len(kept), -1) + 1) - 1  # outside is 0 here, so it need not be stored
            array = np.moveaxis(flat.reshape(len(flat), *kept.shape[1:]), 0, axis)
    return np.ascontiguousarray(array, dtype=np.float32)


def _margin(old: int, span: float) -> float:
    """Start of a frame about the centre; a margin that cannot be halved is smaller before the image than after it."""
    if not float(span).is_integer():
        return (old - span) / 2
    return (old - span) // 2 if span <= old else -((span - old) // 2)


def _triangle(old: int, span: float, start: float, new: int) -> "scipy.sparse.csr_array":
    """Weights (new, old) of the filter; rows sum to 1, less what lies outside the image."""
    width = max(span / new, 1.0)
    centres = start + (np.arange(new) + 0.5) * span / new - 0.5
    where = np.floor(centres).astype(int)[:, None] + np.arange(-math.ceil(width), math.ceil(width) + 1)
    weights = np.clip(1 - np.abs(where - centres[:, None]) / width, 0, None)
    if float(span).is_integer() and float(start).is_integer():  # what lies outside the frame is not looked at
        weights *= (where >= start) & (where < start + span)
    weights = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    rows, inside = np.repeat(np.arange(new), where.shape[1]), ((where >= 0) & (where < old)).ravel()
    matrix = scipy.sparse.csr_array((weights.ravel()[inside], (rows[inside], where.ravel()[inside])), shape=(new, old))
    matrix.eliminate_zeros()
    return matrix
