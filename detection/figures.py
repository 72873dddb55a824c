"""The audit's two pictures. Written whole or not at all."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

SYNTHETIC, UNSEEN, FLAGGED = "#c2410c", "#475569", "#b91c1c"


def planes(image: np.ndarray) -> np.ndarray:
    """A 2D picture of an image (*size, C): itself, or the middle planes along each axis of a volume side by side."""
    grey = np.asarray(image).mean(-1)
    if grey.ndim == 2:
        return grey
    upright = grey[::-1]  # depth runs from inferior to superior, pictures from top to bottom
    middles = [np.take(upright, n // 2, axis) for axis, n in enumerate(grey.shape)]
    tallest = max(m.shape[0] for m in middles)
    return np.concatenate([np.pad(m, ((0, tallest - m.shape[0]), (0, 0)), constant_values=-1) for m in middles], axis=1)


def pairs(
    path: Path,
    synthetic: Sequence[np.ndarray],
    nearest: Sequence[np.ndarray],
    captions: Sequence[tuple[str, str]],
    flagged: Sequence[bool],
    title: str,
) -> None:
    """Synthetic image, nearest training image and their difference, three columns a pair, most similar first.

    Args:
      synthetic, nearest: the images of each pair, (*size, C) in [-1, 1].
      captions: (over the synthetic image, over the training image).
      flagged: pairs framed in red.
    """
    across = 2 if synthetic[0].ndim == 3 else 1
    down = -(-len(synthetic) // across)
    shape = planes(synthetic[0]).shape
    width = 2.0 * max(1.0, shape[1] / shape[0])
    figure = Figure(figsize=(3 * across * width + 0.6 * (across - 1), 2.35 * down + 0.9), layout="constrained")
    figure.suptitle(title, fontsize=12)
    for block, subfigure in enumerate(np.atleast_1d(figure.subfigures(1, across))):
        axes = subfigure.subplots(down, 3, squeeze=False)
        for row in range(down):
            index = row * across + block
            for axis in axes[row]:
                axis.set_axis_off()
            if index >= len(synthetic):
                continue
            a, b = planes(synthetic[index]), planes(nearest[index])
            titles = (*captions[index], "difference")
            for axis, picture, text in zip(axes[row], (a, b, a - b), titles, strict=True):
                grey = text != "difference"
                axis.imshow(picture, cmap="gray" if grey else "RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
                axis.set_title(text, fontsize=8, color=FLAGGED if flagged[index] and grey else "black")
            if flagged[index]:
                for axis in axes[row][:2]:
                    axis.set_axis_on()
                    axis.set(xticks=[], yticks=[])
                    for spine in axis.spines.values():
                        spine.set(color=FLAGGED, linewidth=2.5)
    save(figure, path)


def histogram(
    path: Path,
    synthetic_K: np.ndarray,
    unseen_M: np.ndarray,
    thresholds: Sequence[tuple[str, float | None, str]],
    title: str,
) -> None:
    """Similarity to the nearest training image: synthetic images against unseen real patients, with thresholds.

    Args:
      thresholds: (name, position or None, line style) each.
    """
    low = min(synthetic_K.min(), unseen_M.min())
    bins = np.linspace(low, 1.0, 60)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    for values, color, label in (
        (unseen_M, UNSEEN, f"unseen real patients ({len(unseen_M)} images)"),
        (synthetic_K, SYNTHETIC, f"synthetic images ({len(synthetic_K)})"),
    ):
        weights = np.full(len(values), 100 / len(values))
        axis.hist(values, bins, weights=weights, color=color, alpha=0.55, label=label)
    handles, _ = axis.get_legend_handles_labels()
    for name, position, style in thresholds:
        if position is not None:
            axis.axvline(position, color="black", linestyle=style, linewidth=1.3)
            handles.append(Line2D([], [], color="black", linestyle=style, label=f"{name}: {position:.3f}"))
    axis.set(
        xlabel="similarity to the nearest training image", ylabel="% of the images", title=title, xlim=(low, 1.005)
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(handles=handles, loc="upper left", frameon=False, fontsize=9)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    aside = path.with_name(f".{os.getpid()}.{path.name}")
    figure.savefig(aside, dpi=130, format="png")
    os.replace(aside, path)
