"""What the spaces of an audit are made of: each image is read and rendered once, embedded for all spaces, and kept.

Rows lie in files and are read as memory maps, so that an audit's memory does not depend on the number of images.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from detection import controls, spaces
from launch import log, mesh, stage


class Some(Sequence):
    """The images of these numbers; read when asked for."""

    def __init__(self, images: Sequence, index: np.ndarray):
        self.images, self.index = images, index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Any:
        return self.images[int(self.index[i])]


def of_sets(
    examined: Mapping[str, spaces.Space],
    slow: Mapping[str, spaces.Space],
    sets: Mapping[str, Any],
    some: Mapping[str, np.ndarray],
    view: Mapping[str, Callable[[jax.Array], jax.Array]],
    content: Mapping[str, str],
    **how: Any,
) -> dict[str, dict[str, np.ndarray]]:
    """Rows of every set, as its `view` renders it, in every space: space -> set -> (n, D); see `of_images`.

    Args:
      slow: spaces that are measured on the images `some` of each set alone, and not on sets that it does not name.
    """
    rows: dict[str, dict[str, np.ndarray]] = {space: {} for space in (*examined, *slow)}
    for name, one in sets.items():
        at = some.get(name, np.zeros(0, int))
        whole = len(at) == len(one.images)
        found = of_images({**examined, **(slow if whole else {})}, one.images, view[name], name, content[name], **how)
        if slow and len(at) and not whole:
            which = f"{content[name]} {hashlib.sha256(at.tobytes()).hexdigest()}"
            found |= of_images(slow, Some(one.images, at), view[name], f"some of {name}", which, **how)
        for space, of in found.items():
            rows[space][name] = of
    return rows


def of_images(
    examined: Mapping[str, spaces.Space],
    images: Sequence,
    view: Callable[[jax.Array], jax.Array],
    name: str,
    content: str,
    *,
    in_order: Callable[..., Iterator],
    batch: int,
    cache: Path,
) -> dict[str, np.ndarray]:
    """Rows of the images, as `view` renders them, in every space: memory maps (n, D), as the spaces' searches take them.

    They are kept in the folder `cache` under the hash of the images' content (see `views.fingerprint`) and of the first
    batch's rows, which tells the weights of the space and of the view apart; the next audit reads them and computes that
    batch alone.
    """
    paths: dict[str, Path] = {}
    missing = dict(examined)

    def embed(x: jax.Array) -> dict[str, jax.Array]:
        x = view(x)
        return {space: one.embed(x) for space, one in missing.items()}

    with log.progress(f"embedding {name}", len(images), unit="image") as bar, contextlib.ExitStack() as files:
        for part in mesh.stream(embed, in_order(images, batch)):
            kept = {space: examined[space].keep(part[space]) for space in missing}
            if not paths:
                for space, rows in kept.items():
                    key = hashlib.sha256(f"{content} {rows.shape}".encode() + rows.astype(np.float16).tobytes())
                    paths[space] = cache / f"{key.hexdigest()[:32]}.npy"
                missing = {space: examined[space] for space, path in paths.items() if not path.exists()}
                if not missing:
                    break
                if jax.process_index() == 0:  # written, not mapped: a full disk is then an error and not a crash
                    cache.mkdir(parents=True, exist_ok=True)
                    writers = {space: files.enter_context(open(_aside(paths[space]), "wb")) for space in missing}
                    for space, file in writers.items():
                        header = {"descr": "<f4", "fortran_order": False, "shape": (len(images), kept[space].shape[1])}
                        np.lib.format.write_array_header_1_0(file, header)
            if jax.process_index() == 0:
                for space, file in writers.items():
                    file.write(np.ascontiguousarray(kept[space], "<f4"))
            bar.update(len(next(iter(kept.values()))))
    if jax.process_index() == 0:
        for space in missing:
            if _aside(paths[space]).exists():  # two spaces may have the same rows
                os.replace(_aside(paths[space]), paths[space])
    stage.barrier(f"embeddings {name}")
    return {space: np.load(path, mmap_mode="r") for space, path in paths.items()}


def _aside(path: Path) -> Path:
    return path.with_suffix(".aside")


def of_copies(
    examined: Mapping[str, spaces.Space],
    plants: controls.Plants,
    images: Sequence,
    view: Callable[[jax.Array], jax.Array],
    *,
    in_order: Callable[..., Iterator],
    batch: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """Rows (kinds * n, D), in every space, of planted copies of n images in every kind and strength, as `view` renders them.

    The copies of all kinds follow each other in whole batches, so that few copies of many kinds fill them.
    """
    key = jax.random.key(seed)
    parts: dict[str, list[np.ndarray]] = {space: [] for space in examined}

    def embed(x: jax.Array) -> dict[str, jax.Array]:
        x = view(x)
        return {space: one.embed(x) for space, one in examined.items()}

    with log.progress("planted copies", len(plants) * len(images), unit="image") as bar:
        copies = (
            part
            for copy in plants.values()
            for part in mesh.stream(lambda x, copy=copy: copy(key, x), in_order(images, min(batch, len(images))))
        )
        for part in mesh.stream(embed, filled(copies, batch)):
            for space, rows in part.items():
                parts[space].append(examined[space].keep(rows))
            bar.update(len(rows))
    return {space: np.concatenate(rows) for space, rows in parts.items()}


def of_plants(
    deciding: Mapping[str, spaces.Space],
    beside: Mapping[str, spaces.Space],
    plants: controls.Plants,
    images: Sequence,
    view: Callable[[jax.Array], jax.Array],
    **how: Any,
) -> dict[str, np.ndarray]:
    """`of_copies` of all `plants` in the spaces that decide, and of the standard ones in those beside them, in their order."""
    first = controls.standard(plants)
    more = {kind: copy for kind, copy in plants.items() if kind not in first}
    rows = of_copies({**beside, **deciding}, first, images, view, **how)
    if more:
        order = [[*first, *more].index(kind) for kind in plants]
        for space, further in of_copies(deciding, more, images, view, **how).items():
            every = np.concatenate([rows[space], further])
            rows[space] = every.reshape(len(plants), len(images), -1)[order].reshape(every.shape)
    return rows


def filled(parts: Iterable[np.ndarray], batch: int) -> Iterator[tuple[np.ndarray, int]]:
    """The rows of all parts in whole batches, with the number of valid ones; the last is filled up with its last row."""
    held: list[np.ndarray] = []
    for part in parts:
        held.append(part)
        while sum(map(len, held)) >= batch:
            rows = np.concatenate(held)
            held = [rows[batch:]]
            yield rows[:batch], batch
    rows = np.concatenate(held) if held else np.zeros(0)
    if len(rows):
        yield np.concatenate([rows, np.repeat(rows[-1:], batch - len(rows), 0)]), len(rows)
