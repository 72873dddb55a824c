"""Finds images that are there twice: within a split and, worse, across splits, exactly or nearly the same.

A near duplicate is told by its fingerprint: the image (channels averaged) reduced to 16x16, in 3D 9x9x9, less its own
blur by one cell, then centred and normalised, so that the product of two fingerprints is the correlation of their
middle frequencies. The coarse anatomy, in which aligned brains all look alike, is taken out by the blur; a JPEG's or a
resampling's damage lies above what the grid holds; a linear change of brightness cancels. Mirrored, rotated or cropped
copies are not found: that is the copy detector's task.

Calibration of NEAR = 0.97 (`python -m tests.benchmarks --what=duplicates`), measured. "Halved": the file reduced to half
its size and back, the hardest of the alterations; the others (JPEG at quality 90, 8 bits, doubled in size and back, 10 %
brighter and clipped, 10 % darker, gamma 1.1) come out at 0.998 or more everywhere. 100 images each, 30 of CT.

| images | pairs of different patients | most alike of them | false alarms | found of the altered | halved, least alike |
|---|---|---|---|---|---|
| chest X-ray 64x64, 1,000 | 491,169 | 0.916 | 0 | all | 0.994 |
| hippocampus MR 32x48x32, 131 | 8,515 | 0.938 | 0 | all | 0.992 |
| lung CT slices at 64x64, 30 | 404 | 0.771 | 0 | all | 1.000 |
| brain cohort 64x64, 2,003 | 2,005,003 | 0.918 | 0 | all | 0.991 |
| brain cohort 32x40x32, 303 | 45,753 | 0.940 | 0 | all | 0.991 |

At 32x32 the halved are missed (0.943 and more) and the others found. 8,000 brains at 64x64 (32 million pairs) do not come
nearer to each other than 2,003 do. 100,000 images of 64x64 took three minutes on two cores shared with other work, and
0.2 GiB. Images of one patient taken minutes apart can reach 0.97; they are counted, never an error.
"""

import collections
import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from tqdm import tqdm

from data import geometry

NEAR = 0.97
GRID = {2: 16, 3: 9}  # cells of a fingerprint along each axis, by rank
TILE = 4096  # fingerprints compared at a time with as many others, so 64 MiB of similarities
MOST_PAIRS = 2_000_000
LISTED = 10
BATCH_BYTES = 1 << 25


class Scan(NamedTuple):
    """What is alike among n images, whoever's they are."""

    digest: np.ndarray  # (n,) S16, equal where images are equal
    pairs: np.ndarray  # (k, 2) int64, i < j: nearly the same; of images that are equal only the first is compared
    similarity: np.ndarray  # (k,) float32 in [NEAR, 1]


class Pair(NamedTuple):
    """Two images of different patients that are the same image."""

    ids: tuple[str, str]
    splits: tuple[str, str]
    similarity: float
    exact: bool

    @property
    def leak(self) -> bool:
        return self.splits[0] != self.splits[1]


class Found(NamedTuple):
    pairs: list[Pair]  # the most alike first; leaks before duplicates inside a split
    accepted: list[Pair]
    within: dict[str, int]  # split -> images that repeat an earlier one of their own patient


def scan(images: Sequence[np.ndarray]) -> Scan:
    """Compares every image with every other: one pass over the pixels, then tiles of one matrix product.

    Args:
      images: random access to (*size, C) in [-1, 1], all of one shape.
    Raises:
      ValueError: so many are nearly the same that they could not even be listed.
    """
    digests, prints = [], []
    for batch in _batches(images):
        digests += [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in batch]
        prints.append(fingerprints(batch))
    digest = np.array(digests, dtype="S16")
    _, first = np.unique(digest, return_index=True)
    first = np.sort(first)
    print_UxD = np.concatenate(prints)[first] if prints else np.zeros((0, 1), np.float32)
    found = list(_tiles(print_UxD))
    pairs = np.concatenate([np.zeros((0, 2), np.int64), *(first[pairs] for pairs, _ in found)])
    return Scan(digest, pairs, np.concatenate([np.zeros(0, np.float32), *(sim for _, sim in found)]))


def fingerprints(images: np.ndarray) -> np.ndarray:
    """(B, *size, C) -> (B, D) of unit norm, zero where an image has no middle frequencies at all."""
    coarse = images.mean(-1, dtype=np.float32)
    for axis, old in enumerate(images.shape[1:-1]):
        new = min(GRID[images.ndim - 2], old)
        weights = geometry.resample(np.eye(old, dtype=np.float32), (new,))
        coarse = np.moveaxis(np.tensordot(weights, coarse, (1, axis + 1)), 0, axis + 1)
    blurred = coarse
    for axis, n in enumerate(coarse.shape[1:]):
        blurred = np.moveaxis(np.tensordot(_blur(n), blurred, (1, axis + 1)), 0, axis + 1)
    detail = (coarse - blurred).reshape(len(images), -1)
    detail -= detail.mean(1, keepdims=True)
    norm = np.linalg.norm(detail, axis=1, keepdims=True)
    return np.where(norm > 1e-4, detail / np.maximum(norm, 1e-4), 0)


def find(sets: Mapping[str, Any], accept: Sequence[str] = ()) -> Found:
    """Looks for images of different patients that are the same image, inside each split and across splits.

    An image whose patient is unknown ('') counts as another patient's. What `builder.Stored` sets share is kept beside the
    images, so that the next call with the same images takes no time.

    Args:
      sets: split -> ImageSet, as from `load`, or made by hand.
      accept: as `data.accept_duplicates`: ids, text files (*.txt) with an id a line, or 'all'. A pair is accepted if one
        of its two is named.
    Raises:
      FileNotFoundError, ValueError: a patient is in two splits, or a text file cannot be read.
    """
    disjoint(sets)
    ids, patients = (np.concatenate([getattr(s, name) for s in sets.values()]) for name in ("ids", "patients"))
    split = np.repeat(list(sets), [len(s.ids) for s in sets.values()])
    known = _scan_of(sets)
    named = _named(accept)
    pairs, accepted, repeats = [], [], set()
    for i, j, similarity in _edges(known, [i in named for i in ids]):
        if patients[i] and patients[i] == patients[j]:
            repeats.add(j)
            continue
        exact = known.digest[i] == known.digest[j]
        pair = Pair((str(ids[i]), str(ids[j])), (str(split[i]), str(split[j])), float(similarity), bool(exact))
        (accepted if named & {"all", *pair.ids} else pairs).append(pair)
    order = lambda pair: (not pair.leak, not pair.exact, -pair.similarity, pair.ids)
    within = collections.Counter(str(split[j]) for j in repeats)
    return Found(sorted(pairs, key=order), sorted(accepted, key=order), {name: within[name] for name in sets})


def disjoint(sets: Mapping[str, Any]) -> None:
    """Raises ValueError where a patient is in two splits: then unseen images are not unseen."""
    names = list(sets)
    of = {name: set(sets[name].patients) - {""} for name in names}
    for k, one in enumerate(names):
        for other in names[k + 1 :]:
            if both := sorted(of[one] & of[other]):
                few = ", ".join(both[:LISTED]) + (f" and {len(both) - LISTED} more" if len(both) > LISTED else "")
                raise ValueError(f"the splits {one!r} and {other!r} share patients: {few}; give each one split")


def refuse(found: Found) -> None:
    """Raises ValueError, in one line, where pairs were found that nobody accepted."""
    if not found.pairs:
        return
    leaks = sum(pair.leak for pair in found.pairs)
    listed = "; ".join(told(pair) for pair in found.pairs[:LISTED])
    more = f"; and {len(found.pairs) - LISTED} more pairs" if len(found.pairs) > LISTED else ""
    raise ValueError(
        f"{_count(found.pairs)} of different or unknown patients are the same image, {leaks} of them across splits: {listed}{more}. "
        "Remove one of each, correct the patients, or name those to accept in data.accept_duplicates; "
        "python -m data with the same --config lists all"
    )


def notes(found: Found, names: Sequence[str] = ()) -> list[str]:
    """What every report must say of the pairs that were accepted: one line, or none.

    Args:
      names: ids among them that the data declare themselves (the embedded cohort's planted copies).
    """
    if not found.accepted:
        return []
    planted = sum(bool({*pair.ids} & {*names}) for pair in found.accepted)
    leaks = sum(pair.leak for pair in found.accepted)
    whose = "planted by data.cohort" if planted == len(found.accepted) else "accepted by data.accept_duplicates"
    harm = "; unseen images that are training images in truth make copies look innocent" if leaks else ""
    return [
        f"{_count(found.accepted)} of different or unknown patients are the same image ({whose}), {leaks} across splits{harm}"
    ]


def _count(pairs: Sequence[Pair]) -> str:
    return f"{len(pairs)} pair{'s' * (len(pairs) != 1)} of images"


def told(pair: Pair) -> str:
    """'train a.png = val b.png': equal; '~': nearly."""
    (a, b), (one, other) = pair.ids, pair.splits
    return f"{one} {a} {'=' if pair.exact else '~'} {other} {b}"


# ---- from a scan to pairs


def _named(accept: Sequence[str]) -> set[str]:
    names = set()
    for name in map(str, accept):
        if not name.endswith(".txt"):
            names.add(name)
            continue
        try:
            with open(os.path.expanduser(name), encoding="utf-8") as lines:
                names |= {line.strip() for line in lines if line.strip()}
        except OSError as error:
            why = f"{name}: cannot be read ({error.strerror}); correct data.accept_duplicates"
            raise FileNotFoundError(why) from None
        except UnicodeDecodeError:
            raise ValueError(f"{name}: is not UTF-8 text; save it as UTF-8, an image's id a line") from None
    return names


def _edges(known: Scan, ignored: Sequence[bool]) -> Iterator[tuple[int, int, float]]:
    """Yields (i, j, similarity), enough of them to connect all that is alike, their number linear in the images.

    Ignored images come last in their group, so that the others are connected without them.
    """
    members = collections.defaultdict(list)
    for i in sorted(range(len(known.digest)), key=lambda i: (ignored[i], i)):
        members[known.digest[i]].append(i)
    for group in members.values():
        yield from ((group[0], j, 1.0) for j in group[1:])
    for (i, j), similarity in zip(known.pairs, known.similarity, strict=True):
        one, other = members[known.digest[i]], members[known.digest[j]]
        yield from ((one[0], k, similarity) for k in other)
        yield from ((k, other[0], similarity) for k in one[1:])


def _tiles(print_UxD: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (pairs, similarities) that reach NEAR, a tile of the upper triangle at a time."""
    starts = range(0, len(print_UxD), TILE)
    tiles = [(a, b) for a in starts for b in starts if b >= a]
    count = 0
    for a, b in _bar(tiles, "comparing", "tile"):
        tile = print_UxD[a : a + TILE] @ print_UxD[b : b + TILE].T
        rows, columns = np.nonzero(tile >= NEAR)
        if a == b:
            rows, columns = rows[rows < columns], columns[rows < columns]
        count += len(rows)
        if count > MOST_PAIRS:
            raise ValueError(
                f"more than {MOST_PAIRS} pairs of images are nearly the same: data.intensity or data.size leaves "
                "nothing to tell them apart by"
            )
        yield np.stack([rows + a, columns + b], axis=1), np.minimum(tile[rows, columns], 1)


# ---- reading


def _scan_of(sets: Mapping[str, Any]) -> Scan:
    """Of the sets' images in a row; images of one prepared folder are scanned once, and the result kept in it."""
    from data import builder

    images = [s.images for s in sets.values()]
    if not all(isinstance(i, builder.Stored) for i in images) or len({i.folder for i in images}) != 1:
        return scan(_Joined(images))
    folder, places = images[0].folder, np.concatenate([i.indices for i in images])
    unique, back = np.unique(places, return_inverse=True)
    known = _kept(folder, unique, lambda: scan(builder.Stored(folder, unique)))
    where = np.full(len(unique), -1)  # a row for each place; others of the same place are equal, so one will do
    where[back[::-1]] = np.arange(len(back))[::-1]
    return Scan(known.digest[back], where[known.pairs], known.similarity)


def _kept(folder: str, unique: np.ndarray, make: Callable[[], Scan]) -> Scan:
    key = hashlib.sha256(unique.tobytes())
    for source in (__file__, geometry.__file__):
        with open(source, "rb") as text:
            key.update(text.read())
    path = os.path.join(folder, f"duplicates-{key.hexdigest()[:20]}.npz")
    if os.path.exists(path):
        with np.load(path) as kept:
            return Scan(*(kept[name] for name in Scan._fields))
    known = make()
    aside = f"{path}.{os.getpid()}.npz"
    try:
        np.savez(aside, **known._asdict())
        os.replace(aside, path)
    except OSError as error:
        logging.warning("%s: cannot be written (%s), so duplicates are looked for each time", path, error.strerror)
    return known


class _Joined(Sequence):
    """Several sequences as one."""

    def __init__(self, parts: Sequence[Sequence]):
        self._at = [(part, i) for part in parts for i in range(len(part))]

    def __len__(self) -> int:
        return len(self._at)

    def __getitem__(self, index: int) -> np.ndarray:
        part, i = self._at[index]
        return part[i]


def _batches(images: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    if len(images) == 0:
        return
    size = max(1, BATCH_BYTES // max(1, np.asarray(images[0]).nbytes))
    for start in _bar(range(0, len(images), size), "fingerprints", "batch"):
        yield np.stack([images[i] for i in range(start, min(start + size, len(images)))])


def _blur(n: int) -> np.ndarray:
    """(n, n) Gaussian of one cell, edges extended."""
    rows, taps = np.arange(n)[:, None], np.arange(-4, 5)
    matrix = np.zeros((n, n), np.float32)
    np.add.at(matrix, (rows, np.clip(rows + taps, 0, n - 1)), np.exp(-0.5 * taps**2) / np.exp(-0.5 * taps**2).sum())
    return matrix


def _bar(items: Sequence, name: str, unit: str) -> tqdm:
    live, quiet = sys.stderr.isatty(), bool(os.environ.get("FACSIMILE_QUIET"))
    return tqdm(
        items, f"{name:<12}", unit=unit, disable=quiet, mininterval=0.2 if live else 15, dynamic_ncols=live, delay=2
    )
