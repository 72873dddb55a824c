"""What a data set holds, before anything is trained: counts, shapes, intensities, repeats, and a contact sheet."""

import collections
import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from data import duplicates, files, manifest, sets
from data import splits as partition

SEEN = 64  # files whose own numbers are looked at, and images of each split whose intensities are
COLUMNS = 8
TILE, LABEL, HEAD, GAP = 128, 132, 15, 4  # pixels


def table(splits: Mapping[str, sets.ImageSet], within: Mapping[str, int]) -> list[str]:
    """A line for each split: its images, its patients, and how many images a patient has."""
    row = "{:<10}{:>9}{:>10}{:>22}{:>24}".format
    lines = [row("split", "images", "patients", "images of a patient", "repeats within patient")]
    for name, split in splits.items():
        each = np.unique(split.patients, return_counts=True)[1]
        spread = f"{each.min()} to {each.max()}, median {np.median(each):g}" if len(each) else "-"
        lines.append(row(name, len(split.ids), len(each), spread, within[name]))
    images = sum(len(split.ids) for split in splits.values())
    patients = sum(len(set(split.patients)) for split in splits.values())
    return [*lines, row("together", images, patients, "", sum(within.values()))]


def splits(
    found: manifest.Manifest, part: sets.Partition, settings: Mapping, listing: Path, *, write: bool
) -> list[str]:
    """Who says the splits, and of how many patients; each patient's goes into the CSV file `listing`, as `data.splits` takes
    it, or that is removed where nothing is to be written."""
    table = dict(zip((row.patient for row in found.rows), part.split_of, strict=True))
    said = settings["splits"] if settings["splits"] not in (None, "hash") else "the data"
    if not settings["path"] and said == "the data":
        said = "the cohort"
    by = {f"by {said}": len(part.said), "by a hash of their ids": len(table) - len(part.said)}
    told = ", ".join(f"{how} for {count} patients" for how, count in by.items() if count)
    cut = settings["fold"] is not None and settings["path"] and said == "the data"
    line = f"splits     {told}" + f"; 'train' and 'val' cut anew by data.fold={settings['fold']}" * bool(cut)
    if not write:
        listing.unlink(missing_ok=True)
        return [line]
    rows = [[patient, split or partition.NONE] for patient, split in sorted(table.items())]
    _write_csv(listing, [["patient_id", "split"], *rows])
    return [f"{line}. All: {listing}"]


def prepared(splits: Mapping[str, sets.ImageSet]) -> list[str]:
    """What the models will see: shape, spacing, and intensities of at most SEEN images of each split."""
    one = next(split for split in splits.values() if len(split.ids))
    shape = one.images[0].shape
    mm = "unknown" if one.spacing is None else " x ".join(f"{length:.3g}" for length in one.spacing) + " mm (median)"
    lines = [f"prepared   {_by(shape[:-1])}, {shape[-1]} channel{'s' * (shape[-1] > 1)}; spacing {mm}"]
    if one.window:
        lines[0] += f"; -1 to 1 are {one.window[0]:g} to {one.window[1]:g} of the files"
    for name, split in splits.items():
        if len(split.ids):
            x = np.stack([split.images[i] for i in _spread(len(split.ids), SEEN)])
            ends = f"{100 * (x <= -1 + 1e-4).mean():.1f} % at -1, {100 * (x >= 1 - 1e-4).mean():.1f} % at 1"
            lines.append(f"  {name:<9}mean {x.mean():+.3f}, standard deviation {x.std():.3f}; {ends}")
    return lines


def raw(found: manifest.Manifest) -> list[str]:
    """What the files hold as they are: at most SEEN of them, evenly spread over the list."""
    shapes, types, spacings, low, high, unread = collections.Counter(), set(), [], np.inf, -np.inf, 0
    chosen = _spread(len(found.rows), SEEN)
    for index in chosen:
        try:
            pixels = files.raw(found.rows[index], found.root)
        except ValueError:
            unread += 1  # what that is, preparing has said
            continue
        shapes[_by(pixels.array.shape[:-1]) + f" x{pixels.array.shape[-1]}" * (pixels.array.shape[-1] > 1)] += 1
        types.add(str(pixels.array.dtype))
        low, high = min(low, pixels.array.min()), max(high, pixels.array.max())
        if pixels.spacing:
            spacings.append(pixels.spacing)
    if not shapes:
        return [f"files      none of {len(chosen)} looked at could be read"]
    common = ", ".join(f"{shape} ({count})" for shape, count in shapes.most_common(4))
    more = f" and {len(shapes) - 4} more shapes" if len(shapes) > 4 else ""
    said = f"; {unread} could not be read" if unread else ""
    lines = [
        f"files      {len(chosen)} of {len(found.rows)} looked at{said}: {common}{more}",
        f"           {', '.join(sorted(types))}, values from {low:g} to {high:g}",
    ]
    if spacings and len({len(mm) for mm in spacings}) == 1:
        ends = [
            f"{a:.3g}" if np.isclose(a, b) else f"{a:.3g} to {b:.3g}"
            for a, b in zip(np.min(spacings, 0), np.max(spacings, 0), strict=True)
        ]
        lines.append(f"           spacing {' x '.join(ends)} mm, in {len(spacings)} of them")
    else:
        lines.append("           spacing not said" if not spacings else "           spacing of 2D and 3D files mixed")
    return lines


def left_out(lines: Sequence[str], listing: Path) -> list[str]:
    """Files and lines that cannot be used; all go into the CSV file `listing`, which is removed where there are none."""
    if not lines:
        listing.unlink(missing_ok=True)
        return []
    _write_csv(listing, [["file", "problem"], *(list(line.partition(": "))[::2] for line in lines)])
    more = len(lines) - duplicates.LISTED
    said = [f"left out   {len(lines)} files or lines that cannot be used. All: {listing}"]
    said += [f"           {line}" for line in lines[: duplicates.LISTED]]
    return said + [f"           and {more} more"] * (more > 0)


def _write_csv(path: Path, rows: Sequence[Sequence]) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(aside, "w", newline="", encoding="utf-8") as text:
        csv.writer(text, lineterminator="\n").writerows(rows)
    os.replace(aside, path)


def alike(found: duplicates.Found, listing: Path) -> list[str]:
    """What is there twice; all pairs go into the CSV file `listing`, which is removed where there are none."""
    pairs = [(False, pair) for pair in found.pairs] + [(True, pair) for pair in found.accepted]
    if not pairs:
        listing.unlink(missing_ok=True)
        return ["the same   no image of one patient is also another's, neither inside a split nor across splits"]
    rows = [["image", "split", "other", "other_split", "leak", "equal", "similarity", "accepted"]]
    for accepted, pair in pairs:
        (a, b), (one, other) = pair.ids, pair.splits
        rows.append([a, one, b, other, int(pair.leak), int(pair.exact), f"{pair.similarity:.4f}", int(accepted)])
    _write_csv(listing, rows)
    leaks = sum(pair.leak for _, pair in pairs)
    equal = sum(pair.exact for _, pair in pairs)
    lines = [
        f"the same   {len(pairs)} pairs of images of different or unknown patients ({equal} equal, the others nearly): "
        f"{leaks} leaks across splits, {len(pairs) - leaks} inside one; {len(found.accepted)} accepted. All: {listing}"
    ]
    lines += [f"           {duplicates.told(pair)}" for pair in found.pairs[: duplicates.LISTED]]
    more = len(found.pairs) - duplicates.LISTED
    return lines + [f"           and {more} more"] * (more > 0)


# ---- the contact sheet


def contact_sheet(path: Path, splits: Mapping[str, sets.ImageSet]) -> None:
    """Writes a PNG: a row of at most COLUMNS images for each split, of different patients where there are as many.

    Volumes are three planes through the middle, below each other: axial, coronal, sagittal, in the proportions of their
    spacing. Dark is -1 and bright is 1.
    """
    font = PIL.ImageFont.load_default(11)
    rows = []
    for name, split in splits.items():
        if not len(split.ids):
            continue
        tiles = [(split.ids[i], tile(split.images[i], split.spacing)) for i in _chosen(split.patients)]
        width = LABEL + sum(t.width + GAP for _, t in tiles)
        sheet = PIL.Image.new("RGB", (width, tiles[0][1].height + HEAD + 2 * GAP), "white")
        pen = PIL.ImageDraw.Draw(sheet)
        counts = f"{name}\n{len(split.ids)} images\n{len(set(split.patients))} patients"
        pen.multiline_text((GAP, HEAD), counts, "black", font)
        left = LABEL
        for id_, picture in tiles:
            pen.text((left, 1), _short(str(id_), pen, font, picture.width), "black", font)
            sheet.paste(picture, (left, HEAD))
            left += picture.width + GAP
        rows.append(sheet)
    whole = PIL.Image.new("RGB", (max(r.width for r in rows), sum(r.height for r in rows)), "white")
    top = 0
    for row in rows:
        whole.paste(row, (0, top))
        top += row.height
    aside = path.with_name(f".{os.getpid()}.{path.name}")
    whole.save(aside, format="png")
    os.replace(aside, path)


def tile(image: np.ndarray, spacing: Sequence[float] | None) -> PIL.Image.Image:
    """(*size, C) in [-1, 1] as a picture TILE wide; for volumes three planes below each other."""
    grey = np.round((image + 1) * 127.5).astype(np.uint8)
    grey = grey if grey.shape[-1] == 3 else grey[..., :1].repeat(3, -1)
    mm = np.array(spacing or (1.0,) * (image.ndim - 1))
    if image.ndim == 3:
        planes = [(grey, mm)]
    else:
        d, h, w = (n // 2 for n in grey.shape[:-1])
        planes = [(grey[d], mm[1:]), (grey[::-1, h], mm[[0, 2]]), (grey[::-1, :, w], mm[:2])]
    drawn = []
    for plane, (tall, wide) in planes:
        height = round(TILE * plane.shape[0] * tall / (plane.shape[1] * wide))
        grown = plane.shape[1] <= TILE  # sharp pixels where it is enlarged, no aliasing where it is reduced
        kind = PIL.Image.Resampling.NEAREST if grown else PIL.Image.Resampling.LANCZOS
        drawn.append(PIL.Image.fromarray(plane).resize((TILE, max(1, min(height, 4 * TILE))), kind))
    whole = PIL.Image.new("RGB", (TILE, sum(p.height for p in drawn) + GAP * (len(drawn) - 1)), "white")
    top = 0
    for plane in drawn:
        whole.paste(plane, (0, top))
        top += plane.height + GAP
    return whole


def _chosen(patients: np.ndarray) -> list[int]:
    """Indices of COLUMNS images, one a patient, evenly spread; of fewer patients some have more."""
    first = np.sort(np.unique(patients, return_index=True)[1])
    rest = np.setdiff1d(np.arange(len(patients)), first)
    short = max(0, min(COLUMNS, len(patients)) - len(first))
    return sorted([*first[_spread(len(first), COLUMNS)], *rest[_spread(len(rest), short)]])


def _spread(n: int, most: int) -> np.ndarray:
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int)) if n and most else np.zeros(0, int)


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _short(text: str, pen: PIL.ImageDraw.ImageDraw, font: PIL.ImageFont.ImageFont, width: int) -> str:
    """A file's name without its middle, as much of it as fits; what the font lacks becomes '?'."""
    name = text.rsplit("/", 1)[-1].encode("latin-1", "replace").decode("latin-1")
    short, keep = name, len(name)
    while keep and pen.textlength(short, font) > width:
        keep -= 1
        short = f"{name[: (keep + 1) // 2]}..{name[len(name) - keep // 2 :]}"
    return short
