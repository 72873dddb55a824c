"""The audit's two pictures. Written whole or not at all."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SYNTHETIC, UNSEEN, FLAGGED = "#c2410c", "#475569", "#b91c1c"


def planes(image: np.ndarray) -> np.ndarray:
    """A 2D picture of an image (*size, C): itself, or the middle planes along each axis of a volume side by side."""
    grey = np.asarray(image).mean(-1)
    if grey.ndim == 2:
        return grey
    upright = grey[::-1]  # depth runs from inferior to superior, pictures from top to bottom
    middles = [np.take(upright, n // 2, axis) for axis, n in enumerate(grey.shape)]
    tallest, gap = max(m.shape[0] for m in middles), max(grey.shape[-1] // 32, 1)
    padded = [np.pad(m, ((0, tallest - m.shape[0]), (0, gap)), constant_values=-1) for m in middles]
    return np.concatenate(padded, axis=1)[:, :-gap]


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
      flagged: pairs framed in red and marked in words.
    """
    across = 2 if synthetic[0].ndim == 3 else 1
    down = -(-len(synthetic) // across)
    shape = planes(synthetic[0]).shape
    width = 2.0 * max(1.0, shape[1] / shape[0])
    figure = blank((3 * across * width + 0.6 * (across - 1), 2.35 * down + 0.9))
    figure.suptitle(title, fontsize=12)
    columns = ([1, 1, 1, 0.06] * across)[:-1]  # a narrow empty column between two pairs
    grid = figure.subplots(down, len(columns), squeeze=False, width_ratios=columns)
    for axis in grid.flat:
        axis.set_axis_off()
    for block in range(across):
        for row in range(down):
            axes = grid[row, 4 * block : 4 * block + 3]
            index = row * across + block
            if index >= len(synthetic):
                continue
            a, b = planes(synthetic[index]), planes(nearest[index])
            titles = (*captions[index], "difference" + ", FLAGGED as a copy" * bool(flagged[index]))
            for axis, picture, text in zip(axes, (a, b, a - b), titles, strict=True):
                cmap = "RdBu_r" if text is titles[2] else "gray"
                drawn = axis.imshow(picture, cmap=cmap, vmin=-1, vmax=1, interpolation="nearest")
                axis.set_title(text, fontsize=8, color=FLAGGED if flagged[index] else "black")
            if flagged[index]:
                for axis in axes[:2]:
                    axis.set_axis_on()
                    axis.set(xticks=[], yticks=[])
                    for spine in axis.spines.values():
                        spine.set(color=FLAGGED, linewidth=2.5)
    bar = figure.colorbar(drawn, ax=grid, location="bottom", shrink=0.4, aspect=40, pad=0.01)
    bar.set_label("difference: synthetic minus training image, of grey values from -1 to 1", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    save(figure, path)


Panel = tuple[str, Mapping[str, Sequence[float]], Sequence[tuple[str, float | None, str]]]


def histogram(path: Path, panels: Sequence[Panel]) -> None:
    """Similarity to the nearest training image: synthetic images against unseen real patients, with thresholds.

    Args:
      panels: (title, counts as `outputs.histogram` gives them, (name, position or None, line style) of each threshold).
    """
    figure = blank((6.5 * len(panels), 4.5))
    for axis, (title, counted, thresholds) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        for name, color, hatch, label in (
            ("unseen", UNSEEN, "////", "unseen real patients ({} images)"),
            ("synthetic", SYNTHETIC, None, "synthetic images ({})"),
        ):
            share = 100 * np.asarray(counted[name]) / sum(counted[name])
            look = dict(facecolor=(color, 0.35), edgecolor=color, hatch=hatch, linewidth=1.2, fill=True)
            axis.stairs(share, counted["edges"], label=label.format(sum(counted[name])), **look)
        axis.set_ylim(0, 1.4 * axis.get_ylim()[1])  # room for the legend
        handles, _ = axis.get_legend_handles_labels()
        for name, position, style in thresholds:
            if position is not None:
                look = dict(color="black", linestyle=style, linewidth=1.3, label=f"{name}: {position:.3f}")
                handles.append(axis.axvline(position, **look))
        axis.set(xlabel="similarity to the nearest training image", ylabel="% of the images", title=title)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(handles=handles, loc="upper left", frameon=False, fontsize=9)
    save(figure, path)


def blank(inches: tuple[float, float]) -> Any:
    """An empty matplotlib figure of this width and height."""
    from matplotlib.figure import Figure  # here, since a second of loading it would be a second of every start

    return Figure(figsize=inches, layout="constrained")


def save(figure: Any, path: Path) -> None:
    aside = path.with_name(f".{os.getpid()}.{path.name}")
    figure.savefig(aside, dpi=130, format="png")
    os.replace(aside, path)
